//! The portable instruction set: four lanes on the `wide` crate, whose `f32x4` is SSE2 on x86-64, NEON on AArch64 and
//! simd128 on WebAssembly where the build enables it, and plain arrays elsewhere.
//!
//! `wide` chooses at compile time, which is why it is the floor here and the run-time choice is made above it.

use wide::{f32x4, i32x4, u32x4};

use crate::simd::sealed::Sealed;
use crate::{IsaKind, Simd, SimdOp};

/// The token of the portable instruction set: every CPU has it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Portable {
    _made_by_new: (),
}

impl Portable {
    /// The token.
    #[must_use]
    pub const fn new() -> Self {
        Self { _made_by_new: () }
    }
}

impl Sealed for Portable {}

impl Simd for Portable {
    const KIND: IsaKind = IsaKind::Portable;
    const LANES: usize = 4;
    const REGISTERS: usize = 16;
    type F32 = f32x4;
    type Mask = f32x4;

    #[inline(always)]
    fn vectorize<O: SimdOp>(self, op: O) -> O::Output {
        // A function of its own, so that profiles and disassembly show where the kernel begins.
        #[inline(never)]
        fn enter<O: SimdOp>(s: Portable, op: O) -> O::Output {
            op.eval(s)
        }
        enter(self, op)
    }

    #[inline(always)]
    fn splat(self, x: f32) -> f32x4 {
        f32x4::splat(x)
    }
    #[inline(always)]
    fn iota(self) -> f32x4 {
        f32x4::new([0.0, 1.0, 2.0, 3.0])
    }

