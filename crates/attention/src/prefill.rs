//! The fused kernel: a block of query rows against all the keys that they see.
//!
//! Queries are lanes. For a strip of NR query rows and a block of keys:
//!
//! ```text
//! S^T = K Q^T        tile rows are keys, read in place; Q^T is packed once per task, [dk][NR], scale folded in
//! P^T = 2^(S^T - m)  down the lanes, see online_softmax.rs; the block of P^T is now a packed [keys][NR] panel
//! O^T = alpha O^T + V^T P^T     tile rows are value dims: V's rows are read in place, as columns
//! ```
//!
//! Both products run on the one register tile, and neither keys nor values are packed. All strips of the task
//! take a key block in turn while it is in L2. What happens to scores on their way is in score_ops.rs, which keys are
//! left out in interval.rs and runs.rs, values behind a mask that are NaN or infinite in hidden.rs; packing the queries
//! and storing the outputs in strip.rs.

use core::ops::Range;

use qkv_gemm::tile::{Columns, Rhs, Rows, tile};
use qkv_gemm::{TileOp, with_scratch};
use qkv_simd::{Simd, SimdOp};

use crate::interval::{self, Ends, Visible};
use crate::online_softmax::{self, SUM_CHAINS};
use crate::panels::{self, Ahead, BiasPanel, Bits, WORD};
use crate::plan::{KEY_BLOCK, Plan, Task, key_block};
use crate::row_tiles::{RowsOp, for_row_tiles};
use crate::rule::ScoreRule;
use crate::runs::Runs;
use crate::score_ops::{ScorePass, StripLanes, TileOps, Units, relative_position};
use crate::spec::intersect;
use crate::strip::{MAX_NR, StripRows};
use crate::weights::SelectedWeights;
use crate::{AttentionSpec, TensorMut, TensorRef};

/// No block of keys is larger.
pub(crate) const MAX_KEY_BLOCK: usize = KEY_BLOCK + SUM_CHAINS;

/// Everything that the tasks of a call share.
pub(crate) struct Call<'a, R> {
    pub(crate) q: TensorRef<'a>,
    pub(crate) k: TensorRef<'a>,
    pub(crate) v: TensorRef<'a>,
    pub(crate) out: TensorMut<'a>,
    /// (batch, query heads, query length, 1).
    pub(crate) lse: Option<TensorMut<'a>>,
    /// (batch, query heads, query length, 1).
    pub(crate) maxima: Option<TensorMut<'a>>,
    /// For inspection only.
    pub(crate) weights: Option<SelectedWeights<'a>>,
    pub(crate) spec: &'a AttentionSpec<'a>,
    pub(crate) rule: R,
    pub(crate) units: Units,
    pub(crate) plan: Plan,
}

/// Where a worker's scratch holds what, in values. Every part begins on a cache line.
///
/// ```text
/// | queries: strips x [dk][NR] | outputs: strips x [dv][NR] | max, sum: strips x 2 x [NR] | scores: [block][NR] |
/// | rows: [NR][max(dk, dv, block)], the strip being packed or stored | values: [block][dv], the careful way's copy |
/// | bits: [block / 32][NR] | bias: [block][NR], where there is one |
/// ```
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    outputs: usize,
    state: usize,
    scores: usize,
    rows: usize,
    values: usize,
    bits: usize,
    bias: usize,
    pub(crate) total: usize,
}

impl Layout {
    pub(crate) fn new(plan: &Plan) -> Self {
        let nr = plan.kernel.nr;
        let (dk, dv) = (plan.shape.key_dim, plan.shape.value_dim);
        let mut end = 0;
        let mut part = |values: usize| {
            let start = end;
            end += values.next_multiple_of(16);
            start
        };
        part(plan.strips() * dk * nr);
        let outputs = part(plan.strips() * dv * nr);
        let state = part(plan.strips() * 2 * nr);
        let scores = part(MAX_KEY_BLOCK * nr);
        let rows = part(nr * dk.max(dv).max(MAX_KEY_BLOCK));
        let values = part(MAX_KEY_BLOCK * dv);
        let bits = part(MAX_KEY_BLOCK.div_ceil(WORD) * nr);
        let bias = part(if plan.has_panels { MAX_KEY_BLOCK * nr } else { 0 });
        Self { outputs, state, scores, rows, values, bits, bias, total: end }
    }
}

