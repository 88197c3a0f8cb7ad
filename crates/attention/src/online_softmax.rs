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

use core::ops::Range;

use qkv_simd::{Simd, math::ScaledExp2};

use crate::few_rows::MOST_ROWS;
use crate::packed_scores::fold_keys;

/// Sums of p_j are kept in this many accumulators by key where tiles compute the scores, so that they do not wait for each other. Also
/// the grid to which the first key of a strip's part of a block is aligned, so that a query's sums do not depend on its
/// neighbours.
pub(crate) const SUM_CHAINS: usize = 2;

/// What a vector of scores is.
#[derive(Clone, Copy)]
pub(crate) enum ScoreVectors {
    /// A key's, a query per lane.
    OfKeys,
    /// Of so many values of one key after those of another, a power of two: packed_scores.rs.
    Packed(usize),
}

impl ScoreVectors {
    /// Chains in which weights are added up. With packed keys as many as a key has values: a chain has every such vector, and each of
    /// its lanes every LANES-th key, so that a row's sum does not depend on how many rows there are.
    #[inline(always)]
    fn chains(self) -> usize {
        match self {
            Self::OfKeys => SUM_CHAINS,
            Self::Packed(stride) => stride,
        }
    }
}

/// Folds a block of scores into the state and turns them into weights.
///
/// `max` and `sum` hold m and l of `NV` vectors of queries, `block_max` the largest scores of the block; `scores` are
/// rows of `NV` vectors, overwritten by p_j; `to_log2` is c. Returns alpha.
#[inline(always)]
pub(crate) fn update<S: Simd, const NV: usize>(
    s: S,
    (max, sum): (&mut [f32], &mut [f32]),
    block_max: [S::F32; NV],
    (scores, vectors): (&mut [f32], ScoreVectors),
    to_log2: f32,
) -> [S::F32; NV] {
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
    let mut totals = [s.zero(); NV];
    for (v, total) in totals.iter_mut().enumerate() {
        let exponent = (v * S::LANES, power, references[v]);
        let chains = vectors.chains();
        let mut sums = [s.zero(); MOST_ROWS];
        if chains == 1 {
            [sums[0]] = weigh_chains::<S, NV, 1>(s, scores, 0..chains, exponent);
        } else {
            // Nor more chains than these.
            for first in (0..chains).step_by(SUM_CHAINS) {
                let both = weigh_chains::<S, NV, SUM_CHAINS>(s, scores, first..chains, exponent);
                sums[first..first + SUM_CHAINS].copy_from_slice(&both);
            }
        }
        let mut halves = chains;
        while halves > 1 {
            halves /= 2;
            for chain in 0..halves {
                sums[chain] = s.add(sums[chain], sums[chain + halves]);
            }
        }
        *total = match vectors {
            ScoreVectors::OfKeys => sums[0],
            ScoreVectors::Packed(stride) => fold_keys(s, sums[0], stride, |x, y| s.add(x, y)),
        };
    }

    for v in 0..NV {
        let old = s.load(&sum[v * S::LANES..]);
        s.store(s.mul_add(old, alpha[v], totals[v]), &mut sum[v * S::LANES..]);
    }
    alpha
}

/// Turns the scores of `N` chains into weights, from the first of `chains` to the last of all; returns their sums.
#[inline(always)]
fn weigh_chains<S: Simd, const NV: usize, const N: usize>(
    s: S,
    scores: &mut [f32],
    chains: Range<usize>,
    exponent: (usize, ScaledExp2<S::F32>, S::F32),
) -> [S::F32; N] {
    let nr = NV * S::LANES;
    let mut sums = [s.zero(); N];
    let mut chunks = scores.chunks_exact_mut(chains.end * nr);
    for chunk in &mut chunks {
        for (chain, sum) in sums.iter_mut().enumerate() {
            *sum = s.add(*sum, weigh(s, &mut chunk[(chains.start + chain) * nr..][..nr], exponent));
        }
    }
    let rest = chunks.into_remainder().chunks_exact_mut(nr).skip(chains.start);
    for (sum, row) in sums.iter_mut().zip(rest) {
        *sum = s.add(*sum, weigh(s, row, exponent));
    }
    sums
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
