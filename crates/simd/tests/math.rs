//! The elementary functions of [`qkv_simd::math`] against float64, on every instruction set of this machine.
//!
//! The normal run takes a dense sample of the whole float line (all signs, subnormals, infinities, NaN) with more of it
//! where the functions are not flat; `every_float`, ignored, takes all 2^32 bit patterns:
//!
//! ```text
//! cargo test --release -p qkv-simd --test math -- --ignored --nocapture
//! ```
//!
//! The error is counted in units of the last place that a float32 of the exact value's size has (2^-149 for subnormal
//! ones). Oracles: the standard library's f64 exp2, exp and tanh, `libm`'s f64 erf; each within 1e-8 of such a unit.

use std::ops::RangeInclusive;

use qkv_simd::{Isa, IsaKind, Simd, SimdOp, math};

/// The functions under test.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Function {
    Exp2Nonpositive,
    Exp,
    Tanh,
    Erf,
}

const FUNCTIONS: [Function; 4] = [Function::Exp2Nonpositive, Function::Exp, Function::Tanh, Function::Erf];

impl Function {
    fn exact(self, x: f64) -> f64 {
        match self {
            Function::Exp2Nonpositive => x.exp2(),
            Function::Exp => x.exp(),
            Function::Tanh => x.tanh(),
            Function::Erf => libm::erf(x),
        }
    }

    /// The largest error that the documentation allows, in ULPs.
    fn allowed(self, kind: IsaKind) -> f64 {
        let (fused, separate) = match self {
            Function::Exp2Nonpositive => (0.80, 1.08),
            Function::Exp => (0.9, 1.2),
            Function::Tanh => (2.3, 2.5),
            Function::Erf => (2.2, 2.5),
        };
        if kind == IsaKind::Portable { separate } else { fused }
    }

    /// Whether the documentation says anything about this argument.
    fn defined(self, x: f32) -> bool {
        self != Function::Exp2Nonpositive || x.is_nan() || x <= 127.0
    }

    /// The error of `y` in ULPs of the exact value; infinite where `y` breaks a rule that no distance can mend.
    fn error(self, x: f32, y: f32, exact: f64) -> f64 {
        if x.is_nan() || y.is_nan() {
            return if x.is_nan() && y.is_nan() { 0.0 } else { f64::INFINITY };
        }
        let lawful = match self {
            // Below -126 the result may be flushed.
            Function::Exp2Nonpositive if x < -126.0 => {
                let inside = (0.0..=f32::MIN_POSITIVE).contains(&y) && y.is_sign_positive();
                return if inside { 0.0 } else { f64::INFINITY };
            }
            Function::Exp2Nonpositive | Function::Exp => y.is_sign_positive() && (x != 0.0 || y == 1.0),
            Function::Tanh => odd(x, y) && (x.abs() < 9.02 || y.abs() == 1.0),
            Function::Erf => odd(x, y) && (x.abs() < 3.93 || y.abs() == 1.0),
        };
        if lawful { ulps(y, exact) } else { f64::INFINITY }
    }
}

/// The sign is that of the argument, zeros too, and nothing lies beyond 1.
fn odd(x: f32, y: f32) -> bool {
    x.is_sign_negative() == y.is_sign_negative() && y.abs() <= 1.0 && (x != 0.0 || y == 0.0)
}

/// The distance of `y` from `exact` in ULPs of the latter's size. An infinite `y` counts as 2^128, the value that would
/// come next, and an exact value from there on asks for infinity.
fn ulps(y: f32, exact: f64) -> f64 {
    const NEXT: f64 = f32::MAX as f64 * (1.0 + 1.0 / 16_777_215.0);
    if exact >= NEXT {
        return if y == f32::INFINITY { 0.0 } else { f64::INFINITY };
    }
    let exponent = (((exact.to_bits() >> 52) & 0x7FF) as i32 - 1023).max(-126);
    let y = if y == f32::INFINITY { NEXT } else { f64::from(y) };
    (y - exact).abs() * f64::from_bits(((1023 + 23 - exponent) as u64) << 52)
}

/// Fills the second slice with the function's values of the first; lengths are a multiple of every vector's.
struct Apply<'a>(Function, &'a [f32], &'a mut [f32]);

impl SimdOp for Apply<'_> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        // Plain loops: a closure that `for_each` calls might be compiled without the instruction set's features.
        macro_rules! each {
            ($function:path) => {
                for (x, y) in self.1.chunks_exact(S::LANES).zip(self.2.chunks_exact_mut(S::LANES)) {
                    s.store($function(s, s.load(x)), y);
                }
            };
        }
        match self.0 {
            Function::Exp2Nonpositive => each!(math::exp2_nonpositive),
            Function::Exp => each!(math::exp),
            Function::Tanh => each!(math::tanh),
            Function::Erf => each!(math::erf),
        }
    }
}

