//! The five loops (Goto & van de Geijn 2008; Low et al. 2016, doi 10.1145/2925987), the outer two of them as tasks:
//!
//! ```text
//! for each matrix of the batch, strip of NC columns, range of rows      loop 5 and the threads: tasks, in any order
//!     for each block of KC steps of k                                   loop 4: pack the strip of B, if it must be
//!         for each block of MC rows                                     loop 3: pack the block of A, if it must be
//!             macro-kernel                                              loops 2 and 1: `block.rs`
//! ```
//!
//! k is never split between tasks, and a block of k adds to C in one fixed order, so every element of C is the same sum
//! in the same order whatever the tasks were and whoever did them.
//!
//! Little is copied that needs no copy (`params.rs` decides). The tile reads A in place wherever its rows are contiguous
//! and few enough for the TLB, else from rows copied side by side; columns in place only while they are few. B is read in
//! place where its columns are neighbours and its rows do not push each other out of L1; else each panel is packed when
//! its turn comes, by the first tile that uses it where that is possible. A last panel of B that is not full is always
//! copied, so that the tile may read whole vectors.

use core::marker::PhantomData;

use qkv_simd::{Isa, Simd};

use crate::block::{Job, Leave, LhsBlock, Packed, RhsPanels, macro_kernel};
use crate::epilogue::Identity;
use crate::pack::{Source, copy_rows_raw, pack_lhs_raw, pack_rhs_raw};
use crate::packed::PackedRhs;
use crate::parallel::{Tasks, run_by};
use crate::params::{Blocking, Plan, Shape, pieces};
use crate::scratch::with_scratch;
use crate::shapes::{KernelShape, TileOp, with_tile};
use crate::tile::{Columns, Rows};
use crate::writeback::{Finish, Scale, Target};
use crate::{MAX_BATCH_AXES, MatRef};

/// A matrix that is read, without its shape.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Operand {
    pub(crate) ptr: *const f32,
    pub(crate) row_stride: isize,
    pub(crate) col_stride: isize,
}

impl Operand {
    pub(crate) fn new(view: &MatRef<'_>) -> Self {
        Self { ptr: view.as_ptr(), row_stride: view.row_stride(), col_stride: view.col_stride() }
    }

    #[inline(always)]
    pub(crate) fn at(self, row: usize, col: usize) -> *const f32 {
        self.ptr.wrapping_offset(row as isize * self.row_stride + col as isize * self.col_stride)
    }

    fn moved(self, offset: isize) -> Self {
        Self { ptr: self.ptr.wrapping_offset(offset), ..self }
    }

    pub(crate) fn t(self) -> Self {
        Self { row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }
}

/// B: a matrix, or one packed ahead.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Weights<'a> {
    View(Operand),
    Packed(&'a PackedRhs),
}

/// The matrices of a batch: for each axis, outermost first, its length and its strides in A, B and C.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Batch {
    pub(crate) count: usize,
    pub(crate) rank: usize,
    pub(crate) axes: [(usize, [isize; 3]); MAX_BATCH_AXES],
}

impl Batch {
    /// A single product.
    pub(crate) const ONE: Self = Self { count: 1, rank: 0, axes: [(1, [0; 3]); MAX_BATCH_AXES] };

    /// Where matrix `index` starts in A, B and C.
    #[inline]
    fn offsets(&self, mut index: usize) -> [isize; 3] {
        let mut offsets = [0; 3];
        for &(len, strides) in self.axes[..self.rank].iter().rev() {
            let at = (index % len) as isize;
            index /= len;
            for (offset, stride) in offsets.iter_mut().zip(strides) {
                *offset += at * stride;
            }
        }
        offsets
    }
}

/// All that is computed, checked: C = epilogue(alpha A B + beta C).
#[derive(Clone, Copy)]
pub(crate) struct Product<'a> {
    pub(crate) isa: Isa,
    pub(crate) m: usize,
    pub(crate) k: usize,
    pub(crate) n: usize,
    pub(crate) batch: &'a Batch,
    pub(crate) a: Operand,
    pub(crate) b: Weights<'a>,
    pub(crate) c: Target,
    pub(crate) scale: Scale,
    pub(crate) finish: &'a dyn Finish,
}

