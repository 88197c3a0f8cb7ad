//! Packing: copies of a matrix in the order in which the tile reads it.
//!
//! A matrix is cut across into panels of `width` rows (of A, width MR) or columns (of B, width NR). A panel holds, for
//! each step of k, its `width` values next to each other; where the matrix ends inside a panel, zeros fill it up:
//!
//! ```text
//! panel 0: k=0 [x x x .. x] k=1 [x x x .. x] ... | panel 1: k=0 [..] ... | last panel: k=0 [x x 0 .. 0] ...
//! ```
//!
//! Packing costs a read and a write per value and buys unit strides, one TLB entry where a strided matrix takes a
//! hundred, and freedom from the power-of-two strides whose rows all fall into the same few sets of a cache (Goto & van
//! de Geijn, "Anatomy of high-performance matrix multiplication", 2008, section 4). Which of the two strides is 1
//! decides the way: neighbours across are copied a vector at a time, neighbours along k are transposed in registers a
//! square of vectors at a time, anything else is read value by value.

use qkv_simd::Simd;

use crate::{GemmError, MatRef};

/// Values that [`pack_lhs`] or [`pack_rhs`] writes: whole panels of `width` for `across` rows or columns; None where
/// the product cannot be represented.
#[must_use]
pub fn packed_len(across: usize, depth: usize, width: usize) -> Option<usize> {
    across.checked_next_multiple_of(width)?.checked_mul(depth)
}

/// Packs A (m x k) into panels of `MR` rows, `[k][MR]` each, the last one filled up with zeros.
///
/// # Errors
/// [`GemmError::Length`] where `dst` is shorter than [`packed_len`]`(m, k, MR)`.
#[inline(always)]
pub fn pack_lhs<S: Simd, const MR: usize>(s: S, a: MatRef<'_>, dst: &mut [f32]) -> Result<(), GemmError> {
    check(packed_len(a.rows(), a.cols(), MR), dst.len())?;
    let source = Source { ptr: a.as_ptr(), across_stride: a.row_stride(), depth_stride: a.col_stride() };
    // SAFETY: the view vouches for its elements, and `dst` is long enough and borrowed alone.
    unsafe { pack_lhs_raw::<S, MR>(s, source, a.rows(), a.cols(), dst.as_mut_ptr()) };
    Ok(())
}

/// Packs B (k x n) into panels of `NR = NV * LANES` columns, `[k][NR]` each, the last one filled up with zeros.
///
/// # Errors
/// [`GemmError::Length`] where `dst` is shorter than [`packed_len`]`(n, k, NR)`.
#[inline(always)]
pub fn pack_rhs<S: Simd, const NV: usize>(s: S, b: MatRef<'_>, dst: &mut [f32]) -> Result<(), GemmError> {
    check(packed_len(b.cols(), b.rows(), NV * S::LANES), dst.len())?;
    let source = Source { ptr: b.as_ptr(), across_stride: b.col_stride(), depth_stride: b.row_stride() };
    // SAFETY: the view vouches for its elements, and `dst` is long enough and borrowed alone.
    unsafe { pack_rhs_raw::<S, NV>(s, source, b.cols(), b.rows(), dst.as_mut_ptr()) };
    Ok(())
}

fn check(expected: Option<usize>, given: usize) -> Result<(), GemmError> {
    match expected {
        Some(expected) if expected <= given => Ok(()),
        _ => Err(GemmError::Length { argument: "dst", given, expected: expected.unwrap_or(usize::MAX) }),
    }
}

/// A matrix to be packed, seen along the panels: `across` is rows of A or columns of B, `depth` is k.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Source {
    pub(crate) ptr: *const f32,
    pub(crate) across_stride: isize,
    pub(crate) depth_stride: isize,
}

impl Source {
    #[inline(always)]
    pub(crate) fn at(self, across: usize, depth: usize) -> *const f32 {
        self.ptr.wrapping_offset(across as isize * self.across_stride + depth as isize * self.depth_stride)
    }
}

/// [`pack_lhs`] on addresses.
///
/// # Safety
/// `src` must be readable for `across` x `depth` values, `dst` writable for [`packed_len`] of them.
#[inline(always)]
pub(crate) unsafe fn pack_lhs_raw<S: Simd, const MR: usize>(
    s: S,
    src: Source,
    across: usize,
    depth: usize,
    dst: *mut f32,
) {
    for (panel, first) in (0..across).step_by(MR).enumerate() {
        let valid = (across - first).min(MR);
        let src = Source { ptr: src.at(first, 0), ..src };
        // SAFETY: panel by panel what the caller vouches for.
        unsafe {
            let dst = dst.add(panel * MR * depth);
            if src.across_stride == 1 && valid == MR {
                for k in 0..depth {
                    // An array of constant length becomes two or three moves of the widest registers that fit.
                    let row = src.at(0, k).cast::<[f32; MR]>().read_unaligned();
                    dst.add(k * MR).cast::<[f32; MR]>().write_unaligned(row);
                }
            } else {
                pack_panel(s, src, valid, depth, MR, dst);
            }
        }
    }
}

