//! Elementary functions on vectors, with their largest errors.
//!
//! | function | domain | largest error, ULP: fused / separate | operations | NaN |
//! | --- | --- | --- | --- | --- |
//! | [`exp2_nonpositive`] | x <= 127; flushed to zero below -126 | 0.80 / 1.08 | 12 | NaN |
//! | [`ScaledExp2`] | the same of c x | 1.1 / and half an ULP of c x | 12 | NaN |
//! | [`exp`] | all: to infinity, through the subnormals to 0 | 0.9 / 1.2 | 20 | NaN |
//! | [`tanh`] | all | 2.3 / 2.5 | 22 and a division | NaN |
//! | [`erf`] | all | 2.2 / 2.5 | 28 | NaN |
//!
//! The error is the distance from the exact value in units of its last place, at most over every `f32` of the domain
//! (`tests/math.rs` measures it, against f64). "Fused" is where [`Simd::mul_add`] rounds once, "separate" where it
//! rounds twice: [`crate::Portable`] over SSE2. Every coefficient comes out of `scripts/fit_polynomials.py`. Nothing
//! here branches, so the cost does not depend on the values.
//!
//! # One reduction
//! The argument is split as in W. J. Cody and W. Waite, *Software Manual for the Elementary Functions* (1980): into a
//! whole number n of octaves and a rest r of at most half an octave, so that 2^x = 2^n 2^r, and 2^r (or e^r) is
//! 1 + r q(r). The rounding to n is done by adding [`BIASED_ZERO`], which is 1.5 * 2^23 + 127: the sum holds n in its
//! lowest bits, already carrying the exponent's bias, so that a shift makes 2^n out of it ([`Simd::pow2_of_biased`])
//! and a subtraction makes n.
//!
//! # One identity
//! 2^n (1 + r q) - 1 = (2^n - 1) + 2^n r q, where 2^n - 1 is exact as long as it matters, is e^z - 1 without
//! cancellation near z = 0. [`tanh`] is a quotient of two such sums and [`erf`] is one of them, for a z that is a
//! polynomial: that keeps them accurate around 0 without a second formula and a selection between the two. Both are
//! computed on u = -|x|, where the exponential cannot overflow, and given the sign of x at the end, which makes them odd
//! to the bit.

use crate::Simd;

/// 1.5 * 2^23 + 127: `x + BIASED_ZERO` rounds `x` to a whole number n, |n| < 2^21, and leaves n + 127 in its low bits.
pub const BIASED_ZERO: f32 = 12_583_039.0;

/// Below this, 2^x is zero in [`exp2_nonpositive`]: n becomes -127, whose power of two is +0.
const FLUSH: f32 = -127.0;

/// q of 2^r = 1 + r q(r) on |r| <= 1/2, lowest power first.
const EXP2_Q: [f32; 6] = [6.931472e-1, 2.4022642e-1, 5.5503603e-2, 9.61918e-3, 1.339065e-3, 1.5148023e-4];

/// log2(e).
const LOG2_E: f32 = core::f32::consts::LOG2_E;

/// ln 2 to 15 bits: n times this is exact.
const LN2_HIGH: f32 = 6.9314575e-1;

/// ln 2 less [`LN2_HIGH`].
const LN2_LOW: f32 = 1.4286068e-6;

/// q of e^r = 1 + r q(r) on |r| <= ln 2 / 2, lowest power first; alone off by 0.04 ULP.
const EXP_Q: [f32; 6] = [1.0, 4.999999e-1, 1.6666521e-1, 4.166889e-2, 8.368671e-3, 1.3789478e-3];

/// p of ln(1 - erf(-u)) = u + u p(u) on [-4, 0], lowest power first; alone off by 0.07 * 2^-24 of erf.
const ERF_P: [f32; 9] = [
    1.2837917e-1,
    -6.3661957e-1,
    1.02776304e-1,
    1.9147826e-2,
    -1.6948448e-4,
    -1.6756388e-3,
    -6.373309e-4,
    -1.1884828e-4,
    -9.386007e-6,
];

