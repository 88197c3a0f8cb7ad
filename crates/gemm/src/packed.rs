//! B packed ahead: weights that are multiplied many times.
//!
//! Packing B costs a read and a write per value, which a product with few rows of A does not earn back. Weights do not
//! change, so they can be packed once. The values lie as the driver reads them:
//!
//! ```text
//! [block of k][panel][k in the block][NR]
//! ```
//!
//! block by block rather than panel by panel, so that what is read together is one piece of memory: panels a power of
//! two apart would fall into the same sets of L2.

use qkv_simd::{Isa, Simd};

use crate::driver::Operand;
use crate::pack::{Source, pack_rhs_raw, packed_len};
use crate::parallel::{Tasks, run_tasks};
use crate::params::{KC, block_depth};
use crate::scratch::AlignedBuf;
use crate::shapes::{KernelShape, TileOp, with_tile};
use crate::{GemmError, MatRef};

/// A right-hand side, k x n, packed for one instruction set; see [`crate::gemm_packed`].
///
/// It owns its values, takes [`Self::bytes`] of memory and can be used by many threads at once.
#[derive(Clone, Debug)]
pub struct PackedRhs {
    values: AlignedBuf,
    isa: Isa,
    k: usize,
    n: usize,
    /// Columns in whole panels.
    padded: usize,
    kc: usize,
}

impl PackedRhs {
    /// Packs `b` (k x n) for the instruction set that this process uses.
    ///
    /// # Errors
    /// [`GemmError::Isa`] where `QKV_ISA` asks for one that cannot be used, [`GemmError::Memory`] where the packed copy
    /// (n rounded up to whole panels) cannot be allocated.
    pub fn new(b: MatRef<'_>) -> Result<Self, GemmError> {
        Self::new_for(Isa::active()?, b)
    }

    /// Packs `b` for a given instruction set.
    ///
    /// # Errors
    /// [`GemmError::Memory`] as in [`Self::new`].
    pub fn new_for(isa: Isa, b: MatRef<'_>) -> Result<Self, GemmError> {
        let (k, n) = (b.rows(), b.cols());
        let nr = KernelShape::of(isa).nr;
        let mut values = AlignedBuf::new();
        let memory = || GemmError::Memory { argument: "b", given: (k, n) };
        let len = packed_len(n, k, nr).ok_or_else(memory)?;
        let dst = values.try_reserve(len).ok_or_else(memory)?;
        let (padded, kc) = (n.next_multiple_of(nr), block_depth(k, KC));
        if len > 0 {
            let blocks = k.div_ceil(kc);
            let width = PANELS * nr;
            let strips = n.div_ceil(width);
            let job = PackJob { b: Operand::new(&b), k, n, kc, padded, width, strips, dst: dst.as_mut_ptr() };
            run_tasks(blocks * strips, |tasks| with_tile(isa, PackWorker { job: &job, tasks }));
        }
        Ok(Self { values, isa, k, n, padded, kc })
    }

    /// Steps of k: the rows that were packed.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.k
    }
    /// Columns.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.n
    }
    /// The instruction set that it was packed for.
    #[must_use]
    pub fn isa(&self) -> Isa {
        self.isa
    }
    /// Memory that it takes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.values.capacity() * size_of::<f32>()
    }

    pub(crate) fn kc(&self) -> usize {
        self.kc
    }

    /// The panel with number `panel` of the block of k that starts at `start` and is `depth` deep.
    #[inline(always)]
    pub(crate) fn panel(&self, start: usize, depth: usize, panel: usize) -> *const f32 {
        let nr = KernelShape::of(self.isa).nr;
        self.values.as_ptr().wrapping_add(start * self.padded + panel * nr * depth)
    }
}

/// Panels that a task packs.
const PANELS: usize = 16;

struct PackJob {
    b: Operand,
    k: usize,
    n: usize,
    kc: usize,
    padded: usize,
    width: usize,
    strips: usize,
    dst: *mut f32,
}

// SAFETY: the pointers stand for a shared borrow of B and an exclusive one of the panels, which outlive the job; each
// task writes panels of its own.
unsafe impl Sync for PackJob {}

struct PackWorker<'a> {
    job: &'a PackJob,
    tasks: &'a Tasks<'a>,
}

impl TileOp for PackWorker<'_> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd, const MR: usize, const NV: usize>(self, s: S) {
        let &PackJob { b, k, n, kc, padded, width, strips, dst } = self.job;
        while let Some(task) = self.tasks.take() {
            let (start, col) = (task / strips * kc, task % strips * width);
            let (depth, cols) = (kc.min(k - start), width.min(n - col));
            let source =
                Source { ptr: b.at(start, col), across_stride: b.col_stride, depth_stride: b.row_stride };
            // SAFETY: the strip is inside B and its panels, whole ones, inside the buffer and no other task's.
            unsafe { pack_rhs_raw::<S, NV>(s, source, cols, depth, dst.add(start * padded + col * depth)) };
        }
    }
}
