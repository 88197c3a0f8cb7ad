//! `qkv.scaled_dot_product_attention`: torch's function, over any number of axes in front that broadcast.
//!
//! The axes in front of (heads, length, dim) are merged into one batch axis where the strides of all operands allow that; where
//! they do not, the outermost are walked here, one call each.

use pyo3::prelude::*;
use qkv::{AttentionSpec, Causal, Outputs, attention_into};

use crate::array::{Array, DType};
use crate::attention::flops;
use crate::error::{Names, bad_type, bad_value, not_supported};
use crate::views::Part;
use crate::{options, pool};

/// The names of this function's arguments.
const NAMES: Names = Names {
    query: "query",
    key: "key",
    value: "value",
    output: "out",
    mask: "attn_mask",
    bias: "attn_mask",
    key_lengths: "key_lengths",
};

/// torch.nn.functional.scaled_dot_product_attention: softmax(scale * query @ key.T + mask) @ value.
///
/// query is (..., L, E), key (..., S, E), value (..., S, Ev), with 2 axes or more; the axes in front broadcast. float32, bfloat16 or
/// float16; everything is computed in float32 and rounded once.
///
/// attn_mask
///     Broadcast to (..., L, S): bool, True takes part, or of query's type or float32, added to the scores. Read in place, never
///     expanded.
/// dropout_p
///     0: dropout is not supported.
/// is_causal
///     Key j is seen by query i where j <= i. Not together with attn_mask.
/// scale
///     The factor of query @ key.T; 1 / sqrt(E).
/// enable_gqa
///     Whether key and value may have fewer heads (axis -3) than query: query head h reads key/value head h / (heads / key heads).
///
/// Returns (..., L, Ev): a torch tensor where query is one, else a numpy array. Unlike torch's, a NaN behind a mask is ignored.
///
/// >>> import numpy as np, qkv
/// >>> q = np.zeros((2, 3, 4), np.float32)
/// >>> v = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
/// >>> qkv.scaled_dot_product_attention(q, q, v, is_causal=True)[1, 2].tolist()
/// [16.0, 17.0, 18.0, 19.0]
#[pyfunction]
#[pyo3(signature = (query, key, value, attn_mask=None, dropout_p=None, is_causal=None, scale=None, enable_gqa=None),
       text_signature = "(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False)")]
