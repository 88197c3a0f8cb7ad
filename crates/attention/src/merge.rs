//! The merge of attention over two sets of keys: split keys, shared prefixes, parts of a sequence on other machines.
//!
//! With (o_a, l_a) and (o_b, l_b) the outputs and log-sum-exps over disjoint sets of keys, those over both are
//!
//! ```text
//! l = max(l_a, l_b) + ln(w_a + w_b)     w_x = exp(l_x - max(l_a, l_b))     o = (w_a o_a + w_b o_b) / (w_a + w_b)
//! ```
//!
//! A side that saw no key (l = -infinity) has no weight, whatever its output holds. A sink may be counted in one of the
//! sides only.

use crate::{Argument, AttentionError, DataMut, TensorRef};

/// One side of a merge: an output (batch, heads, length, dim) and its LSE, contiguous (batch, heads, length).
#[derive(Clone, Copy, Debug)]
pub struct Part<'a> {
    /// The output.
    pub out: TensorRef<'a>,
    /// Its log-sum-exp.
    pub lse: &'a [f32],
}

/// Merges `a` and `b` into `out` and `lse`.
///
/// # Errors
/// Where shapes differ. Nothing is written then.
pub fn merge<'o>(
    a: Part<'_>,
    b: Part<'_>,
    out: impl Into<DataMut<'o>>,
    lse: &mut [f32],
) -> Result<(), AttentionError> {
    let out = out.into();
    let shape @ [batches, heads, length, dim] = a.out.shape();
    for (given, argument) in [(b.out.shape(), Argument::Value), (out.shape(), Argument::Output)] {
        for (axis, name) in ["batch", "heads", "length", "head dim"].into_iter().enumerate() {
            crate::check::check_axis(argument, name, given[axis], shape[axis], Argument::Query)?;
        }
    }
    let rows = batches * heads * length;
    for given in [a.lse.len(), b.lse.len(), lse.len()] {
        if given != rows {
            return Err(AttentionError::LseLength { argument: Argument::Lse, given, expected: rows });
        }
    }
    let mut merged = vec![0.0; if rows == 0 { 0 } else { dim }];
    for (row, lse) in lse.iter_mut().enumerate() {
        let (batch, head, i) = (row / length / heads, row / length % heads, row % length);
        let seen = [a.lse[row], b.lse[row]];
        let (weight_a, weight_b, joint) = weights(seen[0], seen[1]);
        *lse = joint;
        let [nothing_a, nothing_b] = seen.map(|lse| lse == f32::NEG_INFINITY);
        let (from_a, from_b) = (a.out.row(batch, head, i), b.out.row(batch, head, i));
        for (d, value) in merged.iter_mut().enumerate() {
            // Not by weights, which may be 0 of keys that are seen.
            *value = match (nothing_a, nothing_b) {
                (true, true) => 0.0,
                (false, true) => weight_a * from_a[d],
                (true, false) => weight_b * from_b[d],
                (false, false) => weight_a.mul_add(from_a[d], weight_b * from_b[d]),
            };
        }
        // SAFETY: the row exists and has `dim` values; `out` is borrowed exclusively.
        unsafe { out.store_row([batch, head, i], &merged) };
    }
    Ok(())
}

/// The shares of two sides in their merge, and the joint LSE: NaN if either is, -infinity if both are.
fn weights(a: f32, b: f32) -> (f32, f32, f32) {
    let (a, b) = (f64::from(a), f64::from(b));
    // Not `f64::max`, which drops NaN.
    let max = if a > b || a.is_nan() { a } else { b };
    if max == f64::NEG_INFINITY {
        return (0.0, 0.0, f32::NEG_INFINITY);
    }
    // Over their sum and not from the joint LSE, in which it is lost where the LSEs are large.
    let (a, b) = ((a - max).exp(), (b - max).exp());
    let total = a + b;
    ((a / total) as f32, (b / total) as f32, (max + total.ln()) as f32)
}