/// A worker's scratch, cut into its parts.
pub(crate) struct Scratch<'s> {
    pub(crate) queries: &'s mut [f32],
    pub(crate) outputs: &'s mut [f32],
    pub(crate) state: &'s mut [f32],
    pub(crate) scores: &'s mut [f32],
    pub(crate) rows: &'s mut [f32],
    pub(crate) values: &'s mut [f32],
    pub(crate) bits: &'s mut [f32],
    pub(crate) bias: &'s mut [f32],
}

impl<'s> Scratch<'s> {
    fn cut(layout: &Layout, memory: &'s mut [f32]) -> Self {
        let (memory, bias) = memory.split_at_mut(layout.bias);
        let (memory, bits) = memory.split_at_mut(layout.bits);
        let (memory, values) = memory.split_at_mut(layout.values);
        let (memory, rows) = memory.split_at_mut(layout.rows);
        let (memory, scores) = memory.split_at_mut(layout.scores);
        let (memory, state) = memory.split_at_mut(layout.state);
        let (queries, outputs) = memory.split_at_mut(layout.outputs);
        Self { queries, outputs, state, scores, rows, values, bits, bias }
    }
}

/// One task, to be dispatched with the tile shape of the instruction set.
pub(crate) struct Prefill<'c, 'a, R> {
    pub(crate) call: &'c Call<'a, R>,
    pub(crate) task: Task,
}

impl<R: ScoreRule> TileOp for Prefill<'_, '_, R> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd, const MR: usize, const NV: usize>(self, s: S) {
        let layout = Layout::new(&self.call.plan);
        with_scratch(layout.total, |memory| {
            let scratch = Scratch::cut(&layout, memory);
            // The closure runs inside a function without vector features: enter them again.
            s.vectorize(Worker::<S, R, MR, NV> {
                s,
                call: self.call,
                task: &self.task,
                scratch,
                key_block: key_block(self.task.segment.key_len),
                started: 0,
                scanned: None,
                scan_found: false,
            });
        });
    }
}

/// A task in the hands of a worker, compiled for an instruction set and its tile.
pub(crate) struct Worker<'w, 'a, S, R, const MR: usize, const NV: usize> {
    pub(crate) s: S,
    pub(crate) call: &'w Call<'a, R>,
    pub(crate) task: &'w Task,
    pub(crate) scratch: Scratch<'w>,
    pub(crate) key_block: usize,
    /// Bit i: strip i has seen a block, its part of the outputs holds something.
    pub(crate) started: u64,
    /// The block of keys whose values have been scanned for NaN and infinities, and what was found.
    pub(crate) scanned: Option<usize>,
    pub(crate) scan_found: bool,
}

impl<S: Simd, R: ScoreRule, const MR: usize, const NV: usize> SimdOp for Worker<'_, '_, S, R, MR, NV> {
    type Output = ();

    #[inline(always)]
    fn eval<Same: Simd>(mut self, _: Same) {
        let strips = self.task.rows.len().div_ceil(Self::NR);
        for strip in 0..strips {
            self.begin_state(strip);
            self.pack_queries(strip);
        }
        let segment = &self.task.segment;
        let all = StripRows { count: self.task.rows.len(), ..self.rows_of(0) };
        let keys = interval::visible(self.call.spec, segment, all.queries()).any;
        let block = self.key_block;
        for begin in (keys.start / block * block..keys.end).step_by(block) {
            let in_block = begin..(begin + block).min(keys.end);
            // The last rows first: under a causal mask they see most of the block, and bring it in for the others.
            for strip in (0..strips).rev() {
                self.fold_block(strip, in_block.clone());
            }
        }
        if self.call.weights.is_some() {
            for strip in 0..strips {
                for begin in (keys.start / block * block..keys.end).step_by(block) {
                    self.store_weights(strip, begin..(begin + block).min(keys.end));
                }
            }
        }
        for strip in 0..strips {
            self.store_outputs(strip);
        }
    }
}

