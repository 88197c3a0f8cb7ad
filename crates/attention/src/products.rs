//! The two products of prefill.rs on the register tile, as operations on tiles of rows.

use core::ops::Range;

use qkv_gemm::RowsOp;
use qkv_gemm::tile::{Acc, Columns, Lhs, Rhs, Rows, tile, tile_in_links};
use qkv_simd::Simd;

use crate::panels::{Ahead, BiasPanel};
use crate::score_ops::TileOps;
use crate::strip::MAX_NR;

/// The first product: tile rows are keys, lanes are queries. Rows count from the first key as `k` does.
pub(crate) struct Scores<'w, S: Simd, const NV: usize> {
    pub(crate) s: S,
    /// What happens to scores on the tile, if anything.
    pub(crate) ops: Option<&'w TileOps<'w, S, NV>>,
    /// Where the run begins that is being computed.
    pub(crate) base: usize,
    pub(crate) k: *const f32,
    pub(crate) k_stride: isize,
    pub(crate) depth: usize,
    /// Whether all queries are in the first vector: the end of a sequence.
    pub(crate) one_vector: bool,
    pub(crate) queries: &'w [f32],
    pub(crate) scores: &'w mut [f32],
    pub(crate) max: [S::F32; NV],
    pub(crate) upcoming: Option<Upcoming>,
    pub(crate) ahead: Option<Ahead>,
    pub(crate) bias: &'w BiasPanel<'w>,
}

/// Value rows that the second product will read: as columns, in steps of a whole row, which the hardware does not
/// foresee. The first strip that reads a block asks for them in good time, row by row.
#[derive(Clone, Copy)]
pub(crate) struct Upcoming {
    pub(crate) v: *const f32,
    pub(crate) stride: isize,
    pub(crate) dim: usize,
}

impl Upcoming {
    #[inline(always)]
    fn prefetch<S: Simd>(&self, s: S, rows: Range<usize>) {
        for row in rows {
            for at in (0..self.dim).step_by(16) {
                s.prefetch(self.v.wrapping_offset(row as isize * self.stride).wrapping_add(at));
            }
        }
    }
}

impl<S: Simd, const NV: usize> RowsOp for Scores<'_, S, NV> {
    #[inline(always)]
    fn run<const ROWS: usize>(&mut self, first: usize) {
        let (s, nr, first) = (self.s, NV * S::LANES, self.base + first);
        let lhs = Rows { ptr: self.k.wrapping_offset(first as isize * self.k_stride), stride: self.k_stride };
        let rhs = Rhs { ptr: self.queries.as_ptr(), stride: nr as isize };
        debug_assert_eq!(self.queries.len(), self.depth * nr);
        if let Some(ahead) = &mut self.ahead {
            ahead.step(s);
        }
        if let Some(upcoming) = self.upcoming {
            upcoming.prefetch(s, first..first + ROWS);
        }
        // SAFETY: key rows first..first + ROWS exist and have `depth` values; the packed queries are [depth][nr].
        let mut acc = unsafe { used_lanes::<S, _, ROWS, NV, true>(s, self.depth, lhs, rhs, self.one_vector) };
        // Opaque, or the compiler would keep parts of it in registers through the product's loop, which needs them all.
        if let Some(ops) = core::hint::black_box(self.ops) {
            ops.apply(s, first, &mut acc, self.bias);
        }
        let out = &mut self.scores[first * nr..][..ROWS * nr];
        for (i, row) in acc.iter().enumerate() {
            for (v, &score) in row.iter().enumerate() {
                s.store(score, &mut out[i * nr + v * S::LANES..]);
                self.max[v] = s.max(score, self.max[v]);
            }
        }
    }
}

/// The tile; with `LINKS` in links, where there are registers for it.
///
/// # Safety
/// As [`tile`].
#[inline(always)]
unsafe fn sums<S: Simd, L: Lhs, const ROWS: usize, const NV: usize, const LINKS: bool>(
    s: S,
    depth: usize,
    lhs: L,
    rhs: Rhs,
) -> Acc<S, ROWS, NV> {
    // SAFETY: the caller's promise, in both.
    unsafe {
        if LINKS && S::REGISTERS >= 32 {
            tile_in_links::<S, L, ROWS, NV>(s, depth, lhs, rhs)
        } else {
            tile::<S, L, ROWS, NV>(s, depth, lhs, rhs)
        }
    }
}

/// The tile; with `one_vector` of its first vector alone, the others zero.
///
/// # Safety
/// As [`tile`].
#[inline(always)]
unsafe fn used_lanes<S: Simd, L: Lhs, const ROWS: usize, const NV: usize, const LINKS: bool>(
    s: S,
    depth: usize,
    lhs: L,
    rhs: Rhs,
    one_vector: bool,
) -> Acc<S, ROWS, NV> {
    if NV == 1 || !one_vector {
        // SAFETY: the caller's promise.
        return unsafe { sums::<S, L, ROWS, NV, LINKS>(s, depth, lhs, rhs) };
    }
    // SAFETY: as above.
    let narrow = unsafe { sums::<S, L, ROWS, 1, LINKS>(s, depth, lhs, rhs) };
    let mut acc = [[s.zero(); NV]; ROWS];
    for (row, [first]) in acc.iter_mut().zip(narrow) {
        row[0] = first;
    }
    acc
}

/// The second product: tile rows are value dims, lanes are queries.
pub(crate) struct WeightedSum<'w, S, const NV: usize> {
    pub(crate) s: S,
    pub(crate) v: *const f32,
    pub(crate) v_stride: isize,
    pub(crate) keys: usize,
    /// Whether all queries are in the first vector.
    pub(crate) one_vector: bool,
    pub(crate) weights: &'w [f32],
    pub(crate) outputs: &'w mut [f32],
    /// In memory: as vectors they would stay in registers through the products' loop, which needs them all.
    pub(crate) alpha: Option<&'w [f32; MAX_NR]>,
}

impl<S: Simd, const NV: usize> RowsOp for WeightedSum<'_, S, NV> {
    #[inline(always)]
    fn run<const ROWS: usize>(&mut self, first: usize) {
        let (s, nr) = (self.s, NV * S::LANES);
        let lhs = Columns { ptr: self.v.wrapping_add(first), stride: self.v_stride };
        let rhs = Rhs { ptr: self.weights.as_ptr(), stride: nr as isize };
        debug_assert_eq!(self.weights.len(), self.keys * nr);
        // SAFETY: the `keys` value rows have dims first..first + ROWS; the weights are [keys][nr].
        let acc = unsafe { used_lanes::<S, _, ROWS, NV, false>(s, self.keys, lhs, rhs, self.one_vector) };
        let out = &mut self.outputs[first * nr..][..ROWS * nr];
        // Opaque, or the compiler would load the factors before the loop after all.
        let alpha = core::hint::black_box(self.alpha);
        for (i, row) in acc.iter().enumerate() {
            for (v, &sum) in row.iter().enumerate() {
                let at = &mut out[i * nr + v * S::LANES..];
                let value = match alpha {
                    Some(alpha) => s.mul_add(s.load(at), s.load(&alpha[v * S::LANES..]), sum),
                    None => sum,
                };
                s.store(value, at);
            }
        }
    }
}
