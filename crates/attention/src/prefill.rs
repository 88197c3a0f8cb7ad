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
//! take a key block in turn while it is in L2. Work of a task at dim 64: per score 4 x 64 FLOP, two loads of half a
//! vector each of K and V per tile row and step, one exponential.
//!
//! Values behind a mask that are NaN or infinite are the business of hidden.rs; packing the queries and storing the outputs
//! that of strip.rs.

use core::ops::Range;

use qkv_gemm::tile::{Columns, Rhs, Rows, tile};
use qkv_gemm::{TileOp, with_scratch};
use qkv_simd::{Simd, SimdOp};

use crate::mask::{Mask, StripRows, Visible};
use crate::online_softmax::{self, SUM_CHAINS};
use crate::plan::{Plan, Task};
use crate::row_tiles::{RowsOp, for_row_tiles};
use crate::{TensorMut, TensorRef};

/// Everything that the tasks of a call share.
pub(crate) struct Call<'a, M> {
    pub(crate) q: TensorRef<'a>,
    pub(crate) k: TensorRef<'a>,
    pub(crate) v: TensorRef<'a>,
    pub(crate) out: TensorMut<'a>,
    /// (batch, query heads, query length, 1).
    pub(crate) lse: Option<TensorMut<'a>>,
    pub(crate) mask: M,
    /// scale x log2(e).
    pub(crate) scale: f64,
    pub(crate) plan: Plan,
}

/// Where a worker's scratch holds what, in values. Every part begins on a cache line.
///
/// ```text
/// | queries: strips x [dk][NR] | outputs: strips x [dv][NR] | max, sum: strips x 2 x [NR] | scores: [block][NR] |
/// | rows: [NR][max(dk, dv)], the strip being packed or stored | values: [block][dv], the careful way's copy |
/// ```
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    queries: usize,
    outputs: usize,
    state: usize,
    scores: usize,
    rows: usize,
    values: usize,
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
        let queries = part(plan.strips() * dk * nr);
        let outputs = part(plan.strips() * dv * nr);
        let state = part(plan.strips() * 2 * nr);
        let scores = part(plan.key_block * nr);
        let rows = part(nr * dk.max(dv));
        let values = part(plan.key_block * dv);
        Self { queries, outputs, state, scores, rows, values, total: end }
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
}

impl<'s> Scratch<'s> {
    fn cut(layout: &Layout, memory: &'s mut [f32]) -> Self {
        let (memory, values) = memory.split_at_mut(layout.values);
        let (memory, rows) = memory.split_at_mut(layout.rows);
        let (memory, scores) = memory.split_at_mut(layout.scores);
        let (memory, state) = memory.split_at_mut(layout.state);
        let (queries, outputs) = memory.split_at_mut(layout.outputs);
        debug_assert_eq!(layout.queries, 0);
        Self { queries, outputs, state, scores, rows, values }
    }
}

/// One task, to be dispatched with the tile shape of the instruction set.
pub(crate) struct Prefill<'c, 'a, M> {
    pub(crate) call: &'c Call<'a, M>,
    pub(crate) task: Task,
}

impl<M: Mask> TileOp for Prefill<'_, '_, M> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd, const MR: usize, const NV: usize>(self, s: S) {
        let layout = Layout::new(&self.call.plan);
        with_scratch(layout.total, |memory| {
            let scratch = Scratch::cut(&layout, memory);
            // The closure runs inside a function without vector features: enter them again.
            s.vectorize(Worker::<S, M, MR, NV> { s, call: self.call, task: &self.task, scratch, started: 0 });
        });
    }
}

/// A task in the hands of a worker, compiled for an instruction set and its tile.
pub(crate) struct Worker<'w, 'a, S, M, const MR: usize, const NV: usize> {
    pub(crate) s: S,
    pub(crate) call: &'w Call<'a, M>,
    pub(crate) task: &'w Task,
    pub(crate) scratch: Scratch<'w>,
    /// Bit i: strip i has seen a block, its part of the outputs holds something.
    pub(crate) started: u64,
}

