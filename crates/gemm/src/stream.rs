//! The stream: few rows times rows of a matrix that are contiguous, read once, several side by side.
//!
//! Sums of a strip of columns stay in L1; the register tile continues them by a few steps of k at a time.

use qkv_simd::Simd;

use crate::driver::Operand;
use crate::gemv::Strip;
use crate::pack::{Source, pack_rhs_raw};
use crate::row_tiles::{next_rows, with_rows};
use crate::tile::{Rhs, Rows, tile_onto};

/// Rows of the matrix that the stream reads side by side where they are neighbours.
///
/// A vector times 4096 x 4096, strips of 2048 columns: 4 rows reach 70 % of the bandwidth of one Zen 4 core, 8 reach
/// 86 %, 12 reach 94 %; 16 less, as rows 16 KiB apart then push each other out of L1. Explicit prefetches, at any of the
/// distances tried, made it slower.
const SIDE: usize = 12;

/// Rows of a part that are read side by side, each a sixth of the part before the next.
///
/// `measure gemm`, two threads of a Zen 4, GFLOP/s, strips of 2048 columns with 12 neighbouring rows, 4 and 6 rows that run on:
/// (1, 4096, 4096) 18.3, 23.7, 24.9; (1, 1536, 1536) 55, 50, 57; (1, 1024, 1024) 33, 48, 55. Eight would share sets of an
/// L1 of eight ways, where rows lie a power of two apart.
const STREAMS: usize = 6;

/// Steps of k, and the order in which they are read.
#[derive(Clone, Copy)]
pub(crate) struct Steps {
    start: usize,
    depth: usize,
    /// Rows between two of the [`STREAMS`] rows that are read side by side; 0: neighbours, [`SIDE`] of them.
    apart: usize,
}

impl Steps {
    /// Steps that are read in order.
    pub(crate) fn in_order(start: usize, depth: usize) -> Self {
        Self { start, depth, apart: 0 }
    }

    /// Steps of a part of k of its own.
    pub(crate) fn part(start: usize, depth: usize) -> Self {
        Self { start, depth, apart: depth / STREAMS }
    }

    /// Row, from `start` on, that is read after `done` others.
    #[inline(always)]
    fn row(self, done: usize) -> usize {
        // Rows that are left come at the end, as neighbours.
        if done < STREAMS * self.apart { done / STREAMS + done % STREAMS * self.apart } else { done }
    }

    /// Rows that are read side by side after `done` others, and how far apart they are.
    #[inline(always)]
    fn group(self, done: usize) -> (usize, usize) {
        if done < STREAMS * self.apart { (STREAMS, self.apart) } else { (SIDE.min(self.depth - done), 1) }
    }
}

