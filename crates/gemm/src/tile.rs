//! The register tile: the one inner loop of the whole library.
//!
//! It computes a block of `MR` rows by `NV` vectors (`NR = NV * LANES` columns)
//!
//! ```text
//! acc[i][j] = sum over k of  lhs(i, k) * rhs[k * rhs_stride + j]        i < MR, j < NR, k < depth
//! ```
//!
//! with every accumulator in a register: per step of k it loads `NV` vectors of the right-hand side, broadcasts `MR`
//! scalars of the left-hand side and issues `MR * NV` fused multiply-adds. Where the scalars come from is a type
//! ([`Lhs`]): a packed panel, rows of a matrix read in place, or columns of one. GEMM uses all three; attention reads
//! keys as [`Rows`] and values as [`Columns`] and never packs them.
//!
//! What happens to the accumulators is the caller's business: they are returned by value and, as everything here is
//! inlined, stay in registers. The contract (layouts, padding, edges) is written down in `docs/KERNELS.md`.

use core::sync::atomic::{Ordering, compiler_fence};

use qkv_simd::Simd;

/// Where the left-hand side's scalars lie: a position that advances along k.
///
/// # Safety
/// `at(i)` must be inside one allocation for each row `i` and step that the tile's caller asked for.
pub unsafe trait Lhs: Copy {
    /// The address of the scalar of row `i` at the current k.
    ///
    /// # Safety
    /// `i` must be below the number of rows that this was made for, and the position before its end.
    unsafe fn at(self, i: usize) -> *const f32;

    /// The position `steps` further along k.
    fn advanced(self, steps: usize) -> Self;
}

/// Rows of a matrix read in place: k runs along memory, rows are `stride` values apart.
#[derive(Clone, Copy, Debug)]
pub struct Rows {
    /// Row 0 at the current k.
    pub ptr: *const f32,
    /// Values from one row to the next.
    pub stride: isize,
}

/// Columns of a matrix read in place, or a packed panel (`stride` = MR): rows of the tile are neighbours in memory,
/// steps of k are `stride` values apart.
#[derive(Clone, Copy, Debug)]
pub struct Columns {
    /// Row 0 at the current k.
    pub ptr: *const f32,
    /// Values from one step of k to the next.
    pub stride: isize,
}

// SAFETY: `at` stays where the maker of the value said that rows are; see the trait.
unsafe impl Lhs for Rows {
    #[inline(always)]
    unsafe fn at(self, i: usize) -> *const f32 {
        // SAFETY: row `i` exists, says the caller.
        unsafe { self.ptr.offset(i as isize * self.stride) }
    }
    #[inline(always)]
    fn advanced(self, steps: usize) -> Self {
        Self { ptr: self.ptr.wrapping_add(steps), ..self }
    }
}

// SAFETY: as above.
unsafe impl Lhs for Columns {
    #[inline(always)]
    unsafe fn at(self, i: usize) -> *const f32 {
        // SAFETY: row `i` exists, says the caller.
        unsafe { self.ptr.add(i) }
    }
    #[inline(always)]
    fn advanced(self, steps: usize) -> Self {
        Self { ptr: self.ptr.wrapping_offset(steps as isize * self.stride), ..self }
    }
}

/// The accumulators of a tile.
pub type Acc<S, const MR: usize, const NV: usize> = [[<S as Simd>::F32; NV]; MR];

/// The right-hand side: vectors of `NR` neighbouring columns, `stride` values from one step of k to the next.
#[derive(Clone, Copy, Debug)]
pub struct Rhs {
    /// Column 0 at k = 0.
    pub ptr: *const f32,
    /// Values from one step of k to the next: NR in a packed panel, the row stride in place.
    pub stride: isize,
}

/// Computes the tile from zero; see the module's text.
///
/// # Safety
/// For each k below `depth`: `lhs` must be readable at rows below `MR`, and `rhs` for `NV * LANES` values.
#[inline(always)]
pub unsafe fn tile<S: Simd, L: Lhs, const MR: usize, const NV: usize>(
    s: S,
    depth: usize,
    lhs: L,
    rhs: Rhs,
) -> Acc<S, MR, NV> {
    // SAFETY: the caller's promise.
    unsafe { tile_onto(s, depth, lhs, rhs, [[s.zero(); NV]; MR]) }
}

