//! AVX2 + FMA + F16C: eight lanes, sixteen registers (Haswell 2013, Zen 2017 and later).

use core::arch::x86_64::*;

use crate::simd::sealed::Sealed;
use crate::{IsaKind, Simd, SimdOp};

/// Proof that this CPU has AVX2, FMA and F16C.
#[derive(Clone, Copy, Debug)]
pub struct Avx2 {
    _made_by_new: (),
}

impl Avx2 {
    /// The token, where the CPU has all three.
    #[must_use]
    pub fn new() -> Option<Self> {
        // These three must be the features that `vectorize` enables.
        (is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c"))
        .then_some(Self { _made_by_new: () })
    }
}

/// The lanes below `n`, as `maskload` and `maskstore` want them: the sign bit of each.
#[inline(always)]
fn first_lanes(n: usize) -> __m256i {
    debug_assert!(n <= 8);
    const WINDOW: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];
    // SAFETY: n <= 8, so the eight values from 8 - n on lie inside the table; AVX2 by the callers' token.
    unsafe { _mm256_loadu_si256(WINDOW.as_ptr().add(8 - n.min(8)).cast()) }
}

impl Sealed for Avx2 {}

impl Simd for Avx2 {
    const KIND: IsaKind = IsaKind::Avx2;
    const LANES: usize = 8;
    const REGISTERS: usize = 16;
    type F32 = __m256;
    type Mask = __m256;

    #[inline(always)]
    fn vectorize<O: SimdOp>(self, op: O) -> O::Output {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn enter<O: SimdOp>(s: Avx2, op: O) -> O::Output {
            op.eval(s)
        }
        // SAFETY: the token proves the three features.
        unsafe { enter(self, op) }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        register_op!(_mm256_set1_ps(x))
    }
    #[inline(always)]
    fn iota(self) -> __m256 {
        register_op!(_mm256_setr_ps(0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0))
    }

    whole_vectors!(__m256, _mm256_loadu_ps, _mm256_storeu_ps);
    #[inline(always)]
    unsafe fn load_partial(self, p: *const f32, n: usize) -> __m256 {
        // SAFETY: masked-off lanes are not accessed; the caller vouches for the first `n`.
        unsafe { _mm256_maskload_ps(p, first_lanes(n)) }
    }
    #[inline(always)]
    unsafe fn store_partial(self, x: __m256, p: *mut f32, n: usize) {
        // SAFETY: masked-off lanes are not accessed; the caller vouches for the first `n`.
        unsafe { _mm256_maskstore_ps(p, first_lanes(n), x) }
    }

    binary_ops! { __m256:
        add => _mm256_add_ps, sub => _mm256_sub_ps, mul => _mm256_mul_ps, div => _mm256_div_ps,
        max => _mm256_max_ps, min => _mm256_min_ps,
    }
    #[inline(always)]
    fn mul_add(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        register_op!(_mm256_fmadd_ps(a, b, c))
    }
    sign_and_exponent! { __m256:
        set1 _mm256_set1_ps, and _mm256_and_ps, andnot _mm256_andnot_ps, or _mm256_or_ps,
        as_int _mm256_castps_si256, as_float _mm256_castsi256_ps, shift _mm256_slli_epi32,
    }

    #[inline(always)]
    fn lt(self, a: __m256, b: __m256) -> __m256 {
        register_op!(_mm256_cmp_ps::<_CMP_LT_OQ>(a, b))
    }
    #[inline(always)]
    fn le(self, a: __m256, b: __m256) -> __m256 {
        register_op!(_mm256_cmp_ps::<_CMP_LE_OQ>(a, b))
    }
    #[inline(always)]
    fn eq(self, a: __m256, b: __m256) -> __m256 {
        register_op!(_mm256_cmp_ps::<_CMP_EQ_OQ>(a, b))
    }
    #[inline(always)]
    fn and(self, a: __m256, b: __m256) -> __m256 {
        register_op!(_mm256_and_ps(a, b))
    }
    #[inline(always)]
    fn or(self, a: __m256, b: __m256) -> __m256 {
        register_op!(_mm256_or_ps(a, b))
    }
    #[inline(always)]
    fn select(self, mask: __m256, yes: __m256, no: __m256) -> __m256 {
        register_op!(_mm256_blendv_ps(no, yes, mask))
    }
    #[inline(always)]
    fn test_bit(self, words: __m256, bit: u32) -> __m256 {
        // Into the sign bit, which is what the masks of AVX2 consist of.
        register_op!({
            let shift = _mm_cvtsi32_si128(31 - bit.cast_signed());
            _mm256_castsi256_ps(_mm256_sll_epi32(_mm256_castps_si256(words), shift))
        })
    }
    #[inline(always)]
    fn funnel_right(self, low: __m256, high: __m256, n: u32) -> __m256 {
        // A shift by 32, where n is 0, leaves nothing.
        register_op!({
            let right = _mm256_srl_epi32(_mm256_castps_si256(low), _mm_cvtsi32_si128(n.cast_signed()));
            let rest = _mm_cvtsi32_si128(32 - n.cast_signed());
            let left = _mm256_sll_epi32(_mm256_castps_si256(high), rest);
            _mm256_castsi256_ps(_mm256_or_si256(right, left))
        })
    }
    #[inline(always)]
    fn bits(self, mask: __m256) -> u32 {
        register_op!(_mm256_movemask_ps(mask).cast_unsigned())
    }

