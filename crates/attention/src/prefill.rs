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

use qkv_gemm::parallel::Tasks;
use qkv_gemm::{TileOp, for_row_tiles, with_scratch};
use qkv_simd::{Isa, Simd, SimdOp};

use crate::ahead::ask_for_queries;
use crate::block_rows::BlockRows;
use crate::few_rows::{FEW_BLOCK, FewScores, FewSums, RowList};
use crate::interval::{self, Ends, Visible};
use crate::kv_rows::KvRows;
use crate::layout::{Layout, Scratch};
use crate::next_task::Taken;
use crate::online_softmax::{self, SUM_CHAINS};
use crate::packed_scores::{self, fold_keys, packed_stride, repeat_first_key};
use crate::panels::{self, BiasPanel, Bits, WORD};
use crate::parts::Shared;
use crate::plan::{Plan, Task, key_block};
use crate::products::{Scores, Vectors, WeightedSum};
use crate::row_runs::RunList;
use crate::rule::ScoreRule;
use crate::runs::Runs;
use crate::score_ops::{ScorePass, StripLanes, TileOps, Units, relative_position};
use crate::spec::intersect;
use crate::strip::{MAX_NR, StripRows};
use crate::weights::SelectedWeights;
use crate::{AttentionSpec, Data, DataMut, TensorMut};

/// Most keys per tile where scores are summed in links.
const LINKED_ROWS: usize = 6;

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

