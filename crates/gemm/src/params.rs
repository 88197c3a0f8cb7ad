//! Block sizes: how a product is cut up, from its shape, its strides and the caches.
//!
//! ```text
//! KC    steps of k per block: a panel of B (KC x NR) stays in L1 while tiles of A pass by
//! MC    rows of A per block: MC x KC stays in L2 while panels of B pass by
//! NC    most columns per task: the task's part of B (KC x NC) streams from L3 past each block of A
//! ROWS  most rows per task
//! ```
//!
//! The model is that of Low et al., "Analytical modeling is enough for high-performance BLIS", 2016
//! (doi 10.1145/2925987), with one difference: threads share nothing. A task is a block of C with all of k, so there is
//! no barrier and no order between tasks; what BLIS packs once for all threads, each task packs for itself, and tasks
//! are cut so that this does not show. The cut follows from the shape, the strides and the machine (its caches and
//! cores), never from the number of threads; a small product is halved where a thread is awake. No sum depends on the cut.
//!
//! Percentages are of the peak of one core, AVX2, 6 x 16 tile, f32, on a Zen 4 (32 KiB L1d, 1 MiB L2, 4 KiB pages,
//! a virtual machine) that others were using, so differences under 1 % mean nothing. What was tried is in
//! `docs/KERNELS.md`.

use qkv_simd::Isa;

use crate::GemmError;
use crate::cache::CacheInfo;
use crate::parallel::{Threads, cores};
use crate::shapes::KernelShape;

/// Most steps of k per block; k is split into equal blocks of at most this.
///
/// With NR = 16 a panel takes 16 KiB, half of the smallest L1d in use, and a tile's rows of A 6 KiB. 192, 256, 344 and 512
/// reach 89, 90, 91 and 90 % at 1024 cubed, but 92, 90, 84 and 87 % at (128, 1536, 384).
///
/// The only number here that the order of a sum, and so its last bits, depends on, which is why it is a constant and
/// does not follow the cache that happens to be found.
pub(crate) const KC: usize = 256;

/// Most rows of A per block.
///
/// 96, 192 and 384 reach 91, 92 and 90 % at 2048 cubed. Where L2 is small it is less: see [`rows_per_block`].
const MC: usize = 192;

/// Block sizes that replace the planned ones; see [`crate::GemmSpec::blocking`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blocking {
    /// Most steps of k per block, at least 1.
    pub kc: usize,
    /// Rows of A per block, at least 1.
    pub mc: usize,
    /// Columns per task, at least 1; rounded up to whole panels.
    pub nc: usize,
    /// Rows per task, at least 1.
    pub rows: usize,
    /// Whether A is packed; where neither of its strides is 1 it is packed in any case.
    pub pack_a: bool,
    /// Whether B is packed; where its columns are not neighbours it is packed in any case.
    pub pack_b: bool,
}

impl Blocking {
    /// # Errors
    /// [`GemmError::Blocking`] where a size is 0.
    pub(crate) fn check(&self) -> Result<(), GemmError> {
        match [self.kc, self.mc, self.nc, self.rows].contains(&0) {
            true => Err(GemmError::Blocking { given: *self }),
            false => Ok(()),
        }
    }
}

/// What the plan needs to know of a product.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) m: usize,
    pub(crate) k: usize,
    pub(crate) n: usize,
    pub(crate) batches: usize,
    /// Whether A can be read in place row by row (neighbours along k).
    pub(crate) a_rows: bool,
    /// Whether A can be read in place column by column.
    pub(crate) a_columns: bool,
    /// Values between steps of k where B can be read in place; None where it must be packed.
    pub(crate) b_stride: Option<isize>,
    /// Whether B is packed already.
    pub(crate) b_packed: bool,
}

/// How a product is cut up.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) blocking: Blocking,
    /// Matrices of the batch per task.
    pub(crate) batches: usize,
    pub(crate) threads: Threads,
}

/// Multiply-adds below which no thread is woken for a product: 128 cubed is twice this and takes 40 microseconds on
/// one core, 23 on two. Waking a worker that sleeps takes longer than this takes to compute.
const INLINE: usize = 1 << 20;

/// Multiply-adds from which on a product for which none is woken is shared with a thread that is awake.
const SHARED: usize = 1 << 16;

/// Multiply-adds that a task should have at least: 5 microseconds.
const TASK: usize = 1 << 18;