// SAFETY: the pointers in it stand for one shared borrow of A and of B and one exclusive borrow of C, which outlive
// the product; workers read A and B and write disjoint blocks of C.
unsafe impl Sync for Product<'_> {}

impl<'a> Product<'a> {
    /// A, B and C of one matrix of the batch.
    #[inline]
    pub(crate) fn operands(&self, index: usize) -> (Operand, Weights<'a>, Target) {
        if self.batch.rank == 0 {
            return (self.a, self.b, self.c);
        }
        let [a, b, c] = self.batch.offsets(index);
        let weights = match self.b {
            Weights::View(view) => Weights::View(view.moved(b)),
            packed => packed,
        };
        (self.a.moved(a), weights, Target { ptr: self.c.ptr.wrapping_offset(c), ..self.c })
    }

    /// How the sums of a block of k leave: with the epilogue in the last block only, through L1 where they must.
    #[inline]
    fn leave(&self, last: bool) -> Leave<'a> {
        let contiguous = self.c.col_stride == 1;
        match (last && !self.finish.direct(), self.finish.simple()) {
            (true, Some(simple)) if contiguous => Leave::Simple(simple),
            (true, _) => Leave::ThroughL1(self.finish),
            (false, _) if contiguous => Leave::Plain,
            (false, _) => Leave::ThroughL1(&Identity),
        }
    }

    fn shape(&self) -> Shape {
        // A stride along an axis of length 1 is never used, and may as well be 1.
        let unit = |stride: isize, len: usize| stride == 1 || len <= 1;
        Shape {
            m: self.m,
            k: self.k,
            n: self.n,
            batches: self.batch.count,
            a_rows: unit(self.a.col_stride, self.k),
            a_columns: unit(self.a.row_stride, self.m),
            b_stride: match self.b {
                Weights::View(b) => unit(b.col_stride, self.n).then_some(b.row_stride),
                Weights::Packed(_) => Some(0),
            },
            b_packed: matches!(self.b, Weights::Packed(_)),
        }
    }
}

/// Computes a product.
pub(crate) fn run(product: &Product<'_>, blocking: Option<Blocking>) {
    let &Product { isa, m, k, n, batch, .. } = product;
    if m == 0 || n == 0 || batch.count == 0 {
        return;
    }
    let shape = product.shape();
    let mut plan = Plan::new(isa, &shape, blocking);
    if let Weights::Packed(packed) = product.b {
        plan.blocking.kc = packed.kc();
    }
    let KernelShape { mr, nr } = KernelShape::of(isa);
    let Blocking { kc, mc, nc, rows, pack_a, pack_b } = plan.blocking;
    let reading = match (shape.a_rows, shape.a_columns, pack_a) {
        (true, _, false) => Reading::Rows,
        (true, _, true) => Reading::CopiedRows,
        (false, true, false) => Reading::Columns,
        (false, _, _) => Reading::Panels,
    };
    let grid = Grid {
        plan: &plan,
        strips: pieces(n, nc),
        ranges: pieces(m, rows),
        b_len: match product.b {
            Weights::Packed(_) => 0,
            Weights::View(_) if pack_b => nc.min(n).next_multiple_of(nr) * kc.min(k),
            Weights::View(_) => nr * kc.min(k),
        },
        a_len: match reading {
            Reading::Rows | Reading::Columns => 0,
            Reading::CopiedRows => mc.min(m) * copied_stride(kc.min(k)),
            Reading::Panels => mc.min(m).next_multiple_of(mr) * kc.min(k),
        },
    };
    let tasks = pieces(batch.count, plan.batches) * grid.strips * grid.ranges;
    // One function for each way to read A: what a compiler computes ahead of the loops for the other ways is 1 % of 64 cubed and 3
    // of 32 cubed (Zen 5).
    run_by(plan.threads, tasks, |tasks| match reading {
        Reading::Rows => work::<Rows>(product, &grid, tasks),
        Reading::CopiedRows => work::<CopiedRows>(product, &grid, tasks),
        Reading::Columns => work::<Columns>(product, &grid, tasks),
        Reading::Panels => work::<Packed>(product, &grid, tasks),
    });
}

