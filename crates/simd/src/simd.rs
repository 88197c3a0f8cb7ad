//! The contract between the kernels and an instruction set.

use core::fmt::Debug;

use crate::IsaKind;

pub(crate) mod sealed {
    /// Tokens are made in this crate only: their existence is a promise about the CPU.
    pub trait Sealed {}
}

/// A computation that is generic over the instruction set; see [`crate::Isa::dispatch`].
pub trait SimdOp {
    /// What it returns.
    type Output;

    /// Runs it. Implementations must be `#[inline(always)]` (see the rule of inlining in the crate's text).
    fn eval<S: Simd>(self, s: S) -> Self::Output;
}

/// An instruction set for vectors of `f32`: a zero-sized proof that the CPU has it, with its operations.
///
/// Operations are lane by lane and round to nearest even unless said otherwise. Lane 0 is the one at the lowest
/// address. Methods that take a slice check its length; methods that take a pointer are `unsafe` and their callers
/// check.
pub trait Simd: sealed::Sealed + Copy + Send + Sync + Debug + 'static {
    /// Which instruction set this is.
    const KIND: IsaKind;
    /// `f32` lanes in a vector.
    const LANES: usize;
    /// Architectural vector registers; register tiles are sized by it.
    const REGISTERS: usize;
    /// A vector of `f32`.
    type F32: Copy + Debug;
    /// One truth value per lane.
    type Mask: Copy + Debug;

    /// Calls `op` compiled with this instruction set's features: the only door into vector code.
    fn vectorize<O: SimdOp>(self, op: O) -> O::Output;

    /// All lanes `x`.
    fn splat(self, x: f32) -> Self::F32;
    /// All lanes +0.
    #[inline(always)]
    fn zero(self) -> Self::F32 {
        self.splat(0.0)
    }
    /// Lanes 0, 1, 2, ...
    fn iota(self) -> Self::F32;

    /// Reads [`Self::LANES`] values.
    ///
    /// # Safety
    /// `p` must be valid for reads of `LANES` values; it need not be aligned beyond `f32`.
    unsafe fn load_ptr(self, p: *const f32) -> Self::F32;
    /// Writes [`Self::LANES`] values.
    ///
    /// # Safety
    /// `p` must be valid for writes of `LANES` values; it need not be aligned beyond `f32`.
    unsafe fn store_ptr(self, x: Self::F32, p: *mut f32);
    /// Reads `n` values (at most [`Self::LANES`]); the other lanes are +0.
    ///
    /// # Safety
    /// `p` must be valid for reads of `n` values, and `n <= LANES`. Nothing past them is touched.
    unsafe fn load_partial(self, p: *const f32, n: usize) -> Self::F32;
    /// Writes the first `n` lanes (at most [`Self::LANES`]).
    ///
    /// # Safety
    /// `p` must be valid for writes of `n` values, and `n <= LANES`. Nothing past them is touched.
    unsafe fn store_partial(self, x: Self::F32, p: *mut f32, n: usize);

    /// Reads the first [`Self::LANES`] values of `src`.
    ///
    /// # Panics
    /// If `src` is shorter than that.
    #[inline(always)]
    fn load(self, src: &[f32]) -> Self::F32 {
        let src = &src[..Self::LANES];
        // SAFETY: the slice has LANES values.
        unsafe { self.load_ptr(src.as_ptr()) }
    }
    /// Writes the first [`Self::LANES`] values of `dst`.
    ///
    /// # Panics
    /// If `dst` is shorter than that.
    #[inline(always)]
    fn store(self, x: Self::F32, dst: &mut [f32]) {
        let dst = &mut dst[..Self::LANES];
        // SAFETY: the slice has LANES values.
        unsafe { self.store_ptr(x, dst.as_mut_ptr()) }
    }

    /// `a + b`.
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a - b`.
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a * b`.
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a / b`.
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a * b + c`, rounded once where the instruction set can (not on [`crate::Portable`] over SSE2).
    fn mul_add(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32;
    /// `a > b ? a : b`: where either is NaN, and for zeros of both signs, it is `b`.
    ///
    /// The order matters: `max(x, floor)` drops a NaN in `x`, `max(floor, x)` keeps it.
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a < b ? a : b`, with the same rule: where either is NaN it is `b`.
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// The absolute value (clears the sign, of a NaN too).
    fn abs(self, a: Self::F32) -> Self::F32;
    /// The magnitude of `a` with the sign of `sign`.
    fn copysign(self, a: Self::F32, sign: Self::F32) -> Self::F32;

    /// `2^n` out of the bits of `biased`, which holds the whole number `n` as `n + BIASED_ZERO` in f32 arithmetic
    /// (see [`crate::math`]); -127 gives +0, 128 gives infinity. Other inputs, NaN among them, give any value.
    fn pow2_of_biased(self, biased: Self::F32) -> Self::F32;

    /// `a < b`, false for NaN.
    fn lt(self, a: Self::F32, b: Self::F32) -> Self::Mask;
    /// `a <= b`, false for NaN.
    fn le(self, a: Self::F32, b: Self::F32) -> Self::Mask;
    /// `a == b`, false for NaN.
    fn eq(self, a: Self::F32, b: Self::F32) -> Self::Mask;
    /// Lanes where both hold.
    fn and(self, a: Self::Mask, b: Self::Mask) -> Self::Mask;
    /// Lanes where either holds.
    fn or(self, a: Self::Mask, b: Self::Mask) -> Self::Mask;
    /// `mask ? yes : no`.
    fn select(self, mask: Self::Mask, yes: Self::F32, no: Self::F32) -> Self::F32;
    /// Lanes whose bit pattern has bit `bit` (0 to 31) set.
    fn test_bit(self, words: Self::F32, bit: u32) -> Self::Mask;
    /// The 32 bits from bit `n` (0 to 31) on of the 64 whose lower half is `low`, lane by lane.
    fn funnel_right(self, low: Self::F32, high: Self::F32, n: u32) -> Self::F32;
    /// One bit per lane, lane 0 the lowest.
    fn bits(self, mask: Self::Mask) -> u32;

    /// Which of 32 bytes are not 0, the first byte's bit lowest: booleans as a bit set.
    ///
    /// # Safety
    /// `p` must be valid for reads of 32 bytes.
    #[inline(always)]
    unsafe fn nonzero_bytes(self, p: *const u8) -> u32 {
        let mut word = 0;
        for byte in 0..4 {
            // SAFETY: the caller vouches for 32 bytes.
            let eight = u64::from_le_bytes(unsafe { p.add(8 * byte).cast::<[u8; 8]>().read() });
            // Each byte's highest bit: set if the others, which carry into it, or itself are not 0.
            let low = 0x7F7F_7F7F_7F7F_7F7F;
            let set = (((eight & low) + low) | eight) & !low;
            // The multiplication gathers the lowest bit of each byte in the topmost byte, in order.
            let gathered = (set >> 7).wrapping_mul(0x0102_0408_1020_4080) >> 56;
            word |= (gathered as u32) << (8 * byte);
        }
        word
    }
    /// [`Self::nonzero_bytes`] of 64 bytes.
    ///
    /// # Safety
    /// 64 bytes must be readable from `p` on.
    #[inline(always)]
    unsafe fn nonzero_bytes_64(self, p: *const u8) -> u64 {
        // SAFETY: the caller vouches for 64 bytes.
        let [low, high] = unsafe { [self.nonzero_bytes(p), self.nonzero_bytes(p.add(32))] };
        u64::from(low) | u64::from(high) << 32
    }

    /// `LANES` IEEE binary16 values, widened; exact, a signalling NaN becomes a quiet one.
    ///
    /// # Safety
    /// `p` must be valid for reads of `LANES` values.
    unsafe fn load_f16(self, p: *const u16) -> Self::F32;
    /// `LANES` bfloat16 values, widened; exact.
    ///
    /// # Safety
    /// `p` must be valid for reads of `LANES` values.
    unsafe fn load_bf16(self, p: *const u16) -> Self::F32;
    /// `LANES` signed bytes, as numbers.
    ///
    /// # Safety
    /// `p` must be valid for reads of `LANES` bytes.
    unsafe fn load_i8(self, p: *const i8) -> Self::F32;

    /// The sum of the lanes, by halves.
    fn reduce_add(self, a: Self::F32) -> f32;
    /// Lane i is the sum of the lanes of `rows[i]`, for 1, 4, 8 or `LANES` rows, of which the first `LANES` count; other
    /// lanes are any. A row's sum is the same to the bit whatever other rows there are.
    #[inline(always)]
    fn reduce_each(self, rows: &[Self::F32]) -> Self::F32 {
        let mut sums = [0.0; 16];
        for (sum, &row) in sums.iter_mut().zip(rows).take(Self::LANES) {
            *sum = self.reduce_add(row);
        }
        self.load(&sums)
    }
    /// The largest lane; NaN lanes may be dropped.
    fn reduce_max(self, a: Self::F32) -> f32;

    /// Lane i is lane `from[i] % LANES` of `a`; the first `LANES` of `from` count.
    fn permute(self, a: Self::F32, from: &[u32; 16]) -> Self::F32;

    /// Transposes a square of `LANES` x `LANES` values: `dst[j * dst_stride + i] = src[i * src_stride + j]`.
    ///
    /// # Safety
    /// Each of the `LANES` rows of `src` must be valid for reads, each of `dst` for writes, of `LANES` values; the
    /// two must not overlap. Strides count values.
    unsafe fn transpose(self, src: *const f32, src_stride: isize, dst: *mut f32, dst_stride: isize);

    /// Asks for the cache line at `p` to be brought into L1. Any address is allowed.
    #[inline(always)]
    fn prefetch(self, p: *const f32) {
        let _ = p;
    }
    /// Asks for the cache line at `p` to be brought into L2: for streams, of which more can be under way there than on the
    /// way to L1. Any address is allowed.
    #[inline(always)]
    fn prefetch_l2(self, p: *const f32) {
        let _ = p;
    }
    /// Asks for the cache line at `p` to be brought into L1 as this core's own, to be written: one that another core has
    /// written would otherwise come shared, and be asked for once more by the store. Any address is allowed.
    #[inline(always)]
    fn prefetch_write(self, p: *const f32) {
        let _ = p;
    }
}
