//! What the functions after flash-attention share, and the simplest of them, `flash_attn_func`.
//!
//! `python/qkv/flash_attn.py` has their signatures and documentation and passes arguments on in tuples; they are checked here
//! and in `varlen.rs` and `kvcache.rs`, under their names.

use pyo3::exceptions::{PyNotImplementedError, PyOverflowError};
use pyo3::prelude::*;
use pyo3::types::PyTuple;
use qkv::{AttentionSpec, Causal, Outputs, Window, attention_into};

use crate::array::{Array, DType};
use crate::error::{Names, bad_type, bad_value};
use crate::options::{self, FARTHEST, per_batch_and_head, shown};
use crate::{attention, pool};

/// Options as they came: softmax_scale, causal, window_size, softcap, alibi_slopes.
#[derive(Debug, FromPyObject)]
pub(crate) struct Asked<'py>(
    Option<Bound<'py, PyAny>>,
    Bound<'py, PyAny>,
    Bound<'py, PyAny>,
    Bound<'py, PyAny>,
    Option<Bound<'py, PyAny>>,
);

/// As they came: dropout_p, deterministic, return_attn_probs.
#[derive(Debug, FromPyObject)]
pub(crate) struct Training<'py>(Bound<'py, PyAny>, Bound<'py, PyAny>, Bound<'py, PyAny>);

/// Options, checked.
#[derive(Debug)]
pub(crate) struct Options {
    scale: Option<f32>,
    pub(crate) causal: bool,
    pub(crate) window: Option<Window>,
    softcap: Option<f32>,
    /// (heads,) or (sequences, heads).
    slopes: Option<Vec<f32>>,
}

impl Options {
    /// For this many sequences and query heads.
    pub(crate) fn read(asked: &Asked<'_>, sequences: usize, heads: usize) -> PyResult<Self> {
        let Asked(scale, causal, window, softcap, slopes) = asked;
        let scale = scale.as_ref().map(|scale| number("softmax_scale", scale)).transpose()?;
        let scale = options::finite("softmax_scale", scale)?;
        let softcap = number("softcap", softcap)?;
        // 0 is none; what is 0 as f32 only is not meant to be.
        let softcap = match options::finite("softcap", Some(softcap))? {
            Some(cap) if softcap < 0.0 || cap == 0.0 && softcap > 0.0 => {
                return Err(bad_value(
                    "softcap",
                    format!("{softcap:?}"),
                    "0 or a positive number of float32",
                ));
            }
            cap => cap.filter(|&cap| cap > 0.0),
        };
        Ok(Self {
            scale,
            causal: flag("causal", causal)?,
            window: window_size(window)?,
            softcap,
            slopes: per_batch_and_head("alibi_slopes", slopes.as_ref(), sequences, heads)?,
        })
    }

    /// With one more sequence at the end.
    pub(crate) fn and_one_more(mut self, heads: usize) -> Self {
        if let Some(slopes) = self.slopes.as_mut().filter(|slopes| slopes.len() != heads) {
            slopes.resize(slopes.len() + heads, 0.0);
        }
        self
    }

    /// For the Rust API.
    pub(crate) fn spec(&self) -> AttentionSpec<'_> {
        let mut spec = AttentionSpec::new();
        spec.scale = self.scale;
        spec.causal = self.causal.then_some(Causal::BottomRight);
        spec.window = self.window;
        spec.softcap = self.softcap;
        spec.alibi_slopes = self.slopes.as_deref();
        spec
    }
}

impl Training<'_> {
    /// Whether the log-sum-exp is wanted; refuses dropout.
    pub(crate) fn wants_lse(&self) -> PyResult<bool> {
        let Self(dropout_p, deterministic, return_attn_probs) = self;
        let dropout = number("dropout_p", dropout_p)?;
        if !(0.0..1.0).contains(&dropout) {
            return Err(bad_value("dropout_p", dropout.to_string(), "0 (at least 0 and below 1)"));
        }
        if dropout > 0.0 {
            return Err(PyNotImplementedError::new_err(format!(
                "dropout_p: {dropout} is not supported, expected 0"
            )));
        }
        // A choice among backward passes; the forward pass is deterministic.
        flag("deterministic", deterministic)?;
        flag("return_attn_probs", return_attn_probs)
    }
}

/// A truth value: a bool, or 0 or 1.
pub(crate) fn flag(name: &str, object: &Bound<'_, PyAny>) -> PyResult<bool> {
    if let Ok(value) = object.extract::<bool>() {
        return Ok(value);
    }
    match integer(name, object)? {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(bad_value(name, shown(object), "True or False")),
    }
}

/// An integer.
pub(crate) fn integer(name: &str, object: &Bound<'_, PyAny>) -> PyResult<i64> {
    object.extract::<i64>().map_err(|error| {
        if error.is_instance_of::<PyOverflowError>(object.py()) {
            bad_value(name, shown(object), "an integer of 64 bits")
        } else {
            bad_type(name, shown(object), "an integer")
        }
    })
}

/// A number.
fn number(name: &str, object: &Bound<'_, PyAny>) -> PyResult<f64> {
    options::number(name, Some(object))?.ok_or_else(|| bad_type(name, shown(object), "a number"))
}