/// [`pack_rhs`] on addresses.
///
/// # Safety
/// As [`pack_lhs_raw`].
#[inline(always)]
pub(crate) unsafe fn pack_rhs_raw<S: Simd, const NV: usize>(
    s: S,
    src: Source,
    across: usize,
    depth: usize,
    dst: *mut f32,
) {
    let width = NV * S::LANES;
    let whole = if src.across_stride == 1 { across - across % width } else { 0 };
    // Neighbouring columns: a few rows at a time through all panels, so that what is read is long pieces of few rows,
    // which the prefetchers follow, and what is written are whole lines.
    for first_row in (0..depth).step_by(COPIED) {
        for first in (0..whole).step_by(width) {
            for k in first_row..depth.min(first_row + COPIED) {
                for v in 0..NV {
                    // SAFETY: row k of the source and of the panel have NV vectors.
                    unsafe {
                        let x = s.load_ptr(src.at(first + v * S::LANES, k));
                        s.store_ptr(x, dst.add(first * depth + k * width + v * S::LANES));
                    }
                }
            }
        }
    }
    for first in (whole..across).step_by(width) {
        let valid = (across - first).min(width);
        // SAFETY: panel by panel what the caller vouches for.
        unsafe {
            pack_panel(
                s,
                Source { ptr: src.at(first, 0), ..src },
                valid,
                depth,
                width,
                dst.add(first * depth),
            );
        }
    }
}

/// Copies rows (neighbours along `depth`) side by side, `stride` values apart: the cheapest copy there is, for a matrix
/// that the tile reads by rows but whose rows lie pages apart.
///
/// # Safety
/// `src` must be readable for `across` x `depth` values with a depth stride of 1, `dst` writable for `across` rows of
/// `stride >= depth` values.
#[inline(always)]
pub(crate) unsafe fn copy_rows_raw<S: Simd>(
    s: S,
    src: Source,
    across: usize,
    depth: usize,
    dst: *mut f32,
    stride: usize,
) {
    let whole = depth - depth % S::LANES;
    for i in 0..across {
        let to = dst.wrapping_add(i * stride);
        // SAFETY: row i has `depth` values on both sides.
        unsafe {
            for k in (0..whole).step_by(S::LANES) {
                s.prefetch(src.at(i + AHEAD, k));
                s.store_ptr(s.load_ptr(src.at(i, k)), to.add(k));
            }
            if whole < depth {
                let rest = depth - whole;
                s.store_partial(s.load_partial(src.at(i, whole), rest), to.add(whole), rest);
            }
        }
    }
}

/// Rows ahead of the copied one that are prefetched: each is too short for the hardware's prefetchers to get going.
const AHEAD: usize = 2;

/// Rows that are copied together through all panels.
///
/// Of 1, 2, 4, 8, 16, 32 and all, 8 was the fastest on strips of 256 columns (Zen 4, rows 4 KiB apart: 6 values per
/// nanosecond from L3; panel by panel 2.5).
const COPIED: usize = 8;

/// One panel by any strides: `valid` of `width` values are there, the others become 0.
///
/// # Safety
/// `src` must be readable for `valid` x `depth` values, `dst` writable for `width * depth`, `valid <= width`.
#[inline(always)]
unsafe fn pack_panel<S: Simd>(s: S, src: Source, valid: usize, depth: usize, width: usize, dst: *mut f32) {
    let mut done = 0;
    if src.depth_stride == 1 {
        // Whole squares of vectors are transposed in registers; what is left over is copied below.
        let whole = depth - depth % S::LANES;
        while done + S::LANES <= valid {
            for k in (0..whole).step_by(S::LANES) {
                // SAFETY: LANES rows from `done` on and LANES steps from `k` on are inside source and panel.
                unsafe {
                    s.transpose(
                        src.at(done, k),
                        src.across_stride,
                        dst.add(k * width + done),
                        width as isize,
                    );
                }
            }
            for k in whole..depth {
                for i in done..done + S::LANES {
                    // SAFETY: i < valid and k < depth.
                    unsafe { *dst.add(k * width + i) = *src.at(i, k) };
                }
            }
            done += S::LANES;
        }
    }
    if done == width {
        return;
    }
    for k in 0..depth {
        for i in done..width {
            // SAFETY: i < width and k < depth; the source is read where i < valid only.
            unsafe { *dst.add(k * width + i) = if i < valid { *src.at(i, k) } else { 0.0 } };
        }
    }
}