impl Strip<'_> {
    /// The stream: rows of the matrix are contiguous.
    ///
    /// # Safety
    /// The strip must be inside its product and be no other task's; scratch as planned.
    #[inline(always)]
    pub(crate) unsafe fn stream<S: Simd, const MR: usize, const NV: usize>(
        &self,
        s: S,
        most: usize,
        sums: &mut [f32],
        rows: &mut [f32],
        panel: &mut [f32],
        turned: &mut [f32],
    ) {
        let k = self.few.product.k;
        let (_, _, c) = self.operands();
        let mut start = 0;
        loop {
            let depth = most.min(k - start);
            let last = start + depth == k;
            // SAFETY: steps inside k, then sums that are complete for this block of it.
            unsafe {
                self.block::<S, MR, NV>(s, Steps::in_order(start, depth), sums, rows, panel);
                self.write(c, start == 0, last, sums, turned);
            }
            start += depth;
            if last {
                break;
            }
        }
    }

    /// The sums of some steps of k.
    ///
    /// # Safety
    /// As [`Self::stream`]; the steps must be inside k, and no more than planned.
    #[inline(always)]
    pub(crate) unsafe fn block<S: Simd, const MR: usize, const NV: usize>(
        &self,
        s: S,
        steps: Steps,
        sums: &mut [f32],
        rows: &mut [f32],
        panel: &mut [f32],
    ) {
        let nr = NV * S::LANES;
        let few = self.few;
        let Steps { start, depth, apart } = steps;
        let (a, b, _) = self.operands();
        let whole = self.cols - self.cols % nr;
        let lhs = if few.copy || apart > 0 {
            copy_rows(a, steps, few.few, rows);
            Rows { ptr: rows.as_ptr(), stride: depth as isize }
        } else {
            Rows { ptr: a.at(0, start), stride: a.row_stride }
        };
        if whole < self.cols {
            let source = Source {
                ptr: b.at(start, self.col + whole),
                across_stride: b.col_stride,
                depth_stride: b.row_stride,
            };
            // SAFETY: the columns after the whole panels are inside the matrix, and `panel` holds one panel.
            unsafe {
                pack_rhs_raw::<S, NV>(s, source, self.cols - whole, depth, panel.as_mut_ptr());
            }
        }
        sums.fill(0.0);
        let mut done = 0;
        while done < depth {
            let ((count, apart), first) = (steps.group(done), steps.row(done));
            for col in (0..self.cols).step_by(nr) {
                let rhs = if col < whole {
                    Rhs {
                        ptr: b.at(start + first, self.col + col),
                        stride: b.row_stride.wrapping_mul(apart as isize),
                    }
                } else {
                    Rhs { ptr: panel.as_ptr().wrapping_add(first * nr), stride: (nr * apart) as isize }
                };
                let mut row = 0;
                while row < few.few {
                    let tile = next_rows(few.few - row, MR, true);
                    let at = Rows {
                        ptr: lhs.ptr.wrapping_offset(row as isize * lhs.stride).wrapping_add(done),
                        ..lhs
                    };
                    with_rows!(tile, MR, R => {
                        let p = sums[row * self.width + col..].as_mut_ptr();
                        // SAFETY: R rows of sums from (row, col) on have whole vectors, as the width is whole
                        // panels; both sides are readable for these rows, columns and steps.
                        unsafe {
                            let mut acc = [[s.zero(); NV]; R];
                            for (i, vectors) in acc.iter_mut().enumerate() {
                                for (v, sum) in vectors.iter_mut().enumerate() {
                                    *sum = s.load_ptr(p.add(i * self.width + v * S::LANES));
                                }
                            }
                            let acc = tile_onto::<S, Rows, R, NV>(s, count, at, rhs, acc);
                            for (i, vectors) in acc.into_iter().enumerate() {
                                for (v, sum) in vectors.into_iter().enumerate() {
                                    s.store_ptr(sum, p.add(i * self.width + v * S::LANES));
                                }
                            }
                        }
                    });
                    row += tile;
                }
            }
            done += count;
        }
    }

    /// Adds up the sums of all parts, in order, and writes them.
    ///
    /// # Safety
    /// As [`Self::stream`].
    #[inline(always)]
    pub(crate) unsafe fn merge<S: Simd>(&self, s: S, parts: &[f32], sums: &mut [f32], turned: &mut [f32]) {
        let parts = parts.chunks_exact(sums.len());
        for (i, part) in parts.enumerate() {
            if i == 0 {
                sums.copy_from_slice(part);
                continue;
            }
            for (sum, part) in sums.chunks_exact_mut(S::LANES).zip(part.chunks_exact(S::LANES)) {
                s.store(s.add(s.load(sum), s.load(part)), sum);
            }
        }
        let (_, _, c) = self.operands();
        // SAFETY: the sums are complete.
        unsafe { self.write(c, true, true, sums, turned) };
    }
}

/// Copies these steps of a few rows, in the order in which they are read.
#[inline(always)]
pub(crate) fn copy_rows(a: Operand, steps: Steps, few: usize, dst: &mut [f32]) {
    for i in 0..few {
        for done in 0..steps.depth {
            // SAFETY: the row and the step are inside A: its rows and steps of k are what the callers pass.
            dst[i * steps.depth + done] = unsafe { *a.at(i, steps.start + steps.row(done)) };
        }
    }
}
