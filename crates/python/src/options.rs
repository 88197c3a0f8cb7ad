//! Options of attention from what Python gives: alignments, windows, lists, masks and biases.

use pyo3::prelude::*;
use pyo3::types::{PyBool, PyInt, PyString, PyTuple};
use qkv::{Causal, Window};

use crate::array::{Array, DType};
use crate::error::{bad_type, bad_value};
use crate::torch_tensor::expect_no_derivative;

/// An object as it prints, cut short.
pub(crate) fn shown(object: &Bound<'_, PyAny>) -> String {
    let text = object.repr().map_or_else(|_| "an object".to_owned(), |text| text.to_string());
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

/// An argument that is a plain Python value: a number, a bool or a string.
pub(crate) fn plain<'a, 'py, T: FromPyObject<'a, 'py>>(
    name: &str,
    object: &'a Bound<'py, PyAny>,
    expected: &str,
) -> PyResult<T> {
    object.extract().map_err(|_| bad_type(name, shown(object), expected))
}

/// A number that may be left out.
pub(crate) fn number(name: &str, object: Option<&Bound<'_, PyAny>>) -> PyResult<Option<f64>> {
    let Some(object) = object else { return Ok(None) };
    expect_no_derivative(name, object)?;
    plain(name, object, "a number").map(Some)
}

/// The most keys that a window counts. Positions end at 2^48 + 2^48, an offset and a length, so that beyond this a window is as
/// good as unbounded; and sums with it fit 64 bits.
pub(crate) const FARTHEST: usize = 1 << 52;

/// Whether an object is a bool, or an array of them: 1 to Python, and not meant where a number is.
fn is_bool(object: &Bound<'_, PyAny>) -> bool {
    if object.is_instance_of::<PyInt>() {
        return object.is_instance_of::<PyBool>();
    }
    let dtype = object.getattr("dtype").and_then(|dtype| dtype.str());
    dtype.is_ok_and(|dtype| matches!(dtype.to_string_lossy().as_ref(), "bool" | "torch.bool"))
}

/// A flag. Not a number: that would be a slip.
pub(crate) fn flag(name: &str, object: Option<&Bound<'_, PyAny>>) -> PyResult<bool> {
    object.map_or(Ok(false), |object| plain(name, object, "True or False"))
}

/// `causal=`: None, "top_left", "bottom_right" or an offset.
pub(crate) fn causal(name: &str, object: Option<&Bound<'_, PyAny>>) -> PyResult<Option<Causal>> {
    const EXPECTED: &str = "None, \"top_left\", \"bottom_right\" or an int offset";
    let Some(object) = object else { return Ok(None) };
    if let Ok(text) = object.cast::<PyString>() {
        return match text.to_cow()?.as_ref() {
            "top_left" => Ok(Some(Causal::TopLeft)),
            "bottom_right" => Ok(Some(Causal::BottomRight)),
            _ => Err(bad_value(name, shown(object), EXPECTED)),
        };
    }
    if is_bool(object) {
        return Err(bad_type(name, shown(object), EXPECTED));
    }
    match object.extract::<i64>() {
        Ok(offset) if offset.unsigned_abs() <= 1 << 48 => Ok(Some(Causal::Offset(offset))),
        Ok(_) => Err(bad_value(name, shown(object), "an offset of at most 2^48")),
        Err(error) if error.is_instance_of::<pyo3::exceptions::PyOverflowError>(object.py()) => {
            Err(bad_value(name, shown(object), "an offset of at most 2^48"))
        }
        Err(_) => Err(bad_type(name, shown(object), EXPECTED)),
    }
}

/// `window=`: None or (left, right), each None or -1 (unbounded) or the number of keys.
pub(crate) fn window(name: &str, object: Option<&Bound<'_, PyAny>>) -> PyResult<Option<Window>> {
    const EXPECTED: &str = "None or (left, right), each None, -1 or a number of keys";
    let Some(object) = object else { return Ok(None) };
    let sides = match object.cast::<PyTuple>() {
        Ok(tuple) => tuple.clone(),
        Err(_) => match object.cast::<pyo3::types::PyList>() {
            Ok(list) => list.to_tuple(),
            Err(_) => return Err(bad_type(name, shown(object), EXPECTED)),
        },
    };
    if sides.len() != 2 {
        return Err(bad_value(name, shown(object), EXPECTED));
    }
    let side = |index| -> PyResult<Option<usize>> {
        let side = sides.get_item(index)?;
        if side.is_none() {
            return Ok(None);
        }
        if is_bool(&side) {
            return Err(bad_type(name, shown(object), EXPECTED));
        }
        match side.extract::<i64>() {
            Ok(-1) => Ok(None),
            Ok(keys) => match usize::try_from(keys) {
                Ok(keys) => Ok(Some(keys.min(FARTHEST))),
                Err(_) => Err(bad_value(name, shown(object), EXPECTED)),
            },
            Err(error) if error.is_instance_of::<pyo3::exceptions::PyOverflowError>(object.py()) => {
                Err(bad_value(name, shown(object), "numbers below 2^63"))
            }
            Err(_) => Err(bad_type(name, shown(object), EXPECTED)),
        }
    };
    let (left, right) = (side(0)?, side(1)?);
    Ok((left.is_some() || right.is_some()).then(|| Window::new(left, right)))
}

/// A scale or cap: a number that is finite as f32.
pub(crate) fn finite(name: &str, value: Option<f64>) -> PyResult<Option<f32>> {
    let Some(value) = value else { return Ok(None) };
    let narrow = value as f32;
    if narrow.is_finite() {
        Ok(Some(narrow))
    } else {
        Err(bad_value(name, value.to_string(), "a finite number"))
    }
}

/// A soft cap: a number above 0.
pub(crate) fn softcap(name: &str, value: Option<f64>) -> PyResult<Option<f32>> {
    match (value, finite(name, value)?) {
        // As f32, of which the smallest are above 1e-45.
        (Some(value), Some(cap)) if cap <= 0.0 => {
            Err(bad_value(name, format!("{value:?}"), "None or a number above 0"))
        }
        (_, cap) => Ok(cap),
    }
}

/// A bias: of the queries' type or f32, four axes or fewer.
pub(crate) fn bias<'py>(
    name: &'static str,
    object: Option<&Bound<'py, PyAny>>,
    q: &Array<'py>,
) -> PyResult<Option<Array<'py>>> {
    let Some(bias) = Array::optional(name, object)? else { return Ok(None) };
    if ![q.dtype, DType::F32].contains(&bias.dtype) {
        let expected = format!("{}'s type ({}) or float32", q.name, q.dtype.name());
        return Err(bad_type(name, format!("an array of {}", bias.dtype.name()), expected));
    }
    up_to_four(bias).map(Some)
}

