//! Products with few rows or few columns: a vector times a matrix, a matrix times a vector, and skinny blocks of both.
//!
//! Each value of the large matrix takes part in only a few multiply-adds, so reading it is all that counts: it is read
//! once, in the order in which it lies in memory, and never packed. With few columns the product is computed as its
//! transpose, C^T = B^T A^T, so "few x k times k x many" is the only case, and the large matrix's strides decide the way:
//!
//! ```text
//! rows are contiguous      stream: sums[few][NC] += few x 12 times 12 x NC, twelve rows of the matrix side by side;
//!                          the sums stay in L1, the register tile does the work
//!   and from memory        the same by parts of k, with six rows a sixth of the part apart, so that each of the six
//!                          runs on through memory from one step to the next; sums of the parts are added in order
//! columns are contiguous   dots: lanes run along k, up to 8 columns at once or up to 4 rows, summed at the end
//! ```
//!
//! Neither stride 1: the general driver packs it. Tasks are strips of columns and parts of k, both cut by the shape alone,
//! so the result does not depend on the number of threads.

use core::slice::{from_raw_parts, from_raw_parts_mut};

use qkv_simd::Simd;

use crate::driver::{Operand, Product, Weights};
use crate::epilogue::Identity;
use crate::parallel::{Tasks, Threads, cores, run_by};
use crate::params::{KC, block_depth};
use crate::scratch::{KEPT, with_scratch};
use crate::shapes::{KernelShape, TileOp, with_tile};
use crate::stream::Steps;
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

/// Most rows for which k is cut into parts: with more, the sums of a wide strip do not stay in L1.
const FEW_PARTS: usize = 2;

/// Columns of a strip, times rows, where k is cut into parts: 16 KiB of sums, half of the smallest L1d in use. A part of
/// [`KC`] steps is then up to 4 MiB of the matrix.
const WIDE: usize = 4096;

/// Values of the large matrix below which no thread is woken: half a megabyte, which is read from L2
/// in some 10 microseconds.
const INLINE: f64 = 131_072.0;

/// Values from which on the work is then shared with a thread that is awake.
const SHARED: f64 = 32_768.0;

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
pub(crate) struct Few<'a> {
    pub(crate) product: &'a Product<'a>,
    a: Operand,
    b: Operand,
    pub(crate) few: usize,
    many: usize,
    /// Whether this is the transpose of what was asked for.
    transposed: bool,
    /// Whether it is computed by dots.
    dot: bool,
    /// Whether the few rows must be copied to be contiguous along k.
    pub(crate) copy: bool,
}

// SAFETY: as for `Product`, whose pointers these are.
unsafe impl Sync for Few<'_> {}

/// Lengths of the parts of a worker's scratch.
#[derive(Clone, Copy)]
struct Lengths {
    width: usize,
    /// Steps of k in a block or part.
    depth: usize,
    sums: usize,
    rows: usize,
    panel: usize,
    turned: usize,
}

/// The sums of parts: few rows of a strip's width for each part, the parts of a strip one after the other.
#[derive(Clone, Copy)]
struct Slots {
    ptr: *mut f32,
    /// Parts of a strip.
    parts: usize,
    /// The strip, of all of the batch, whose sums come first.
    first: usize,
}

// SAFETY: each task writes sums of its own; they are read when all of them are written.
unsafe impl Sync for Slots {}

/// What a task does.
#[derive(Clone, Copy)]
enum Step {
    /// A strip, for all of k.
    Whole,
    /// A part of k of a strip: its sums stay in the slots.
    Part(Slots),
    /// Adds up the parts of a strip.
    Merge(Slots),
}