/// Values from one copied row to the next: a line more than they have, so that rows of a power of two do not all fall
/// into the same sets of L1.
fn copied_stride(depth: usize) -> usize {
    depth.next_multiple_of(16) + 16
}

/// A thread's share of the tasks.
fn work<R: ReadBlock>(product: &Product<'_>, grid: &Grid<'_>, tasks: &Tasks<'_>) {
    with_scratch(grid.b_len + grid.a_len, |scratch| {
        with_tile(product.isa, Worker::<R> { product, grid, tasks, scratch, reading: PhantomData });
    });
}

/// How A is read.
#[derive(Clone, Copy, Debug)]
enum Reading {
    /// In place, neighbours along k.
    Rows,
    /// The same after rows were copied side by side.
    CopiedRows,
    /// In place, neighbours across.
    Columns,
    /// Packed.
    Panels,
}

/// How a block of A is read: [`Reading`] as a type.
trait ReadBlock {
    type Block: LhsBlock;

    /// The block, readable as the tile wants it.
    ///
    /// # Safety
    /// The source must be readable for the block, and the room have the length that [`Grid`] says.
    unsafe fn block<S: Simd, const MR: usize>(s: S, of: Unread) -> Self::Block;
}

/// A block of A that is to be read, and where there is room for a copy of it.
struct Unread {
    source: Source,
    rows: usize,
    depth: usize,
    room: *mut f32,
    /// Values from one copied row to the next.
    stride: usize,
}

impl ReadBlock for Rows {
    type Block = Self;
    #[inline(always)]
    unsafe fn block<S: Simd, const MR: usize>(_: S, of: Unread) -> Self {
        Self { ptr: of.source.ptr, stride: of.source.across_stride }
    }
}

/// Rows that were copied side by side.
struct CopiedRows;

impl ReadBlock for CopiedRows {
    type Block = Rows;
    #[inline(always)]
    unsafe fn block<S: Simd, const MR: usize>(s: S, of: Unread) -> Rows {
        // SAFETY: the caller's promise.
        unsafe { copy_rows_raw(s, of.source, of.rows, of.depth, of.room, of.stride) };
        Rows { ptr: of.room, stride: of.stride as isize }
    }
}

impl ReadBlock for Columns {
    type Block = Self;
    #[inline(always)]
    unsafe fn block<S: Simd, const MR: usize>(_: S, of: Unread) -> Self {
        Self { ptr: of.source.ptr, stride: of.source.depth_stride }
    }
}

impl ReadBlock for Packed {
    type Block = Self;
    #[inline(always)]
    unsafe fn block<S: Simd, const MR: usize>(s: S, of: Unread) -> Self {
        // SAFETY: the caller's promise.
        unsafe { pack_lhs_raw::<S, MR>(s, of.source, of.rows, of.depth, of.room) };
        Self { ptr: of.room, depth: of.depth, width: MR }
    }
}

/// The tasks of a product: (group of matrices, strip of columns, range of rows), the last running fastest.
struct Grid<'a> {
    plan: &'a Plan,
    strips: usize,
    ranges: usize,
    b_len: usize,
    a_len: usize,
}

/// A thread's share of the tasks.
struct Worker<'a, R> {
    product: &'a Product<'a>,
    grid: &'a Grid<'a>,
    tasks: &'a Tasks<'a>,
    scratch: &'a mut [f32],
    reading: PhantomData<R>,
}

impl<R: ReadBlock> TileOp for Worker<'_, R> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd, const MR: usize, const NV: usize>(self, s: S) {
        let Grid { plan, strips, ranges, b_len, .. } = *self.grid;
        let (b_scratch, a_scratch) = self.scratch.split_at_mut(b_len);
        while let Some(task) = self.tasks.take() {
            let (task, range) = (task / ranges, task % ranges);
            let (group, strip) = (task / strips, task % strips);
            let (col, row) = (strip * plan.blocking.nc, range * plan.blocking.rows);
            for batch in group * plan.batches..self.product.batch.count.min((group + 1) * plan.batches) {
                let (a, b, c) = self.product.operands(batch);
                let part = Part {
                    product: self.product,
                    a,
                    b,
                    c,
                    blocking: plan.blocking,
                    batch,
                    row,
                    col,
                    rows: (self.product.m - row).min(plan.blocking.rows),
                    cols: (self.product.n - col).min(plan.blocking.nc),
                };
                // SAFETY: a checked product, a part inside it that no other task has, and scratch of the planned size.
                unsafe { part.compute::<S, R, MR, NV>(s, b_scratch, a_scratch) };
            }
        }
    }
}