/// The values of `function` at `xs`, whatever their number.
fn values(isa: Isa, function: Function, xs: &[f32]) -> Vec<f32> {
    let mut padded = xs.to_vec();
    padded.resize(xs.len().next_multiple_of(64), 0.0);
    let mut ys = vec![0.0; padded.len()];
    isa.dispatch(Apply(function, &padded, &mut ys));
    ys.truncate(xs.len());
    ys
}

/// The worst error so far, and where.
#[derive(Clone, Copy, Debug)]
struct Worst {
    error: f64,
    at: f32,
    value: f32,
}

impl Worst {
    const NONE: Worst = Worst { error: -1.0, at: 0.0, value: 0.0 };

    fn or(self, other: Worst) -> Worst {
        if other.error > self.error { other } else { self }
    }
}

/// The worst error over these arguments, for each instruction set in the order of [`Isa::available`].
fn measure(function: Function, xs: &[f32]) -> Vec<Worst> {
    let exact: Vec<f64> = xs.iter().map(|&x| function.exact(f64::from(x))).collect();
    Isa::available()
        .into_iter()
        .map(|isa| {
            let ys = values(isa, function, xs);
            let mut worst = Worst::NONE;
            for ((&at, &value), &exact) in xs.iter().zip(&ys).zip(&exact) {
                if function.defined(at) {
                    worst = worst.or(Worst { error: function.error(at, value, exact), at, value });
                }
            }
            worst
        })
        .collect()
}

/// Prints one line per instruction set and tells where the documentation promises more.
fn judge(function: Function, worst: &[Worst]) -> Result<(), String> {
    for (isa, w) in Isa::available().into_iter().zip(worst) {
        println!("{function:?} on {}: {:.4} ULP at {:e} (gives {:e})", isa.kind(), w.error, w.at, w.value);
    }
    for (isa, w) in Isa::available().into_iter().zip(worst) {
        let allowed = function.allowed(isa.kind());
        if w.error > allowed {
            return Err(format!("{function:?} on {}: {w:?}, allowed are {allowed} ULP", isa.kind()));
        }
    }
    Ok(())
}

/// Every `step`th float between two magnitudes, of both signs.
fn sample(magnitudes: RangeInclusive<f32>, step: usize) -> impl Iterator<Item = f32> {
    (magnitudes.start().to_bits()..=magnitudes.end().to_bits())
        .step_by(step)
        .flat_map(|bits| [f32::from_bits(bits), -f32::from_bits(bits)])
}

/// A dense sample: the whole line, and more of the stretch where the functions rise.
fn dense(function: Function) {
    let mut xs: Vec<f32> = (0..=u32::MAX).step_by(10_007).map(f32::from_bits).collect();
    let rise = match function {
        Function::Exp2Nonpositive => 0.25..=127.0,
        Function::Exp => 0.1..=104.5,
        Function::Tanh => 0.03..=9.1,
        Function::Erf => 0.02..=4.0,
    };
    xs.extend(sample(rise, 173));
    let special =
        [0.0, 1e-45, f32::MIN_POSITIVE, f32::EPSILON, 0.5, 1.0, 1.5, f32::MAX, f32::INFINITY, f32::NAN];
    xs.extend(special.into_iter().flat_map(|x| [x, -x]));
    judge(function, &measure(function, &xs)).unwrap();
}

#[test]
fn exp2_nonpositive_of_a_dense_sample() {
    dense(Function::Exp2Nonpositive);
}

#[test]
fn exp_of_a_dense_sample() {
    dense(Function::Exp);
}

#[test]
fn tanh_of_a_dense_sample() {
    dense(Function::Tanh);
}

#[test]
fn erf_of_a_dense_sample() {
    dense(Function::Erf);
}

/// The arguments that the documentation names, with the values that it gives, bit by bit.
#[test]
fn edges() {
    let inf = f32::INFINITY;
    let largest = 88.722_83; // The largest argument whose exponential is finite.
    let smallest = -103.972_08; // The smallest whose exponential is not rounded to 0.
    for isa in Isa::available() {
        let check = |function, points: &[(f32, f32)]| {
            let (xs, want): (Vec<f32>, Vec<f32>) = points.iter().copied().unzip();
            let got = values(isa, function, &xs);
            for i in 0..xs.len() {
                let (got, want) = (got[i], want[i]);
                let same = got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan());
                assert!(same, "{function:?}({}) on {}: {got:e}, expected {want:e}", xs[i], isa.kind());
            }
        };
        let nan = f32::NAN;
        let powers = (-126..=0).map(|n| (n as f32, (n as f64).exp2() as f32));
        check(Function::Exp2Nonpositive, &powers.collect::<Vec<_>>());
        check(
            Function::Exp2Nonpositive,
            &[(-0.0, 1.0), (-1e-45, 1.0), (-127.0, 0.0), (-1e38, 0.0), (-inf, 0.0), (nan, nan), (-nan, nan)],
        );
        check(Function::Exp, &[(0.0, 1.0), (-0.0, 1.0), (1e-45, 1.0), (nan, nan), (-nan, nan)]);
        check(Function::Exp, &[(inf, inf), (f32::MAX, inf), (f32::next_up(largest), inf), (89.5, inf)]);
        check(Function::Exp, &[(-inf, 0.0), (f32::MIN, 0.0), (f32::next_down(smallest), 0.0), (-150.0, 0.0)]);
        check(Function::Exp, &[(smallest, 1e-45)]);
        assert!(values(isa, Function::Exp, &[largest])[0].is_finite());
        for function in [Function::Tanh, Function::Erf] {
            check(function, &[(0.0, 0.0), (-0.0, -0.0), (inf, 1.0), (-inf, -1.0), (nan, nan), (-nan, nan)]);
            check(function, &[(9.02, 1.0), (-9.02, -1.0), (f32::MAX, 1.0), (f32::MIN, -1.0), (12.0, 1.0)]);
        }
    }
}

