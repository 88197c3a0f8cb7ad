//! What happens to the scores of a strip and a block between the first product and the softmax:
//!
//! ```text
//! soft cap, + bias panel, - ALiBi, the caller's rule, x log2(e), interval, bits
//! ```
//!
//! One pass over [keys][NR] in L1, a vector at a time through all steps, in a function of its own: the products' loops stay
//! as small as without it. A plain call (nothing but intervals) does not come here; its few tiles on an edge are
//! masked in registers. Each step is there or not for the whole call, so a vector pays one predictable branch for a step
//! that is not. Units: without a caller's rule the packed queries carry log2(e) and every step adds in units of
//! log2; with one, scores are natural until the rule has seen them.

use core::ops::Range;

use qkv_simd::math::tanh;
use qkv_simd::{Simd, SimdOp};

use crate::AttentionSpec;
use crate::interval::{Ends, position_shift};
use crate::panels::WORD;
use crate::rule::{RuleLanes, ScoreRule};
use crate::strip::{MAX_NR, StripRows, load_lanes};

/// Factors that a call's scores are made with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Units {
    /// Folded into the packed queries.
    pub(crate) query_scale: f64,
    /// tanh of the product is multiplied by this.
    pub(crate) cap: Option<f32>,
    /// What is added to scores is multiplied by this: log2(e), or 1 where a rule wants natural units.
    pub(crate) unit: f32,
}

impl Units {
    pub(crate) fn new(spec: &AttentionSpec<'_>, key_dim: usize, rule: bool) -> Self {
        let unit = if rule { 1.0 } else { core::f64::consts::LOG2_E };
        let scale = spec.scale_for(key_dim);
        match spec.softcap {
            None => Self { query_scale: scale * unit, cap: None, unit: unit as f32 },
            Some(cap) => Self {
                query_scale: scale / f64::from(cap),
                cap: Some((f64::from(cap) * unit) as f32),
                unit: unit as f32,
            },
        }
    }
}

/// The lanes of a strip, for what depends on the query.
pub(crate) struct StripLanes<S: Simd, const NV: usize> {
    /// -slope x unit.
    slopes: [S::F32; NV],
    /// How far each lane's position is ahead of the first lane's.
    ahead: [S::F32; NV],
    /// Query heads and indices, for a rule.
    heads: [S::F32; NV],
    queries: [S::F32; NV],
}

impl<S: Simd, const NV: usize> StripLanes<S, NV> {
    #[inline(always)]
    pub(crate) fn new(s: S, spec: &AttentionSpec<'_>, rows: &StripRows, heads: usize, unit: f32) -> Self {
        let (mut slopes, mut lane_heads) = ([0.0; MAX_NR], [0.0; MAX_NR]);
        for lane in 0..NV * S::LANES {
            let head = rows.head(lane.min(rows.count - 1));
            lane_heads[lane] = head as f32;
            if let Some(all) = spec.alibi_slopes {
                let first = if all.len() == heads { 0 } else { rows.segment.index * heads };
                slopes[lane] = -all[first + head] * unit;
            }
        }
        let ahead = rows.lanes_ahead::<S, NV>(s);
        let mut queries = ahead;
        for query in &mut queries {
            *query = s.add(*query, s.splat(rows.query(0) as f32));
        }
        Self { slopes: load_lanes(s, &slopes), ahead, heads: load_lanes(s, &lane_heads), queries }
    }
}

