//! Loads that widen, over every 16-bit pattern and every byte, against the definitions of the formats.

use qkv_simd::{Isa, IsaKind, Simd, SimdOp};

/// Which load.
#[derive(Clone, Copy, Debug)]
enum Format {
    F16,
    Bf16,
    I8,
}

/// Widens all of `from`, whose length is a multiple of every vector's.
struct Widen<'a> {
    format: Format,
    from: &'a [u16],
}

impl SimdOp for Widen<'_> {
    type Output = Vec<f32>;
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) -> Vec<f32> {
        let mut out = vec![0.0; self.from.len()];
        let bytes: Vec<i8> = self.from.iter().map(|&x| x.cast_signed() as i8).collect();
        for at in (0..self.from.len()).step_by(S::LANES) {
            // SAFETY: `LANES` values lie from `at` on.
            let x = unsafe {
                match self.format {
                    Format::F16 => s.load_f16(self.from[at..].as_ptr()),
                    Format::Bf16 => s.load_bf16(self.from[at..].as_ptr()),
                    Format::I8 => s.load_i8(bytes[at..].as_ptr()),
                }
            };
            s.store(x, &mut out[at..]);
        }
        out
    }
}

/// IEEE binary16 by its definition, in f64.
fn f16(bits: u16) -> f64 {
    let sign = if bits >> 15 == 1 { -1.0 } else { 1.0 };
    let (exponent, mantissa) = (i32::from(bits >> 10 & 31), f64::from(bits & 1023));
    sign * match exponent {
        0 => mantissa * 2f64.powi(-24),
        31 if mantissa == 0.0 => f64::INFINITY,
        31 => f64::NAN,
        _ => (1.0 + mantissa / 1024.0) * 2f64.powi(exponent - 15),
    }
}

#[test]
fn every_pattern_widens_exactly() {
    let all: Vec<u16> = (0..=u16::MAX).collect();
    for isa in Isa::available() {
        for format in [Format::F16, Format::Bf16, Format::I8] {
            let got = isa.dispatch(Widen { format, from: &all });
            for (&bits, &got) in all.iter().zip(&got) {
                let want = match format {
                    Format::F16 => f16(bits),
                    Format::Bf16 => f64::from(f32::from_bits(u32::from(bits) << 16)),
                    Format::I8 => f64::from(bits.cast_signed() as i8),
                };
                let same = if want.is_nan() {
                    got.is_nan()
                } else {
                    f64::from(got) == want && got.is_sign_negative() == want.is_sign_negative()
                };
                assert!(same, "{format:?} {bits:#06x} on {}: {got} instead of {want}", isa.kind().name());
            }
        }
    }
    assert!(Isa::available().iter().any(|isa| isa.kind() == IsaKind::Portable));
}