impl<S: Simd, R: ScoreRule, const MR: usize, const NV: usize> Worker<'_, '_, S, R, MR, NV> {
    /// Query rows in a strip.
    pub(crate) const NR: usize = NV * S::LANES;

    /// The rows in the lanes of a strip.
    #[inline(always)]
    pub(crate) fn rows_of(&self, strip: usize) -> StripRows {
        let first = self.task.rows.start + strip * Self::NR;
        StripRows {
            segment: self.task.segment,
            kv_head: self.task.kv_head,
            group: self.call.plan.shape.group(),
            first,
            count: Self::NR.min(self.task.rows.end - first),
        }
    }

    /// Whether it holds the task's last rows, and so is the first to be computed.
    #[inline(always)]
    fn is_last(&self, strip: usize) -> bool {
        self.task.rows.start + (strip + 1) * Self::NR >= self.task.rows.end
    }

    /// Number of the block that a key is in.
    #[inline(always)]
    pub(crate) fn block_index(&self, key: usize) -> usize {
        key / self.key_block
    }

    /// The value row of a key of the task's sequence.
    #[inline(always)]
    pub(crate) fn value_row(&self, key: usize) -> &[f32] {
        self.call.v.row(self.task.segment.batch, self.task.kv_head, self.task.segment.first_key + key)
    }

    /// Where the softmax of a strip begins: with nothing, or with its heads' sinks, which have no value.
    #[inline(always)]
    fn begin_state(&mut self, strip: usize) {
        let rows = self.rows_of(strip);
        let state = &mut self.scratch.state[strip * 2 * Self::NR..][..2 * Self::NR];
        let (max, sum) = state.split_at_mut(Self::NR);
        max.fill(f32::NEG_INFINITY);
        sum.fill(0.0);
        if let Some(sinks) = self.call.spec.sinks {
            for lane in 0..rows.count {
                let sink = sinks[rows.head(lane)];
                if sink != f32::NEG_INFINITY {
                    max[lane] = sink * core::f32::consts::LOG2_E;
                    sum[lane] = 1.0;
                }
            }
        }
    }

    /// Folds one block of keys into a strip: scores, softmax update, weighted values.
    #[inline(always)]
    fn fold_block(&mut self, strip: usize, block: Range<usize>) {
        let Some(BlockScores { keys, visible, max: block_max, anywhere }) = self.block_scores(strip, block)
        else {
            return;
        };
        let seen = self.has_hidden_nan(&keys, &visible, anywhere).then(|| self.copy_finite_values(&keys));
        let (max, sum) = self.scratch.state[strip * 2 * Self::NR..][..2 * Self::NR].split_at_mut(Self::NR);
        let scores = &mut self.scratch.scores[..keys.len() * Self::NR];
        let alpha = online_softmax::update(self.s, max, sum, block_max, scores, self.call.units.to_log2);

        let (v, v_stride) = match &seen {
            Some(_) => (self.scratch.values.as_ptr(), self.call.plan.shape.value_dim as isize),
            None => (self.value_row(keys.start).as_ptr(), self.call.v.position_stride()),
        };
        self.weighted_sum(strip, (v, v_stride), keys.len(), alpha);
        if let Some(seen) = seen {
            self.add_visible_nans(strip, &keys, &seen);
        }
        self.started |= 1 << strip;
    }

