//! AVX-512 F, BW, DQ, VL: sixteen lanes, thirty-two registers, masks in registers of their own (Skylake-SP 2017, Zen 4 2022
//! and later).

use core::arch::x86_64::*;

use crate::simd::sealed::Sealed;
use crate::{IsaKind, Simd, SimdOp};

/// Proof that this CPU has AVX-512 F, BW, DQ and VL, and AVX2, FMA and F16C with them.
#[derive(Clone, Copy, Debug)]
pub struct Avx512 {
    _made_by_new: (),
}

impl Avx512 {
    /// The token, where the CPU has all of them.
    #[must_use]
    pub fn new() -> Option<Self> {
        // These must be the features that `vectorize` enables.
        (is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c"))
        .then_some(Self { _made_by_new: () })
    }
}

/// The lanes below `n`.
#[inline(always)]
fn first_lanes(n: usize) -> __mmask16 {
    debug_assert!(n <= 16);
    ((1u32 << n.min(16)) - 1) as __mmask16
}

/// The sums of four rows within each block of four lanes: lane i of a block is that of row i.
#[inline(always)]
fn sums_of_blocks(a: __m512, b: __m512, c: __m512, d: __m512) -> __m512 {
    register_op!({
        let ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        let cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
        let (ab, cd) = (_mm512_castps_pd(ab), _mm512_castps_pd(cd));
        let (even, odd) = (_mm512_unpacklo_pd(ab, cd), _mm512_unpackhi_pd(ab, cd));
        _mm512_add_ps(_mm512_castpd_ps(even), _mm512_castpd_ps(odd))
    })
}

/// Blocks 0 + 2 and 1 + 3 of `low`, then of `high`.
#[inline(always)]
fn halves_added(low: __m512, high: __m512) -> __m512 {
    register_op!(_mm512_add_ps(
        _mm512_shuffle_f32x4::<0x44>(low, high),
        _mm512_shuffle_f32x4::<0xEE>(low, high)
    ))
}

/// What [`halves_added`] left of four groups, added up: a block per group.
#[inline(always)]
fn quarters_added(low: __m512, high: __m512) -> __m512 {
    register_op!(_mm512_add_ps(
        _mm512_shuffle_f32x4::<0x88>(low, high),
        _mm512_shuffle_f32x4::<0xDD>(low, high)
    ))
}

impl Sealed for Avx512 {}

impl Simd for Avx512 {
    const KIND: IsaKind = IsaKind::Avx512;
    const LANES: usize = 16;
    const REGISTERS: usize = 32;
    type F32 = __m512;
    type Mask = __mmask16;

    #[inline(always)]
    fn vectorize<O: SimdOp>(self, op: O) -> O::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
        fn enter<O: SimdOp>(s: Avx512, op: O) -> O::Output {
            op.eval(s)
        }
        // SAFETY: the token proves the features.
        unsafe { enter(self, op) }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        register_op!(_mm512_set1_ps(x))
    }
    #[inline(always)]
    fn iota(self) -> __m512 {
        register_op!(_mm512_setr_ps(
            0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0
        ))
    }

    whole_vectors!(__m512, _mm512_loadu_ps, _mm512_storeu_ps);
    #[inline(always)]
    unsafe fn load_partial(self, p: *const f32, n: usize) -> __m512 {
        // SAFETY: masked-off lanes are not accessed; the caller vouches for the first `n`.
        unsafe { _mm512_maskz_loadu_ps(first_lanes(n), p) }
    }
    #[inline(always)]
    unsafe fn store_partial(self, x: __m512, p: *mut f32, n: usize) {
        // SAFETY: masked-off lanes are not accessed; the caller vouches for the first `n`.
        unsafe { _mm512_mask_storeu_ps(p, first_lanes(n), x) }
    }