    #[inline(always)]
    unsafe fn nonzero_bytes(self, p: *const u8) -> u32 {
        // SAFETY: the caller vouches for 32 bytes.
        unsafe {
            let bytes = _mm256_loadu_si256(p.cast());
            !_mm256_movemask_epi8(_mm256_cmpeq_epi8(bytes, _mm256_setzero_si256())).cast_unsigned()
        }
    }

    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> __m256 {
        // SAFETY: the caller vouches for eight values at `p`.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> __m256 {
        // SAFETY: the caller vouches for eight values at `p`.
        let wide = unsafe { _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast())) };
        register_op!(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide)))
    }
    #[inline(always)]
    unsafe fn load_i8(self, p: *const i8) -> __m256 {
        // SAFETY: the caller vouches for eight bytes at `p`.
        let bytes = unsafe { _mm_loadl_epi64(p.cast()) };
        register_op!(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)))
    }

    #[inline(always)]
    fn reduce_add(self, a: __m256) -> f32 {
        register_op!({
            let x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
        })
    }
    #[inline(always)]
    fn reduce_each(self, rows: &[__m256]) -> __m256 {
        register_op!({
            match *rows {
                [a, b, c, d, e, f, g, h] => {
                    let low = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
                    let high = _mm256_hadd_ps(_mm256_hadd_ps(e, f), _mm256_hadd_ps(g, h));
                    // The sums of halves: of rows 0 to 3 in `low`, of rows 4 to 7 in `high`.
                    let first = _mm256_permute2f128_ps::<0x20>(low, high);
                    _mm256_add_ps(first, _mm256_permute2f128_ps::<0x31>(low, high))
                }
                [a, b, c, d] => {
                    let low = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
                    let sums = _mm_add_ps(_mm256_castps256_ps128(low), _mm256_extractf128_ps::<1>(low));
                    _mm256_castps128_ps256(sums)
                }
                // In the order of the others, so that a row's sum does not depend on its company.
                [a, ..] => {
                    let low = _mm256_hadd_ps(a, a);
                    let low = _mm256_hadd_ps(low, low);
                    let sums = _mm_add_ps(_mm256_castps256_ps128(low), _mm256_extractf128_ps::<1>(low));
                    _mm256_castps128_ps256(sums)
                }
                [] => _mm256_setzero_ps(),
            }
        })
    }
    #[inline(always)]
    fn reduce_max(self, a: __m256) -> f32 {
        register_op!({
            let x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)))
        })
    }

    #[inline(always)]
    fn permute(self, a: __m256, from: &[u32; 16]) -> __m256 {
        // SAFETY: AVX2 by the token; the first eight of the sixteen indices are readable. Their three lowest bits count.
        unsafe { _mm256_permutevar8x32_ps(a, _mm256_loadu_si256(from.as_ptr().cast())) }
    }

    #[inline(always)]
    unsafe fn transpose(self, src: *const f32, src_stride: isize, dst: *mut f32, dst_stride: isize) {
        // Halves are paired at the load (row i beside row i + 4), so that every later step stays inside 128 bits:
        // 8 loads + 8 inserts from memory, 8 unpacks, 8 shuffles, 8 stores.
        // SAFETY: the caller vouches for eight rows of eight values on both sides; each access is one of them.
        unsafe {
            let pair = |i: isize, half: isize| {
                let low = _mm_loadu_ps(src.offset(i * src_stride + 4 * half));
                let high = _mm_loadu_ps(src.offset((i + 4) * src_stride + 4 * half));
                _mm256_insertf128_ps::<1>(_mm256_castps128_ps256(low), high)
            };
            for half in 0..2 {
                let (r0, r1, r2, r3) = (pair(0, half), pair(1, half), pair(2, half), pair(3, half));
                let (t0, t1) = (_mm256_unpacklo_ps(r0, r1), _mm256_unpackhi_ps(r0, r1));
                let (t2, t3) = (_mm256_unpacklo_ps(r2, r3), _mm256_unpackhi_ps(r2, r3));
                let dst = dst.offset(4 * half * dst_stride);
                _mm256_storeu_ps(dst, _mm256_shuffle_ps::<0x44>(t0, t2));
                _mm256_storeu_ps(dst.offset(dst_stride), _mm256_shuffle_ps::<0xEE>(t0, t2));
                _mm256_storeu_ps(dst.offset(2 * dst_stride), _mm256_shuffle_ps::<0x44>(t1, t3));
                _mm256_storeu_ps(dst.offset(3 * dst_stride), _mm256_shuffle_ps::<0xEE>(t1, t3));
            }
        }
    }

    prefetches!();
}