#[expect(clippy::too_many_arguments, reason = "torch's signature")]
pub(crate) fn scaled_dot_product_attention<'py>(
    py: Python<'py>,
    query: &Bound<'py, PyAny>,
    key: &Bound<'py, PyAny>,
    value: &Bound<'py, PyAny>,
    attn_mask: Option<&Bound<'py, PyAny>>,
    dropout_p: Option<&Bound<'py, PyAny>>,
    is_causal: Option<&Bound<'py, PyAny>>,
    scale: Option<&Bound<'py, PyAny>>,
    enable_gqa: Option<&Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyAny>> {
    let dropout_p = options::number("dropout_p", dropout_p)?.unwrap_or(0.0);
    let is_causal = options::flag("is_causal", is_causal)?;
    let enable_gqa = options::flag("enable_gqa", enable_gqa)?;
    if !(0.0..=1.0).contains(&dropout_p) {
        return Err(bad_value("dropout_p", dropout_p.to_string(), "0 (a probability)"));
    }
    if dropout_p > 0.0 {
        return Err(not_supported("dropout_p", format!("dropout ({dropout_p})")));
    }
    if is_causal && attn_mask.is_some() {
        return Err(bad_value("attn_mask", "a mask together with is_causal", "one of the two"));
    }
    let least = if enable_gqa { 3 } else { 2 };
    let tensor = |name, object| -> PyResult<Array<'py>> {
        let array = Array::input(name, object)?;
        array.expect_dtype(&DType::FLOATS)?;
        if array.rank() < least {
            let given = format!("shape {:?}", array.shape);
            return Err(bad_value(name, given, format!("at least {least} axes")));
        }
        array.with_contiguous_rows()
    };
    let (q, k, v) = (tensor("query", query)?, tensor("key", key)?, tensor("value", value)?);
    let rank = q.rank().max(k.rank()).max(v.rank());
    // With an axis of heads, if it is one of 1.
    let full_rank = rank.max(3);
    let [q, k, v] = [q, k, v].map(|array| array.repeatable(full_rank));
    let sizes = Sizes::new(&q, &k, &v, enable_gqa)?;
    let mask = match Array::optional("attn_mask", attn_mask)? {
        Some(mask) => Some(sizes.checked_mask(mask, q.dtype, rank)?),
        None => None,
    };
    let mut spec = AttentionSpec::new();
    spec.scale = options::finite("scale", options::number("scale", scale)?)?;
    spec.causal = is_causal.then_some(Causal::TopLeft);

    let [length, dim] = [sizes.q_len, sizes.value_dim];
    let mut shape = sizes.batch.clone();
    shape.extend([sizes.heads, length, dim]);
    let result = Array::new("out", &q, q.dtype, &shape[full_rank - rank..])?;
    if shape.contains(&0) {
        return result.into_result(false);
    }
    let mut out = result.repeatable(full_rank);
    let (outer, batch) = sizes.batch_axes([Some(&q), Some(&k), Some(&v), mask.as_ref(), Some(&out)]);
    let work = flops([batch.size, sizes.heads, length, sizes.key_dim], sizes.kv_len, dim);
    let calls: usize = outer.iter().map(|axis| axis.size).product();
    for call in 0..calls {
        let offsets = offsets(&outer, call);
        let part = |operand: usize, array: &Array<'_>, heads: usize| {
            let last = full_rank - 1;
            Part {
                offset: offsets[operand],
                shape: [batch.size, heads, array.shape[last - 1], array.shape[last]],
                strides: [
                    batch.strides[operand],
                    array.strides[last - 2],
                    array.strides[last - 1],
                    array.strides[last],
                ],
            }
        };
        let parts = [part(0, &q, sizes.heads), part(1, &k, sizes.kv_heads), part(2, &v, sizes.kv_heads)];
        let out_part = part(4, &out, sizes.heads);
        let mut spec = spec.clone();
        // SAFETY: along each axis a part takes as many steps as the array does, or steps of 0; so does the walk.
        let (q, k, v, to) = unsafe {
            if let Some(mask) = &mask {
                let mut of_mask = part(3, mask, sizes.heads);
                of_mask.shape = [batch.size, sizes.heads, length, sizes.kv_len];
                match mask.dtype {
                    DType::Bool => spec.mask = Some(mask.mask_part(&of_mask)?),
                    _ => spec.bias = Some(mask.bias_part(&of_mask)?),
                }
            }
            (
                q.data_part(&parts[0])?,
                k.data_part(&parts[1])?,
                v.data_part(&parts[2])?,
                out.data_mut_part(&out_part)?,
            )
        };
        pool::run(py, work, || attention_into(q, k, v, &spec, Outputs::new(to)))?
            .map_err(|error| NAMES.exception(&error))?;
    }
    out.into_result(false)
}

/// The sizes of a call, all axes broadcast.
struct Sizes {
    /// Of the axes in front of the heads.
    batch: Vec<usize>,
    heads: usize,
    kv_heads: usize,
    q_len: usize,
    kv_len: usize,
    key_dim: usize,
    value_dim: usize,
}

/// Query, key, value, mask and output.
const OPERANDS: usize = 5;

/// An axis that all operands walk together.
struct BatchAxis {
    size: usize,
    strides: [isize; OPERANDS],
}