    /// The scores of a strip and the part of a block that it sees, into the scratch; `None` where it sees nothing.
    ///
    /// Gaps that a block-sparse mask leaves inside that part are not computed and score -infinity.
    #[inline(always)]
    pub(crate) fn block_scores(
        &mut self,
        strip: usize,
        block: Range<usize>,
    ) -> Option<BlockScores<S::F32, NV>> {
        let (call, spec) = (self.call, self.call.spec);
        let rows = self.rows_of(strip);
        let visible = interval::visible(spec, &rows.segment, rows.queries());
        let mut any = intersect(&visible.any, &block);
        if R::ACTIVE {
            any = intersect(&any, &call.rule.keys(&rows.for_rule()));
        }
        let mut runs = Runs::new(spec, &rows, &any);
        let any = runs.hull();
        if any.is_empty() {
            return None;
        }
        // On the grid of the softmax's chains, so that a query's sums do not depend on the other lanes.
        let keys = any.start - (any.start - block.start) % SUM_CHAINS..any.end;
        runs.count_from(keys.start);
        let mut bits = Bits::All;
        if panels::needs_bits(spec, runs.ragged) {
            let words = &mut self.scratch.bits[..keys.len().div_ceil(WORD) * Self::NR];
            bits = panels::fill_bits(self.s, spec, &rows, &keys, words);
            if bits == Bits::None {
                return None;
            }
        }
        let (max, bias_masks) = self.scores(&rows, &keys, &runs, &visible, (strip, bits));
        let anywhere = bits == Bits::Some || bias_masks || R::ACTIVE || runs.as_slice().len() > 1;
        Some(BlockScores { keys, visible, max, anywhere })
    }

    /// The strip that comes next, and its keys, where a mask or a bias has to be brought in for it: the one before in this
    /// block, or the last in the next block.
    #[inline(always)]
    fn next_strip(
        &self,
        strip: usize,
        rows: &StripRows,
        keys: &Range<usize>,
    ) -> Option<(StripRows, Range<usize>)> {
        if self.call.spec.bias.is_none() && self.call.spec.mask.is_none() {
            return None;
        }
        let start = self.block_index(keys.start) * self.key_block;
        let (strip, start) = match strip.checked_sub(1) {
            Some(before) => (before, start),
            None => (self.task.rows.len().div_ceil(Self::NR) - 1, start + self.key_block),
        };
        let end = (start + self.key_block).min(rows.segment.key_len);
        Some((self.rows_of(strip), start.min(end)..end))
    }

