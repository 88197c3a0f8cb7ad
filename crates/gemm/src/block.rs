//! The macro-kernel: loops 2 and 1 of the five, a block of C from a block of A and panels of B.
//!
//! ```text
//! for each panel of B (NR columns, stays in L1)            loop 2
//!     for each tile of A (up to MR rows, comes from L2)    loop 1
//!         sums = tile(A, B)                                registers, `tile.rs`
//!         C = epilogue(alpha * sums + beta * C)            `writeback.rs`
//! ```
//!
//! Rows that do not fill a tile are computed by the same tile with fewer rows, a constant in the type, so that A can be
//! read in place without a look past its end; columns that do not fill a vector are computed on zeros and not stored.

use core::mem::MaybeUninit;

use qkv_simd::{Isa, Simd};

use crate::pack::{Source, pack_rhs_raw};
use crate::row_tiles::{next_rows, with_rows};
use crate::tile::{Acc, Columns, Lhs, Rhs, Rows, tile, tile_onto, tile_packing};
use crate::writeback::{BiasFloor, Block, Finish, Plain, Scale, Simple, Target, store_registers};

/// Where tile number `index`, which starts at row `row` of a block of A, finds its scalars.
pub(crate) trait LhsBlock: Copy {
    type Lhs: Lhs;
    /// Whether tiles may start at any row; packed ones start at their panel's.
    const ANY_ROW: bool;
    fn tile(self, index: usize, row: usize) -> Self::Lhs;
}

impl LhsBlock for Rows {
    type Lhs = Rows;
    const ANY_ROW: bool = true;
    #[inline(always)]
    fn tile(self, _: usize, row: usize) -> Rows {
        Rows { ptr: self.ptr.wrapping_offset(row as isize * self.stride), ..self }
    }
}

impl LhsBlock for Columns {
    type Lhs = Columns;
    const ANY_ROW: bool = true;
    #[inline(always)]
    fn tile(self, _: usize, row: usize) -> Columns {
        Columns { ptr: self.ptr.wrapping_add(row), ..self }
    }
}

/// A block of A packed by [`crate::pack`], a panel of `width` rows per tile.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Packed {
    pub(crate) ptr: *const f32,
    pub(crate) depth: usize,
    pub(crate) width: usize,
}

impl LhsBlock for Packed {
    type Lhs = Columns;
    const ANY_ROW: bool = false;
    #[inline(always)]
    fn tile(self, index: usize, _: usize) -> Columns {
        Columns { ptr: self.ptr.wrapping_add(index * self.depth * self.width), stride: self.width as isize }
    }
}

/// Panels of B for a block of k.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RhsPanels {
    /// Column 0 at the block's first k.
    pub(crate) ptr: *const f32,
    /// Values from one step of k to the next.
    pub(crate) stride: isize,
    /// Values from one panel to the next.
    pub(crate) panel: usize,
    /// The last panel, where it is not a full one and so lies somewhere else, packed.
    pub(crate) partial: Option<*const f32>,
    /// Where the panels are still to be packed: what they are packed from. `ptr` then leads to room for them.
    pub(crate) fresh: Option<Source>,
}

/// How sums leave the registers.
#[derive(Clone, Copy)]
pub(crate) enum Leave<'a> {
    /// To a C whose columns are neighbours, as they are.
    Plain,
    /// To such a C by way of a short epilogue.
    Simple(Simple<'a>),
    /// To L1, where the epilogue takes them up.
    ThroughL1(&'a dyn Finish),
}

/// The rest of what a block of C needs.
#[derive(Clone, Copy)]
pub(crate) struct Job<'a> {
    pub(crate) isa: Isa,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) depth: usize,
    pub(crate) scale: Scale,
    pub(crate) c: Target,
    pub(crate) leave: Leave<'a>,
    /// Batch, row and column of the block in C.
    pub(crate) place: (usize, usize, usize),
}

/// Values per cache line.
const LINE: usize = 16;

/// Values of the largest tile of any instruction set.
const LARGEST_TILE: usize = 16 * 32;