/// The polynomial with these coefficients, lowest power first, by Horner's rule.
#[inline(always)]
fn polynomial<S: Simd, const N: usize>(s: S, x: S::F32, coefficients: &[f32; N]) -> S::F32 {
    let mut value = s.splat(coefficients[N - 1]);
    for &c in coefficients[..N - 1].iter().rev() {
        value = s.mul_add(value, x, s.splat(c));
    }
    value
}

/// e^x = 2^n (1 + r q(r)): answers n + [`BIASED_ZERO`], n and r, with |r| <= ln 2 / 2 and a rounding.
#[inline(always)]
fn split_exp<S: Simd>(s: S, x: S::F32) -> (S::F32, S::F32, S::F32) {
    let biased = s.mul_add(x, s.splat(LOG2_E), s.splat(BIASED_ZERO));
    let n = s.sub(biased, s.splat(BIASED_ZERO));
    // x - n LN2_HIGH is exact, fused or not: the product has 15 + 8 bits and the difference cancels.
    let r = s.mul_add(n, s.splat(-LN2_HIGH), x);
    (biased, n, s.mul_add(n, s.splat(-LN2_LOW), r))
}

/// 2^x for x <= 0.
///
/// At most 0.80 ULP from the exact value for x in [-126, 0] where [`Simd::mul_add`] is fused, 1.08 where it is not; exactly 1 at 0; below -126 subnormal or zero; +0 at -infinity; NaN for NaN. Positive
/// arguments up to 127 are computed too, with the same error; beyond, the value is any.
///
/// 12 operations: x = n + r with n whole, 2^r = 1 + r q(r), and the last step multiplies by 2^n in the same breath:
/// 2^n + (2^n r) q(r). It multiplies rather than adding to the exponent's bits so that a NaN stays one.
#[inline(always)]
pub fn exp2_nonpositive<S: Simd>(s: S, x: S::F32) -> S::F32 {
    // `max` returns its second operand for NaN.
    let x = s.max(s.splat(FLUSH), x);
    let biased = s.add(x, s.splat(BIASED_ZERO));
    exp2_of_parts(s, biased, s.sub(x, s.sub(biased, s.splat(BIASED_ZERO))))
}

/// 2^(c x) for x <= 0 and a factor c > 0, as in the online softmax: x is a score less its row's maximum, c what makes log2 units of it.
///
/// At most 1.1 ULP from the power of the exact c x where [`Simd::mul_add`] is fused, else further by half an ULP of c x; for the
/// rest as [`exp2_nonpositive`], also where c x would overflow. For factors in 2^-100..2^100.
#[derive(Clone, Copy, Debug)]
pub struct ScaledExp2<V> {
    factor: V,
    /// The x below which the power is 0.
    least: V,
}

impl<V: Copy> ScaledExp2<V> {
    /// For the factor c.
    #[inline(always)]
    pub fn new<S: Simd<F32 = V>>(s: S, factor: f32) -> Self {
        Self { factor: s.splat(factor), least: s.splat(FLUSH / factor) }
    }

    /// 2^(c x).
    #[inline(always)]
    pub fn of<S: Simd<F32 = V>>(self, s: S, x: V) -> V {
        // `max` returns its second operand for NaN.
        let x = s.max(self.least, x);
        let biased = s.mul_add(x, self.factor, s.splat(BIASED_ZERO));
        let r = s.mul_add(x, self.factor, s.sub(s.splat(BIASED_ZERO), biased));
        exp2_of_parts(s, biased, r)
    }
}

/// 2^n 2^r from n + [`BIASED_ZERO`] and r.
#[inline(always)]
fn exp2_of_parts<S: Simd>(s: S, biased: S::F32, r: S::F32) -> S::F32 {
    let power = s.pow2_of_biased(biased);
    s.mul_add(s.mul(power, r), polynomial(s, r, &EXP2_Q), power)
}

