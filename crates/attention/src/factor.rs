//! Factors in two parts, the second what rounding took off the first: a product with one is rounded once.

use qkv_simd::Simd;

/// A factor per lane.
#[derive(Clone, Copy)]
pub(crate) struct Factor<F> {
    high: F,
    low: F,
}

impl<F: Copy> Factor<F> {
    /// The same for all lanes.
    #[inline(always)]
    pub(crate) fn splat<S: Simd<F32 = F>>(s: S, factor: f64) -> Self {
        let high = factor as f32;
        Self { high: s.splat(high), low: s.splat((factor - f64::from(high)) as f32) }
    }

    /// 1 / l, the factor that ends a row, or 0 for a query that has seen nothing: o / l without a division per output.
    #[inline(always)]
    pub(crate) fn inverse_sum<S: Simd<F32 = F>>(s: S, sum: F) -> Self {
        let one = s.splat(1.0);
        let nothing = s.eq(sum, s.zero());
        let high = s.div(one, sum);
        let low = s.mul(high, s.mul_add(s.sub(s.zero(), high), sum, one));
        Self { high: s.select(nothing, s.zero(), high), low: s.select(nothing, s.zero(), low) }
    }

    #[inline(always)]
    pub(crate) fn times<S: Simd<F32 = F>>(self, s: S, x: F) -> F {
        // An infinite x is infinite times the factor: times `low`, of either sign or 0, it must stay finite.
        let finite = s.max(s.splat(f32::MIN), s.min(s.splat(f32::MAX), x));
        s.mul_add(x, self.high, s.mul(finite, self.low))
    }
}
