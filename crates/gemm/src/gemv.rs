//! Products with few rows or few columns: a vector times a matrix, a matrix times a vector, and skinny blocks of both.
//!
//! Each value of the large matrix takes part in only a few multiply-adds, so reading it is all that counts: it is read
//! once, in the order in which it lies in memory, and never packed. With few columns the product is computed as its
//! transpose, C^T = B^T A^T, so "few x k times k x many" is the only case, and the large matrix's strides decide the way:
//!
//! ```text
//! rows are contiguous      stream: sums[few][NC] += few x 12 times 12 x NC, twelve rows of the matrix side by side;
//!                          the sums stay in L1, the register tile does the work
//! columns are contiguous   dots: lanes run along k, up to 8 columns at once or up to 4 rows, summed at the end
//! ```
//!
//! Neither stride 1: the general driver packs it. Tasks are strips of columns, k is not split, so the result does not
//! depend on the number of threads.

use qkv_simd::Simd;

use crate::driver::{Operand, Product, Weights};
use crate::epilogue::Identity;
use crate::pack::{Source, pack_rhs_raw};
use crate::parallel::{Tasks, run_inline, run_tasks};
use crate::params::{KC, block_depth, cores};
use crate::row_tiles::{next_rows, with_rows};
use crate::scratch::with_scratch;
use crate::shapes::{KernelShape, TileOp, with_tile};
use crate::tile::{Rhs, Rows, tile_onto};
use crate::writeback::{Block, Finish, Scale, Target};

/// Most rows for the stream, where the matrix is small enough to stay in a cache and where it is not.
///
/// Against the general driver, which also reads it in place, one core of a Zen 4, percent of its peak: k = n = 4096
/// with 1, 4, 8, 12 rows 10, 31, 36, 38 by the stream and 6, 17, 34, 47 by the driver; k = 384, n = 1536 (2.25 MiB)
/// with 1, 2, 3, 4, 8 rows 23, 39, 43, 47, 56 by the stream and 15, 33, 43, 51, 72 by the driver.
const FEW_STREAM: usize = 3;
const FEW_STREAM_LARGE: usize = 8;

/// Values from which on the matrix is large: 4 MiB.
const LARGE: usize = 1 << 20;

/// Most rows for the dots, which reach 1.8 times the rate of the driver (it has to pack) with 2 rows, 1.1 times with 8
/// and the same with 12.
const FEW_DOT: usize = 8;

/// Rows of the matrix that the stream reads side by side.
///
/// A vector times 4096 x 4096, strips of 2048 columns: 4 rows reach 70 % of the bandwidth of one Zen 4 core, 8 reach
/// 86 %, 12 reach 94 %; 16 less, as rows 16 KiB apart then push each other out of L1. Explicit prefetches, at any of the
/// distances tried, made it slower.
const SIDE: usize = 12;

/// Values of the large matrix below which the work stays on the caller's thread: half a megabyte, which is read from L2
/// in some 10 microseconds.
const INLINE: usize = 1 << 17;

/// Most values of the few rows that are copied where they are not contiguous along k.
const COPY: usize = 1 << 16;

/// Computes `product` here, where it is of this kind; else answers false.
pub(crate) fn run(product: &Product<'_>) -> bool {
    let Weights::View(b) = product.b else { return false };
    let few = |a: Operand, b: Operand, few: usize, many: usize, transposed: bool| {
        let unit = |stride: isize, len: usize| stride == 1 || len <= 1;
        let copy = !unit(a.col_stride, product.k);
        let large = product.k.saturating_mul(many) >= LARGE;
        let stream = unit(b.col_stride, many) && few <= if large { FEW_STREAM_LARGE } else { FEW_STREAM };
        let dot = !stream && unit(b.row_stride, product.k) && few <= FEW_DOT;
        let fits = !copy || stream || few.saturating_mul(product.k) <= COPY;
        ((stream || dot) && fits).then_some(Few { product, a, b, few, many, transposed, dot, copy })
    };
    let direct = few(product.a, b, product.m, product.n, false);
    let Some(few) = direct.or_else(|| few(b.t(), product.a.t(), product.n, product.m, true)) else {
        return false;
    };
    few.run();
    true
}

