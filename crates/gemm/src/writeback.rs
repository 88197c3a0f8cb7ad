//! From sums to C: `C = epilogue(alpha * sum + beta * C)`.
//!
//! Two ways. Sums that need no epilogue, or only a bias and a floor ([`Simple`]), and whose row of C is contiguous go from
//! the registers to memory ([`store_registers`]). All others are laid down as a small dense block in L1 and taken up again row by row
//! ([`Finish`]): that gives the epilogue one place in the machine code instead of one per accumulator, serves any stride
//! of C, and takes the sums of the matrix-vector paths as well. It costs a store and a load per vector, once per
//! element of C.
//!
//! Where `beta` is 0, C is never read: what is in it (NaN, uninitialised memory behind a raw view) does not matter.

use qkv_simd::{Isa, Simd, SimdOp};

use crate::epilogue::{Epilogue, Place};
use crate::tile::Acc;

/// The two factors of an update.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scale {
    pub(crate) alpha: f32,
    pub(crate) beta: f32,
}

/// A block of C.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Target {
    /// Element (0, 0) of the block.
    pub(crate) ptr: *mut f32,
    /// Values from row to row.
    pub(crate) row_stride: isize,
    /// Values from column to column.
    pub(crate) col_stride: isize,
}

impl Target {
    /// The block that starts at (row, col) of this one.
    #[inline(always)]
    pub(crate) fn at(self, row: usize, col: usize) -> Self {
        let offset = row as isize * self.row_stride + col as isize * self.col_stride;
        Self { ptr: self.ptr.wrapping_offset(offset), ..self }
    }
}

/// An epilogue that is so short that sums need not leave the registers for it: `max(floor, x + bias)`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Simple<'a> {
    /// One value per column of C.
    pub(crate) bias: Option<&'a [f32]>,
    /// 0 for ReLU, else -infinity, which changes nothing, not even a NaN.
    pub(crate) floor: f32,
}

impl<'a> Simple<'a> {
    /// From column `col` on.
    #[inline(always)]
    pub(crate) fn at(self, col: usize) -> Self {
        Self { bias: self.bias.map(|bias: &'a [f32]| bias.get(col..).unwrap_or(&[])), ..self }
    }
}

/// What happens to a value between the scaling and the store.
pub(crate) trait Touch<S: Simd>: Copy {
    /// The value of vector `v` of a row.
    fn touch(self, s: S, x: S::F32, v: usize) -> S::F32;
}

/// Nothing.
#[derive(Clone, Copy)]
pub(crate) struct Plain;

impl<S: Simd> Touch<S> for Plain {
    #[inline(always)]
    fn touch(self, _: S, x: S::F32, _: usize) -> S::F32 {
        x
    }
}

/// [`Simple`], in vectors.
#[derive(Clone, Copy)]
pub(crate) struct BiasFloor<S: Simd, const NV: usize> {
    bias: [S::F32; NV],
    floor: S::F32,
}

impl<S: Simd, const NV: usize> BiasFloor<S, NV> {
    #[inline(always)]
    pub(crate) fn new(s: S, simple: Simple<'_>) -> Self {
        // Adding -0 changes nothing, not even a zero's sign.
        let mut bias = [s.splat(-0.0); NV];
        if let Some(values) = simple.bias {
            for (v, vector) in bias.iter_mut().enumerate() {
                let left = &values[values.len().min(v * S::LANES)..];
                *vector = if left.len() >= S::LANES {
                    s.load(left)
                } else {
                    // SAFETY: `left` has so many values, fewer than a vector.
                    unsafe { s.load_partial(left.as_ptr(), left.len()) }
                };
            }
        }
        Self { bias, floor: s.splat(simple.floor) }
    }
}

impl<S: Simd, const NV: usize> Touch<S> for BiasFloor<S, NV> {
    #[inline(always)]
    fn touch(self, s: S, x: S::F32, v: usize) -> S::F32 {
        // `max` keeps a NaN in its second operand.
        s.max(self.floor, s.add(x, self.bias[v]))
    }
}

/// Writes `ROWS` rows of `cols` sums (at most `NV` vectors) to rows of C that are contiguous.
///
/// # Safety
/// The block of C must be valid for writes, for reads where beta is not 0, and have a column stride of 1.
#[inline(always)]
pub(crate) unsafe fn store_registers<S: Simd, T: Touch<S>, const ROWS: usize, const NV: usize>(
    s: S,
    acc: Acc<S, ROWS, NV>,
    touch: T,
    scale: Scale,
    c: Target,
    cols: usize,
) {
    // Opaque, so that no vector made of them is computed ahead of the tile's loop: it would live through the loop in a
    // register that an accumulator needs.
    let scale = core::hint::black_box(scale);
    let (alpha, beta) = (s.splat(scale.alpha), s.splat(scale.beta));
    if cols == NV * S::LANES {
        // One choice for the whole tile, and no multiplication by 1: sixteen of them are 2 % of a tile of 64 steps.
        macro_rules! each {
            (|$sum:ident, $p:ident| $x:expr) => {
                for (i, row) in acc.into_iter().enumerate() {
                    for (v, $sum) in row.into_iter().enumerate() {
                        let $p = c.at(i, v * S::LANES).ptr;
                        // SAFETY: row i < ROWS and columns of vector v are inside the block; C is read where beta is
                        // not 0.
                        unsafe { s.store_ptr(touch.touch(s, $x, v), $p) };
                    }
                }
            };
        }
        match (scale.alpha == 1.0, scale.beta == 0.0) {
            (true, true) => each!(|sum, p| sum),
            (false, true) => each!(|sum, p| s.mul(alpha, sum)),
            (_, false) => each!(|sum, p| s.mul_add(alpha, sum, s.mul(beta, s.load_ptr(p)))),
        }
        return;
    }
    for (i, row) in acc.into_iter().enumerate() {
        for (v, sum) in row.into_iter().enumerate() {
            let lanes = cols.saturating_sub(v * S::LANES).min(S::LANES);
            if lanes > 0 {
                let p = c.at(i, v * S::LANES).ptr;
                // SAFETY: as above; only the first `lanes` values are touched.
                unsafe {
                    let x = if scale.beta == 0.0 {
                        s.mul(alpha, sum)
                    } else {
                        s.mul_add(alpha, sum, s.mul(beta, s.load_partial(p, lanes)))
                    };
                    s.store_partial(touch.touch(s, x, v), p, lanes);
                }
            }
        }
    }
}

/// A dense block of sums on its way to C.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Block {
    /// Sum (0, 0); rows are `stride` values apart, and each may be read up to the next multiple of a vector's lanes.
    pub(crate) sums: *const f32,
    pub(crate) stride: usize,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) scale: Scale,
    pub(crate) c: Target,
    /// Where (0, 0) is in C, for the epilogue.
    pub(crate) place: (usize, usize, usize),
}

