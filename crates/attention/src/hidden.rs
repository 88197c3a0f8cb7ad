//! Values behind a mask that are NaN or infinite.
//!
//! 0 x NaN is NaN, so a weight of zero does not keep such a value out of a sum. Skipped keys are never read and whole
//! blocks have no zero weights by mask. Where a strip sees part of a block, the values of the keys on the edge are
//! scanned, and only if one is not finite does the strip take the careful way: a copy of the block with zeros in
//! the place of such entries, which are then added one by one to the rows that do see them.

use core::ops::Range;

use qkv_gemm::tile::Acc;
use qkv_simd::{Simd, SimdOp};

use crate::mask::{MAX_NR, Mask, StripRows, Visible};
use crate::prefill::Worker;

impl<S: Simd, M: Mask, const MR: usize, const NV: usize> Worker<'_, '_, S, M, MR, NV> {
    /// Whether a value of the keys on an edge of the mask, which some rows must not see, is NaN or infinite.
    #[inline(always)]
    pub(crate) fn has_hidden_nan(&self, keys: &Range<usize>, visible: &Visible) -> bool {
        let s = self.s;
        // x - x is 0 for finite x and NaN else, and once NaN the sum stays so.
        let mut sum = s.zero();
        for edge in
            [keys.start..visible.whole.start.min(keys.end), visible.whole.end.max(keys.start)..keys.end]
        {
            for key in edge {
                let row = self.call.v.row(self.task.batch, self.task.kv_head, key);
                let mut at = 0;
                while at + S::LANES <= row.len() {
                    let x = s.load(&row[at..]);
                    sum = s.add(sum, s.sub(x, x));
                    at += S::LANES;
                }
                for &x in &row[at..] {
                    sum = s.add(sum, s.splat(x - x));
                }
            }
        }
        s.bits(s.eq(sum, s.zero())) != (1 << S::LANES) - 1
    }

    /// Copies the values of `keys` into the scratch with zeros for NaN and infinities.
    #[cold]
    #[inline(never)]
    pub(crate) fn copy_finite_values(&mut self, keys: &Range<usize>) {
        let dv = self.call.plan.shape.value_dim;
        for (key, copy) in keys.clone().zip(self.scratch.values.chunks_exact_mut(dv)) {
            for (&x, copy) in self.call.v.row(self.task.batch, self.task.kv_head, key).iter().zip(copy) {
                *copy = if x.is_finite() { x } else { 0.0 };
            }
        }
    }

    /// Adds what [`Self::copy_finite_values`] left out to the rows that do see its key.
    #[cold]
    #[inline(never)]
    pub(crate) fn add_visible_nans(&mut self, strip: usize, keys: &Range<usize>) {
        /// The mask's answer for one key, lane by lane: above -infinity where the key is seen.
        struct Seen<'m, M: Mask, const NV: usize>(&'m M, StripRows, usize, usize);
        impl<M: Mask, const NV: usize> SimdOp for Seen<'_, M, NV> {
            type Output = [f32; MAX_NR];
            #[inline(always)]
            fn eval<S: Simd>(self, s: S) -> [f32; MAX_NR] {
                let Seen(mask, rows, first_key, key) = self;
                let mut probe: Acc<S, 1, NV> = [[s.zero(); NV]];
                mask.apply(s, &mask.lanes(s, rows, first_key), key - first_key, &mut probe);
                let mut seen = [0.0; MAX_NR];
                for (v, &score) in probe[0].iter().enumerate() {
                    s.store(score, &mut seen[v * S::LANES..]);
                }
                seen
            }
        }

        let (call, rows, dv) = (self.call, self.rows_of(strip), self.call.plan.shape.value_dim);
        let outputs = &mut self.scratch.outputs[strip * dv * Self::NR..][..dv * Self::NR];
        for (key, weights) in keys.clone().zip(self.scratch.scores.chunks_exact(Self::NR)) {
            let row = call.v.row(self.task.batch, self.task.kv_head, key);
            if row.iter().all(|x| x.is_finite()) {
                continue;
            }
            let seen = self.s.vectorize(Seen::<M, NV>(&call.mask, rows, keys.start, key));
            for (&x, outputs) in row.iter().zip(outputs.chunks_exact_mut(Self::NR)) {
                if !x.is_finite() {
                    for (lane, output) in outputs.iter_mut().enumerate() {
                        if seen[lane] > f32::NEG_INFINITY {
                            *output += weights[lane] * x;
                        }
                    }
                }
            }
        }
    }
}