    /// S^T of a strip and the runs of keys, masked, into the scratch; returns the largest per lane, and whether a bias masked
    /// any.
    #[inline(always)]
    fn scores(
        &mut self,
        rows: &StripRows,
        keys: &Range<usize>,
        runs: &Runs,
        visible: &Visible,
        (strip, bits): (usize, Bits),
    ) -> ([S::F32; NV], bool) {
        let (s, call, spec) = (self.s, self.call, self.call.spec);
        let (dk, first_key) = (call.plan.shape.key_dim, rows.segment.first_key + keys.start);
        let alibi = spec.alibi_slopes.is_some();
        let needs_pass = spec.softcap.is_some() || alibi || R::ACTIVE;
        let upcoming = self.is_last(strip).then(|| Upcoming {
            v: call.v.row_ptr(rows.segment.batch, rows.kv_head, first_key),
            stride: call.v.position_stride(),
            dim: call.plan.shape.value_dim,
        });
        let tiles = keys.len().div_ceil(MR);
        let ahead =
            self.next_strip(strip, rows, keys).and_then(|(rows, keys)| Ahead::new(spec, &rows, &keys, tiles));
        let panel = if call.plan.has_panels { keys.len() * Self::NR } else { 0 };
        let bias =
            BiasPanel::new(s, spec, rows, keys, (&mut self.scratch.bias[..panel], &mut *self.scratch.rows));
        let tile_ops = TileOps {
            unit: call.units.unit,
            bias: call.plan.has_panels,
            bits: (bits == Bits::Some).then_some(&*self.scratch.bits),
            // Without an edge in these keys nobody asks.
            ends: (!visible.is_whole(keys)).then(|| Ends::new(s, spec, rows, keys.start)),
            whole: visible.whole.start.saturating_sub(keys.start)
                ..visible.whole.end.saturating_sub(keys.start),
        };
        let mut op = Scores::<S, NV> {
            s,
            ahead,
            ops: (!needs_pass && !tile_ops.is_empty()).then_some(&tile_ops),
            base: 0,
            k: call.k.row_ptr(rows.segment.batch, rows.kv_head, first_key),
            k_stride: call.k.position_stride(),
            depth: dk,
            queries: &self.scratch.queries[strip * dk * Self::NR..][..dk * Self::NR],
            scores: &mut self.scratch.scores[..keys.len() * Self::NR],
            max: [s.splat(f32::NEG_INFINITY); NV],
            upcoming,
            bias: &bias,
        };
        let mut filled = 0;
        for run in runs.as_slice() {
            op.scores[filled * Self::NR..run.start * Self::NR].fill(f32::NEG_INFINITY);
            op.base = run.start;
            for_row_tiles::<MR, _>(run.len(), &mut op);
            filled = run.end;
        }
        if !needs_pass {
            let max = op.max;
            return (max, bias.masks);
        }
        let max = s.vectorize(ScorePass {
            s,
            scores: &mut self.scratch.scores[..keys.len() * Self::NR],
            computed: runs.as_slice(),
            cap: call.units.cap,
            lanes: (alibi || R::ACTIVE)
                .then(|| StripLanes::new(s, spec, rows, call.plan.shape.query_heads, call.units.unit)),
            alibi,
            rule: call.rule,
            batch: rows.segment.index,
            first_key: keys.start,
            position: relative_position(spec, rows, keys.start),
            tile_ops,
            bias: &bias,
        });
        (max, bias.masks)
    }

    /// O^T = alpha O^T + V^T P^T with the weights of `keys` keys in the scratch and the values in rows from `v` on.
    #[inline(always)]
    fn weighted_sum(
        &mut self,
        strip: usize,
        (v, v_stride): (*const f32, isize),
        keys: usize,
        alpha: [S::F32; NV],
    ) {
        let dv = self.call.plan.shape.value_dim;
        let mut factors = [0.0; MAX_NR];
        for (v, &alpha) in alpha.iter().enumerate() {
            self.s.store(alpha, &mut factors[v * S::LANES..]);
        }
        let mut op = WeightedSum::<S, NV> {
            s: self.s,
            v,
            v_stride,
            keys,
            weights: &self.scratch.scores[..keys * Self::NR],
            outputs: &mut self.scratch.outputs[strip * dv * Self::NR..][..dv * Self::NR],
            // The first block of a strip writes: what the scratch held before is never read.
            alpha: (self.started >> strip & 1 == 1).then_some(&factors),
        };
        for_row_tiles::<MR, _>(dv, &mut op);
    }
}

/// What [`Worker::block_scores`] has left in the scratch.
pub(crate) struct BlockScores<F, const NV: usize> {
    /// The keys whose scores they are.
    pub(crate) keys: Range<usize>,
    visible: Visible,
    /// The largest per lane.
    max: [F; NV],
    /// Whether any key may be masked for some lane, not only those on the edge of the interval.
    anywhere: bool,
}

/// The first product: tile rows are keys, lanes are queries. Rows count from the first key as `k` does.
struct Scores<'w, S: Simd, const NV: usize> {
    s: S,
    /// What happens to scores on the tile, if anything.
    ops: Option<&'w TileOps<'w, S, NV>>,
    /// Where the run begins that is being computed.
    base: usize,
    k: *const f32,
    k_stride: isize,
    depth: usize,
    queries: &'w [f32],
    scores: &'w mut [f32],
    max: [S::F32; NV],
    upcoming: Option<Upcoming>,
    ahead: Option<Ahead>,
    bias: &'w BiasPanel<'w>,
}