    #[inline(always)]
    unsafe fn load_ptr(self, p: *const f32) -> f32x4 {
        // SAFETY: the caller vouches for four values at `p`; the read asks for no alignment.
        f32x4::new(unsafe { p.cast::<[f32; 4]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn store_ptr(self, x: f32x4, p: *mut f32) {
        // SAFETY: the caller vouches for four values at `p`; the write asks for no alignment.
        unsafe { p.cast::<[f32; 4]>().write_unaligned(x.to_array()) }
    }
    #[inline(always)]
    unsafe fn load_partial(self, p: *const f32, n: usize) -> f32x4 {
        debug_assert!(n <= 4);
        let mut lanes = [0.0; 4];
        // SAFETY: the caller vouches for `n` values at `p`, and n <= 4 = lanes.len().
        unsafe { p.copy_to_nonoverlapping(lanes.as_mut_ptr(), n.min(4)) };
        f32x4::new(lanes)
    }
    #[inline(always)]
    unsafe fn store_partial(self, x: f32x4, p: *mut f32, n: usize) {
        debug_assert!(n <= 4);
        // SAFETY: the caller vouches for `n` values at `p`, and n <= 4, the array's length.
        unsafe { p.copy_from_nonoverlapping(x.to_array().as_ptr(), n.min(4)) };
    }

    #[inline(always)]
    fn add(self, a: f32x4, b: f32x4) -> f32x4 {
        a + b
    }
    #[inline(always)]
    fn sub(self, a: f32x4, b: f32x4) -> f32x4 {
        a - b
    }
    #[inline(always)]
    fn mul(self, a: f32x4, b: f32x4) -> f32x4 {
        a * b
    }
    #[inline(always)]
    fn div(self, a: f32x4, b: f32x4) -> f32x4 {
        a / b
    }
    #[inline(always)]
    fn mul_add(self, a: f32x4, b: f32x4, c: f32x4) -> f32x4 {
        a.mul_add(b, c)
    }
    #[inline(always)]
    fn max(self, a: f32x4, b: f32x4) -> f32x4 {
        // Not `wide`'s own max: what that does with NaN differs between its back ends.
        b.simd_lt(a).bitselect(a, b)
    }
    #[inline(always)]
    fn min(self, a: f32x4, b: f32x4) -> f32x4 {
        a.simd_lt(b).bitselect(a, b)
    }
    #[inline(always)]
    fn abs(self, a: f32x4) -> f32x4 {
        a & f32x4::splat(f32::from_bits(0x7FFF_FFFF))
    }
    #[inline(always)]
    fn copysign(self, a: f32x4, sign: f32x4) -> f32x4 {
        self.abs(a) | (sign & f32x4::splat(-0.0))
    }

    #[inline(always)]
    fn pow2_of_biased(self, biased: f32x4) -> f32x4 {
        bytemuck::cast::<i32x4, f32x4>(bytemuck::cast::<f32x4, i32x4>(biased) << 23)
    }

    #[inline(always)]
    fn lt(self, a: f32x4, b: f32x4) -> f32x4 {
        a.simd_lt(b)
    }
    #[inline(always)]
    fn le(self, a: f32x4, b: f32x4) -> f32x4 {
        a.simd_le(b)
    }
    #[inline(always)]
    fn eq(self, a: f32x4, b: f32x4) -> f32x4 {
        a.simd_eq(b)
    }
    #[inline(always)]
    fn and(self, a: f32x4, b: f32x4) -> f32x4 {
        a & b
    }
    #[inline(always)]
    fn or(self, a: f32x4, b: f32x4) -> f32x4 {
        a | b
    }
    #[inline(always)]
    fn select(self, mask: f32x4, yes: f32x4, no: f32x4) -> f32x4 {
        mask.bitselect(yes, no)
    }
    #[inline(always)]
    fn test_bit(self, words: f32x4, bit: u32) -> f32x4 {
        // Into the sign bit, and from there over the whole lane.
        let shifted = bytemuck::cast::<f32x4, i32x4>(words) << (31 - bit);
        bytemuck::cast::<i32x4, f32x4>(shifted >> 31)
    }
    #[inline(always)]
    fn funnel_right(self, low: f32x4, high: f32x4, n: u32) -> f32x4 {
        let (low, high) = (bytemuck::cast::<f32x4, u32x4>(low), bytemuck::cast::<f32x4, u32x4>(high));
        // In two steps, as no shift may be by 32.
        bytemuck::cast::<u32x4, f32x4>((low >> n) | ((high << 1) << (31 - n)))
    }
    #[inline(always)]
    fn bits(self, mask: f32x4) -> u32 {
        mask.to_bitmask()
    }

    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> f32x4 {
        // SAFETY: the caller vouches for four values at `p`; the read asks for no alignment.
        let bits = unsafe { p.cast::<[u16; 4]>().read_unaligned() };
        // The exponent is moved over by a product with 2^112, which also makes normal numbers of subnormal ones; what had
        // the largest exponent, infinities and NaN, gets the largest again.
        let bits = u32x4::new(bits.map(u32::from));
        let magnitude = (bits & u32x4::splat(0x7FFF)) << 13;
        let scaled = bytemuck::cast::<u32x4, f32x4>(magnitude) * f32x4::splat(f32::from_bits(0x7780_0000));
        let special = bytemuck::cast::<f32x4, u32x4>(scaled.simd_ge(f32x4::splat(65536.0)));
        let quiet = bytemuck::cast::<f32x4, u32x4>(scaled.simd_gt(f32x4::splat(65536.0)));
        let out = bytemuck::cast::<f32x4, u32x4>(scaled)
            | (special & u32x4::splat(0x7F80_0000))
            | (quiet & u32x4::splat(0x0040_0000))
            | ((bits & u32x4::splat(0x8000)) << 16);
        bytemuck::cast(out)
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> f32x4 {
        // SAFETY: as above.
        let bits = unsafe { p.cast::<[u16; 4]>().read_unaligned() };
        bytemuck::cast(u32x4::new(bits.map(u32::from)) << 16)
    }
    #[inline(always)]
    unsafe fn load_i8(self, p: *const i8) -> f32x4 {
        // SAFETY: the caller vouches for four bytes at `p`.
        let bytes = unsafe { p.cast::<[i8; 4]>().read() };
        f32x4::new(bytes.map(f32::from))
    }

    #[inline(always)]
    fn reduce_add(self, a: f32x4) -> f32 {
        let [a, b, c, d] = a.to_array();
        (a + c) + (b + d)
    }
    #[inline(always)]
    fn reduce_max(self, a: f32x4) -> f32 {
        let [a, b, c, d] = a.to_array();
        a.max(c).max(b.max(d))
    }

    #[inline(always)]
    fn permute(self, a: f32x4, from: &[u32; 16]) -> f32x4 {
        let lanes = a.to_array();
        f32x4::new(core::array::from_fn(|i| lanes[from[i] as usize % 4]))
    }

    #[inline(always)]
    unsafe fn transpose(self, src: *const f32, src_stride: isize, dst: *mut f32, dst_stride: isize) {
        // SAFETY: the caller vouches for four rows of four values on both sides; each access is one of them.
        unsafe {
            let row = |i: isize| self.load_ptr(src.offset(i * src_stride));
            let columns = f32x4::transpose([row(0), row(1), row(2), row(3)]);
            for (j, column) in (0isize..).zip(columns) {
                self.store_ptr(column, dst.offset(j * dst_stride));
            }
        }
    }
}
