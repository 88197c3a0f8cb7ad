//! How far a result is from the exact one.
//!
//! "Exact" is the textbook's computation in f64 ([`qkv::reference::oracle`]). That is a plain loop and slow, so it is
//! run over the threads here, some rows of one head at a time; a row depends on no other row, so the bits are those of
//! one call. Its score matrix then is [`ROWS`] rows per thread instead of a square.

use qkv::reference::oracle;
use qkv::{AttentionSpec, Causal, Tensor, TensorRef};
use rayon::prelude::*;
use serde::Serialize;

/// Rows of one call of the oracle: few enough that their scores are small, enough that a call is worth a task.
pub(crate) const ROWS: usize = 64;

/// Attention in f64, row-major (batch, heads, query length, value dim).
///
/// The shapes must fit each other: callers pass what a kernel has accepted.
pub(crate) fn exact(q: &Tensor, k: &Tensor, v: &Tensor, spec: &AttentionSpec<'_>) -> Vec<f64> {
    let [batches, heads, query_len, key_dim] = q.shape();
    let [_, kv_heads, key_len, _] = k.shape();
    let value_dim = v.shape()[3];
    let mut out = vec![0.0; batches * heads * query_len * value_dim];
    if out.is_empty() {
        return out;
    }
    let one_head = |tensor: &'_ Tensor, index: usize| {
        let [_, _, length, dim] = tensor.shape();
        index * length * dim..(index + 1) * length * dim
    };
    let offset = spec.causal.map(|causal| causal.offset(query_len, key_len));

    out.par_chunks_mut(query_len * value_dim).enumerate().for_each(|(head, out)| {
        let kv_head = head / heads * kv_heads + head % heads / (heads / kv_heads);
        let view = |tensor, index, shape| part(&Tensor::data(tensor)[one_head(tensor, index)], shape);
        let k = view(k, kv_head, [1, 1, key_len, key_dim]);
        let v = view(v, kv_head, [1, 1, key_len, value_dim]);
        let queries = &q.data()[one_head(q, head)];
        out.par_chunks_mut(ROWS * value_dim).enumerate().for_each(|(index, out)| {
            let (first, rows) = (index * ROWS, out.len() / value_dim);
            let q = part(&queries[first * key_dim..][..rows * key_dim], [1, 1, rows, key_dim]);
            // Row i of these is row first + i of all.
            let mut spec = spec.clone();
            spec.causal = offset.map(|offset| Causal::Offset(offset + first as i64));
            out.copy_from_slice(oracle(q, k, v, &spec).output.data());
        });
    });
    out
}

/// A view of all of a slice.
fn part(data: &[f32], shape: [usize; 4]) -> TensorRef<'_> {
    TensorRef::from_slice(data, shape).expect("a part of a tensor that exists")
}

/// The distance of a result from the exact one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(crate) struct Distance {
    /// The largest difference; infinite where only one of the two is a number.
    pub(crate) max: f64,
    /// The root of the mean of the squared differences.
    pub(crate) rms: f64,
}

impl Distance {
    /// Of `given` from `exact`. Two NaN, and two infinities of one sign, are equal.
    pub(crate) fn between(given: &[f32], exact: &[f64]) -> Self {
        debug_assert_eq!(given.len(), exact.len());
        let mut max = 0.0f64;
        let mut squares = 0.0;
        for (&given, &exact) in given.iter().zip(exact) {
            let given = f64::from(given);
            let same = given == exact || (given.is_nan() && exact.is_nan());
            let difference = match (given - exact).abs() {
                _ if same => 0.0,
                difference if difference.is_nan() => f64::INFINITY,
                difference => difference,
            };
            max = max.max(difference);
            squares += difference * difference;
        }
        Self { max, rms: (squares / given.len().max(1) as f64).sqrt() }
    }
}

/// The largest error that passes: four times that of the naive computation in f32 on the same input, and four units in
/// the last place of the largest value (an output is a mean of values, so none is larger).
pub(crate) fn tolerance(naive: Distance, v: &Tensor) -> f64 {
    let largest = v.data().iter().filter(|x| x.is_finite()).fold(0.0f32, |max, x| max.max(x.abs()));
    4.0 * naive.max + 4.0 * f64::from(largest.next_up() - largest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(shape: [usize; 4], seed: usize) -> Tensor {
        Tensor::from_fn(shape, |[b, h, s, d]| ((b * 7 + h * 5 + s * 3 + d + seed) as f32).sin()).unwrap()
    }

    #[test]
    fn rows_over_threads_have_the_bits_of_one_call() {
        let q = tensor([2, 4, 150, 8], 1);
        let k = tensor([2, 2, 170, 8], 2);
        let v = tensor([2, 2, 170, 5], 3);
        for spec in [
            AttentionSpec::new(),
            AttentionSpec::new().with_causal(Causal::TopLeft),
            AttentionSpec::new().with_causal(Causal::BottomRight),
        ] {
            let whole = oracle(q.view(), k.view(), v.view(), &spec).output;
            assert_eq!(exact(&q, &k, &v, &spec), whole.data(), "{spec:?}");
        }
    }

    #[test]
    fn nothing_is_exact() {
        let q = tensor([1, 2, 0, 8], 1);
        let k = tensor([1, 2, 3, 8], 2);
        assert!(exact(&q, &k, &k, &AttentionSpec::new()).is_empty());
    }

    #[test]
    fn distances() {
        let d = Distance::between(&[1.0, 2.0, f32::NAN, f32::INFINITY], &[1.0, 2.5, f64::NAN, f64::INFINITY]);
        assert_eq!(d, Distance { max: 0.5, rms: 0.25 });
        assert_eq!(Distance::between(&[f32::NAN], &[1.0]).max, f64::INFINITY);
        assert_eq!(Distance::between(&[], &[]), Distance::default());
    }

    #[test]
    fn the_tolerance_knows_the_size_of_the_values() {
        let v = Tensor::from_vec(vec![1.0, -2.0, f32::NAN, 0.5], [1, 1, 2, 2]).unwrap();
        let naive = Distance { max: 1e-7, rms: 0.0 };
        assert_eq!(tolerance(naive, &v), 4e-7 + 4.0 * 2.0f64.powi(-22));
    }
}