/// Value rows that the second product will read: as columns, in steps of a whole row, which the hardware does not
/// foresee. The first strip that reads a block asks for them in good time, row by row.
#[derive(Clone, Copy)]
struct Upcoming {
    v: *const f32,
    stride: isize,
    dim: usize,
}

impl Upcoming {
    #[inline(always)]
    fn prefetch<S: Simd>(&self, s: S, rows: Range<usize>) {
        for row in rows {
            for at in (0..self.dim).step_by(16) {
                s.prefetch(self.v.wrapping_offset(row as isize * self.stride).wrapping_add(at));
            }
        }
    }
}

impl<S: Simd, const NV: usize> RowsOp for Scores<'_, S, NV> {
    #[inline(always)]
    fn run<const ROWS: usize>(&mut self, first: usize) {
        let (s, nr, first) = (self.s, NV * S::LANES, self.base + first);
        let lhs = Rows { ptr: self.k.wrapping_offset(first as isize * self.k_stride), stride: self.k_stride };
        let rhs = Rhs { ptr: self.queries.as_ptr(), stride: nr as isize };
        debug_assert_eq!(self.queries.len(), self.depth * nr);
        if let Some(ahead) = &mut self.ahead {
            ahead.step(s);
        }
        if let Some(upcoming) = self.upcoming {
            upcoming.prefetch(s, first..first + ROWS);
        }
        // SAFETY: key rows first..first + ROWS exist and have `depth` values; the packed queries are [depth][nr].
        let mut acc = unsafe { tile::<S, _, ROWS, NV>(s, self.depth, lhs, rhs) };
        // Opaque, or the compiler would keep parts of it in registers through the product's loop, which needs them all.
        if let Some(ops) = core::hint::black_box(self.ops) {
            ops.apply(s, first, &mut acc, self.bias);
        }
        let out = &mut self.scores[first * nr..][..ROWS * nr];
        for (i, row) in acc.iter().enumerate() {
            for (v, &score) in row.iter().enumerate() {
                s.store(score, &mut out[i * nr + v * S::LANES..]);
                self.max[v] = s.max(score, self.max[v]);
            }
        }
    }
}

/// The second product: tile rows are value dims, lanes are queries.
struct WeightedSum<'w, S, const NV: usize> {
    s: S,
    v: *const f32,
    v_stride: isize,
    keys: usize,
    weights: &'w [f32],
    outputs: &'w mut [f32],
    /// In memory: as vectors they would stay in registers through the products' loop, which needs them all.
    alpha: Option<&'w [f32; MAX_NR]>,
}

impl<S: Simd, const NV: usize> RowsOp for WeightedSum<'_, S, NV> {
    #[inline(always)]
    fn run<const ROWS: usize>(&mut self, first: usize) {
        let (s, nr) = (self.s, NV * S::LANES);
        let lhs = Columns { ptr: self.v.wrapping_add(first), stride: self.v_stride };
        let rhs = Rhs { ptr: self.weights.as_ptr(), stride: nr as isize };
        debug_assert_eq!(self.weights.len(), self.keys * nr);
        // SAFETY: the `keys` value rows have dims first..first + ROWS; the weights are [keys][nr].
        let acc = unsafe { tile::<S, _, ROWS, NV>(s, self.keys, lhs, rhs) };
        let out = &mut self.outputs[first * nr..][..ROWS * nr];
        // Opaque, or the compiler would load the factors before the loop after all.
        let alpha = core::hint::black_box(self.alpha);
        for (i, row) in acc.iter().enumerate() {
            for (v, &sum) in row.iter().enumerate() {
                let at = &mut out[i * nr + v * S::LANES..];
                let value = match alpha {
                    Some(alpha) => s.mul_add(s.load(at), s.load(&alpha[v * S::LANES..]), sum),
                    None => sum,
                };
                s.store(value, at);
            }
        }
    }
}
