//! What happens to the scores of a strip and a block between the first product and the softmax:
//!
//! ```text
//! soft cap, + bias panel, - ALiBi, the caller's rule, interval, bits
//! ```
//!
//! Bias, interval and bits are light and are done by the first product on its tile, while it is in registers ([`TileOps`]).
//! A call with a soft cap, ALiBi or a rule does all steps in one pass over [keys][NR] in L1 instead ([`ScorePass`]), in
//! a function of its own, so that the products' loops stay small. Each step is there or not for the whole call: one
//! predictable branch per tile. The units of scores are those of [`Units`].

use core::ops::Range;

use qkv_gemm::tile::Acc;
use qkv_simd::math::tanh;
use qkv_simd::{Simd, SimdOp};

use crate::AttentionSpec;
use crate::interval::{Ends, position_shift};
use crate::panels::{BiasPanel, WORD};
use crate::rule::{RuleLanes, ScoreRule};
use crate::strip::{MAX_NR, StripRows, load_lanes};

/// Factors that a call's scores are made with.
///
/// The scale is split: a power of two goes into the packed queries, which is exact, and the rest, with log2(e), is the
/// factor of the exponential ([`ScaledExp2`](qkv_simd::math::ScaledExp2)). So the scale costs no rounding.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Units {
    /// Folded into the packed queries.
    pub(crate) query_scale: f64,
    /// tanh of the product is multiplied by this.
    pub(crate) cap: Option<f32>,
    /// What is added to scores is multiplied by this: 1 where scores are natural.
    pub(crate) unit: f32,
    /// Makes log2 units of a score.
    pub(crate) to_log2: f32,
    /// Makes natural units of a score.
    pub(crate) natural: f64,
}

/// A scale whose exponent is outside of this is folded into the queries as it is, so that nothing overflows on the way.
const SPLIT_EXPONENTS: Range<i32> = -64..64;

impl Units {
    /// A rule and the soft cap want natural scores.
    pub(crate) fn new(spec: &AttentionSpec<'_>, key_dim: usize, rule: bool) -> Self {
        let log2_e = core::f64::consts::LOG2_E;
        let scale = spec.scale_for(key_dim);
        if let Some(cap) = spec.softcap {
            let query_scale = scale / f64::from(cap);
            return Self { query_scale, cap: Some(cap), unit: 1.0, to_log2: log2_e as f32, natural: 1.0 };
        }
        let exponent = scale.abs().log2().floor();
        let splits =
            !rule && exponent >= SPLIT_EXPONENTS.start.into() && exponent < SPLIT_EXPONENTS.end.into();
        let power = if splits { exponent.exp2().copysign(scale) } else { scale };
        let rest = if splits { scale / power } else { 1.0 };
        Self {
            query_scale: power,
            cap: None,
            unit: (1.0 / rest) as f32,
            to_log2: (rest * log2_e) as f32,
            natural: rest,
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
        // Of lanes without a row heads and queries are the last one's: a rule may look something up by them.
        let ahead = rows.lanes_ahead::<S, NV>(s);
        let mut queries = ahead;
        for query in &mut queries {
            *query = s.add(*query, s.splat(rows.query(0) as f32));
        }
        Self { slopes: load_lanes(s, &slopes), ahead, heads: load_lanes(s, &lane_heads), queries }
    }
}

/// The last and light steps, for a tile of scores in registers: bias panel, interval, bits.
pub(crate) struct TileOps<'w, S: Simd, const NV: usize> {
    /// What the bias is multiplied by.
    pub(crate) unit: f32,
    /// Whether there is a bias panel.
    pub(crate) bias: bool,
    /// [keys / 32][NR].
    pub(crate) bits: Option<&'w [f32]>,
    /// Where some key may be outside the interval of some lane, and the keys that are inside for all.
    pub(crate) ends: Option<Ends<S::F32, NV>>,
    pub(crate) whole: Range<usize>,
}

impl<S: Simd, const NV: usize> TileOps<'_, S, NV> {
    /// Whether there is anything to do.
    pub(crate) fn is_empty(&self) -> bool {
        !self.bias && self.bits.is_none() && self.ends.is_none()
    }

    #[inline(always)]
    fn add_bias<const KEYS: usize>(
        &self,
        s: S,
        key: usize,
        tile: &mut Acc<S, KEYS, NV>,
        bias: &BiasPanel<'_>,
    ) {
        if !self.bias {
            return;
        }
        let nr = NV * S::LANES;
        let panel = &bias.values[key * nr..][..KEYS * nr];
        for (i, row) in tile.iter_mut().enumerate() {
            for (v, score) in row.iter_mut().enumerate() {
                let x = s.load(&panel[i * nr + v * S::LANES..]);
                *score = s.mul_add(x, s.splat(self.unit), *score);
                if bias.masks {
                    // Whatever the score was, NaN too.
                    let masked = s.splat(f32::NEG_INFINITY);
                    *score = s.select(s.eq(x, masked), masked, *score);
                }
            }
        }
    }

    #[inline(always)]
    fn mask<const KEYS: usize>(&self, s: S, key: usize, tile: &mut Acc<S, KEYS, NV>) {
        let nr = NV * S::LANES;
        if let Some(ends) = &self.ends
            && (key < self.whole.start || key + KEYS > self.whole.end)
        {
            ends.apply(s, key, tile);
        }
        if let Some(words) = self.bits {
            // The tile's bits in one word per lane, from bit 0 on: what is tested then is known to the compiler.
            let (first, last) = (key / WORD * nr, (key + KEYS - 1) / WORD * nr);
            let (low, high) = (&words[first..][..nr], &words[last..][..nr]);
            for v in 0..NV {
                let (low, high) = (s.load(&low[v * S::LANES..]), s.load(&high[v * S::LANES..]));
                let word = s.funnel_right(low, high, (key % WORD) as u32);
                for (i, row) in tile.iter_mut().enumerate() {
                    row[v] = s.select(s.test_bit(word, i as u32), row[v], s.splat(f32::NEG_INFINITY));
                }
            }
        }
    }

    /// All of them, on the scores of keys `key + i` counted from the block's first, with the block's bias.
    #[inline(always)]
    pub(crate) fn apply<const KEYS: usize>(
        &self,
        s: S,
        key: usize,
        tile: &mut Acc<S, KEYS, NV>,
        bias: &BiasPanel<'_>,
    ) {
        self.add_bias(s, key, tile, bias);
        self.mask(s, key, tile);
    }
}