impl Few<'_> {
    fn run(&self) {
        let Product { isa, k, batch, .. } = *self.product;
        let KernelShape { nr, .. } = KernelShape::of(isa);
        let lanes = isa.lanes();
        let cut = !self.dot && self.few <= FEW_PARTS && k.saturating_mul(self.many) >= LARGE;
        let width = if cut { self.wide(nr) } else { self.width(nr) };
        let kc = block_depth(k, KC);
        let lengths = Lengths {
            width,
            depth: kc,
            sums: self.few * width,
            rows: match (self.copy || cut, self.dot) {
                (false, _) => 0,
                (true, true) => self.few * k,
                (true, false) => self.few * kc,
            }
            .next_multiple_of(lanes),
            // Widths are whole panels, so only the last columns can be fewer.
            panel: if self.dot || self.many.is_multiple_of(nr) { 0 } else { kc * nr },
            turned: if self.transposed { width * self.few.next_multiple_of(lanes) } else { 0 },
        };
        let strips = self.many.div_ceil(width);
        if !cut {
            return self.tasks(batch.count * strips, lengths, Step::Whole);
        }
        let parts = k.div_ceil(kc);
        // Sums are far smaller than their matrix, but a batch may read one matrix for many vectors.
        let of_one = strips * parts * lengths.sums;
        let at_once = (KEPT / of_one).clamp(1, batch.count.max(1));
        with_scratch(at_once * of_one, |sums| {
            for first in (0..batch.count).step_by(at_once) {
                let slots = Slots { ptr: sums.as_mut_ptr(), parts, first: first * strips };
                let strips = at_once.min(batch.count - first) * strips;
                self.tasks(strips * parts, lengths, Step::Part(slots));
                self.tasks(strips, lengths, Step::Merge(slots));
            }
        });
    }

    /// Runs `count` tasks of this kind.
    fn tasks(&self, count: usize, lengths: Lengths, step: Step) {
        let Product { isa, k, batch, .. } = *self.product;
        let Lengths { sums, rows, panel, turned, .. } = lengths;
        let worker = |tasks: &Tasks<'_>| {
            with_scratch(sums + rows + panel + turned, |scratch| {
                with_tile(isa, Worker { few: self, tasks, lengths, step, scratch });
            });
        };
        let work = batch.count as f64 * k as f64 * self.many as f64;
        run_by(Threads::of(work, [SHARED, INLINE], count), count, worker);
    }

    /// Columns per task where k is cut into parts: even strips of at most [`WIDE`] sums.
    fn wide(&self, nr: usize) -> usize {
        let strips = self.many.div_ceil(WIDE / self.few);
        self.many.div_ceil(strips).next_multiple_of(nr)
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

/// A thread's share of the tasks.
struct Worker<'a> {
    few: &'a Few<'a>,
    tasks: &'a Tasks<'a>,
    lengths: Lengths,
    step: Step,
    scratch: &'a mut [f32],
}

impl TileOp for Worker<'_> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd, const MR: usize, const NV: usize>(self, s: S) {
        let Lengths { width, depth, sums, rows, panel, .. } = self.lengths;
        let (sums, rest) = self.scratch.split_at_mut(sums);
        let (rows, rest) = rest.split_at_mut(rows);
        let (panel, turned) = rest.split_at_mut(panel);
        let few = self.few;
        let strips = few.many.div_ceil(width);
        let (first, parts) = match self.step {
            Step::Whole => (0, 1),
            Step::Part(slots) => (slots.first, slots.parts),
            Step::Merge(slots) => (slots.first, 1),
        };
        while let Some(task) = self.tasks.take() {
            let (slot, part) = (task / parts, task % parts);
            let (batch, strip) = ((first + slot) / strips, (first + slot) % strips);
            let col = strip * width;
            let strip = Strip { few, batch, col, cols: width.min(few.many - col), width };
            let len = sums.len();
            // SAFETY: a checked product, columns inside it, and parts of k, that no other task has, scratch of the
            // planned lengths, and slots for the parts of all these strips, in which this part or strip has its own.
            unsafe {
                match self.step {
                    Step::Whole if few.dot => strip.dots(s, sums, rows, turned),
                    Step::Whole => strip.stream::<S, MR, NV>(s, depth, sums, rows, panel, turned),
                    Step::Part(slots) => {
                        let sums = from_raw_parts_mut(slots.ptr.add((slot * parts + part) * len), len);
                        let start = part * depth;
                        let steps = Steps::part(start, depth.min(few.product.k - start));
                        strip.block::<S, MR, NV>(s, steps, sums, rows, panel);
                    }
                    Step::Merge(slots) => {
                        let len = slots.parts * len;
                        strip.merge(s, from_raw_parts(slots.ptr.add(slot * len), len), sums, turned);
                    }
                }
            }
        }
    }
}

/// A strip of columns of one matrix of the batch.
pub(crate) struct Strip<'a> {
    pub(crate) few: &'a Few<'a>,
    batch: usize,
    pub(crate) col: usize,
    pub(crate) cols: usize,
    pub(crate) width: usize,
}

impl Strip<'_> {
    /// The operands of this matrix of the batch.
    #[inline(always)]
    pub(crate) fn operands(&self) -> (Operand, Operand, Target) {
        let (a, b, c) = self.few.product.operands(self.batch);
        let Weights::View(b) = b else { return (self.few.a, self.few.b, c) };
        if self.few.transposed { (b.t(), a.t(), c) } else { (a, b, c) }
    }

    /// Hands sums to the epilogue and C.
    ///
    /// # Safety
    /// As [`Self::stream`].
    #[inline(always)]
    pub(crate) unsafe fn write(&self, c: Target, first: bool, last: bool, sums: &[f32], turned: &mut [f32]) {
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
