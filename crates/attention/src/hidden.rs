//! Scores and values behind a mask that are NaN or infinite.
//!
//! 0 x NaN is NaN, so a weight of zero does not keep such a value out of a sum, and NaN - infinity is NaN, so a bias of -infinity
//! does not hide such a score. Skipped keys are never read, masks other than a bias replace the score, and a block that all lanes
//! see has no zero weights by mask. Where a strip has folded keys that some lanes may not see, its outputs are looked
//! at when its keys are done: such a value or score leaves NaN there, which nothing removes. Only then is the task's part of the
//! keys computed again, the careful way: scores under a bias of -infinity are replaced as well, and blocks with hidden keys and a
//! value that is not finite are copied with zeros in the place of such entries, which are then added one by one to the rows that
//! do see them.

use core::ops::Range;

use qkv_simd::Simd;

use crate::layout::MAX_KEY_BLOCK;
use crate::prefill::Worker;
use crate::rule::ScoreRule;

/// Which lanes see each key of a block: above -infinity, or NaN, before the scores become weights.
pub(crate) type Seen = [u64; MAX_KEY_BLOCK];

impl<S: Simd, R: ScoreRule, const MR: usize, const NV: usize, const FEW: bool>
    Worker<'_, '_, S, R, MR, NV, FEW>
{
    /// Whether an output of a strip that had hidden keys is NaN: then one of their values may be the reason.
    #[inline(always)]
    pub(crate) fn may_show_hidden(&self) -> bool {
        let strips = self.task.rows.len().div_ceil(Self::ROWS);
        let mut found = false;
        for strip in 0..strips {
            found |= self.hides >> strip & 1 == 1 && self.has_non_finite_output(strip);
        }
        found
    }

    /// NaN or infinity, of which the latter costs no more than a second look. A score's NaN is in the sums as well, which are all
    /// that there is where values have no dims.
    #[inline(always)]
    fn has_non_finite_output(&self, strip: usize) -> bool {
        let (s, dv) = (self.s, self.call.plan.shape.value_dim);
        if dv == 0 {
            let sums = &self.scratch.state[strip * 2 * Self::NR + Self::NR..][..self.rows_of(strip).count];
            return sums.iter().any(|sum| sum.is_nan());
        }
        // Of few rows those that there are, of others all lanes: [rows][dv] and [dv][NR].
        let rows = if FEW { self.rows_of(strip).count } else { Self::NR };
        let outputs = &self.scratch.outputs[self.outputs_of(strip)][..rows * dv];
        // 0 x is 0 for finite x and NaN else, and once NaN a sum stays so. Four sums, for one alone would wait for each
        // of its additions.
        let mut sums = [s.zero(); 4];
        let mut chunks = outputs.chunks_exact(4 * S::LANES);
        for chunk in &mut chunks {
            for (i, sum) in sums.iter_mut().enumerate() {
                *sum = s.mul_add(s.load(&chunk[i * S::LANES..]), s.zero(), *sum);
            }
        }
        for &x in chunks.remainder() {
            sums[0] = s.mul_add(s.splat(x), s.zero(), sums[0]);
        }
        let sum = s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3]));
        s.bits(s.eq(sum, s.zero())) != (1 << S::LANES) - 1
    }

    /// Whether a value of `keys`, of the block that is brought in, is NaN or infinite. Then all are brought in as f32, to be looked at
    /// one by one; else what few rows have done with them is done again, to the bit.
    #[cold]
    #[inline(never)]
    pub(crate) fn any_not_finite(&mut self, keys: &Range<usize>) -> bool {
        let mut found = false;
        if FEW {
            let (s, segment, head) = (self.s, &self.task.segment, self.task.kv_head);
            let row = &mut self.scratch.values[..self.call.plan.shape.value_dim];
            for key in keys.clone() {
                self.call.v.copy(s, segment, head, &(key..key + 1), row, false);
                found |= row.iter().any(|x| !x.is_finite());
            }
            if found {
                self.bring_in_values(true);
            }
            return found;
        }
        for key in keys.clone() {
            found |= self.value_row(key).iter().any(|x| !x.is_finite());
        }
        found
    }

    /// Copies the values of `keys` into the scratch with zeros for NaN and infinities, and says who sees which key; to
    /// be called while the scratch still holds scores.
    #[cold]
    #[inline(never)]
    pub(crate) fn copy_finite_values(&mut self, keys: &Range<usize>) -> Seen {
        let dv = self.call.plan.shape.value_dim;
        let mut seen = [0; MAX_KEY_BLOCK];
        for (i, key) in keys.clone().enumerate() {
            for d in 0..dv {
                let x = self.value_row(key)[d];
                self.scratch.values[i * dv + d] = if x.is_finite() { x } else { 0.0 };
            }
            for (lane, &score) in self.scratch.scores[i * Self::NR..][..Self::NR].iter().enumerate() {
                seen[i] |= u64::from(score != f32::NEG_INFINITY) << lane;
            }
        }
        seen
    }

    /// Adds what [`Self::copy_finite_values`] left out to the rows that see its key.
    #[cold]
    #[inline(never)]
    pub(crate) fn add_visible_nans(
        &mut self,
        strip: usize,
        (keys, stride): (&Range<usize>, usize),
        seen: &Seen,
    ) {
        let dv = self.call.plan.shape.value_dim;
        let lanes = if FEW { self.rows_of(strip).count } else { Self::NR };
        let outputs = self.outputs_of(strip);
        for (i, key) in keys.clone().enumerate() {
            for d in 0..dv {
                let x = self.value_row(key)[d];
                if x.is_finite() {
                    continue;
                }
                let outputs = &mut self.scratch.outputs[outputs.clone()];
                let weights = &self.scratch.scores[i * stride..][..lanes];
                for (lane, &weight) in weights.iter().enumerate() {
                    if seen[i] >> lane & 1 == 1 {
                        outputs[if FEW { lane * dv + d } else { d * Self::NR + lane }] += weight * x;
                    }
                }
            }
        }
    }
}