/// A block of C with all of k: what a task computes.
struct Part<'a> {
    product: &'a Product<'a>,
    a: Operand,
    b: Weights<'a>,
    c: Target,
    blocking: Blocking,
    batch: usize,
    row: usize,
    col: usize,
    rows: usize,
    cols: usize,
}

impl Part<'_> {
    /// Loops 4 and 3.
    ///
    /// # Safety
    /// The part must lie inside its product and be no other task's; the scratch must have the lengths of [`Grid`].
    #[inline(always)]
    unsafe fn compute<S: Simd, R: ReadBlock, const MR: usize, const NV: usize>(
        &self,
        s: S,
        b_scratch: &mut [f32],
        a_scratch: &mut [f32],
    ) {
        let p = self.product;
        let Blocking { kc, mc, .. } = self.blocking;
        let mut start = 0;
        // At least one turn: with k = 0, C is still scaled and goes through the epilogue.
        loop {
            let depth = (p.k - start).min(kc);
            let last = start + depth == p.k;
            let scale = if start == 0 { p.scale } else { Scale { beta: 1.0, ..p.scale } };
            // SAFETY: the part's columns and these steps of k are inside B, says the caller.
            let mut rhs = unsafe { self.panels::<S, NV>(s, start, depth, b_scratch) };
            for first in (0..self.rows).step_by(mc) {
                let row = self.row + first;
                let job = Job {
                    isa: p.isa,
                    rows: (self.rows - first).min(mc),
                    cols: self.cols,
                    depth,
                    scale,
                    c: self.c.at(row, self.col),
                    leave: p.leave(last),
                    place: (self.batch, row, self.col),
                };
                let ptr = self.a.at(row, start);
                let source =
                    Source { ptr, across_stride: self.a.row_stride, depth_stride: self.a.col_stride };
                // SAFETY: the job's rows and steps of k are inside A; `rhs` covers its columns; its block of C is the
                // part's own; the scratch holds the copied block.
                unsafe {
                    let (rows, room) = (job.rows, a_scratch.as_mut_ptr());
                    let stride = copied_stride(kc.min(p.k));
                    let lhs = R::block::<S, MR>(s, Unread { source, rows, depth, room, stride });
                    macro_kernel::<S, _, MR, NV>(s, lhs, rhs, &job);
                }
                rhs.fresh = None;
            }
            start += depth;
            if last {
                break;
            }
        }
    }

    /// The panels of B for `depth` steps of k from `start` on, packed now, packed ahead or in place.
    ///
    /// # Safety
    /// As [`Self::compute`].
    #[inline(always)]
    unsafe fn panels<S: Simd, const NV: usize>(
        &self,
        s: S,
        start: usize,
        depth: usize,
        scratch: &mut [f32],
    ) -> RhsPanels {
        let nr = NV * S::LANES;
        let b = match self.b {
            Weights::View(b) => b,
            Weights::Packed(packed) => {
                let ptr = packed.panel(start, depth, self.col / nr);
                return RhsPanels { ptr, stride: nr as isize, panel: nr * depth, partial: None, fresh: None };
            }
        };
        let source = |col: usize| Source {
            ptr: b.at(start, col),
            across_stride: b.col_stride,
            depth_stride: b.row_stride,
        };
        let packed = scratch.as_mut_ptr();
        if self.blocking.pack_b {
            let fresh = Some(source(self.col));
            return RhsPanels { ptr: packed, stride: nr as isize, panel: nr * depth, partial: None, fresh };
        }
        let whole = self.cols - self.cols % nr;
        let partial = (whole < self.cols).then(|| {
            // SAFETY: as above, for the columns of the last panel.
            unsafe {
                pack_rhs_raw::<S, NV>(s, source(self.col + whole), self.cols - whole, depth, packed);
            }
            packed.cast_const()
        });
        RhsPanels { ptr: b.at(start, self.col), stride: b.row_stride, panel: nr, partial, fresh: None }
    }
}