/// Computes a block of C.
///
/// # Safety
/// `lhs` and `rhs` must be readable for the job's rows, columns (B to whole vectors of `NR`) and depth, and fresh panels
/// have room; the block of C must be valid for writes, and for reads where beta is not 0.
#[inline(always)]
pub(crate) unsafe fn macro_kernel<S: Simd, A: LhsBlock, const MR: usize, const NV: usize>(
    s: S,
    lhs: A,
    rhs: RhsPanels,
    job: &Job<'_>,
) {
    let nr = NV * S::LANES;
    debug_assert!(MR * nr <= LARGEST_TILE);
    // Not initialised: that would cost a tenth of a small product.
    let mut spill = [MaybeUninit::<f32>::uninit(); LARGEST_TILE];
    let full_first = next_rows(job.rows, MR, A::ANY_ROW) == MR;
    for (panel, col) in (0..job.cols).step_by(nr).enumerate() {
        let cols = (job.cols - col).min(nr);
        let b = match rhs.partial {
            Some(ptr) if cols < nr => Rhs { ptr, stride: nr as isize },
            _ => Rhs { ptr: rhs.ptr.wrapping_add(panel * rhs.panel), stride: rhs.stride },
        };
        let (mut row, mut index) = (0, 0);
        let mut ahead = Ahead::NOTHING;
        if let Some(source) = rhs.fresh {
            let room = b.ptr.cast_mut();
            let source = Source { ptr: source.at(col, 0), ..source };
            if source.across_stride == 1 && cols == nr && full_first {
                let from = Rhs { ptr: source.ptr, stride: source.depth_stride };
                let c = job.c.at(0, col);
                prefetch_target::<S, MR>(s, c, nr);
                // SAFETY: MR rows and a whole panel of the source are readable, and there is room for the panel.
                unsafe {
                    let acc = tile_packing::<S, A::Lhs, MR, NV>(s, job.depth, lhs.tile(0, 0), from, room);
                    emit::<S, MR, NV>(s, acc, job, (0, col, cols), c, &mut spill);
                }
                (row, index) = (MR, 1);
                if col + 2 * nr <= job.cols {
                    ahead = Ahead::new((source.at(nr, 0), source.depth_stride), job.depth, job.rows / MR, nr);
                }
            } else {
                // SAFETY: the source covers the panel's columns for `depth` steps, and there is room for the panel.
                unsafe { pack_rhs_raw::<S, NV>(s, source, cols, job.depth, room) };
            }
        }
        while row < job.rows {
            let rows = next_rows(job.rows - row, MR, A::ANY_ROW);
            let a = lhs.tile(index, row);
            let c = job.c.at(row, col);
            with_rows!(rows, MR, R => {
                ahead.prefetch(s);
                let half = job.depth / 8 * 4;
                // SAFETY: R rows, NR columns and `depth` steps of both sides are readable, says the caller.
                unsafe {
                    let acc = tile::<S, A::Lhs, R, NV>(s, half, a, b);
                    // Not sooner: rows of C often share a set of L1 with each other and with the panel of B, whose lines
                    // would push them out before the tile ends.
                    prefetch_target::<S, R>(s, c, nr);
                    let later = Rhs { ptr: b.ptr.wrapping_offset(half as isize * b.stride), ..b };
                    let acc = tile_onto::<S, A::Lhs, R, NV>(s, job.depth - half, a.advanced(half), later, acc);
                    emit::<S, R, NV>(s, acc, job, (row, col, cols), c, &mut spill);
                }
            });
            row += rows;
            index += 1;
        }
    }
}

/// The rows of the next panel of B, brought in while the tiles of this one are computed.
///
/// The first tile of a panel reads a line or two out of each of many rows, which no prefetcher of the hardware follows.
struct Ahead {
    row: *const f32,
    stride: isize,
    left: usize,
    per_tile: usize,
    width: usize,
}

impl Ahead {
    const NOTHING: Self = Self { row: core::ptr::null(), stride: 0, left: 0, per_tile: 0, width: 0 };

    /// `rows` rows of `width` values, over the next `tiles` tiles.
    fn new((row, stride): (*const f32, isize), rows: usize, tiles: usize, width: usize) -> Self {
        Self { row, stride, left: rows, per_tile: rows.div_ceil(tiles.max(1)), width }
    }

    /// A tile's share.
    #[inline(always)]
    fn prefetch<S: Simd>(&mut self, s: S) {
        let share = self.per_tile.min(self.left);
        for _ in 0..share {
            for at in (0..self.width).step_by(LINE) {
                s.prefetch(self.row.wrapping_add(at));
            }
            self.row = self.row.wrapping_offset(self.stride);
        }
        self.left -= share;
    }
}

/// Asks for the lines of C that a tile will write: they arrive while it is computed. Rows need not begin with a line.
#[inline(always)]
fn prefetch_target<S: Simd, const R: usize>(s: S, c: Target, nr: usize) {
    for i in 0..R {
        for at in (0..nr).step_by(LINE) {
            s.prefetch_write(c.at(i, at).ptr);
        }
        s.prefetch_write(c.at(i, nr - 1).ptr);
    }
}

/// Sends a tile's sums to C.
///
/// # Safety
/// The `R` rows and `cols` columns of `c` must be the job's.
#[inline(always)]
unsafe fn emit<S: Simd, const R: usize, const NV: usize>(
    s: S,
    acc: Acc<S, R, NV>,
    job: &Job<'_>,
    (row, col, cols): (usize, usize, usize),
    c: Target,
    spill: &mut [MaybeUninit<f32>; LARGEST_TILE],
) {
    let nr = NV * S::LANES;
    let (batch, row0, col0) = job.place;
    let finish = match job.leave {
        Leave::Plain => {
            // SAFETY: the caller's promise; C is as `Leave` says.
            return unsafe { store_registers::<S, _, R, NV>(s, acc, Plain, job.scale, c, cols) };
        }
        Leave::Simple(simple) => {
            let touch = BiasFloor::<S, NV>::new(s, simple.at(col0 + col));
            // SAFETY: as above.
            return unsafe { store_registers::<S, _, R, NV>(s, acc, touch, job.scale, c, cols) };
        }
        Leave::ThroughL1(finish) => finish,
    };
    let spill = spill.as_mut_ptr().cast::<f32>();
    for (i, vectors) in acc.into_iter().enumerate() {
        for (v, sum) in vectors.into_iter().enumerate() {
            // SAFETY: the largest tile has room for R rows of NV vectors.
            unsafe { s.store_ptr(sum, spill.add(i * nr + v * S::LANES)) };
        }
    }
    let place = (batch, row0 + row, col0 + col);
    let block = Block { sums: spill, stride: nr, rows: R, cols, scale: job.scale, c, place };
    // SAFETY: the sums were written above to whole vectors; C as before.
    unsafe { finish.finish(job.isa, block) };
}