impl Sizes {
    /// Of arrays of equal rank, at least 3.
    fn new(q: &Array<'_>, k: &Array<'_>, v: &Array<'_>, grouped: bool) -> PyResult<Self> {
        let rank = q.rank();
        let at = |array: &Array<'_>, from_last: usize| array.shape[rank - from_last];
        let mismatch = |array: &Array<'_>, what: &str, other: &Array<'_>| {
            let expected = format!("{what} as in {} ({:?})", other.name, other.shape);
            bad_value(array.name, format!("shape {:?}", array.shape), expected)
        };
        if at(k, 1) != at(q, 1) {
            return Err(mismatch(k, "the last axis", q));
        }
        if at(v, 2) != at(k, 2) {
            return Err(mismatch(v, "the length (axis -2)", k));
        }
        let mut batch = Vec::with_capacity(rank - 3);
        for axis in 0..rank - 3 {
            let size = broadcast(q.shape[axis], k.shape[axis])
                .ok_or_else(|| mismatch(k, "axes that broadcast", q))?;
            batch.push(broadcast(size, v.shape[axis]).ok_or_else(|| mismatch(v, "axes that broadcast", q))?);
        }
        let (q_heads, k_heads, v_heads) = (at(q, 3), at(k, 3), at(v, 3));
        let (heads, kv_heads) = if grouped {
            if v_heads != k_heads {
                return Err(mismatch(v, "the heads (axis -3)", k));
            }
            if k_heads == 0 || q_heads % k_heads != 0 {
                let given = format!("{q_heads} heads (axis -3)");
                return Err(bad_value(
                    q.name,
                    given,
                    format!("a multiple of the {k_heads} heads of {}", k.name),
                ));
            }
            (q_heads, k_heads)
        } else {
            let broadcast_heads = || mismatch(k, "heads (axis -3) that broadcast (enable_gqa is not set)", q);
            let heads = broadcast(q_heads, k_heads).ok_or_else(broadcast_heads)?;
            let heads =
                broadcast(heads, v_heads).ok_or_else(|| mismatch(v, "heads (axis -3) that broadcast", q))?;
            // One head for all queries is a group; others are repeated with stride 0.
            (heads, if (k_heads, v_heads) == (1, 1) { 1 } else { heads })
        };
        Ok(Self {
            batch,
            heads,
            kv_heads,
            q_len: at(q, 2),
            kv_len: at(k, 2),
            key_dim: at(q, 1),
            value_dim: at(v, 1),
        })
    }

    /// A mask whose type and shape fit, of the full rank.
    fn checked_mask<'py>(&self, mask: Array<'py>, query: DType, rank: usize) -> PyResult<Array<'py>> {
        if ![DType::Bool, DType::F32, query].contains(&mask.dtype) {
            let expected = format!("bool, query's type ({}) or float32", query.name());
            return Err(bad_type(mask.name, format!("an array of {}", mask.dtype.name()), expected));
        }
        let mut full = self.batch.clone();
        full.extend([self.heads, self.q_len, self.kv_len]);
        let given = mask.shape.clone();
        let fits = mask.rank() <= rank;
        let mask = mask.repeatable(full.len());
        if !fits || mask.shape.iter().zip(&full).any(|(&size, &full)| size != full && size != 1) {
            let expected = format!("one that broadcasts to {:?}", &full[full.len() - rank..]);
            return Err(bad_value(mask.name, format!("shape {given:?}"), expected));
        }
        Ok(mask)
    }

    /// The axes in front of the heads, merged where all operands allow it: those to walk, and the innermost.
    fn batch_axes(&self, operands: [Option<&Array<'_>>; OPERANDS]) -> (Vec<BatchAxis>, BatchAxis) {
        let mut axes: Vec<BatchAxis> = Vec::new();
        for (axis, &size) in self.batch.iter().enumerate().filter(|&(_, &size)| size != 1) {
            let strides = operands.map(|array| array.map_or(0, |array| array.strides[axis]));
            let step = |stride: isize| isize::try_from(size).ok().and_then(|size| stride.checked_mul(size));
            match axes.last_mut() {
                Some(before) if (0..OPERANDS).all(|i| Some(before.strides[i]) == step(strides[i])) => {
                    before.size *= size;
                    before.strides = strides;
                }
                _ => axes.push(BatchAxis { size, strides }),
            }
        }
        let innermost = axes.pop().unwrap_or(BatchAxis { size: 1, strides: [0; OPERANDS] });
        (axes, innermost)
    }
}

/// The size of two axes that broadcast.
fn broadcast(a: usize, b: usize) -> Option<usize> {
    match (a, b) {
        (a, b) if a == b || b == 1 => Some(a),
        (1, b) => Some(b),
        _ => None,
    }
}

/// Where a call's operands begin, in values.
fn offsets(axes: &[BatchAxis], mut call: usize) -> [isize; OPERANDS] {
    let mut offsets = [0; OPERANDS];
    for axis in axes.iter().rev() {
        let index = (call % axis.size) as isize;
        call /= axis.size;
        for (offset, stride) in offsets.iter_mut().zip(axis.strides) {
            *offset += index * stride;
        }
    }
    offsets
}
