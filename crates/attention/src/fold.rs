//! A block of keys folded into a strip of queries: the first product with its masks and biases, the softmax update, the second
//! product (the equations of prefill.rs).

use core::ops::Range;

use qkv_gemm::for_row_tiles;
use qkv_simd::Simd;

use crate::block_rows::BlockRows;
use crate::few_rows::{FewScores, FewSums, RowList};
use crate::interval::{self, Ends, Visible};
use crate::online_softmax::{self, SUM_CHAINS, ScoreVectors};
use crate::packed_scores::{self, fold_keys, packed_stride, repeat_first_key};
use crate::panels::{self, BiasPanel, Bits, WORD};
use crate::prefill::Worker;
use crate::products::{Scores, Vectors, WeightedSum};
use crate::row_runs::RunList;
use crate::rule::ScoreRule;
use crate::runs::Runs;
use crate::score_ops::{ScorePass, StripLanes, TileOps, relative_position};
use crate::spec::intersect;
use crate::strip::{MAX_NR, StripRows};

/// Most keys per tile where scores are summed in links.
const LINKED_ROWS: usize = 6;

impl<S: Simd, R: ScoreRule, const MR: usize, const NV: usize, const FEW: bool>
    Worker<'_, '_, S, R, MR, NV, FEW>
{
    /// Folds one block of keys into a strip: scores, softmax update, weighted values.
    #[inline(always)]
    pub(crate) fn fold_block(&mut self, strip: usize, block: Range<usize>) {
        let Some(BlockScores { keys, visible, vectors, max: mut block_max, anywhere, mut stride }) =
            self.block_scores(strip, block)
        else {
            return;
        };
        let hides = anywhere || !visible.is_whole(&keys);
        if FEW {
            self.bring_in_values(false);
        }
        self.hides |= u64::from(hides) << strip;
        let seen =
            (self.careful && hides && self.any_not_finite(&keys)).then(|| self.copy_finite_values(&keys));
        let packed = packed_stride::<S>(self.rows_of(strip).count);
        let (max, sum) = self.scratch.state[strip * 2 * Self::NR..][..2 * Self::NR].split_at_mut(Self::NR);
        let (s, to_log2) = (self.s, self.call.units.to_log2);
        let mut scores = &mut self.scratch.scores[..keys.len() * Self::NR];
        if FEW {
            if stride != packed {
                packed_scores::pack::<S>(scores, keys.len(), packed);
                block_max[0] = repeat_first_key(s, block_max[0], packed);
                stride = packed;
            }
            scores = &mut scores[..(keys.len() * stride).next_multiple_of(S::LANES)];
            // Every key of a vector goes on from its row's maximum.
            s.store(repeat_first_key(s, s.load(max), stride), max);
            s.store(repeat_first_key(s, s.load(sum), stride), sum);
        }
        let kind = if FEW { ScoreVectors::Packed(stride) } else { ScoreVectors::OfKeys };
        let alpha = online_softmax::update(s, (max, sum), block_max, (scores, kind), to_log2);

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
        // written.
        let grid = if FEW { S::LANES } else { SUM_CHAINS };
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
        // A gap between runs, or before the first, where the grid begins.
        let gaps = runs.as_slice().len() > 1 || runs.hull().start > 0;
        let anywhere = bits == Bits::Some || bias_masks || R::ACTIVE || gaps;
        Some(BlockScores { keys, visible, vectors, max, anywhere, stride })
    }

    /// S^T of a strip and the runs of keys, masked, into the scratch; returns the largest per lane, whether a bias may have
    /// masked any, and the values from one key's scores to the next.
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
        let queries = self.queries_of(strip);
        let panel = if call.plan.has_panels { keys.len() * Self::NR } else { 0 };
        let memory = (&mut self.scratch.bias[..panel], &mut *self.scratch.rows);
        // A rule is to see -infinity where a bias masks, not NaN.
        let bias = BiasPanel::new(s, spec, rows, keys, memory, self.careful || R::ACTIVE);
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
        let queries = &self.scratch.queries[queries];
        let scores = &mut self.scratch.scores[..keys.len() * Self::NR];
        if let Some(few) = few {
            let plain = !needs_pass && tile_ops.is_empty();
            // Scores of a block with gaps may be looked at one by one (hidden.rs).
            let whole = runs.as_slice().len() == 1 && runs.hull().start == 0;
            let packs = plain && whole && call.weights.is_none();
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
                return (max, bias.may_mask, Self::NR);
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
        (max, bias.may_mask, Self::NR)
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
        let (count, outputs) = (self.rows_of(strip).count, self.outputs_of(strip));
        let outputs = &mut self.scratch.outputs[outputs];
        if let Some(few) = few {
            let mut op = FewSums {
                weights,
                stride,
                values: few,
                keys: keys.len(),
                first_key: keys.start - self.block.start,
                count,
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
    /// Values from one key's scores to the next: NR, or less where they are packed (packed_scores.rs).
    stride: usize,
}
