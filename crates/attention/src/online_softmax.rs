//! The one softmax update, and the log-sum-exp of a row.
//!
//! Per query the state is the largest score so far m and the sum l of exponentials relative to it. A block of scores s_j, of
//! which c makes log2 units, with maximum b changes it by
//!
//! ```text
//! m' = max(m, b)    alpha = 2^(c (m - m'))      p_j = 2^(c (s_j - m'))    l' = alpha l + sum p_j
//! o' = alpha o + sum p_j v_j
//! ```
//!
//! and at the end the output is o / l and the log-sum-exp is ln 2 c m + ln l (Milakov and Gimelshein 2018,
//! arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135). Queries are lanes, so all of this is vertical. (Of few
//! queries a vector holds several keys; their maxima and sums are folded once per block, packed_scores.rs.)
//!
//! A query that has seen nothing has m = -infinity; the exponents are then taken relative to 0, which makes every
//! p_j and alpha +0 rather than 2^(-inf + inf) = NaN. A NaN score is dropped by the maxima, but its own p_j is NaN, and so
//! become l and o, of its lane alone. The difference is taken before the factor: that of the largest score is exactly 0 then, however
//! large the scores are (c s - c m would be off by half an ULP of c m, hundreds of octaves for scores of 1e10), and c s cannot
//! overflow.

use qkv_simd::{Simd, math::ScaledExp2};

use crate::packed_scores::fold_keys;

/// Sums of p_j are kept in this many accumulators by key where tiles compute the scores, so that they do not wait for each other. Also
/// the grid to which the first key of a strip's part of a block is aligned, so that a query's sums do not depend on its
/// neighbours.
pub(crate) const SUM_CHAINS: usize = 2;

/// Folds a block of scores into the state and turns them into weights.
///
/// `max` and `sum` hold m and l of `NV` vectors of queries, `block_max` the largest scores of the block; `scores` are
/// rows of keys, `NV * LANES` values each, overwritten by p_j; `to_log2` is c. Returns alpha.
///
/// The p_j are added up in `CHAINS`, a power of two, and these by halves. `PACKED`: a vector is several keys of `CHAINS` rows
/// (packed_scores.rs); by halves these are then added up as well, so that a row's sum does not depend on how many there are.
#[inline(always)]
pub(crate) fn update<S: Simd, const NV: usize, const CHAINS: usize, const PACKED: bool>(
    s: S,
    (max, sum): (&mut [f32], &mut [f32]),
    block_max: [S::F32; NV],
    scores: &mut [f32],
    to_log2: f32,
) -> [S::F32; NV] {
    let nr = NV * S::LANES;
    let mut alpha = [s.zero(); NV];
    let mut references = [s.zero(); NV];
    let power = ScaledExp2::new(s, to_log2);
    for v in 0..NV {
        let old = s.load(&max[v * S::LANES..]);
        let new = s.max(block_max[v], old);
        references[v] = reference(s, new);
        alpha[v] = power.of(s, s.sub(old, references[v]));
        s.store(new, &mut max[v * S::LANES..]);
    }

    // One vector of queries after the other: with the constants of the exponential, two at a time do not fit 16 registers.
    let mut sums = [[s.zero(); CHAINS]; NV];
    for (v, sums) in sums.iter_mut().enumerate() {
        let exponent = (v * S::LANES, power, references[v]);
        let mut chunks = scores.chunks_exact_mut(CHAINS * nr);
        for chunk in &mut chunks {
            for (chain, sum) in sums.iter_mut().enumerate() {
                *sum = s.add(*sum, weigh(s, &mut chunk[chain * nr..][..nr], exponent));
            }
        }
        for (chain, row) in chunks.into_remainder().chunks_exact_mut(nr).enumerate() {
            sums[chain] = s.add(sums[chain], weigh(s, row, exponent));
        }
    }

    for v in 0..NV {
        let sums = &mut sums[v];
        let mut chains = CHAINS;
        while chains > 1 {
            chains /= 2;
            for chain in 0..chains {
                sums[chain] = s.add(sums[chain], sums[chain + chains]);
            }
        }
        let mut total = sums[0];
        if PACKED {
            total = fold_keys(s, total, CHAINS, |x, y| s.add(x, y));
        }
        let old = s.load(&sum[v * S::LANES..]);
        s.store(s.mul_add(old, alpha[v], total), &mut sum[v * S::LANES..]);
    }
    alpha
}

/// What a row's exponents are taken relative to: its maximum, 0 where it has seen nothing, NaN where it is +infinity.
#[inline(always)]
pub(crate) fn reference<S: Simd>(s: S, max: S::F32) -> S::F32 {
    let nothing_seen = s.eq(max, s.splat(f32::NEG_INFINITY));
    s.select(nothing_seen, s.zero(), s.add(max, s.sub(max, max)))
}

/// Turns the scores of one key and one vector of queries, at `lane`, into weights.
#[inline(always)]
fn weigh<S: Simd>(
    s: S,
    row: &mut [f32],
    (lane, power, reference): (usize, ScaledExp2<S::F32>, S::F32),
) -> S::F32 {
    let at = &mut row[lane..];
    let p = power.of(s, s.sub(s.load(at), reference));
    s.store(p, at);
    p
}

/// The log-sum-exp from the state; `natural` makes natural units of a score. Finite where the maximum is.
pub(crate) fn lse(max: f32, sum: f64, natural: f64) -> f32 {
    if max == f32::NEG_INFINITY && sum == 0.0 {
        return f32::NEG_INFINITY;
    }
    let lse = f64::from(max) * natural + sum.ln();
    if lse.is_finite() { lse.clamp(f32::MIN.into(), f32::MAX.into()) as f32 } else { lse as f32 }
}