    binary_ops! { __m512:
        add => _mm512_add_ps, sub => _mm512_sub_ps, mul => _mm512_mul_ps, div => _mm512_div_ps,
        max => _mm512_max_ps, min => _mm512_min_ps,
    }
    #[inline(always)]
    fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        register_op!(_mm512_fmadd_ps(a, b, c))
    }
    sign_and_exponent! { __m512:
        set1 _mm512_set1_ps, and _mm512_and_ps, andnot _mm512_andnot_ps, or _mm512_or_ps,
        as_int _mm512_castps_si512, as_float _mm512_castsi512_ps, shift _mm512_slli_epi32,
    }

    #[inline(always)]
    fn lt(self, a: __m512, b: __m512) -> __mmask16 {
        register_op!(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b))
    }
    #[inline(always)]
    fn le(self, a: __m512, b: __m512) -> __mmask16 {
        register_op!(_mm512_cmp_ps_mask::<_CMP_LE_OQ>(a, b))
    }
    #[inline(always)]
    fn eq(self, a: __m512, b: __m512) -> __mmask16 {
        register_op!(_mm512_cmp_ps_mask::<_CMP_EQ_OQ>(a, b))
    }
    #[inline(always)]
    fn and(self, a: __mmask16, b: __mmask16) -> __mmask16 {
        a & b
    }
    #[inline(always)]
    fn or(self, a: __mmask16, b: __mmask16) -> __mmask16 {
        a | b
    }
    #[inline(always)]
    fn select(self, mask: __mmask16, yes: __m512, no: __m512) -> __m512 {
        register_op!(_mm512_mask_blend_ps(mask, no, yes))
    }
    #[inline(always)]
    fn test_bit(self, words: __m512, bit: u32) -> __mmask16 {
        register_op!({
            let one = _mm512_set1_epi32((1u32 << bit).cast_signed());
            _mm512_test_epi32_mask(_mm512_castps_si512(words), one)
        })
    }
    #[inline(always)]
    fn funnel_right(self, low: __m512, high: __m512, n: u32) -> __m512 {
        // A shift by 32, where n is 0, leaves nothing.
        register_op!({
            let right = _mm512_srl_epi32(_mm512_castps_si512(low), _mm_cvtsi32_si128(n.cast_signed()));
            let rest = _mm_cvtsi32_si128(32 - n.cast_signed());
            let left = _mm512_sll_epi32(_mm512_castps_si512(high), rest);
            _mm512_castsi512_ps(_mm512_or_si512(right, left))
        })
    }
    #[inline(always)]
    fn bits(self, mask: __mmask16) -> u32 {
        u32::from(mask)
    }

    #[inline(always)]
    unsafe fn nonzero_bytes(self, p: *const u8) -> u32 {
        // SAFETY: the caller vouches for 32 bytes.
        let bytes = unsafe { _mm256_loadu_si256(p.cast()) };
        register_op!(_mm256_test_epi8_mask(bytes, bytes))
    }
    #[inline(always)]
    unsafe fn nonzero_bytes_64(self, p: *const u8) -> u64 {
        // SAFETY: the caller vouches for 64 bytes.
        let bytes = unsafe { _mm512_loadu_si512(p.cast()) };
        register_op!(_mm512_test_epi8_mask(bytes, bytes))
    }

    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> __m512 {
        // SAFETY: the caller vouches for sixteen values at `p`.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> __m512 {
        // SAFETY: the caller vouches for sixteen values at `p`.
        let wide = unsafe { _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast())) };
        register_op!(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide)))
    }
    #[inline(always)]
    unsafe fn load_i8(self, p: *const i8) -> __m512 {
        // SAFETY: the caller vouches for sixteen bytes at `p`.
        let bytes = unsafe { _mm_loadu_si128(p.cast()) };
        register_op!(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)))
    }

    #[inline(always)]
    fn reduce_add(self, a: __m512) -> f32 {
        register_op!({
            let x = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a));
            let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
        })
    }
    #[inline(always)]
    fn reduce_each(self, rows: &[__m512]) -> __m512 {
        // The order of a row's sum is the same whatever its company: within blocks of four, then 0 + 2 and 1 + 3.
        match *rows {
            [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] => {
                let low = halves_added(sums_of_blocks(a, b, c, d), sums_of_blocks(e, f, g, h));
                let high = halves_added(sums_of_blocks(i, j, k, l), sums_of_blocks(m, n, o, p));
                quarters_added(low, high)
            }
            [a, b, c, d, e, f, g, h] => {
                let both = halves_added(sums_of_blocks(a, b, c, d), sums_of_blocks(e, f, g, h));
                quarters_added(both, both)
            }
            [a, b, c, d] => {
                let sums = sums_of_blocks(a, b, c, d);
                let both = halves_added(sums, sums);
                quarters_added(both, both)
            }
            [a, ..] => {
                let sums = sums_of_blocks(a, a, a, a);
                let both = halves_added(sums, sums);
                quarters_added(both, both)
            }
            [] => self.zero(),
        }
    }
    #[inline(always)]
    fn reduce_max(self, a: __m512) -> f32 {
        register_op!({
            let x = _mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a));
            let x = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)))
        })
    }

    #[inline(always)]
    fn permute(self, a: __m512, from: &[u32; 16]) -> __m512 {
        // SAFETY: AVX-512 by the token; sixteen indices are readable. Their four lowest bits count.
        unsafe { _mm512_permutexvar_ps(_mm512_loadu_si512(from.as_ptr().cast()), a) }
    }

    #[inline(always)]
    unsafe fn transpose(self, src: *const f32, src_stride: isize, dst: *mut f32, dst_stride: isize) {
        // Four strips of four columns: rows i, i + 4, i + 8, i + 12 side by side in a register, so that every later step
        // stays inside blocks of four lanes. 64 loads of 16 bytes, most of them inserted by the load itself.
        // SAFETY: the caller vouches for sixteen rows of sixteen values on both sides; each access is one of them.
        unsafe {
            for strip in 0..4 {
                let src = src.offset(4 * strip);
                let r0 = four_rows(src, src_stride);
                let r1 = four_rows(src.offset(src_stride), src_stride);
                let r2 = four_rows(src.offset(2 * src_stride), src_stride);
                let r3 = four_rows(src.offset(3 * src_stride), src_stride);
                let (t0, t1) = (_mm512_unpacklo_ps(r0, r1), _mm512_unpackhi_ps(r0, r1));
                let (t2, t3) = (_mm512_unpacklo_ps(r2, r3), _mm512_unpackhi_ps(r2, r3));
                let dst = dst.offset(4 * strip * dst_stride);
                _mm512_storeu_ps(dst, _mm512_shuffle_ps::<0x44>(t0, t2));
                _mm512_storeu_ps(dst.offset(dst_stride), _mm512_shuffle_ps::<0xEE>(t0, t2));
                _mm512_storeu_ps(dst.offset(2 * dst_stride), _mm512_shuffle_ps::<0x44>(t1, t3));
                _mm512_storeu_ps(dst.offset(3 * dst_stride), _mm512_shuffle_ps::<0xEE>(t1, t3));
            }
        }
    }

    prefetches!();
}

/// Four values of row 0, of row 4, of row 8 and of row 12.
///
/// # Safety
/// Each of these rows must be valid for reads of four values.
#[inline(always)]
unsafe fn four_rows(src: *const f32, stride: isize) -> __m512 {
    // SAFETY: the caller's promise; AVX-512 by the token of the caller.
    unsafe {
        let x = _mm512_castps128_ps512(_mm_loadu_ps(src));
        let x = _mm512_insertf32x4::<1>(x, _mm_loadu_ps(src.offset(4 * stride)));
        let x = _mm512_insertf32x4::<2>(x, _mm_loadu_ps(src.offset(8 * stride)));
        _mm512_insertf32x4::<3>(x, _mm_loadu_ps(src.offset(12 * stride)))
    }
}
