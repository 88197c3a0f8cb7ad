//! The one softmax update and the end of a row.
//!
//! Per query the state is the largest score so far m and the sum l of exponentials relative to it, both in units of
//! log2 (the scale of the scores has log2(e) in it). A block of scores s_j with maximum b changes it by
//!
//! ```text
//! m' = max(m, b)      alpha = 2^(m - m')      p_j = 2^(s_j - m')      l' = alpha l + sum p_j
//! o' = alpha o + sum p_j v_j
//! ```
//!
//! and at the end the output is o / l and the log-sum-exp is ln 2 (m + log2 l) (Milakov and Gimelshein 2018,
//! arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135). Queries are lanes, so all of this is vertical: no reduction
//! across lanes anywhere.
//!
//! A query that has seen nothing has m = -infinity; the exponents are then taken relative to 0, which makes every
//! p_j and alpha +0 rather than 2^(-inf + inf) = NaN. A NaN score is dropped by the maxima, but its own p_j is NaN, and so
//! become l and o, of its lane alone.

use qkv_simd::{Simd, math::exp2_nonpositive};

/// Sums of p_j are kept in this many accumulators by key, so that they do not wait for each other. Also the grid to
/// which the first key of a strip's part of a block is aligned, so that a query's sums do not depend on its
/// neighbours.
pub(crate) const SUM_CHAINS: usize = 2;

/// Folds a block of scores into the state and turns them into weights.
///
/// `max` and `sum` hold m and l of `NV` vectors of queries, `block_max` the largest scores of the block; `scores` are
/// rows of keys, `NV * LANES` values each, overwritten by p_j. Returns alpha.
#[inline(always)]
pub(crate) fn update<S: Simd, const NV: usize>(
    s: S,
    max: &mut [f32],
    sum: &mut [f32],
    block_max: [S::F32; NV],
    scores: &mut [f32],
) -> [S::F32; NV] {
    let nr = NV * S::LANES;
    let mut alpha = [s.zero(); NV];
    let mut relative_to = [s.zero(); NV];
    for v in 0..NV {
        let old = s.load(&max[v * S::LANES..]);
        let new = s.max(block_max[v], old);
        let nothing_seen = s.eq(new, s.splat(f32::NEG_INFINITY));
        relative_to[v] = s.select(nothing_seen, s.zero(), new);
        alpha[v] = exp2_nonpositive(s, s.sub(old, relative_to[v]));
        s.store(new, &mut max[v * S::LANES..]);
    }

    let mut sums = [[s.zero(); NV]; SUM_CHAINS];
    let mut chunks = scores.chunks_exact_mut(SUM_CHAINS * nr);
    for chunk in &mut chunks {
        for (chain, sums) in sums.iter_mut().enumerate() {
            weigh(s, &mut chunk[chain * nr..][..nr], &relative_to, sums);
        }
    }
    for (chain, row) in chunks.into_remainder().chunks_exact_mut(nr).enumerate() {
        weigh(s, row, &relative_to, &mut sums[chain]);
    }

    for v in 0..NV {
        let mut total = sums[0][v];
        for chain in &sums[1..] {
            total = s.add(total, chain[v]);
        }
        let old = s.load(&sum[v * S::LANES..]);
        s.store(s.mul_add(old, alpha[v], total), &mut sum[v * S::LANES..]);
    }
    alpha
}

/// Turns one key's scores into weights and adds them to `sums`.
#[inline(always)]
fn weigh<S: Simd, const NV: usize>(
    s: S,
    row: &mut [f32],
    relative_to: &[S::F32; NV],
    sums: &mut [S::F32; NV],
) {
    for v in 0..NV {
        let at = &mut row[v * S::LANES..];
        let p = exp2_nonpositive(s, s.sub(s.load(at), relative_to[v]));
        s.store(p, at);
        sums[v] = s.add(sums[v], p);
    }
}

/// 1 / l, or 0 for a query that has seen nothing: the factor that ends a row.
#[inline(always)]
pub(crate) fn inverse_sum<S: Simd>(s: S, sum: S::F32) -> S::F32 {
    s.select(s.eq(sum, s.zero()), s.zero(), s.div(s.splat(1.0), sum))
}

/// The natural logarithm of the sum of exponentials, from the state in log2 units: ln 2 (m + log2 l).
pub(crate) fn lse(max: f32, sum: f32) -> f32 {
    if max == f32::NEG_INFINITY && sum == 0.0 {
        f32::NEG_INFINITY
    } else {
        (f64::from(max) * core::f64::consts::LN_2 + f64::from(sum).ln()) as f32
    }
}