/// A boolean mask, four axes or fewer.
pub(crate) fn mask<'py>(
    name: &'static str,
    object: Option<&Bound<'py, PyAny>>,
) -> PyResult<Option<Array<'py>>> {
    let Some(mask) = Array::optional(name, object)? else { return Ok(None) };
    if mask.dtype != DType::Bool {
        let given = format!("an array of {}", mask.dtype.name());
        return Err(bad_type(name, given, "bool (True takes part); an additive mask is a bias"));
    }
    up_to_four(mask).map(Some)
}

fn up_to_four(array: Array<'_>) -> PyResult<Array<'_>> {
    if array.rank() > 4 {
        let given = format!("shape {:?}", array.shape);
        return Err(bad_value(array.name, given, "at most 4 axes (batch, heads, query length, key length)"));
    }
    Ok(array.with_rank(4))
}

/// One f32 per query head: `sinks=`.
pub(crate) fn per_head(
    name: &'static str,
    object: Option<&Bound<'_, PyAny>>,
    heads: usize,
) -> PyResult<Option<Vec<f32>>> {
    let Some(list) = Array::optional(name, object)? else { return Ok(None) };
    list.expect_dtype(&[DType::F32])?;
    list.expect_shape(&[heads])?;
    list.to_floats().map(Some)
}

/// One f32 per query head, or per batch and query head: `alibi_slopes=`.
pub(crate) fn per_batch_and_head(
    name: &'static str,
    object: Option<&Bound<'_, PyAny>>,
    batch: usize,
    heads: usize,
) -> PyResult<Option<Vec<f32>>> {
    let Some(list) = Array::optional(name, object)? else { return Ok(None) };
    list.expect_dtype(&[DType::F32])?;
    if list.shape != [heads] && list.shape != [batch, heads] {
        let given = format!("shape {:?}", list.shape);
        return Err(bad_value(name, given, format!("[{heads}] or [{batch}, {heads}]")));
    }
    list.to_floats().map(Some)
}

/// One count per batch, at most `most`: `kv_lengths=`.
pub(crate) fn per_batch(
    name: &'static str,
    object: Option<&Bound<'_, PyAny>>,
    batch: usize,
    most: usize,
) -> PyResult<Option<Vec<usize>>> {
    let Some(list) = Array::optional(name, object)? else { return Ok(None) };
    list.expect_dtype(&[DType::I32, DType::I64])?;
    list.expect_shape(&[batch])?;
    let counts = list.to_counts()?;
    if let Some(index) = counts.iter().position(|&count| count > most) {
        let given = counts[index].to_string();
        return Err(bad_value(&format!("{name}[{index}]"), given, format!("at most the {most} keys")));
    }
    Ok(Some(counts))
}