/// The pass over one strip and block: everything that it needs. Its output is the largest score per lane.
pub(crate) struct ScorePass<'w, S: Simd, R, const NV: usize> {
    pub(crate) s: S,
    /// [keys][NR], those of the runs that were computed.
    pub(crate) scores: &'w mut [f32],
    /// The rows of `scores` that were computed.
    pub(crate) computed: &'w [Range<usize>],
    pub(crate) cap: Option<f32>,
    /// Where ALiBi or a rule needs them.
    pub(crate) lanes: Option<StripLanes<S, NV>>,
    pub(crate) alibi: bool,
    pub(crate) rule: R,
    pub(crate) batch: usize,
    /// The block's first key, and the first lane's position less it.
    pub(crate) first_key: usize,
    pub(crate) position: f32,
    pub(crate) tile_ops: TileOps<'w, S, NV>,
    pub(crate) bias: &'w BiasPanel<'w>,
}

/// The first lane's position counted from a key, as f32.
pub(crate) fn relative_position(spec: &AttentionSpec<'_>, rows: &StripRows, key: usize) -> f32 {
    let p = position_shift(spec, &rows.segment).saturating_add(rows.query(0) as i64);
    p.saturating_sub(key as i64) as f32
}

/// Keys that go through the steps together: what a step asks of the call is then asked once for several vectors.
const KEYS_AT_ONCE: usize = 4;

impl<S: Simd, R: ScoreRule, const NV: usize> SimdOp for ScorePass<'_, S, R, NV> {
    type Output = [S::F32; NV];

    #[inline(always)]
    fn eval<Same: Simd>(mut self, _: Same) -> Self::Output {
        let scores = core::mem::take(&mut self.scores);
        let mut max = [self.s.splat(f32::NEG_INFINITY); NV];
        for run in self.computed {
            let mut key = run.start;
            while key + KEYS_AT_ONCE <= run.end {
                self.keys::<KEYS_AT_ONCE>(key, scores, &mut max);
                key += KEYS_AT_ONCE;
            }
            while key < run.end {
                self.keys::<1>(key, scores, &mut max);
                key += 1;
            }
        }
        max
    }
}

impl<S: Simd, R: ScoreRule, const NV: usize> ScorePass<'_, S, R, NV> {
    /// All steps for `KEYS` keys from `key` on, counted from the block's first, and the largest scores so far.
    #[inline(always)]
    fn keys<const KEYS: usize>(&self, key: usize, scores: &mut [f32], max: &mut [S::F32; NV]) {
        let (s, nr) = (self.s, NV * S::LANES);
        let scores = &mut scores[key * nr..][..KEYS * nr];
        if let Some(cap) = self.cap {
            // Through memory: the function is long enough not to be unrolled over many vectors.
            for x in scores.chunks_exact_mut(S::LANES) {
                s.store(s.mul(tanh(s, s.load(x)), s.splat(cap)), x);
            }
        }
        let mut tile = [[s.zero(); NV]; KEYS];
        for (i, row) in tile.iter_mut().enumerate() {
            for (v, score) in row.iter_mut().enumerate() {
                *score = s.load(&scores[i * nr + v * S::LANES..]);
            }
        }
        self.steps(key, &mut tile);
        for (i, row) in tile.iter().enumerate() {
            for (v, &score) in row.iter().enumerate() {
                s.store(score, &mut scores[i * nr + v * S::LANES..]);
                max[v] = s.max(score, max[v]);
            }
        }
    }

    /// The steps after the soft cap.
    #[inline(always)]
    fn steps<const KEYS: usize>(&self, key: usize, tile: &mut Acc<S, KEYS, NV>) {
        let s = self.s;
        self.tile_ops.add_bias(s, key, tile, self.bias);
        if let Some(lanes) = &self.lanes {
            if self.alibi {
                for (i, row) in tile.iter_mut().enumerate() {
                    let from_key = s.splat(self.position - (key + i) as f32);
                    for (v, score) in row.iter_mut().enumerate() {
                        let distance = s.abs(s.add(lanes.ahead[v], from_key));
                        *score = s.mul_add(lanes.slopes[v], distance, *score);
                    }
                }
            }
            if R::ACTIVE {
                for v in 0..NV {
                    let of_vector = RuleLanes {
                        batch: self.batch,
                        head: lanes.heads[v],
                        query: lanes.queries[v],
                        position: s.add(lanes.ahead[v], s.splat(self.position + self.first_key as f32)),
                    };
                    for (i, row) in tile.iter_mut().enumerate() {
                        row[v] = self.rule.apply(s, &of_vector, self.first_key + key + i, row[v]);
                    }
                }
            }
        }
        self.tile_ops.mask(s, key, tile);
    }
}