/// e^x for every x.
///
/// At most 0.9 ULP from the exact value where [`Simd::mul_add`] is fused, 1.2 where it is not, subnormal results among
/// them; exactly 1 at 0; +infinity above 88.72283 (where the exact value exceeds the largest `f32`), +0 below -103.98
/// (where it is under half the smallest); NaN for NaN.
///
/// 20 operations. Neither 2^128 nor 2^-150 has an exponent of its own, so the power is applied in two halves, of which
/// only the second rounds.
#[inline(always)]
pub fn exp<S: Simd>(s: S, x: S::F32) -> S::F32 {
    // Beyond these the value has long been 0 or infinite; within them n lies in -150..=128. The order keeps a NaN.
    let x = s.min(s.splat(89.0), s.max(s.splat(-104.0), x));
    let (_, n, r) = split_exp(s, x);
    let value = s.mul_add(r, polynomial(s, r, &EXP_Q), s.splat(1.0));
    let half = s.mul_add(n, s.splat(0.5), s.splat(BIASED_ZERO));
    let rest = s.add(s.sub(n, s.sub(half, s.splat(BIASED_ZERO))), s.splat(BIASED_ZERO));
    s.mul(s.mul(value, s.pow2_of_biased(half)), s.pow2_of_biased(rest))
}

/// The hyperbolic tangent of every x: tanh(x) = (1 - e^(-2|x|)) / (1 + e^(-2|x|)) with the sign of x.
///
/// At most 2.3 ULP from the exact value where [`Simd::mul_add`] is fused, 2.5 where it is not; odd to the bit (-0 for
/// -0); never beyond 1 in magnitude and exactly ±1 for |x| >= 9.02; NaN for NaN.
///
/// 22 operations and a division.
#[inline(always)]
pub fn tanh<S: Simd>(s: S, x: S::F32) -> S::F32 {
    // -|x|; from 10 on the exponential is too small to move a sum with 1.
    let u = s.max(s.splat(-10.0), s.copysign(x, s.splat(-0.0)));
    let (biased, _, r) = split_exp(s, s.add(u, u));
    let power = s.pow2_of_biased(biased);
    let (scaled, q) = (s.mul(power, r), polynomial(s, r, &EXP_Q));
    let numerator = s.mul_add(scaled, q, s.sub(power, s.splat(1.0)));
    let denominator = s.mul_add(scaled, q, s.add(power, s.splat(1.0)));
    s.copysign(s.div(numerator, denominator), x)
}

/// The error function of every x, 2/sqrt(pi) times the integral of e^(-t^2) from 0 to x: erf(x) = 1 - e^z with the sign
/// of x, where z = u + u p(u), u = -|x|, is a fit of the logarithm of 1 - erf(|x|).
///
/// At most 2.2 ULP from the exact value where [`Simd::mul_add`] is fused, 2.5 where it is not; odd to the bit (-0 for
/// -0); never beyond 1 in magnitude and exactly ±1 for |x| >= 3.93; NaN for NaN.
///
/// 28 operations. What p is off by counts less and less towards larger arguments, by the factor 1 - erf, which is why
/// one polynomial does for all of them.
#[inline(always)]
pub fn erf<S: Simd>(s: S, x: S::F32) -> S::F32 {
    // -|x|; from 4 on 1 - erf is too small to move a sum with 1.
    let u = s.max(s.splat(-4.0), s.copysign(x, s.splat(-0.0)));
    let z = s.mul_add(u, polynomial(s, u, &ERF_P), u);
    let (biased, _, r) = split_exp(s, z);
    let power = s.pow2_of_biased(biased);
    let negative = s.mul_add(s.mul(power, r), polynomial(s, r, &EXP_Q), s.sub(power, s.splat(1.0)));
    s.copysign(negative, x)
}