impl<S: Simd, M: Mask, const MR: usize, const NV: usize> SimdOp for Worker<'_, '_, S, M, MR, NV> {
    type Output = ();

    #[inline(always)]
    fn eval<Same: Simd>(mut self, _: Same) {
        let (plan, rows) = (&self.call.plan, &self.task.rows);
        let strips = rows.len().div_ceil(Self::NR);
        for state in self.scratch.state.chunks_exact_mut(2 * Self::NR) {
            state[..Self::NR].fill(f32::NEG_INFINITY);
            state[Self::NR..].fill(0.0);
        }
        for strip in 0..strips {
            self.pack_queries(strip);
        }
        let all = StripRows { first: rows.start, count: rows.len(), group: plan.shape.group() };
        let keys = self.call.mask.visible(all.positions()).any;
        // The grid of blocks begins at key 0 whatever the task sees, so that sums are cut at the same keys for all.
        let block = plan.key_block;
        for begin in (keys.start / block * block..keys.end).step_by(block) {
            let in_block = begin..(begin + block).min(keys.end);
            for strip in 0..strips {
                self.fold_block(strip, in_block.clone());
            }
        }
        for strip in 0..strips {
            self.store_outputs(strip);
        }
    }
}

impl<S: Simd, M: Mask, const MR: usize, const NV: usize> Worker<'_, '_, S, M, MR, NV> {
    /// Query rows in a strip.
    pub(crate) const NR: usize = NV * S::LANES;

    /// The rows in the lanes of a strip.
    #[inline(always)]
    pub(crate) fn rows_of(&self, strip: usize) -> StripRows {
        let first = self.task.rows.start + strip * Self::NR;
        let count = Self::NR.min(self.task.rows.end - first);
        StripRows { first, count, group: self.call.plan.shape.group() }
    }

    /// Folds one block of keys into a strip: scores, softmax update, weighted values.
    #[inline(always)]
    fn fold_block(&mut self, strip: usize, block: Range<usize>) {
        let visible = self.call.mask.visible(self.rows_of(strip).positions());
        // On the grid of the softmax's chains, so that a query's sums do not depend on the other lanes.
        let first = visible.any.start.max(block.start);
        let keys = first - (first - block.start) % SUM_CHAINS..visible.any.end.min(block.end);
        if keys.is_empty() {
            return;
        }
        let block_max = self.scores(strip, &keys, &visible);

        let (max, sum) = self.scratch.state[strip * 2 * Self::NR..][..2 * Self::NR].split_at_mut(Self::NR);
        let scores = &mut self.scratch.scores[..keys.len() * Self::NR];
        let alpha = online_softmax::update(self.s, max, sum, block_max, scores);

        let call = self.call;
        let hidden = self.has_hidden_nan(&keys, &visible);
        let (v, v_stride) = if hidden {
            self.copy_finite_values(&keys);
            (self.scratch.values.as_ptr(), call.plan.shape.value_dim as isize)
        } else {
            (call.v.row_ptr(self.task.batch, self.task.kv_head, keys.start), call.v.position_stride())
        };
        self.weighted_sum(strip, v, v_stride, keys.len(), alpha);
        if hidden {
            self.add_visible_nans(strip, &keys);
        }
        self.started |= 1 << strip;
    }