/// A product few x k times k x many.
struct Few<'a> {
    product: &'a Product<'a>,
    a: Operand,
    b: Operand,
    few: usize,
    many: usize,
    /// Whether this is the transpose of what was asked for.
    transposed: bool,
    /// Whether it is computed by dots.
    dot: bool,
    /// Whether the few rows must be copied to be contiguous along k.
    copy: bool,
}

// SAFETY: as for `Product`, whose pointers these are.
unsafe impl Sync for Few<'_> {}

/// Lengths of the parts of a worker's scratch.
#[derive(Clone, Copy)]
struct Lengths {
    width: usize,
    sums: usize,
    rows: usize,
    panel: usize,
    turned: usize,
}

impl Few<'_> {
    fn run(&self) {
        let Product { isa, k, batch, .. } = *self.product;
        let KernelShape { nr, .. } = KernelShape::of(isa);
        let lanes = isa.lanes();
        let width = self.width(nr);
        let kc = block_depth(k, KC);
        let lengths = Lengths {
            width,
            sums: self.few * width,
            rows: match (self.copy, self.dot) {
                (false, _) => 0,
                (true, true) => self.few * k,
                (true, false) => self.few * kc,
            }
            .next_multiple_of(lanes),
            panel: if self.dot { 0 } else { kc * nr },
            turned: if self.transposed { width * self.few.next_multiple_of(lanes) } else { 0 },
        };
        let Lengths { sums, rows, panel, turned, .. } = lengths;
        let tasks = batch.count * self.many.div_ceil(width);
        let worker = |tasks: &Tasks<'_>| {
            with_scratch(sums + rows + panel + turned, |scratch| {
                with_tile(isa, Worker { few: self, tasks, lengths, scratch });
            });
        };
        let work = batch.count.saturating_mul(k).saturating_mul(self.many);
        if work < INLINE { run_inline(tasks, worker) } else { run_tasks(tasks, worker) }
    }

    /// Columns per task.
    ///
    /// For the stream, long pieces of rows matter more than many tasks: strips of 1024 columns read a fifth slower than
    /// strips of 2048.
    fn width(&self, nr: usize) -> usize {
        let width = if self.dot {
            (self.many / (4 * cores())).clamp(32, 512)
        } else {
            (self.many / cores()).clamp(512, 2048)
        };
        width.min(self.many).next_multiple_of(nr)
    }
}

/// A thread's share of the strips.
struct Worker<'a> {
    few: &'a Few<'a>,
    tasks: &'a Tasks<'a>,
    lengths: Lengths,
    scratch: &'a mut [f32],
}

impl TileOp for Worker<'_> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd, const MR: usize, const NV: usize>(self, s: S) {
        let Lengths { width, sums, rows, panel, .. } = self.lengths;
        let (sums, rest) = self.scratch.split_at_mut(sums);
        let (rows, rest) = rest.split_at_mut(rows);
        let (panel, turned) = rest.split_at_mut(panel);
        let few = self.few;
        let strips = few.many.div_ceil(width);
        while let Some(task) = self.tasks.take() {
            let (batch, col) = (task / strips, task % strips * width);
            let strip = Strip { few, batch, col, cols: width.min(few.many - col), width };
            // SAFETY: a checked product, columns inside it that no other task has, scratch of the planned lengths.
            unsafe {
                if few.dot {
                    strip.dots(s, sums, rows, turned);
                } else {
                    strip.stream::<S, MR, NV>(s, sums, rows, panel, turned);
                }
            }
        }
    }
}

/// A strip of columns of one matrix of the batch.
struct Strip<'a> {
    few: &'a Few<'a>,
    batch: usize,
    col: usize,
    cols: usize,
    width: usize,
}

