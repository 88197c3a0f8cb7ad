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
//! take a key block in turn while it is in L2 (fold.rs). What happens to scores on their way is in score_ops.rs, which keys are
//! left out in interval.rs and runs.rs, values behind a mask that are NaN or infinite in hidden.rs; packing the queries
//! and storing the outputs in strip.rs.

use core::ops::Range;

use qkv_gemm::parallel::Tasks;
use qkv_gemm::{TileOp, with_scratch};
use qkv_simd::{Isa, Simd, SimdOp};

use crate::ahead::ask_for_queries;
use crate::block_rows::BlockRows;
use crate::few_rows::{FEW_BLOCK, most_few_rows};
use crate::interval;
use crate::kv_rows::KvRows;
use crate::layout::{Layout, Scratch};
use crate::next_task::Taken;
use crate::parts::Shared;
use crate::plan::{Plan, Task, key_block};
use crate::rule::ScoreRule;
use crate::score_ops::Units;
use crate::spec::intersect;
use crate::strip::StripRows;
use crate::weights::SelectedWeights;
use crate::{AttentionSpec, Data, DataMut, TensorMut};

/// Everything that the tasks of a call share.
pub(crate) struct Call<'a, R> {
    pub(crate) q: Data<'a>,
    pub(crate) k: KvRows<'a>,
    pub(crate) v: KvRows<'a>,
    pub(crate) out: DataMut<'a>,
    /// (batch, query heads, query length, 1).
    pub(crate) lse: Option<TensorMut<'a>>,
    /// (batch, query heads, query length, 1).
    pub(crate) maxima: Option<TensorMut<'a>>,
    /// For inspection only.
    pub(crate) weights: Option<SelectedWeights<'a>>,
    pub(crate) spec: &'a AttentionSpec<'a>,
    pub(crate) rule: R,
    pub(crate) isa: Isa,
    pub(crate) units: Units,
    pub(crate) plan: Plan,
    /// Where tasks leave their parts of a head's keys, where these are tasks of their own.
    pub(crate) shared: Option<Shared>,
}

/// One task, to be dispatched with the tile shape of the instruction set.
pub(crate) struct Prefill<'c, 'a, R> {
    pub(crate) call: &'c Call<'a, R>,
    pub(crate) task: Task,
    /// Whether its queries were asked for by the task before.
    pub(crate) asked: bool,
    /// Where the worker finds its next task.
    pub(crate) tasks: Option<&'c Tasks<'c>>,
}

impl<R: ScoreRule> TileOp for Prefill<'_, '_, R> {
    /// The next task, if it was taken already.
    type Output = Option<Taken>;

    #[inline(always)]
    fn eval<S: Simd, const MR: usize, const NV: usize>(self, s: S) -> Option<Taken> {
        let plan = &self.call.plan;
        let layout = Layout::new(plan);
        with_scratch(layout.total, |memory| {
            let scratch = Scratch::cut(&layout, memory);
            // The closure runs inside a function without vector features: enter them again.
            if plan.has_few_rows(&self.task.segment) {
                s.vectorize(Worker::<S, R, MR, 1, true>::new(s, &self, scratch))
            } else {
                s.vectorize(Worker::<S, R, MR, NV, false>::new(s, &self, scratch))
            }
        })
    }
}

/// A task in the hands of a worker, compiled for an instruction set and its tile; `FEW`: for the products of few_rows.rs, with
/// strips of few rows, instead of tiles.
pub(crate) struct Worker<'w, 'a, S, R, const MR: usize, const NV: usize, const FEW: bool> {
    pub(crate) s: S,
    pub(crate) call: &'w Call<'a, R>,
    pub(crate) task: &'w Task,
    pub(crate) scratch: Scratch<'w>,
    pub(crate) key_block: usize,
    /// Bit i: strip i has seen a block, its part of the outputs holds something.
    pub(crate) started: u64,
    /// Bit i: strip i has folded keys that some lanes may not see, whose weights there are 0.
    pub(crate) hides: u64,
    /// Whether scores and values behind a mask are looked at, see hidden.rs.
    pub(crate) careful: bool,
    /// The end of the keys that the task reads.
    pub(crate) end: usize,
    /// Whether this head's keys may lie in no cache, [`Plan::reads_first`].
    pub(crate) reads_first: bool,
    /// The block of keys that is brought in, and where its rows are (block_rows.rs).
    pub(crate) block: Range<usize>,
    pub(crate) keys: BlockRows,
    pub(crate) values: BlockRows,
    /// Whether the values are in, and if so, whether all had to be f32.
    pub(crate) values_f32: Option<bool>,
    /// Whether the queries were asked for by the task before.
    pub(crate) asked: bool,
    /// Where the next task is to be found, and the one that was taken while this one ends.
    pub(crate) tasks: Option<&'w Tasks<'w>>,
    pub(crate) next: Option<Taken>,
}

impl<'w, 'a, S: Simd, R: ScoreRule, const MR: usize, const NV: usize, const FEW: bool>
    Worker<'w, 'a, S, R, MR, NV, FEW>
{
    #[inline(always)]
    fn new(s: S, of: &'w Prefill<'w, 'a, R>, scratch: Scratch<'w>) -> Self {
        let &Prefill { call, ref task, asked, tasks } = of;
        Self {
            s,
            call,
            task,
            scratch,
            key_block: if FEW { FEW_BLOCK } else { key_block(task.segment.key_len) },
            started: 0,
            hides: 0,
            careful: false,
            end: 0,
            reads_first: !FEW && call.plan.reads_first(task),
            block: 0..0,
            keys: BlockRows::NONE,
            values: BlockRows::NONE,
            values_f32: None,
            asked,
            tasks,
            next: None,
        }
    }
}