/// An epilogue as the driver sees it: without its type, so that the driver is compiled once per instruction set.
pub(crate) trait Finish: Sync {
    /// Whether sums can go to C as they are.
    fn direct(&self) -> bool;

    /// The epilogue as a short one, where it is.
    fn simple(&self) -> Option<Simple<'_>>;

    /// Writes a block with the epilogue.
    ///
    /// # Safety
    /// The sums must be valid for reads as [`Block`] says, the block of C for writes, and for reads where beta is not 0.
    unsafe fn finish(&self, isa: Isa, block: Block);
}

impl<E: Epilogue> Finish for E {
    fn direct(&self) -> bool {
        self.is_identity()
    }
    fn simple(&self) -> Option<Simple<'_>> {
        Epilogue::bias_and_floor(self).map(|(bias, floor)| Simple { bias, floor })
    }
    unsafe fn finish(&self, isa: Isa, block: Block) {
        isa.dispatch(FinishOp { epilogue: self, block });
    }
}

struct FinishOp<'a, E> {
    epilogue: &'a E,
    block: Block,
}

impl<E: Epilogue> SimdOp for FinishOp<'_, E> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let Block { sums, stride, rows, cols, scale, c, place: (batch, row0, col0) } = self.block;
        let (alpha, beta) = (s.splat(scale.alpha), s.splat(scale.beta));
        for i in 0..rows {
            for j in (0..cols).step_by(S::LANES) {
                let lanes = (cols - j).min(S::LANES);
                let p = c.at(i, j);
                // SAFETY: `Finish::finish`'s contract: sums are readable to whole vectors, `lanes` columns of C are
                // inside the block, and C is read only where beta is not 0.
                unsafe {
                    let sum = s.load_ptr(sums.add(i * stride + j));
                    // The same operations in the same order as from the registers: the way does not show in the bits.
                    let x = if scale.beta == 0.0 {
                        s.mul(alpha, sum)
                    } else {
                        s.mul_add(alpha, sum, s.mul(beta, gather(s, p, lanes)))
                    };
                    let x = self.epilogue.apply(s, x, Place { batch, row: row0 + i, col: col0 + j, lanes });
                    scatter(s, x, p, lanes);
                }
            }
        }
    }
}

/// Most lanes of any instruction set (AVX-512 has 16).
const MOST_LANES: usize = 16;

/// Reads `lanes` neighbouring columns of a row of C.
///
/// # Safety
/// They must be valid for reads, and `lanes <= LANES`.
#[inline(always)]
unsafe fn gather<S: Simd>(s: S, c: Target, lanes: usize) -> S::F32 {
    if c.col_stride == 1 {
        // SAFETY: the caller's promise, with neighbours in memory.
        return unsafe { if lanes == S::LANES { s.load_ptr(c.ptr) } else { s.load_partial(c.ptr, lanes) } };
    }
    let mut values = [0.0; MOST_LANES];
    for (j, value) in values.iter_mut().enumerate().take(lanes) {
        // SAFETY: the caller's promise.
        *value = unsafe { *c.at(0, j).ptr };
    }
    s.load(&values)
}

/// Writes `lanes` neighbouring columns of a row of C.
///
/// # Safety
/// They must be valid for writes, and `lanes <= LANES`.
#[inline(always)]
unsafe fn scatter<S: Simd>(s: S, x: S::F32, c: Target, lanes: usize) {
    if c.col_stride == 1 {
        // SAFETY: the caller's promise, with neighbours in memory.
        unsafe { if lanes == S::LANES { s.store_ptr(x, c.ptr) } else { s.store_partial(x, c.ptr, lanes) } }
        return;
    }
    let mut values = [0.0; MOST_LANES];
    s.store(x, &mut values);
    for (j, &value) in values.iter().enumerate().take(lanes) {
        // SAFETY: the caller's promise.
        unsafe { *c.at(0, j).ptr = value };
    }
}
