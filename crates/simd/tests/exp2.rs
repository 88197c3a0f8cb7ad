//! `exp2_nonpositive` against f64: a dense sample in the normal run, every float at or below zero in the ignored one.

use qkv_simd::{Isa, Simd, SimdOp, math};

struct Exp2<'a>(&'a [f32], &'a mut [f32]);

impl SimdOp for Exp2<'_> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        for (x, y) in self.0.chunks_exact(S::LANES).zip(self.1.chunks_exact_mut(S::LANES)) {
            s.store(math::exp2_nonpositive(s, s.load(x)), y);
        }
    }
}

/// Distance in ULPs of the exact value's binade.
fn ulp_error(got: f32, exact: f64) -> f64 {
    let exponent = exact.abs().log2().floor().max(-126.0);
    (f64::from(got) - exact).abs() / (exponent - 23.0).exp2()
}

fn worst(bits: impl Iterator<Item = u32>) -> Vec<(String, f64, f32)> {
    let xs: Vec<f32> = bits.map(f32::from_bits).collect();
    let mut padded = xs.clone();
    padded.resize(xs.len().next_multiple_of(16), 0.0);
    Isa::available()
        .into_iter()
        .map(|isa| {
            let mut ys = vec![0.0; padded.len()];
            isa.dispatch(Exp2(&padded, &mut ys));
            let mut worst = (0.0, 0.0);
            for (&x, &y) in padded.iter().zip(&ys) {
                let e = ulp_error(y, f64::from(x).exp2());
                if e > worst.0 && x >= -126.0 {
                    worst = (e, x);
                }
                assert!(x >= -126.0 || (0.0..=2f32.powi(-126)).contains(&y), "{isa:?} 2^{x} = {y}");
            }
            (isa.kind().to_string(), worst.0, worst.1)
        })
        .collect()
}

#[test]
fn dense_sample() {
    let zero = (-0.0f32).to_bits();
    let end = f32::NEG_INFINITY.to_bits();
    for (isa, e, x) in worst((zero..=end).step_by(997)) {
        println!("{isa}: {e:.3} ULP at {x}");
        assert!(e <= 2.1, "{isa}: {e} ULP at {x:e}");
    }
}
