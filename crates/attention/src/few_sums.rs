//! Weighted values for few query rows: multiply-adds onto outputs in registers (few_rows.rs).

use core::marker::PhantomData;
use core::ops::Range;

use qkv_simd::{Simd, SimdOp};

use crate::few_ahead::{ask, asked, asks, asks_twice};
use crate::few_rows::{FewSums, MOST_ROWS, load};
use crate::row_runs::{FewRows, RowRun, RunCursor};
use crate::storage::Element;

/// Keys whose weighted values are summed up in registers: so few that where rows are read in several passes, they are still in L1 for
/// the next one. The same however many passes there are, which depends on the rows that share the registers, so that a row's sums do
/// not.
const PASS_KEYS: usize = 16;

/// [`FewSums`] of a type, `R` query rows, `DV` vectors of dims at a time.
pub(crate) struct SumsOf<'o, 'w, T, const R: usize, const DV: usize>(
    pub(crate) &'o mut FewSums<'w>,
    pub(crate) PhantomData<T>,
);

impl<T: Element, const R: usize, const DV: usize> SimdOp for SumsOf<'_, '_, T, R, DV> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let sums = self.0;
        let (dim, step, keys) = (sums.values.dim, DV * S::LANES, sums.keys);
        let mut cursor = RunCursor::new(sums.values.runs);
        // At most a run, which is what passes ask for: of f32, so that a second look at values that are widened adds up alike.
        let chunk = PASS_KEYS.min(RowRun::most(dim * size_of::<f32>()));
        let mut first = 0;
        while first < keys {
            let end = keys.min((sums.first_key + first) / chunk * chunk + chunk - sums.first_key);
            cursor.advance(first);
            let mut part = Part { keys: first..end, cursor, at: 0, last: S::LANES };
            while part.at + step <= dim {
                // SAFETY: these dims are inside the rows, which are readable, says the caller of `run`.
                unsafe { sums.dims::<S, T, R, DV>(s, &part) };
                part.at += step;
            }
            // Only where more than that are taken at a time: for many query rows their sums would not fit the registers.
            while DV > 4 && part.at + 4 * S::LANES <= dim {
                // SAFETY: as above.
                unsafe { sums.dims::<S, T, R, 4>(s, &part) };
                part.at += 4 * S::LANES;
            }
            while part.at < dim {
                part.last = (dim - part.at).min(S::LANES);
                // SAFETY: as above.
                unsafe { sums.dims::<S, T, R, 1>(s, &part) };
                part.at += S::LANES;
            }
            first = end;
        }
    }
}

/// Keys and dims that are summed up in registers.
struct Part<'o> {
    keys: Range<usize>,
    /// At the first of them.
    cursor: RunCursor<'o>,
    /// The first dim.
    at: usize,
    /// Dims in the last vector.
    last: usize,
}

impl FewSums<'_> {
    /// `DV` vectors of dims over some keys.
    ///
    /// # Safety
    /// As [`Self::run`]; the part's keys and dims must be inside.
    #[inline(always)]
    unsafe fn dims<S: Simd, T: Element, const R: usize, const DV: usize>(&mut self, s: S, part: &Part<'_>) {
        let &Part { ref keys, mut cursor, at, last } = part;
        let mut acc = [[s.zero(); DV]; R];
        let dim = self.values.dim;
        let mut first = keys.start;
        while let Some(run) = cursor.take(first..keys.end) {
            let part = Part { keys: first..first + run.count, ..*part };
            let whole = run.count == keys.len();
            // SAFETY: these are rows and dims of the part.
            unsafe {
                if asks_twice::<T, R>(&run) {
                    self.rows::<S, T, R, DV, true>(s, &part, (&run, whole), &mut acc);
                } else {
                    self.rows::<S, T, R, DV, false>(s, &part, (&run, whole), &mut acc);
                }
            }
            first += run.count;
        }
        let whole = last == S::LANES;
        let alpha = if keys.start == 0 { self.alpha } else { Some(&[1.0; MOST_ROWS][..]) };
        for (i, acc) in acc.iter().enumerate().take(self.count) {
            for (d, &sum) in acc.iter().enumerate() {
                let from = i * dim + at + d * S::LANES;
                let to = &mut self.outputs[from..][..last];
                let p = to.as_mut_ptr();
                // SAFETY: `to` has `last` values, a whole vector where `whole`.
                unsafe {
                    let value = match alpha {
                        None => sum,
                        Some(alpha) => {
                            let old = if whole { s.load_ptr(p) } else { s.load_partial(p, last) };
                            // Rounded twice: keys that a mask hides, in parts of their own, must not change a bit.
                            s.add(s.mul(old, s.splat(alpha[i])), sum)
                        }
                    };
                    if whole {
                        s.store_ptr(value, p)
                    } else {
                        s.store_partial(value, p, last)
                    };
                }
            }
        }
    }

    /// Adds the rows of a run, which are the part's, to sums of `DV` vectors; `whole`: the pass reads no other run. `TWICE`: see
    /// [`asks_twice`].
    ///
    /// # Safety
    /// As [`Self::dims`].
    #[inline(always)]
    unsafe fn rows<S: Simd, T: Element, const R: usize, const DV: usize, const TWICE: bool>(
        &self,
        s: S,
        &Part { ref keys, at, last, .. }: &Part<'_>,
        (run, whole): (&RowRun, bool),
        acc: &mut [[S::F32; DV]; R],
    ) {
        let FewRows { scales, dim, .. } = self.values;
        let weights = self.weights[keys.start * self.stride..].chunks_exact(self.stride);
        let (mut row, asks) = (run.first, asks::<T, R>(run));
        let ([mut next, mut again], next_step) = asked::<T>(run, dim, at..at + DV * S::LANES, whole);
        for (j, weights) in keys.clone().zip(weights) {
            let here = row.cast::<T>();
            if asks {
                ask(s, next, DV * S::LANES);
                if TWICE {
                    ask(s, again, DV * S::LANES);
                }
            }
            let mut v = [s.zero(); DV];
            for (d, v) in v.iter_mut().enumerate() {
                // SAFETY: these dims are inside the row.
                *v = unsafe { load(s, here.add(at + d * S::LANES), last) };
            }
            // The stride is R rounded up.
            let Some(weights) = weights.first_chunk::<R>() else { continue };
            for (acc, &weight) in acc.iter_mut().zip(weights) {
                let weight = s.splat(if T::SCALED { weight * scales[j] } else { weight });
                for (acc, &v) in acc.iter_mut().zip(&v) {
                    *acc = s.mul_add(weight, v, *acc);
                }
            }
            row = row.wrapping_offset(run.stride);
            next = next.wrapping_byte_offset(next_step);
            again = again.wrapping_byte_offset(next_step);
        }
    }
}