/// Tasks to aim for, per core of the machine: at least two, so that uneven cores even out.
const TASKS_PER_CORE: usize = 2;

/// Below this many multiply-adds tasks are twice as many: a worker that starts two microseconds late then costs one, not
/// half of a task.
const SMALL: usize = 1 << 25;

/// Most columns per task. 128, 256, 512 and 1024 reach 81, 87, 89 and 91 % at 2048 cubed, where every strip reads A
/// again through a TLB that cannot hold it; at 1024 cubed they are within 1 %.
const NC: usize = 1024;

/// Most rows per task. Every range packs B again, which its first tile does in passing. 2048 cubed on two threads with 16 lanes:
/// 200 GFLOP/s with ranges of 512, 207 of 1024, 212 with one range of all rows and a task per thread; with 8 lanes within 1 %.
const ROWS: usize = 2048;

/// Bytes of A above which its rows are copied side by side block by block: 2048 pages, about the reach of the TLBs of
/// the last ten years. Worth 1 to 2 % at 2048 cubed (16 MiB), costs 1 to 2 % at 1024 cubed (4 MiB).
const FAR: usize = 8 << 20;

/// Bytes of A up to which its columns are read in place: steps of k are a row apart, so all of it should stay in L2.
/// In place against packed: 91 and 89 % at 128 cubed, 95 and 93 at 256 (256 KiB), 92 and 93 at 512 (1 MiB).
const COLUMNS_IN_PLACE: usize = 512 << 10;

/// Rows below which B is not packed, if its columns are neighbours: too few tiles share a panel to earn the copy back.
/// In place against packed, k = n = 4096: 48 and 29 % with 16 rows, 57 and 44 with 24, 52 and 57 with 32, 60 and 70 with
/// 48.
const ROWS_TO_PACK: usize = 32;

/// Steps of k per block where k is split into equal blocks of at most `most`: a short last block would pay for reading
/// and writing C like a full one.
pub(crate) fn block_depth(k: usize, most: usize) -> usize {
    let blocks = k.div_ceil(most).max(1);
    k.div_ceil(blocks).next_multiple_of(DEPTH_STEP).min(most).max(1)
}

/// Block depths are multiples of this where they can be: of the tile's unrolling and of the lanes of the transposes.
const DEPTH_STEP: usize = 8;

/// Whether rows of B, `stride` values apart, can be read in place by every tile of A without being pushed out of L1.
///
/// Each row of a panel is one or two cache lines, and rows a multiple of 4 KiB apart all fall into the same set of 8
/// ways: with `g` the largest power of two that divides the distance in lines, `64 / g` of the 64 sets are used.
fn fits_in_place(stride: isize, depth: usize) -> bool {
    let lines = stride.unsigned_abs().div_ceil(16).max(1);
    let sets = 64 >> lines.trailing_zeros().min(6);
    depth <= sets * 4
}

