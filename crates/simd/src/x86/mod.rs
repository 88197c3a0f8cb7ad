//! x86-64 instruction sets beyond the SSE2 that every such CPU has (that one is [`crate::Portable`]'s).
//!
//! The macros write the operations that are the same in every width but for the intrinsic's name.

/// One operation on registers alone: the token `self` proves the features, nothing else is asked.
macro_rules! register_op {
    ($body:expr) => {{
        // SAFETY: no memory is touched, and the token proves that the CPU has the features.
        unsafe { $body }
    }};
}

/// `fn op(self, a, b)` by one intrinsic.
macro_rules! binary_ops {
    ($F32:ty: $($op:ident => $intrinsic:ident,)*) => {
        $(#[inline(always)]
        fn $op(self, a: $F32, b: $F32) -> $F32 {
            register_op!($intrinsic(a, b))
        })*
    };
}

/// Loads and stores of whole vectors.
macro_rules! whole_vectors {
    ($F32:ty, $load:ident, $store:ident) => {
        #[inline(always)]
        unsafe fn load_ptr(self, p: *const f32) -> $F32 {
            // SAFETY: the caller vouches for `LANES` values at `p`.
            unsafe { $load(p) }
        }
        #[inline(always)]
        unsafe fn store_ptr(self, x: $F32, p: *mut f32) {
            // SAFETY: the caller vouches for `LANES` values at `p`.
            unsafe { $store(p, x) }
        }
    };
}

/// What is done on the bits of the sign and of the exponent.
macro_rules! sign_and_exponent {
    ($F32:ty: set1 $set1:ident, and $and:ident, andnot $andnot:ident, or $or:ident,
     as_int $as_int:ident, as_float $as_float:ident, shift $shift:ident,) => {
        #[inline(always)]
        fn abs(self, a: $F32) -> $F32 {
            register_op!($andnot($set1(-0.0), a))
        }
        #[inline(always)]
        fn copysign(self, a: $F32, sign: $F32) -> $F32 {
            register_op!({
                let bit = $set1(-0.0);
                $or($andnot(bit, a), $and(bit, sign))
            })
        }
        #[inline(always)]
        fn pow2_of_biased(self, biased: $F32) -> $F32 {
            register_op!($as_float($shift::<23>($as_int(biased))))
        }
    };
}

/// Prefetches into L1, into L2, and into L1 for writing.
macro_rules! prefetches {
    () => {
        #[inline(always)]
        fn prefetch(self, p: *const f32) {
            // SAFETY: a prefetch never faults, whatever the address.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
        }
        #[inline(always)]
        fn prefetch_l2(self, p: *const f32) {
            // SAFETY: as above.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
        }
        #[inline(always)]
        fn prefetch_write(self, p: *const f32) {
            // The intrinsic with a hint for writing becomes one for reading where the compiler is not told of this
            // instruction. CPUs that lack it, all older than AVX-512 and AVX2's second generation, take it for a `nop`.
            // SAFETY: a prefetch never faults, whatever the address.
            unsafe {
                core::arch::asm!("prefetchw [{}]", in(reg) p, options(nostack, preserves_flags, readonly));
            }
        }
    };
}

mod avx2;
mod avx512;

pub use avx2::Avx2;
pub use avx512::Avx512;
