//! `qkv.attention` and `qkv.merge_states`.

use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::PyTuple;
use qkv::merge::{Part, merge};
use qkv::{AttentionSpec, Outputs, attention_into};

use crate::array::{Array, DType};
use crate::error::{Names, bad_value};
use crate::{options, pool};

/// Attention of `q` over `k` and `v`: softmax over keys of `softcap(scale * q.k) + bias`, masked, times `v`.
///
/// q is (batch, heads, q_len, dk), k (batch, kv_heads, kv_len, dk), v (batch, kv_heads, kv_len, dv), or with the axes 1 and 2
/// exchanged in the layout "bshd". Query head h reads key/value head h / (heads / kv_heads). float32, bfloat16 or float16; everything
/// is computed in float32 and rounded once.
///
/// layout
///     "bhsd", or "bshd" for (batch, length, heads, dim): of q, k, v and the output alike. Masks and LSE stay heads first.
/// causal
///     None; "top_left": key j is seen by query i where j <= i; "bottom_right": where j <= i + kv_len - q_len; an int offset:
///     where j <= i + offset.
/// window
///     (left, right): the query at position p sees keys p - left to p + right; None or -1 is unbounded. p is i for "top_left",
///     i + offset with an offset, else i + kv_len - q_len.
/// mask
///     bool, broadcast to (batch, heads, q_len, kv_len); True takes part. Read in place, never expanded.
/// bias
///     q's type or float32, broadcast likewise, added to the scores; -inf masks. Goes together with `mask`.
/// alibi_slopes
///     float32 (heads,) or (batch, heads): -slope * |p - j| is added.
/// softcap
///     Scores become softcap * tanh(scores / softcap).
/// sinks
///     float32 (heads,): logits that join the softmax without a value.
/// scale
///     The factor of q.k; 1 / sqrt(dk).
/// kv_lengths
///     int32 or int64 (batch,): keys from here on are not there; kv_len above is then this.
/// return_lse
///     Whether to return (out, lse): lse is float32 (batch, heads, q_len), the natural log of the sum of exp of the visible scores
///     and sinks.
/// out
///     An array for the result, of q's type and the result's shape; any strides but the last axis contiguous.
///
/// Returns (batch, heads, q_len, dv), or in the given layout: a torch tensor where q is one, else a numpy array. A query that sees no
/// key gives 0 and an LSE of -inf (its sink, where it has one).
///
/// >>> import numpy as np, qkv
/// >>> q = np.ones((1, 2, 3, 4), np.float32)
/// >>> v = np.arange(12, dtype=np.float32).reshape(1, 1, 3, 4)
/// >>> out = qkv.attention(q, q[:, :1], v, causal="top_left")
/// >>> out.shape
/// (1, 2, 3, 4)
/// >>> out[0, 1].tolist()  # all scores are equal: means of the first 1, 2 and 3 values
/// [[0.0, 1.0, 2.0, 3.0], [2.0, 3.0, 4.0, 5.0], [4.0, 5.0, 6.0, 7.0]]
#[pyfunction]
#[pyo3(signature = (q, k, v, *, layout=None, causal=None, window=None, mask=None, bias=None, alibi_slopes=None,
                    softcap=None, sinks=None, scale=None, kv_lengths=None, return_lse=None, out=None),
       text_signature = "(q, k, v, *, layout='bhsd', causal=None, window=None, mask=None, bias=None, alibi_slopes=None, \
                         softcap=None, sinks=None, scale=None, kv_lengths=None, return_lse=False, out=None)")]
#[expect(clippy::too_many_arguments, reason = "keyword arguments of a Python function")]
pub(crate) fn attention<'py>(
    py: Python<'py>,
    q: &Bound<'py, PyAny>,
    k: &Bound<'py, PyAny>,
    v: &Bound<'py, PyAny>,
    layout: Option<&Bound<'py, PyAny>>,
    causal: Option<&Bound<'py, PyAny>>,
    window: Option<&Bound<'py, PyAny>>,
    mask: Option<&Bound<'py, PyAny>>,
    bias: Option<&Bound<'py, PyAny>>,
    alibi_slopes: Option<&Bound<'py, PyAny>>,
    softcap: Option<&Bound<'py, PyAny>>,
    sinks: Option<&Bound<'py, PyAny>>,
    scale: Option<&Bound<'py, PyAny>>,
    kv_lengths: Option<&Bound<'py, PyAny>>,
    return_lse: Option<&Bound<'py, PyAny>>,
    out: Option<&Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyAny>> {
    let bshd = is_bshd("layout", layout)?;
    let return_lse = options::flag("return_lse", return_lse)?;
    let axes = if bshd { "(batch, length, heads, dim)" } else { "(batch, heads, length, dim)" };
    let tensor = |name, object| -> PyResult<Array<'py>> {
        let array = Array::input(name, object)?;
        array.expect_dtype(&DType::FLOATS)?;
        array.expect_rank(4, axes)?;
        let array = if bshd { array.swapped(1, 2) } else { array };
        array.with_contiguous_rows()
    };
    let (q, k, v) = (tensor("q", q)?, tensor("k", k)?, tensor("v", v)?);
    let [batch, heads, length, dim] = [q.shape[0], q.shape[1], q.shape[2], v.shape[3]];

    let mask = options::mask("mask", mask)?;
    let bias = options::bias("bias", bias, &q)?;
    let slopes = options::per_batch_and_head("alibi_slopes", alibi_slopes, batch, heads)?;
    let sinks = options::per_head("sinks", sinks, heads)?;
    let lengths = options::per_batch("kv_lengths", kv_lengths, batch, k.shape[2])?;
    let mut spec = AttentionSpec::new();
    spec.causal = options::causal("causal", causal)?;
    spec.window = options::window("window", window)?;
    spec.mask = mask.as_ref().map(Array::mask).transpose()?;
    spec.bias = bias.as_ref().map(Array::bias).transpose()?;
    spec.alibi_slopes = slopes.as_deref();
    spec.softcap = options::softcap("softcap", options::number("softcap", softcap)?)?;
    spec.sinks = sinks.as_deref();
    spec.scale = options::finite("scale", options::number("scale", scale)?)?;
    spec.key_lengths = lengths.as_deref();

    let shape = if bshd { [batch, length, heads, dim] } else { [batch, heads, length, dim] };
    let result = Array::given_or_new("out", out, &q, q.dtype, &shape)?;
    if out.is_some() {
        result.expect_apart_from([&q, &k, &v].into_iter().chain(&mask).chain(&bias))?;
    }
    let mut result = if bshd { result.swapped(1, 2) } else { result };
    let mut lse = match return_lse {
        true => Some(Array::new("lse", &q, DType::F32, &[batch, heads, length])?),
        false => None,
    };
    let mut outputs = Outputs::new(result.data_mut()?);
    if let Some(lse) = &mut lse {
        outputs = outputs.with_lse(lse.floats_mut()?);
    }
    let [data_q, data_k, data_v] = [q.data()?, k.data()?, v.data()?];
    let flops = flops(data_q.shape(), data_k.shape()[2], dim);
    pool::run(py, flops, || attention_into(data_q, data_k, data_v, &spec, outputs))?
        .map_err(|error| Names::ATTENTION.exception(&error))?;
    let result = result.into_result(out.is_some())?;
    match lse {
        Some(lse) => Ok(PyTuple::new(py, [result, lse.into_result(false)?])?.into_any()),
        None => Ok(result),
    }
}