    /// S^T of a strip and the keys of a block, with the mask applied, into the scratch; returns the largest per lane.
    #[inline(always)]
    fn scores(&mut self, strip: usize, keys: &Range<usize>, visible: &Visible) -> [S::F32; NV] {
        let (call, dk) = (self.call, self.call.plan.shape.key_dim);
        let mut op = Scores::<S, M, NV> {
            s: self.s,
            mask: call.mask,
            // Without an edge in these keys the tiles never ask.
            lanes: call.mask.lanes(self.s, self.rows_of(strip), keys.start),
            whole: visible.whole.start.saturating_sub(keys.start)
                ..visible.whole.end.saturating_sub(keys.start),
            k: call.k.row_ptr(self.task.batch, self.task.kv_head, keys.start),
            k_stride: call.k.position_stride(),
            depth: dk,
            queries: &self.scratch.queries[strip * dk * Self::NR..][..dk * Self::NR],
            scores: &mut self.scratch.scores[..keys.len() * Self::NR],
            max: [self.s.splat(f32::NEG_INFINITY); NV],
            upcoming: (strip == 0).then(|| Upcoming {
                v: call.v.row_ptr(self.task.batch, self.task.kv_head, keys.start),
                stride: call.v.position_stride(),
                dim: call.plan.shape.value_dim,
            }),
        };
        for_row_tiles::<MR, _>(keys.len(), &mut op);
        op.max
    }

    /// O^T = alpha O^T + V^T P^T with the weights in the scratch and the values of `keys` rows from `v` on.
    #[inline(always)]
    fn weighted_sum(
        &mut self,
        strip: usize,
        v: *const f32,
        v_stride: isize,
        keys: usize,
        alpha: [S::F32; NV],
    ) {
        let dv = self.call.plan.shape.value_dim;
        let mut op = WeightedSum::<S, NV> {
            s: self.s,
            v,
            v_stride,
            keys,
            weights: &self.scratch.scores[..keys * Self::NR],
            outputs: &mut self.scratch.outputs[strip * dv * Self::NR..][..dv * Self::NR],
            // The first block of a strip writes: what the scratch held before is never read.
            alpha: (self.started >> strip & 1 == 1).then_some(alpha),
        };
        for_row_tiles::<MR, _>(dv, &mut op);
    }
}

/// The first product: tile rows are keys, lanes are queries.
struct Scores<'w, S: Simd, M: Mask, const NV: usize> {
    s: S,
    mask: M,
    lanes: M::Lanes<S, NV>,
    /// Keys that all lanes see, counted from the first as `k` does.
    whole: Range<usize>,
    k: *const f32,
    k_stride: isize,
    depth: usize,
    queries: &'w [f32],
    scores: &'w mut [f32],
    max: [S::F32; NV],
    upcoming: Option<Upcoming>,
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

impl<S: Simd, M: Mask, const NV: usize> RowsOp for Scores<'_, S, M, NV> {
    #[inline(always)]
    fn run<const ROWS: usize>(&mut self, first: usize) {
        let (s, nr) = (self.s, NV * S::LANES);
        let lhs = Rows { ptr: self.k.wrapping_offset(first as isize * self.k_stride), stride: self.k_stride };
        let rhs = Rhs { ptr: self.queries.as_ptr(), stride: nr as isize };
        debug_assert_eq!(self.queries.len(), self.depth * nr);
        if let Some(upcoming) = self.upcoming {
            upcoming.prefetch(s, first..first + ROWS);
        }
        // SAFETY: key rows first..first + ROWS exist and have `depth` values; the packed queries are [depth][nr].
        let mut acc = unsafe { tile::<S, _, ROWS, NV>(s, self.depth, lhs, rhs) };
        if first < self.whole.start || first + ROWS > self.whole.end {
            self.mask.apply(s, &self.lanes, first, &mut acc);
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
struct WeightedSum<'w, S: Simd, const NV: usize> {
    s: S,
    v: *const f32,
    v_stride: isize,
    keys: usize,
    weights: &'w [f32],
    outputs: &'w mut [f32],
    alpha: Option<[S::F32; NV]>,
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
        for (i, row) in acc.iter().enumerate() {
            for (v, &sum) in row.iter().enumerate() {
                let at = &mut out[i * nr + v * S::LANES..];
                let value = match self.alpha {
                    Some(alpha) => s.mul_add(s.load(at), alpha[v], sum),
                    None => sum,
                };
                s.store(value, at);
            }
        }
    }
}