/// What the functions give does not depend on which lane an argument is in or on its neighbours.
#[test]
fn lanes_are_independent() {
    let xs: Vec<f32> = (0..64).map(|i| -0.37 * i as f32).chain([f32::NAN; 16]).collect();
    for isa in Isa::available() {
        for function in FUNCTIONS {
            let together = values(isa, function, &xs);
            for (i, &x) in xs.iter().enumerate() {
                let alone = values(isa, function, &[x])[0];
                let same = alone.to_bits() == together[i].to_bits() || alone.is_nan() && together[i].is_nan();
                assert!(
                    same,
                    "{function:?}({x}) on {}: {alone:e} alone, {:e} at {i}",
                    isa.kind(),
                    together[i]
                );
            }
        }
    }
}

/// Every bit pattern, on two threads; minutes.
#[test]
#[ignore = "takes minutes: all 2^32 arguments of four functions"]
fn every_float() {
    const BLOCK: u32 = 1 << 20;
    let verdicts = FUNCTIONS.map(|function| {
        let half = |blocks: std::ops::Range<u32>| {
            let mut worst = vec![Worst::NONE; Isa::available().len()];
            for block in blocks {
                let first = block * BLOCK;
                let xs: Vec<f32> = (first..=first + (BLOCK - 1)).map(f32::from_bits).collect();
                for (total, part) in worst.iter_mut().zip(measure(function, &xs)) {
                    *total = total.or(part);
                }
            }
            worst
        };
        // Odd functions rest on their sign bit alone, but the test does not trust that.
        let (low, high) = std::thread::scope(|scope| {
            let low = scope.spawn(|| half(0..2048));
            let high = half(2048..4096);
            (low.join().expect("the first half's thread"), high)
        });
        let worst: Vec<Worst> = low.into_iter().zip(high).map(|(a, b)| a.or(b)).collect();
        judge(function, &worst)
    });
    assert_eq!(verdicts, FUNCTIONS.map(|_| Ok(())));
}

/// 2^(c x) over a sample of scores' distances, on one instruction set.
struct Scaled<'a>(f32, &'a [f32], &'a mut [f32]);

impl SimdOp for Scaled<'_> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let power = math::ScaledExp2::new(s, self.0);
        for (x, y) in self.1.chunks_exact(S::LANES).zip(self.2.chunks_exact_mut(S::LANES)) {
            s.store(power.of(s, s.load(x)), y);
        }
    }
}

#[test]
fn scaled_exp2_of_a_sample() {
    for factor in [std::f32::consts::LOG2_E, 1.0, 2.884_2, 0.013, 977.5] {
        let mut xs: Vec<f32> = (0..160_000).map(|i| -(i as f32) * 1.000_1 / 1250.0 / factor).collect();
        xs.extend([0.0, -0.0, -1e-45, -1e38, f32::MIN, f32::NEG_INFINITY, f32::NAN, -f32::NAN]);
        xs.resize(xs.len().next_multiple_of(16), 0.0);
        for isa in Isa::available() {
            let mut ys = vec![0.0; xs.len()];
            isa.dispatch(Scaled(factor, &xs, &mut ys));
            for (&x, &y) in xs.iter().zip(&ys) {
                let exponent = f64::from(factor) * f64::from(x);
                // Where a multiply-add rounds twice, the product is off by half an ULP of its own.
                let rounded = if isa.kind() == IsaKind::Portable { exponent.abs() * 0.7 } else { 0.0 };
                let right = match exponent {
                    _ if x.is_nan() => y.is_nan(),
                    0.0 => y == 1.0,
                    ..-126.0 => (0.0..=f32::MIN_POSITIVE).contains(&y),
                    _ => ulps(y, exponent.exp2()) <= 1.1 + rounded,
                };
                assert!(right, "2^({factor} x {x}) on {}: {y:e}", isa.kind());
            }
        }
    }
}