impl Strip<'_> {
    /// The operands of this matrix of the batch.
    #[inline(always)]
    fn operands(&self) -> (Operand, Operand, Target) {
        let single = self.few.product.single(self.batch);
        let Weights::View(b) = single.b else { return (self.few.a, self.few.b, single.c) };
        if self.few.transposed { (b.t(), single.a.t(), single.c) } else { (single.a, b, single.c) }
    }

    /// The stream: rows of the matrix are contiguous.
    ///
    /// # Safety
    /// The strip must be inside its product and be no other task's; scratch as planned.
    #[inline(always)]
    unsafe fn stream<S: Simd, const MR: usize, const NV: usize>(
        &self,
        s: S,
        sums: &mut [f32],
        rows: &mut [f32],
        panel: &mut [f32],
        turned: &mut [f32],
    ) {
        let nr = NV * S::LANES;
        let few = self.few;
        let k = few.product.k;
        let (a, b, c) = self.operands();
        let kc = block_depth(k, KC);
        let whole = self.cols - self.cols % nr;
        let mut start = 0;
        loop {
            let depth = kc.min(k - start);
            let last = start + depth == k;
            let lhs = if few.copy {
                copy_rows(a, start, few.few, depth, rows);
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
            for first in (0..depth).step_by(SIDE) {
                let steps = SIDE.min(depth - first);
                for col in (0..self.cols).step_by(nr) {
                    let rhs = if col < whole {
                        Rhs { ptr: b.at(start + first, self.col + col), stride: b.row_stride }
                    } else {
                        Rhs { ptr: panel.as_ptr().wrapping_add(first * nr), stride: nr as isize }
                    };
                    let mut row = 0;
                    while row < few.few {
                        let count = next_rows(few.few - row, MR, true);
                        let at = Rows {
                            ptr: lhs.ptr.wrapping_offset(row as isize * lhs.stride).wrapping_add(first),
                            ..lhs
                        };
                        with_rows!(count, MR, R => {
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
                                let acc = tile_onto::<S, Rows, R, NV>(s, steps, at, rhs, acc);
                                for (i, vectors) in acc.into_iter().enumerate() {
                                    for (v, sum) in vectors.into_iter().enumerate() {
                                        s.store_ptr(sum, p.add(i * self.width + v * S::LANES));
                                    }
                                }
                            }
                        });
                        row += count;
                    }
                }
            }
            // SAFETY: the sums are complete for this block of k.
            unsafe { self.write(c, start == 0, last, sums, turned) };
            start += depth;
            if last {
                break;
            }
        }
    }

    /// The dots: columns of the matrix are contiguous.
    ///
    /// # Safety
    /// As [`Self::stream`].
    #[inline(always)]
    unsafe fn dots<S: Simd>(&self, s: S, sums: &mut [f32], rows: &mut [f32], turned: &mut [f32]) {
        let few = self.few;
        let k = few.product.k;
        let (a, b, c) = self.operands();
        let lhs = if few.copy {
            copy_rows(a, 0, few.few, k, rows);
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

    /// Hands sums to the epilogue and C.
    ///
    /// # Safety
    /// As [`Self::stream`].
    #[inline(always)]
    unsafe fn write(&self, c: Target, first: bool, last: bool, sums: &[f32], turned: &mut [f32]) {
        let Product { isa, scale, .. } = *self.few.product;
        let scale = if first { scale } else { Scale { beta: 1.0, ..scale } };
        let finish: &dyn Finish = if last { self.few.product.finish } else { &Identity };
        let few = self.few.few;
        let block = if self.few.transposed {
            let stride = turned.len() / self.width;
            for (i, row) in sums.chunks_exact(self.width).enumerate() {
                for (j, &sum) in row[..self.cols].iter().enumerate() {
                    turned[j * stride + i] = sum;
                }
            }
            Block {
                sums: turned.as_ptr(),
                stride,
                rows: self.cols,
                cols: few,
                scale,
                c: c.at(self.col, 0),
                place: (self.batch, self.col, 0),
            }
        } else {
            Block {
                sums: sums.as_ptr(),
                stride: self.width,
                rows: few,
                cols: self.cols,
                scale,
                c: c.at(0, self.col),
                place: (self.batch, 0, self.col),
            }
        };
        // SAFETY: rows of both scratches are whole vectors; the block of C is this strip's own.
        unsafe { finish.finish(isa, block) };
    }
}

/// Copies `depth` steps of a few rows so that they are contiguous.
#[inline(always)]
fn copy_rows(a: Operand, start: usize, few: usize, depth: usize, dst: &mut [f32]) {
    for i in 0..few {
        for k in 0..depth {
            // SAFETY: i and start + k are inside A: its rows and steps of k are what the callers pass.
            dst[i * depth + k] = unsafe { *a.at(i, start + k) };
        }
    }
}

/// Sums over k of a few rows times a few columns, both contiguous.
struct Dots<'a> {
    x: Rows,
    columns: Rows,
    k: usize,
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
