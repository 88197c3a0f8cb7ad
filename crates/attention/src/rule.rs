//! A caller's own rule for scores, compiled into the kernel.
//!
//! [`ScoreRule`] is the vector form, as fast as what is built in: implement it for a small `Copy` type and pass it to
//! [`crate::attention_with_rule`]. [`score_mod`] and [`mask_mod`] make a rule of a closure that is called once per score:
//! slower, but enough to try an idea. Both see scores in natural units, after the soft cap and the biases and before
//! the built-in masks.

use core::ops::Range;

use qkv_simd::Simd;

use crate::reference::Place;

/// The queries of a vector, lane by lane. Numbers are f32, exact below 2^24; longer sequences are refused with a rule.
#[derive(Clone, Copy, Debug)]
pub struct RuleLanes<S: Simd> {
    /// Batch, or number of the packed sequence.
    pub batch: usize,
    /// Query head.
    pub head: S::F32,
    /// Query index, from 0.
    pub query: S::F32,
    /// The query's position among the keys (see [`crate::AttentionSpec`]).
    pub position: S::F32,
}

/// A range of queries and heads, for [`ScoreRule::keys`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RuleRows {
    /// Batch, or number of the packed sequence.
    pub batch: usize,
    /// Query heads.
    pub heads: Range<usize>,
    /// Query indices.
    pub queries: Range<usize>,
    /// Length of the queries' sequence.
    pub query_len: usize,
    /// Length of the keys' sequence.
    pub key_len: usize,
}

/// What happens to a vector of scores.
pub trait ScoreRule: Copy + Send + Sync {
    /// Whether there is anything to do; the kernel leaves `apply` out where not.
    const ACTIVE: bool = true;

    /// The keys outside of which no query of `rows` sees any: they are not computed at all. [`Self::apply`] must mask
    /// what lies inside but is not seen.
    fn keys(&self, rows: &RuleRows) -> Range<usize> {
        0..rows.key_len
    }

    /// The new scores of `key` and the queries in the lanes; -infinity where a query does not see the key.
    ///
    /// Must be `#[inline(always)]`, and must not let one lane depend on another.
    fn apply<S: Simd>(&self, s: S, lanes: &RuleLanes<S>, key: usize, scores: S::F32) -> S::F32;
}

/// No rule.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NoRule;

impl ScoreRule for NoRule {
    const ACTIVE: bool = false;
    #[inline(always)]
    fn apply<S: Simd>(&self, _: S, _: &RuleLanes<S>, _: usize, scores: S::F32) -> S::F32 {
        scores
    }
}

/// A closure as a rule; see [`score_mod`].
#[derive(Clone, Copy, Debug)]
pub struct PerScore<F>(F);

impl<F: Fn(Place, f32) -> f32 + Copy + Send + Sync> ScoreRule for PerScore<F> {
    #[inline(always)]
    fn apply<S: Simd>(&self, s: S, lanes: &RuleLanes<S>, key: usize, scores: S::F32) -> S::F32 {
        let (mut heads, mut queries, mut values) = ([0.0; 16], [0.0; 16], [0.0; 16]);
        s.store(lanes.head, &mut heads);
        s.store(lanes.query, &mut queries);
        s.store(scores, &mut values);
        for lane in 0..S::LANES {
            let place =
                Place { batch: lanes.batch, head: heads[lane] as usize, query: queries[lane] as usize, key };
            values[lane] = (self.0)(place, values[lane]);
        }
        s.load(&values)
    }
}

/// A closure as a mask; see [`mask_mod`].
#[derive(Clone, Copy, Debug)]
pub struct PerPlace<F>(F);

impl<F: Fn(Place) -> bool + Copy + Send + Sync> ScoreRule for PerPlace<F> {
    #[inline(always)]
    fn apply<S: Simd>(&self, s: S, lanes: &RuleLanes<S>, key: usize, scores: S::F32) -> S::F32 {
        let sees = self.0;
        PerScore(move |place, score| if sees(place) { score } else { f32::NEG_INFINITY })
            .apply(s, lanes, key, scores)
    }
}

/// A rule from a closure that gets a score and its place and returns the new score (FlexAttention's score_mod).
pub fn score_mod<F: Fn(Place, f32) -> f32 + Copy + Send + Sync>(f: F) -> PerScore<F> {
    PerScore(f)
}

/// A rule from a closure that says whether the query of a place sees its key (FlexAttention's mask_mod).
pub fn mask_mod<F: Fn(Place) -> bool + Copy + Send + Sync>(sees: F) -> PerPlace<F> {
    PerPlace(sees)
}