/// A task in the hands of a worker, compiled for an instruction set and its tile; `FEW`: for the products of few_rows.rs,
/// with one vector of queries, instead of tiles.
pub(crate) struct Worker<'w, 'a, S, R, const MR: usize, const NV: usize, const FEW: bool> {
    pub(crate) s: S,
    pub(crate) call: &'w Call<'a, R>,
    pub(crate) task: &'w Task,
    pub(crate) scratch: Scratch<'w>,
    pub(crate) key_block: usize,
    /// Bit i: strip i has seen a block, its part of the outputs holds something.
    pub(crate) started: u64,
    /// Bit i: strip i has folded keys that some lanes do not see, whose weights there are 0.
    pub(crate) hides: u64,
    /// Whether values behind a mask are looked at, see hidden.rs.
    pub(crate) careful: bool,
    /// The end of the keys that the task reads.
    pub(crate) end: usize,
    /// Whether this head's keys may lie in no cache, [`Plan::reads_first`].
    pub(crate) reads_first: bool,
    /// The block of keys that is brought in, and where its rows are (block_rows.rs).
    pub(crate) block: Range<usize>,
    pub(crate) keys: BlockRows,
    pub(crate) values: BlockRows,
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
        let (s, strips) = (self.s, self.task.rows.len().div_ceil(Self::NR));
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
                // Few rows may have brought values in where its keys were.
                self.block = 0..0;
            }
            if parts > 1 {
                self.save_part(part);
            }
        }
        if parts > 1 {
            self.merge_parts(parts);
            return self.next;
        }
        if self.call.weights.is_some() {
            let (keys, block) = (visible, self.key_block);
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
    /// Query rows in a strip.
    pub(crate) const NR: usize = NV * S::LANES;

    /// The rows in the lanes of a strip.
    #[inline(always)]
    pub(crate) fn rows_of(&self, strip: usize) -> StripRows {
        let first = self.task.rows.start + strip * Self::NR;
        self.call.plan.rows_of(self.task, first..self.task.rows.end.min(first + Self::NR))
    }

    /// Whether it holds the task's last rows, and so is the first to be computed.
    #[inline(always)]
    pub(crate) fn is_last(&self, strip: usize) -> bool {
        self.task.rows.start + (strip + 1) * Self::NR >= self.task.rows.end
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
                    max[lane] = sink * core::f32::consts::LOG2_E;
                    sum[lane] = 1.0;
                }
            }
        }
    }

    /// Folds one block of keys into a strip: scores, softmax update, weighted values.
    #[inline(always)]
    fn fold_block(&mut self, strip: usize, block: Range<usize>) {
        let Some(BlockScores { keys, visible, vectors, max: mut block_max, anywhere, mut stride }) =
            self.block_scores(strip, block)
        else {
            return;
        };
        let hides = anywhere || !visible.is_whole(&keys);
        if FEW {
            // Values that are looked at one by one have to be f32.
            self.values = self.rows_of_block(&self.call.v, self.careful && hides);
        }
        self.hides |= u64::from(hides) << strip;
        let seen =
            (self.careful && hides && self.any_not_finite(&keys)).then(|| self.copy_finite_values(&keys));
        let (max, sum) = self.scratch.state[strip * 2 * Self::NR..][..2 * Self::NR].split_at_mut(Self::NR);
        let (s, to_log2) = (self.s, self.call.units.to_log2);
        let mut scores = &mut self.scratch.scores[..keys.len() * Self::NR];
        if FEW {
            let packed = packed_stride::<S>(self.task.rows.len());
            if stride != packed {
                packed_scores::pack::<S>(scores, keys.len(), packed);
                block_max[0] = repeat_first_key(s, block_max[0], packed);
                stride = packed;
            }
            scores = &mut scores[..(keys.len() * stride).next_multiple_of(S::LANES)];
            // Every key of a vector goes on from its row's maximum, the first alone from its sum.
            s.store(repeat_first_key(s, s.load(max), stride), max);
            sum[stride..].fill(0.0);
        }
        let alpha = online_softmax::update(s, max, sum, block_max, scores, to_log2);
        if FEW {
            s.store(fold_keys(s, s.load(sum), stride, |x, y| s.add(x, y)), sum);
        }

        let values = match &seen {
            Some(_) => {
                let stride = self.call.plan.shape.value_dim as isize;
                // As if the copy had the whole block, of which only `keys` are looked at.
                let before = (keys.start - self.block.start) as isize * stride;
                BlockRows { ptr: self.scratch.values.as_ptr().wrapping_offset(-before), stride }
            }
            None => self.values,
        };
        self.weighted_sum(strip, values, (&keys, stride), vectors, alpha);
        if let Some(seen) = seen {
            self.add_visible_nans(strip, (&keys, stride), &seen);
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
        // On the grid of the softmax's chains, so that a query's sums do not depend on the other lanes, nor on how a mask is
        // written. Of few rows a chain takes as many keys at a time as a vector holds.
        let grid = SUM_CHAINS * if FEW { S::LANES / packed_stride::<S>(rows.count) } else { 1 };
        let keys = any.start - (any.start - block.start) % grid..any.end;
        runs.count_from(keys.start);
        self.bring_in(&block);
        let mut bits = Bits::All;
        if panels::needs_bits(spec, runs.ragged) {
            let words = &mut self.scratch.bits[..keys.len().div_ceil(WORD) * Self::NR];
            bits = panels::fill_bits(self.s, spec, &rows, &keys, words);
            if bits == Bits::None {
                return None;
            }
        }
        let vectors = Vectors::new::<S, NV>(spec, &rows, &visible, &keys);
        let (max, bias_masks, stride) = self.scores(&rows, &keys, &runs, (&visible, &vectors), (strip, bits));
        let anywhere = bits == Bits::Some || bias_masks || R::ACTIVE || runs.as_slice().len() > 1;
        Some(BlockScores { keys, visible, vectors, max, anywhere, stride })
    }

    /// S^T of a strip and the runs of keys, masked, into the scratch; returns the largest per lane, whether a bias masked
    /// any, and the values from one key's scores to the next.
    #[inline(always)]
    fn scores(
        &mut self,
        rows: &StripRows,
        keys: &Range<usize>,
        runs: &Runs,
        (visible, vectors): (&Visible, &Vectors),
        (strip, bits): (usize, Bits),
    ) -> ([S::F32; NV], bool, usize) {
        let (s, call, spec) = (self.s, self.call, self.call.spec);
        let (dk, in_block) = (call.plan.shape.key_dim, keys.start - self.block.start);
        let alibi = spec.alibi_slopes.is_some();
        let needs_pass = spec.softcap.is_some() || alibi || R::ACTIVE;
        let tiles = keys.len().div_ceil(if S::REGISTERS >= 32 { LINKED_ROWS } else { MR });
        let ahead = self.ahead(strip, rows, keys, visible, tiles);
        let (mut key_runs, mut scales) = (RunList::new(), RowList::new());
        let few = FEW.then(|| self.few_rows(&call.k, self.keys, keys, (&mut key_runs, &mut scales)));
        let panel = if call.plan.has_panels { keys.len() * Self::NR } else { 0 };
        let bias =
            BiasPanel::new(s, spec, rows, keys, (&mut self.scratch.bias[..panel], &mut *self.scratch.rows));
        // Without an edge in these keys nobody asks. Not a closure: that would be compiled without the instruction set.
        let ends = if visible.is_whole(keys) { None } else { Some(Ends::new(s, spec, rows, keys.start)) };
        let tile_ops = TileOps {
            unit: call.units.unit,
            bias: call.plan.has_panels,
            bits: (bits == Bits::Some).then_some(&*self.scratch.bits),
            ends,
            whole: visible.whole.start.saturating_sub(keys.start)
                ..visible.whole.end.saturating_sub(keys.start),
        };
        let light = !needs_pass && !FEW;
        let queries = &self.scratch.queries[strip * dk * Self::NR..][..dk * Self::NR];
        let scores = &mut self.scratch.scores[..keys.len() * Self::NR];
        if let Some(few) = few {
            let plain = !needs_pass && tile_ops.is_empty();
            let packs = plain && runs.as_slice().len() == 1 && call.weights.is_none();
            let stride = if packs { packed_stride::<S>(rows.count) } else { S::LANES };
            fill_gaps(scores, runs.as_slice(), stride);
            let wanted = runs.as_slice();
            let mut op =
                FewScores { queries, count: rows.count, keys: few, wanted, scores: &mut *scores, stride };
            // SAFETY: the keys of the block have rows of `dk` values.
            unsafe { op.run(call.isa) };
            if plain {
                packed_scores::pad::<S>(scores, keys.len() * stride);
                let mut max = [s.splat(f32::NEG_INFINITY); NV];
                for row in scores[..(keys.len() * stride).next_multiple_of(S::LANES)].chunks_exact(S::LANES) {
                    max[0] = s.max(s.load(row), max[0]);
                }
                max[0] = fold_keys(s, max[0], stride, |x, y| s.max(x, y));
                return (max, false, stride);
            }
        } else {
            fill_gaps(scores, runs.as_slice(), Self::NR);
            let mut op = Scores::<S, NV> {
                s,
                ahead,
                ops: (light && !tile_ops.is_empty()).then_some(&tile_ops),
                base: 0,
                k: self.keys.row(in_block),
                k_stride: self.keys.stride,
                depth: dk,
                vectors: vectors.clone(),
                queries,
                scores,
                max: [s.splat(f32::NEG_INFINITY); NV],
                bias: &bias,
            };
            for part in runs.as_slice().iter().flat_map(|run| vectors.parts(run)) {
                op.base = part.start;
                // Scores are summed in links: 6 x 2 x 2 sums, not 8 x 2 x 2, fit 32 registers.
                if S::REGISTERS >= 32 {
                    for_row_tiles::<LINKED_ROWS, _>(part.len(), &mut op);
                } else {
                    for_row_tiles::<MR, _>(part.len(), &mut op);
                }
            }
            if light {
                let max = op.max;
                return (max, bias.masks, Self::NR);
            }
        }
        let lanes = if alibi || R::ACTIVE {
            Some(StripLanes::new(s, spec, rows, call.plan.shape.query_heads, call.units.unit))
        } else {
            None
        };
        let max = s.vectorize(ScorePass {
            s,
            scores: &mut self.scratch.scores[..keys.len() * Self::NR],
            computed: runs.as_slice(),
            cap: call.units.cap,
            lanes,
            alibi,
            rule: call.rule,
            batch: rows.segment.index,
            first_key: keys.start,
            position: relative_position(spec, rows, keys.start),
            tile_ops,
            bias: &bias,
        });
        (max, bias.masks, Self::NR)
    }

    /// O^T = alpha O^T + V^T P^T with the weights of `keys` in the scratch and the values of the block in `values`.
    #[inline(always)]
    fn weighted_sum(
        &mut self,
        strip: usize,
        values: BlockRows,
        (keys, stride): (&Range<usize>, usize),
        vectors: Vectors,
        alpha: [S::F32; NV],
    ) {
        let (s, dv) = (self.s, self.call.plan.shape.value_dim);
        let mut factors = [0.0; MAX_NR];
        for (v, &alpha) in alpha.iter().enumerate() {
            s.store(alpha, &mut factors[v * S::LANES..]);
        }
        // The first block of a strip writes: what the scratch held before is never read.
        let started = self.started >> strip & 1 == 1;
        let (mut value_runs, mut scales) = (RunList::new(), RowList::new());
        let few = FEW.then(|| self.few_rows(&self.call.v, values, keys, (&mut value_runs, &mut scales)));
        let weights = &self.scratch.scores[..keys.len() * stride];
        let outputs = &mut self.scratch.outputs[strip * dv * Self::NR..][..dv * Self::NR];
        if let Some(few) = few {
            let mut op = FewSums {
                weights,
                stride,
                values: few,
                keys: keys.len(),
                first_key: keys.start - self.block.start,
                count: self.task.rows.len(),
                alpha: started.then_some(&factors),
                outputs,
            };
            // SAFETY: the keys of the block have value rows of `dv` values.
            unsafe { op.run(self.call.isa) };
            return;
        }
        let mut op = WeightedSum::<S, NV> {
            s,
            v: values.row(keys.start - self.block.start),
            v_stride: values.stride,
            keys: keys.len(),
            vectors,
            weights,
            outputs,
            alpha: started.then_some(&factors),
        };
        for_row_tiles::<MR, _>(dv, &mut op);
    }
}

/// The scores of the keys between runs, and before the first.
#[inline(always)]
fn fill_gaps(scores: &mut [f32], runs: &[Range<usize>], nr: usize) {
    let mut filled = 0;
    for run in runs {
        scores[filled * nr..run.start * nr].fill(f32::NEG_INFINITY);
        filled = run.end;
    }
}

/// What [`Worker::block_scores`] has left in the scratch.
pub(crate) struct BlockScores<F, const NV: usize> {
    /// The keys whose scores they are.
    pub(crate) keys: Range<usize>,
    visible: Visible,
    vectors: Vectors,
    /// The largest per lane.
    max: [F; NV],
    /// Whether any key may be masked for some lane, not only those on the edge of the interval.
    anywhere: bool,
    /// Values from one key's scores to the next: NR, or less where they are packed (few_rows.rs).
    stride: usize,
}