impl Plan {
    pub(crate) fn new(isa: Isa, shape: &Shape, given: Option<Blocking>) -> Self {
        let KernelShape { mr, nr } = KernelShape::of(isa);
        let &Shape { m, k, n, batches, a_rows, a_columns, b_stride, b_packed } = shape;
        let work = m.saturating_mul(n).saturating_mul(k);
        if let Some(mut blocking) = given {
            blocking.nc = blocking.nc.saturating_add(nr - 1) / nr * nr;
            blocking.pack_a |= !(a_rows || a_columns);
            blocking.pack_b |= b_stride.is_none();
            blocking.pack_b &= !b_packed;
            return Self { blocking, batches: 1, threads: Threads::All };
        }
        let kc = block_depth(k, KC);
        let in_place = b_stride.is_some_and(|stride| m < ROWS_TO_PACK || fits_in_place(stride, kc));
        let pack_b = !b_packed && !in_place;
        let a_bytes = m.saturating_mul(k).saturating_mul(size_of::<f32>());
        let far = a_bytes > FAR;
        let in_place = match a_rows {
            true => !(far && n >= NC),
            false => a_columns && a_bytes <= COLUMNS_IN_PLACE,
        };
        let pack_a = !in_place;
        // What a task pays beside its tiles, in tiles: the first panel's tiles wait for A (or pack it), the first tile
        // of each panel packs it. Of the two ways to make more tasks, the cheaper one is taken.
        let a_cost = if far || !a_rows { 0.9 } else { 0.15 };
        let b_cost = if pack_b { 1.0 } else { 0.1 };
        let cost =
            |(nc, rows): (usize, usize)| a_cost * nr as f64 / nc as f64 + b_cost * mr as f64 / rows as f64;
        let split = |len: usize, parts: usize, unit: usize| {
            if parts == 1 { len } else { len.div_ceil(parts) }.next_multiple_of(unit)
        };
        let (mut strips, mut ranges) = (n.div_ceil(NC).max(1), m.div_ceil(ROWS).max(1));
        // The most tasks that there could be.
        let tiles = batches.saturating_mul(n.div_ceil(nr)).saturating_mul(m.div_ceil(mr));
        let threads = Threads::of(work as f64 * batches as f64, [SHARED as f64, INLINE as f64], tiles);
        let (wanted, task) = match threads {
            Threads::Caller => (1, TASK),
            Threads::Awake => (2, SHARED / 2),
            Threads::All if work < SMALL => (2 * TASKS_PER_CORE * cores(), TASK),
            Threads::All => (TASKS_PER_CORE * cores(), TASK),
        };
        while batches.saturating_mul(strips * ranges) < wanted && work / (2 * task) >= strips * ranges {
            let now = (split(n, strips, nr), split(m, ranges, mr));
            let by_strips = (split(n, 2 * strips, nr), now.1);
            let by_ranges = (now.0, split(m, 2 * ranges, mr));
            if by_strips != now && (cost(by_strips) <= cost(by_ranges) || by_ranges == now) {
                strips *= 2;
            } else if by_ranges != now {
                ranges *= 2;
            } else {
                break;
            }
        }
        let (nc, rows) = (split(n, strips, nr), split(m, ranges, mr));
        let mc = split(rows, pieces(rows, rows_per_block()), mr);
        let blocking = Blocking { kc, mc, nc, rows, pack_a, pack_b };
        let per_task = match (batches, threads) {
            (0 | 1, _) => 1,
            (_, Threads::Awake) => batches.div_ceil(2),
            _ => (TASK / work.max(1)).clamp(1, batches),
        };
        Self { blocking, batches: per_task, threads }
    }
}

/// Pieces of at most `most` that `len` is cut into, at least one. In a product of 64 x 64 matrices the divisions that
/// would answer 1 are 1 % of the time.
#[inline]
pub(crate) fn pieces(len: usize, most: usize) -> usize {
    if len <= most { 1 } else { len.div_ceil(most) }
}

/// Most rows of A per block: a fifth of L2, which panels of B and lines of C pass through as well.
fn rows_per_block() -> usize {
    (CacheInfo::get().l2 / 5 / (KC * size_of::<f32>())).clamp(MC / 4, MC)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_of_k_are_equal_and_cover_it() {
        for k in 0..3000 {
            let depth = block_depth(k, KC);
            assert!((1..=KC).contains(&depth));
            let (blocks, fewest) = (k.div_ceil(depth), k.div_ceil(KC));
            assert_eq!(blocks, fewest, "k = {k}: blocks of {depth}");
        }
    }

    #[test]
    fn plans_cover_the_product_and_are_cut_by_whole_panels() {
        for isa in Isa::available() {
            let KernelShape { nr, .. } = KernelShape::of(isa);
            for (m, k, n) in [(1, 1, 1), (13, 0, 40), (128, 384, 384), (2048, 2048, 2048), (100_000, 8, 3)] {
                for batches in [1, 3, 1000] {
                    let shape = Shape {
                        m,
                        k,
                        n,
                        batches,
                        a_rows: true,
                        a_columns: false,
                        b_stride: Some(n as isize),
                        b_packed: false,
                    };
                    let plan = Plan::new(isa, &shape, None);
                    let Blocking { nc, rows, mc, .. } = plan.blocking;
                    assert!(nc % nr == 0 && nc > 0 && rows > 0 && mc > 0, "{plan:?}");
                    assert!((1..=batches).contains(&plan.batches), "{plan:?}");
                }
            }
        }
    }

    #[test]
    fn rows_a_page_apart_do_not_fit_in_place() {
        assert!(fits_in_place(64, 64));
        assert!(!fits_in_place(1024, 256));
        assert!(fits_in_place(1040, 256));
        assert!(fits_in_place(0, 256));
    }
}