/// (left, right); a negative one is unbounded.
fn window_size(object: &Bound<'_, PyAny>) -> PyResult<Option<Window>> {
    let sides = object.try_iter().and_then(|sides| sides.take(3).collect::<PyResult<Vec<_>>>());
    let Ok([left, right]) = sides.as_deref() else {
        return Err(bad_type("window_size", shown(object), "(left, right)"));
    };
    let side = |side| {
        integer("window_size", side).map(|side| usize::try_from(side).ok().map(|keys| keys.min(FARTHEST)))
    };
    let (left, right) = (side(left)?, side(right)?);
    Ok((left.is_some() || right.is_some()).then(|| Window::new(left, right)))
}

/// A tensor that is read, of these axes, its rows contiguous.
pub(crate) fn tensor<'py>(
    name: &'static str,
    object: &Bound<'py, PyAny>,
    rank: usize,
    axes: &str,
) -> PyResult<Array<'py>> {
    let array = Array::input(name, object)?;
    array.expect_dtype(&DType::FLOATS)?;
    array.expect_rank(rank, axes)?;
    Ok(settled(array.with_contiguous_rows()?))
}

/// With a last axis of stride 1 where there is nothing to step over, as the Rust API wants it.
pub(crate) fn settled(mut array: Array<'_>) -> Array<'_> {
    if array.shape.contains(&0)
        && let Some(last) = array.strides.last_mut()
    {
        *last = 1;
    }
    array
}

/// Refuses an array whose type is not that of `of`.
pub(crate) fn expect_type_of(array: &Array<'_>, of: &Array<'_>) -> PyResult<()> {
    if array.dtype == of.dtype {
        return Ok(());
    }
    Err(bad_type(array.name, array.dtype.name(), format!("{} as {} is", of.dtype.name(), of.name)))
}

/// A list of int32, one axis.
pub(crate) fn int32(
    name: &'static str,
    object: &Bound<'_, PyAny>,
    count: Option<usize>,
) -> PyResult<Vec<i64>> {
    let array = Array::input(name, object)?;
    array.expect_dtype(&[DType::I32])?;
    match count {
        Some(count) => array.expect_shape(&[count])?,
        None => array.expect_rank(1, "(batch + 1)")?,
    }
    array.to_integers()
}

/// A log-sum-exp as flash-attention has it: +inf where a query sees no key.
pub(crate) fn empty_rows_up(lse: &mut [f32]) {
    for lse in lse {
        if *lse == f32::NEG_INFINITY {
            *lse = f32::INFINITY;
        }
    }
}

/// `out`, or `(out, lse, None)`.
pub(crate) fn with_probs<'py>(out: Array<'py>, lse: Option<Array<'py>>) -> PyResult<Bound<'py, PyAny>> {
    let out = out.into_result(false)?;
    let Some(lse) = lse else { return Ok(out) };
    let py = out.py();
    Ok(PyTuple::new(py, [out, lse.into_result(false)?, py.None().into_bound(py)])?.into_any())
}

/// `qkv.flash_attn.flash_attn_func`, which documents it.
#[pyfunction]
pub(crate) fn flash_attn_func<'py>(
    py: Python<'py>,
    q: &Bound<'py, PyAny>,
    k: &Bound<'py, PyAny>,
    v: &Bound<'py, PyAny>,
    asked: Asked<'py>,
    training: Training<'py>,
) -> PyResult<Bound<'py, PyAny>> {
    let wants_lse = training.wants_lse()?;
    let read = |name, object| tensor(name, object, 4, "(batch, length, heads, dim)");
    let (q, k, v) = (read("q", q)?, read("k", k)?, read("v", v)?);
    expect_type_of(&k, &q)?;
    expect_type_of(&v, &q)?;
    let (batch, length, heads, dim) = (q.shape[0], q.shape[1], q.shape[2], v.shape[3]);
    let options = Options::read(&asked, batch, heads)?;
    let spec = options.spec();
    let [q, k, v] = [q, k, v].map(|array| array.swapped(1, 2));
    let (data_q, data_k, data_v) = (q.data()?, k.data()?, v.data()?);
    let mut out = Array::new("out", &q, q.dtype, &[batch, length, heads, dim])?.swapped(1, 2);
    let mut lse = match wants_lse {
        true => Some(Array::new("softmax_lse", &q, DType::F32, &[batch, heads, length])?),
        false => None,
    };
    let work = attention::flops(data_q.shape(), data_k.shape()[2], dim);
    let outputs = outputs(&mut out, &mut lse)?;
    pool::run(py, work, || attention_into(data_q, data_k, data_v, &spec, outputs))?
        .map_err(|error| Names::ATTENTION.exception(&error))?;
    if let Some(lse) = &mut lse {
        empty_rows_up(lse.floats_mut()?);
    }
    with_probs(out, lse)
}

/// Where results go.
pub(crate) fn outputs<'a>(out: &'a mut Array<'_>, lse: &'a mut Option<Array<'_>>) -> PyResult<Outputs<'a>> {
    let outputs = Outputs::new(out.data_mut()?);
    Ok(match lse {
        Some(lse) => outputs.with_lse(lse.floats_mut()?),
        None => outputs,
    })
}