/// The pass over one strip and block: everything that it needs. Its output is the largest score per lane.
pub(crate) struct ScorePass<'w, S: Simd, R, const NV: usize> {
    pub(crate) s: S,
    /// [keys][NR], those of the runs that were computed.
    pub(crate) scores: &'w mut [f32],
    /// The rows of `scores` that were computed.
    pub(crate) computed: &'w [Range<usize>],
    pub(crate) units: Units,
    /// Where ALiBi or a rule needs them.
    pub(crate) lanes: Option<StripLanes<S, NV>>,
    pub(crate) alibi: bool,
    pub(crate) rule: R,
    pub(crate) batch: usize,
    /// The block's first key, and the first lane's position less it.
    pub(crate) first_key: usize,
    pub(crate) position: f32,
    /// [keys][NR] in natural units, and whether any of it is -infinity.
    pub(crate) bias: Option<(&'w [f32], bool)>,
    /// [keys / 32][NR].
    pub(crate) bits: Option<&'w [f32]>,
    /// Where some key may be outside the interval of some lane, and the keys that are inside for all.
    pub(crate) ends: Option<Ends<S::F32, NV>>,
    pub(crate) whole: Range<usize>,
}

/// The first lane's position counted from a key, as f32; clamped where f32 would round.
pub(crate) fn relative_position(spec: &AttentionSpec<'_>, rows: &StripRows, key: usize) -> f32 {
    let p = position_shift(spec, &rows.segment).saturating_add(rows.query(0) as i64);
    p.saturating_sub(key as i64) as f32
}

impl<S: Simd, R: ScoreRule, const NV: usize> SimdOp for ScorePass<'_, S, R, NV> {
    type Output = [S::F32; NV];

    #[inline(always)]
    fn eval<Same: Simd>(mut self, _: Same) -> [S::F32; NV] {
        let (s, nr) = (self.s, NV * S::LANES);
        let scores = core::mem::take(&mut self.scores);
        let mut max = [s.splat(f32::NEG_INFINITY); NV];
        for run in self.computed {
            for key in run.clone() {
                let row = &mut scores[key * nr..][..nr];
                let on_edge = !self.whole.contains(&key);
                for v in 0..NV {
                    let at = &mut row[v * S::LANES..];
                    let score = self.steps(key, v, on_edge, s.load(at));
                    s.store(score, at);
                    max[v] = s.max(score, max[v]);
                }
            }
        }
        max
    }
}

impl<S: Simd, R: ScoreRule, const NV: usize> ScorePass<'_, S, R, NV> {
    /// All steps for vector `v` of key `key`, counted from the block's first.
    #[inline(always)]
    fn steps(&self, key: usize, v: usize, on_edge: bool, score: S::F32) -> S::F32 {
        let (s, nr) = (self.s, NV * S::LANES);
        let masked = s.splat(f32::NEG_INFINITY);
        let mut score = score;
        if let Some(cap) = self.units.cap {
            score = s.mul(tanh(s, score), s.splat(cap));
        }
        if let Some((panel, masks)) = self.bias {
            let bias = s.load(&panel[key * nr + v * S::LANES..]);
            score = s.mul_add(bias, s.splat(self.units.unit), score);
            if masks {
                // Whatever the score was, NaN too.
                score = s.select(s.eq(bias, masked), masked, score);
            }
        }
        if let Some(lanes) = &self.lanes {
            if self.alibi {
                let distance = s.abs(s.add(lanes.ahead[v], s.splat(self.position - key as f32)));
                score = s.mul_add(lanes.slopes[v], distance, score);
            }
            if R::ACTIVE {
                let of_vector = RuleLanes {
                    batch: self.batch,
                    head: lanes.heads[v],
                    query: lanes.queries[v],
                    position: s.add(lanes.ahead[v], s.splat(self.position + self.first_key as f32)),
                };
                score = self.rule.apply(s, &of_vector, self.first_key + key, score);
                score = s.mul(score, s.splat(core::f32::consts::LOG2_E));
            }
        }
        if let (true, Some(ends)) = (on_edge, &self.ends) {
            score = s.select(ends.sees(s, v, s.splat(key as f32)), score, masked);
        }
        if let Some(words) = self.bits {
            let word = s.load(&words[key / WORD * nr + v * S::LANES..]);
            score = s.select(s.test_bit(word, (key % WORD) as u32), score, masked);
        }
        score
    }
}