/// As [`tile`], continuing the sums in `acc`: each accumulator is one chain of multiply-adds over both calls.
///
/// # Safety
/// As [`tile`].
#[inline(always)]
pub unsafe fn tile_onto<S: Simd, L: Lhs, const MR: usize, const NV: usize>(
    s: S,
    depth: usize,
    mut lhs: L,
    rhs: Rhs,
    mut acc: Acc<S, MR, NV>,
) -> Acc<S, MR, NV> {
    let mut b = rhs.ptr;
    // Unrolled by hand: the counter and the two pointers are then a tenth of the instructions, not a third.
    for _ in 0..depth / UNROLL {
        for step in 0..UNROLL {
            // SAFETY: these steps of k are below `depth`.
            unsafe {
                fma_step(s, lhs.advanced(step), b.offset(step as isize * rhs.stride), &mut acc);
            }
            // A wall for the compiler alone, no instruction: it would begin the next step's loads early, with registers
            // that are not there, and spill an accumulator (attention on Zen 4: 74 instead of 88 % of the peak).
            compiler_fence(Ordering::SeqCst);
        }
        lhs = lhs.advanced(UNROLL);
        b = b.wrapping_offset(UNROLL as isize * rhs.stride);
    }
    for _ in 0..depth % UNROLL {
        // SAFETY: this step of k is below `depth`.
        unsafe { fma_step(s, lhs, b, &mut acc) };
        lhs = lhs.advanced(1);
        b = b.wrapping_offset(rhs.stride);
    }
    acc
}

/// As [`tile`], with each sum in links of 8 steps that are added up: the error of a sum of n products is then that
/// of a sum of n / 8. For instruction sets with registers for twice the accumulators.
///
/// # Safety
/// As [`tile`].
#[inline(always)]
pub unsafe fn tile_in_links<S: Simd, L: Lhs, const MR: usize, const NV: usize>(
    s: S,
    depth: usize,
    mut lhs: L,
    mut rhs: Rhs,
) -> Acc<S, MR, NV> {
    let mut total = [[s.zero(); NV]; MR];
    let mut left = depth;
    while left > 0 {
        let steps = left.min(LINK);
        // A whole link apart, so that its number of steps is a constant.
        // SAFETY: these steps are below `depth`.
        let link = unsafe {
            if steps == LINK {
                tile::<S, L, MR, NV>(s, LINK, lhs, rhs)
            } else {
                tile::<S, L, MR, NV>(s, steps, lhs, rhs)
            }
        };
        for (total, link) in total.iter_mut().zip(&link) {
            for (total, &link) in total.iter_mut().zip(link) {
                *total = s.add(*total, link);
            }
        }
        lhs = lhs.advanced(steps);
        rhs.ptr = rhs.ptr.wrapping_offset(steps as isize * rhs.stride);
        left -= steps;
    }
    total
}

/// Steps of k per link.
const LINK: usize = 8;

/// Steps of k per turn of the loop.
const UNROLL: usize = 4;

/// One step of k.
///
/// # Safety
/// `lhs` must be readable at rows below `MR`, `b` for `NV * LANES` values.
#[inline(always)]
unsafe fn fma_step<S: Simd, L: Lhs, const MR: usize, const NV: usize>(
    s: S,
    lhs: L,
    b: *const f32,
    acc: &mut Acc<S, MR, NV>,
) {
    let mut columns = [s.zero(); NV];
    for (v, column) in columns.iter_mut().enumerate() {
        // SAFETY: the caller vouches for NV vectors.
        *column = unsafe { s.load_ptr(b.add(v * S::LANES)) };
    }
    for (i, row) in acc.iter_mut().enumerate() {
        // SAFETY: i < MR.
        let scalar = s.splat(unsafe { *lhs.at(i) });
        for (sum, &column) in row.iter_mut().zip(&columns) {
            *sum = s.mul_add(scalar, column, *sum);
        }
    }
}

/// As [`tile`], and leaves the right-hand side behind as a packed panel, `depth * NR` values from `panel` on.
///
/// The loads are there anyway and the multiply-adds leave room for the stores, so the copy costs next to nothing. Not
/// unrolled: the compiler would move the loads of later steps ahead of the stores, and run out of registers.
///
/// # Safety
/// As [`tile`]; `panel` must be writable for `depth * NR` values that neither side reads.
#[inline(always)]
pub unsafe fn tile_packing<S: Simd, L: Lhs, const MR: usize, const NV: usize>(
    s: S,
    depth: usize,
    mut lhs: L,
    rhs: Rhs,
    panel: *mut f32,
) -> Acc<S, MR, NV> {
    let mut acc = [[s.zero(); NV]; MR];
    let (mut b, mut to) = (rhs.ptr, panel);
    for _ in 0..depth {
        // SAFETY: this step of k is below `depth`; the loads are those of `fma_step`.
        unsafe {
            for v in 0..NV {
                s.store_ptr(s.load_ptr(b.add(v * S::LANES)), to.add(v * S::LANES));
            }
            fma_step(s, lhs, b, &mut acc);
        }
        lhs = lhs.advanced(1);
        b = b.wrapping_offset(rhs.stride);
        to = to.wrapping_add(NV * S::LANES);
    }
    acc
}