impl<S: Simd, R: ScoreRule, const MR: usize, const NV: usize, const FEW: bool> SimdOp
    for Worker<'_, '_, S, R, MR, NV, FEW>
{
    type Output = Option<Taken>;

    #[inline(always)]
    fn eval<Same: Simd>(mut self, _: Same) -> Option<Taken> {
        if self.task.parts.is_empty() {
            return None;
        }
        let (s, strips) = (self.s, self.task.rows.len().div_ceil(Self::ROWS));
        let asks = !FEW && self.call.plan.is_cold && !self.asked;
        if asks {
            ask_for_queries(s, &self.call.q, &self.rows_of(0));
        }
        for strip in 0..strips {
            if asks && strip + 1 < strips {
                ask_for_queries(s, &self.call.q, &self.rows_of(strip + 1));
            }
            self.pack_queries(strip);
        }
        let visible = self.call.visible(self.task);
        let (parts, part_keys) = self.call.plan.parts(&self.task.segment);
        self.end = visible.end.min(self.task.parts.end.saturating_mul(part_keys));
        let takes_next = self.end_of_first_strip();
        for part in self.task.parts.clone() {
            let keys = match parts {
                1 => visible.clone(),
                _ => intersect(&visible, &(part * part_keys..(part + 1) * part_keys)),
            };
            self.careful = false;
            // Once, and once more where a value behind a mask may have got through.
            loop {
                for strip in 0..strips {
                    self.begin_state(strip, part == 0);
                }
                (self.started, self.hides) = (0, 0);
                let block = self.key_block;
                for begin in (keys.start / block * block..keys.end).step_by(block) {
                    let in_block = begin..(begin + block).min(keys.end);
                    if in_block.end >= takes_next {
                        self.take_next();
                    }
                    // The last rows first: under a causal mask they see most of the block, and bring it in for the others.
                    for strip in (0..strips).rev() {
                        self.fold_block(strip, in_block.clone());
                    }
                }
                if self.careful || !self.may_show_hidden() {
                    break;
                }
                self.careful = true;
            }
            if parts > 1 {
                for strip in 0..strips {
                    self.save_part(strip, part);
                }
            }
        }
        if parts > 1 {
            self.merge_parts(strips, parts);
            return self.next;
        }
        if self.call.weights.is_some() {
            let (keys, block) = (visible, self.key_block);
            // A masked NaN is to have no weight.
            self.careful = true;
            for strip in 0..strips {
                for begin in (keys.start / block * block..keys.end).step_by(block) {
                    self.store_weights(strip, begin..(begin + block).min(keys.end));
                }
            }
        }
        for strip in 0..strips {
            self.store_outputs(strip);
        }
        self.next
    }
}

impl<R> Call<'_, R> {
    /// The keys that any row of a task sees, as far as intervals go.
    pub(crate) fn visible(&self, task: &Task) -> Range<usize> {
        let all = self.plan.rows_of(task, task.rows.clone());
        interval::visible(self.spec, &task.segment, all.queries()).any
    }
}

impl<S: Simd, R: ScoreRule, const MR: usize, const NV: usize, const FEW: bool>
    Worker<'_, '_, S, R, MR, NV, FEW>
{
    /// Lanes of a strip.
    pub(crate) const NR: usize = NV * S::LANES;

    /// Most query rows of a strip.
    pub(crate) const ROWS: usize = if FEW { most_few_rows(S::LANES) } else { Self::NR };

    /// The rows in the lanes of a strip.
    #[inline(always)]
    pub(crate) fn rows_of(&self, strip: usize) -> StripRows {
        let first = self.task.rows.start + strip * Self::ROWS;
        self.call.plan.rows_of(self.task, first..self.task.rows.end.min(first + Self::ROWS))
    }

    /// Whether it holds the task's last rows, and so is the first to be computed.
    #[inline(always)]
    pub(crate) fn is_last(&self, strip: usize) -> bool {
        self.task.rows.start + (strip + 1) * Self::ROWS >= self.task.rows.end
    }

    /// Number of the block that a key is in.
    #[inline(always)]
    pub(crate) fn block_index(&self, key: usize) -> usize {
        key / self.key_block
    }

    /// Where the softmax of a strip begins: with nothing, or with its heads' sinks, which have no value.
    #[inline(always)]
    fn begin_state(&mut self, strip: usize, with_sinks: bool) {
        let rows = self.rows_of(strip);
        let state = &mut self.scratch.state[strip * 2 * Self::NR..][..2 * Self::NR];
        let (max, sum) = state.split_at_mut(Self::NR);
        max.fill(f32::NEG_INFINITY);
        sum.fill(0.0);
        if let Some(sinks) = self.call.spec.sinks.filter(|_| with_sinks) {
            for lane in 0..rows.count {
                let sink = sinks[rows.head(lane)];
                if sink != f32::NEG_INFINITY {
                    max[lane] = sink * self.call.units.unit;
                    sum[lane] = 1.0;
                }
            }
        }
    }
}
