//! Values behind a mask that are NaN or infinite.
//!
//! 0 x NaN is NaN, so a weight of zero does not keep such a value out of a sum. Skipped keys are never read, and a block that
//! all lanes see has no zero weights by mask. Where some lanes do not see a key, its values are scanned (the keys on
//! the edge of an interval per strip; all keys of a block, once for all strips, where bits or a bias may mask any of
//! them), and only if one is not finite does the strip take the careful way: a copy of the block with zeros in the place
//! of such entries, which are then added one by one to the rows that do see them.

use core::ops::Range;

use qkv_simd::Simd;

use crate::interval::Visible;
use crate::layout::MAX_KEY_BLOCK;
use crate::prefill::Worker;
use crate::rule::ScoreRule;

/// Which lanes see each key of a block: above -infinity, or NaN, before the scores become weights.
pub(crate) type Seen = [u64; MAX_KEY_BLOCK];

impl<S: Simd, R: ScoreRule, const MR: usize, const NV: usize, const FEW: bool>
    Worker<'_, '_, S, R, MR, NV, FEW>
{
    /// Whether a value of `keys` that some lanes of a strip may not see is NaN or infinite.
    ///
    /// `anywhere`: any key may be masked, not only those on the edge of the interval.
    #[inline(always)]
    pub(crate) fn has_hidden_nan(&mut self, keys: &Range<usize>, visible: &Visible, anywhere: bool) -> bool {
        if anywhere {
            let block = self.block_index(keys.start);
            if self.scanned != Some(block) {
                self.scanned = Some(block);
                self.scan_found = self.any_not_finite(self.block.clone());
            }
            return self.scan_found;
        }
        self.any_not_finite(keys.start..visible.whole.start.min(keys.end))
            || self.any_not_finite(visible.whole.end.max(keys.start)..keys.end)
    }

    #[inline(always)]
    fn any_not_finite(&self, keys: Range<usize>) -> bool {
        let s = self.s;
        // 0 x is 0 for finite x and NaN else, and once NaN a sum stays so. Four sums, for one alone would wait for each
        // of its additions.
        let mut sums = [s.zero(); 4];
        for key in keys {
            let row = self.value_row(key);
            let mut at = 0;
            while at + 4 * S::LANES <= row.len() {
                for (i, sum) in sums.iter_mut().enumerate() {
                    let x = s.load(&row[at + i * S::LANES..]);
                    *sum = s.mul_add(x, s.zero(), *sum);
                }
                at += 4 * S::LANES;
            }
            while at + S::LANES <= row.len() {
                let x = s.load(&row[at..]);
                sums[0] = s.mul_add(x, s.zero(), sums[0]);
                at += S::LANES;
            }
            for &x in &row[at..] {
                let x = s.splat(x);
                sums[0] = s.mul_add(x, s.zero(), sums[0]);
            }
        }
        let sum = s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3]));
        s.bits(s.eq(sum, s.zero())) != (1 << S::LANES) - 1
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
        let lanes = if FEW { self.task.rows.len() } else { Self::NR };
        for (i, key) in keys.clone().enumerate() {
            for d in 0..dv {
                let x = self.value_row(key)[d];
                if x.is_finite() {
                    continue;
                }
                let outputs = &mut self.scratch.outputs[strip * dv * Self::NR..][..dv * Self::NR];
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