/// `layout=`: whether it is "bshd".
fn is_bshd(name: &str, layout: Option<&Bound<'_, PyAny>>) -> PyResult<bool> {
    const EXPECTED: &str = "\"bhsd\" or \"bshd\"";
    let Some(layout) = layout else { return Ok(false) };
    match options::plain::<PyBackedStr>(name, layout, EXPECTED)?.as_ref() {
        "bhsd" => Ok(false),
        "bshd" => Ok(true),
        _ => Err(bad_value(name, options::shown(layout), EXPECTED)),
    }
}

/// The work of attention without a causal mask, in floating-point operations: no fewer than there are.
pub(crate) fn flops([batch, heads, length, dk]: [usize; 4], keys: usize, dv: usize) -> f64 {
    let scores = batch as f64 * heads as f64 * length as f64 * keys as f64;
    scores * 2.0 * (dk as f64 + dv as f64)
}

/// The attention over two sets of keys, from the results over each: (out, lse).
///
/// out_a and out_b are (batch, heads, q_len, dv), lse_a and lse_b float32 (batch, heads, q_len), as `attention(..., return_lse=True)`
/// returns them. The sets must be disjoint, and at most one of the sides may have counted sinks. A side that saw no key (LSE -inf) has
/// no weight. The result has the type of `out_a`; 16-bit outputs are widened to float32 copies first.
///
/// >>> import numpy as np, qkv
/// >>> rng = np.random.default_rng(0)
/// >>> q, k, v = (rng.standard_normal((1, 2, 6, 8), np.float32) for _ in range(3))
/// >>> a = qkv.attention(q, k[:, :, :4], v[:, :, :4], return_lse=True)
/// >>> b = qkv.attention(q, k[:, :, 4:], v[:, :, 4:], return_lse=True)
/// >>> out, lse = qkv.merge_states(*a, *b)
/// >>> np.allclose(out, qkv.attention(q, k, v), atol=1e-6)
/// True
#[pyfunction]
#[pyo3(signature = (out_a, lse_a, out_b, lse_b))]
pub(crate) fn merge_states<'py>(
    py: Python<'py>,
    out_a: &Bound<'py, PyAny>,
    lse_a: &Bound<'py, PyAny>,
    out_b: &Bound<'py, PyAny>,
    lse_b: &Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyAny>> {
    let a = Array::input("out_a", out_a)?;
    a.expect_dtype(&DType::FLOATS)?;
    a.expect_rank(4, "(batch, heads, length, dim)")?;
    let b = Array::input("out_b", out_b)?;
    b.expect_dtype(&DType::FLOATS)?;
    b.expect_shape(&a.shape)?;
    let (shape, dtype) = (a.shape.clone(), a.dtype);
    let lse = |name, object| -> PyResult<Vec<f32>> {
        let lse = Array::input(name, object)?;
        lse.expect_dtype(&[DType::F32])?;
        lse.expect_shape(&shape[..3])?;
        lse.to_floats()
    };
    let (lse_a, lse_b) = (lse("lse_a", lse_a)?, lse("lse_b", lse_b)?);
    let mut out = Array::new("out", &a, dtype, &shape)?;
    let mut lse = Array::new("lse", &a, DType::F32, &shape[..3])?;
    let (a, b) = (a.widened()?.with_contiguous_rows()?, b.widened()?.with_contiguous_rows()?);
    let (part_a, part_b) = (Part { out: a.tensor()?, lse: &lse_a }, Part { out: b.tensor()?, lse: &lse_b });
    let (to, joint) = (out.data_mut()?, lse.floats_mut()?);
    pool::run(py, 0.0, || merge(part_a, part_b, to, joint))?
        .map_err(|error| Names::ATTENTION.exception(&error))?;
    Ok(PyTuple::new(py, [out.into_result(false)?, lse.into_result(false)?])?.into_any())
}
