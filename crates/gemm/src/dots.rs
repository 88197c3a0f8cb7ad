//! Dots: a few rows times a few columns, both contiguous along k, lanes along k and summed at the end.

use qkv_simd::Simd;

use crate::gemv::Strip;
use crate::stream::{Steps, copy_rows};
use crate::tile::Rows;

impl Strip<'_> {
    /// The dots: columns of the matrix are contiguous.
    ///
    /// # Safety
    /// As [`Self::stream`].
    #[inline(always)]
    pub(crate) unsafe fn dots<S: Simd>(&self, s: S, sums: &mut [f32], rows: &mut [f32], turned: &mut [f32]) {
        let few = self.few;
        let k = few.product.k;
        let (a, b, c) = self.operands();
        let lhs = if few.copy {
            copy_rows(a, Steps::in_order(0, k), few.few, rows);
            Rows { ptr: rows.as_ptr(), stride: k as isize }
        } else {
            Rows { ptr: a.ptr, stride: a.row_stride }
        };
        let mut col = 0;
        while col < self.cols {
            let left = self.cols - col;
            let columns = Rows { ptr: b.at(0, self.col + col), stride: b.col_stride };
            let group = if left >= 8 {
                8
            } else if left >= 4 {
                4
            } else {
                1
            };
            let mut row = 0;
            while row < few.few {
                let rows_left = few.few - row;
                let x = Rows { ptr: lhs.ptr.wrapping_offset(row as isize * lhs.stride), ..lhs };
                let dots =
                    Dots { x, columns, k, out: &mut sums[row * self.width + col..], stride: self.width };
                // SAFETY: these rows and columns are inside the matrices for all of k.
                let done = unsafe {
                    match (group, rows_left) {
                        (8, 1) => dots.compute::<S, 1, 8>(s),
                        (8, 2) => dots.in_turns::<S, 2, 4>(s, 2),
                        (8, 3) => dots.in_turns::<S, 3, 4>(s, 2),
                        (8, _) => dots.in_turns::<S, 4, 2>(s, 4),
                        (4, 1) => dots.compute::<S, 1, 4>(s),
                        (4, 2) => dots.compute::<S, 2, 4>(s),
                        (4, 3) => dots.compute::<S, 3, 4>(s),
                        (4, _) => dots.in_turns::<S, 4, 2>(s, 2),
                        (_, 1) => dots.compute::<S, 1, 1>(s),
                        (_, 2) => dots.compute::<S, 2, 1>(s),
                        (_, 3) => dots.compute::<S, 3, 1>(s),
                        (_, _) => dots.compute::<S, 4, 1>(s),
                    }
                };
                row += done;
            }
            col += group;
        }
        // SAFETY: the sums are complete.
        unsafe { self.write(c, true, true, sums, turned) };
    }
}

/// Sums over k of a few rows times a few columns, both contiguous.
struct Dots<'a> {
    /// The few rows.
    x: Rows,
    /// The columns.
    columns: Rows,
    k: usize,
    /// Sum (row, column) goes to `out[row * stride + column]`.
    out: &'a mut [f32],
    stride: usize,
}

impl Dots<'_> {
    /// `times` groups of `Q` columns.
    ///
    /// # Safety
    /// `R` rows of x and `times * Q` columns must be readable for k values.
    #[inline(always)]
    unsafe fn in_turns<S: Simd, const R: usize, const Q: usize>(self, s: S, times: usize) -> usize {
        for turn in 0..times {
            let part = Dots {
                columns: Rows {
                    ptr: self.columns.ptr.wrapping_offset((turn * Q) as isize * self.columns.stride),
                    ..self.columns
                },
                out: &mut self.out[turn * Q..],
                ..self
            };
            // SAFETY: a part of what the caller vouches for.
            unsafe { part.compute::<S, R, Q>(s) };
        }
        R
    }

    /// One group; answers R.
    ///
    /// # Safety
    /// `R` rows of x and `Q` columns must be readable for k values.
    #[inline(always)]
    unsafe fn compute<S: Simd, const R: usize, const Q: usize>(self, s: S) -> usize {
        let mut acc = [[s.zero(); Q]; R];
        let whole = self.k - self.k % S::LANES;
        for k in (0..whole).step_by(S::LANES) {
            let mut y = [s.zero(); Q];
            for (q, y) in y.iter_mut().enumerate() {
                // SAFETY: column q < Q has LANES values from k on.
                *y = unsafe { s.load_ptr(self.columns.ptr.offset(q as isize * self.columns.stride).add(k)) };
            }
            for (r, sums) in acc.iter_mut().enumerate() {
                // SAFETY: row r < R has LANES values from k on.
                let x = unsafe { s.load_ptr(self.x.ptr.offset(r as isize * self.x.stride).add(k)) };
                for (sum, &y) in sums.iter_mut().zip(&y) {
                    *sum = s.mul_add(x, y, *sum);
                }
            }
        }
        let rest = self.k - whole;
        for (r, sums) in acc.iter_mut().enumerate() {
            for (q, sum) in sums.iter_mut().enumerate() {
                if rest > 0 {
                    // SAFETY: `rest` values are left in row r and column q.
                    let (x, y) = unsafe {
                        (
                            s.load_partial(self.x.ptr.offset(r as isize * self.x.stride).add(whole), rest),
                            s.load_partial(
                                self.columns.ptr.offset(q as isize * self.columns.stride).add(whole),
                                rest,
                            ),
                        )
                    };
                    *sum = s.mul_add(x, y, *sum);
                }
                self.out[r * self.stride + q] = s.reduce_add(*sum);
            }
        }
        R
    }
}
