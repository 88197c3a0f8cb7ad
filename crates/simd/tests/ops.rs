//! Every operation of [`Simd`] on registers, on every instruction set of this machine, against scalar code: lane by
//! lane, bit by bit, with the zeros of both signs, infinities, NaN and subnormals among the operands.
//!
//! The operations on memory are in `memory.rs`.

use std::marker::PhantomData;

use proptest::prelude::*;
use qkv_simd::{Isa, IsaKind, Simd, SimdOp, math::BIASED_ZERO};

/// An operation in both worlds; operands that it does not use are ignored. Masks come out as 1 and 0.
trait Operation {
    const NAME: &'static str;
    fn vector<S: Simd>(s: S, a: S::F32, b: S::F32, c: S::F32) -> S::F32;
    fn scalar(a: f32, b: f32, c: f32) -> f32;
}

/// Defines an [`Operation`] from its two formulas.
macro_rules! operation {
    ($name:ident: |$s:ident, $a:ident, $b:ident, $c:ident| $vector:expr, $scalar:expr) => {
        struct $name;
        impl Operation for $name {
            const NAME: &'static str = stringify!($name);
            #[inline(always)]
            fn vector<S: Simd>($s: S, $a: S::F32, $b: S::F32, $c: S::F32) -> S::F32 {
                let _ = ($a, $b, $c);
                $vector
            }
            fn scalar($a: f32, $b: f32, $c: f32) -> f32 {
                let _ = ($a, $b, $c);
                $scalar
            }
        }
    };
}

/// 1 for true, 0 for false.
fn truth(x: bool) -> f32 {
    if x { 1.0 } else { 0.0 }
}

/// The 32 bits from bit `n` on of the 64 in `high` and `low`.
fn funnelled(low: f32, high: f32, n: u32) -> f32 {
    let both = u64::from(high.to_bits()) << 32 | u64::from(low.to_bits());
    f32::from_bits((both >> n) as u32)
}

/// The same of a mask.
#[inline(always)]
fn shown<S: Simd>(s: S, mask: S::Mask) -> S::F32 {
    s.select(mask, s.splat(1.0), s.zero())
}

operation!(Add: |s, a, b, c| s.add(a, b), a + b);
operation!(Sub: |s, a, b, c| s.sub(a, b), a - b);
operation!(Mul: |s, a, b, c| s.mul(a, b), a * b);
operation!(Div: |s, a, b, c| s.div(a, b), a / b);
operation!(Max: |s, a, b, c| s.max(a, b), if a > b { a } else { b });
operation!(Min: |s, a, b, c| s.min(a, b), if a < b { a } else { b });
operation!(Abs: |s, a, b, c| s.abs(a), a.abs());
operation!(Copysign: |s, a, b, c| s.copysign(a, b), a.copysign(b));
operation!(Lt: |s, a, b, c| shown(s, s.lt(a, b)), truth(a < b));
operation!(Le: |s, a, b, c| shown(s, s.le(a, b)), truth(a <= b));
operation!(Eq: |s, a, b, c| shown(s, s.eq(a, b)), truth(a == b));
operation!(And: |s, a, b, c| shown(s, s.and(s.lt(a, b), s.le(b, c))), truth(a < b && b <= c));
operation!(Or: |s, a, b, c| shown(s, s.or(s.lt(a, b), s.eq(b, c))), truth(a < b || b == c));
operation!(Select: |s, a, b, c| s.select(s.lt(a, s.splat(1.0)), b, c), if a < 1.0 { b } else { c });
operation!(LowestBit: |s, a, b, c| shown(s, s.test_bit(a, 0)), truth(a.to_bits() & 1 == 1));
operation!(MiddleBit: |s, a, b, c| shown(s, s.test_bit(a, 21)), truth(a.to_bits() >> 21 & 1 == 1));
operation!(SignBit: |s, a, b, c| shown(s, s.test_bit(a, 31)), truth(a.to_bits() >> 31 == 1));
operation!(FunnelByNothing: |s, a, b, c| s.funnel_right(a, b, 0), a);
operation!(FunnelBy13: |s, a, b, c| s.funnel_right(a, b, 13), funnelled(a, b, 13));
operation!(FunnelBy31: |s, a, b, c| s.funnel_right(a, b, 31), funnelled(a, b, 31));
operation!(Zero: |s, a, b, c| s.zero(), 0.0);
operation!(Splat: |s, a, b, c| s.splat(-1.25e-3), -1.25e-3);
operation!(FusedMulAdd: |s, a, b, c| s.mul_add(a, b, c), a.mul_add(b, c));
operation!(SeparateMulAdd: |s, a, b, c| s.mul_add(a, b, c), a * b + c);

/// Runs an operation over three slices of one length, a multiple of every vector's.
struct Map<'a, O> {
    operands: [&'a [f32]; 3],
    out: &'a mut [f32],
    operation: PhantomData<O>,
}

impl<O: Operation> SimdOp for Map<'_, O> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let [a, b, c] = self.operands;
        for i in (0..self.out.len()).step_by(S::LANES) {
            let value = O::vector(s, s.load(&a[i..]), s.load(&b[i..]), s.load(&c[i..]));
            s.store(value, &mut self.out[i..]);
        }
    }
}

/// Equal to the bit; any NaN is as good as another where `any_nan`.
fn same(x: f32, y: f32, any_nan: bool) -> bool {
    x.to_bits() == y.to_bits() || (any_nan && x.is_nan() && y.is_nan())
}

/// Where an operation on this instruction set differs from the scalar formula, over these triples.
fn difference<O: Operation>(isa: Isa, triples: &[[f32; 3]], any_nan: bool) -> Option<String> {
    let length = triples.len().next_multiple_of(64);
    let column = |k: usize| {
        let mut values: Vec<f32> = triples.iter().map(|t| t[k]).collect();
        values.resize(length, 0.5);
        values
    };
    let (a, b, c) = (column(0), column(1), column(2));
    let mut out = vec![f32::NAN; length];
    isa.dispatch(Map::<O> { operands: [&a, &b, &c], out: &mut out, operation: PhantomData });
    triples.iter().zip(&out).find_map(|(&[a, b, c], &got)| {
        let want = O::scalar(a, b, c);
        let text = || format!("{} of {a:e}, {b:e}, {c:e} on {}: {got:e}, not {want:e}", O::NAME, isa.kind());
        (!same(got, want, any_nan)).then(text)
    })
}

/// The first difference of any operation on any instruction set of this machine.
fn differences(triples: &[[f32; 3]]) -> Option<String> {
    Isa::available().into_iter().find_map(|isa| {
        // What an operation computes may be any NaN; what it passes on is the operand itself.
        let computed = difference::<Add>(isa, triples, true)
            .or_else(|| difference::<Sub>(isa, triples, true))
            .or_else(|| difference::<Mul>(isa, triples, true))
            .or_else(|| difference::<Div>(isa, triples, true));
        let chosen = || {
            difference::<Max>(isa, triples, false)
                .or_else(|| difference::<Min>(isa, triples, false))
                .or_else(|| difference::<Abs>(isa, triples, false))
                .or_else(|| difference::<Copysign>(isa, triples, false))
                .or_else(|| difference::<Select>(isa, triples, false))
                .or_else(|| difference::<Zero>(isa, triples, false))
                .or_else(|| difference::<Splat>(isa, triples, false))
        };
        let masks = || {
            difference::<Lt>(isa, triples, false)
                .or_else(|| difference::<Le>(isa, triples, false))
                .or_else(|| difference::<Eq>(isa, triples, false))
                .or_else(|| difference::<And>(isa, triples, false))
                .or_else(|| difference::<Or>(isa, triples, false))
                .or_else(|| difference::<LowestBit>(isa, triples, false))
                .or_else(|| difference::<MiddleBit>(isa, triples, false))
                .or_else(|| difference::<FunnelByNothing>(isa, triples, false))
                .or_else(|| difference::<FunnelBy13>(isa, triples, false))
                .or_else(|| difference::<FunnelBy31>(isa, triples, false))
                .or_else(|| difference::<SignBit>(isa, triples, false))
        };
        // Fused everywhere, except that the portable one may round twice (but not now so, now so).
        let fused = || {
            let fused = difference::<FusedMulAdd>(isa, triples, true)?;
            let separate = difference::<SeparateMulAdd>(isa, triples, true);
            if isa.kind() == IsaKind::Portable { separate } else { Some(fused) }
        };
        computed.or_else(chosen).or_else(masks).or_else(fused)
    })
}

/// Operands at which rules change.
const SPECIAL: [f32; 22] = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    f32::INFINITY,
    f32::NEG_INFINITY,
    f32::NAN,
    -f32::NAN,
    f32::from_bits(0x7FC1_2345), // A NaN with a payload, to tell operands apart.
    f32::MIN_POSITIVE,
    -f32::MIN_POSITIVE,
    f32::from_bits(1), // The smallest subnormal.
    -f32::from_bits(1),
    f32::from_bits(0x007F_FFFF), // The largest.
    f32::MAX,
    f32::MIN,
    f32::EPSILON,
    1.0 + f32::EPSILON,
    0.333_333_34,
    -2.5,
    16_777_217.0,
    BIASED_ZERO,
];

#[test]
fn special_operands() {
    let mut triples = Vec::new();
    for a in SPECIAL {
        for b in SPECIAL {
            triples.extend(SPECIAL.map(|c| [a, b, c]));
        }
    }
    assert_eq!(differences(&triples), None);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Any bit patterns.
    #[test]
    fn any_operands(bits in prop::collection::vec(any::<[u32; 3]>(), 1..100)) {
        // Signalling NaN are left out: scalar code may quieten them when it only passes them on.
        let quiet = |bits: u32| {
            let x = f32::from_bits(bits);
            if x.is_nan() { f32::from_bits(bits | 0x0040_0000) } else { x }
        };
        let triples: Vec<[f32; 3]> = bits.into_iter().map(|t| t.map(quiet)).collect();
        prop_assert_eq!(differences(&triples), None);
    }

    /// Operands of one size, where sums cancel and comparisons are close.
    #[test]
    fn similar_operands(triples in prop::collection::vec(prop::array::uniform3(-2.0f32..2.0), 1..100)) {
        prop_assert_eq!(differences(&triples), None);
    }
}

/// Hands the lanes of a few vectors to a test written in scalar code.
fn lanes<S: Simd>(s: S, x: S::F32) -> Vec<f32> {
    let mut out = vec![0.0; S::LANES];
    s.store(x, &mut out);
    out
}

/// Constants and the shape of a vector.
struct Shape;

impl SimdOp for Shape {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        assert!(S::LANES.is_power_of_two() && S::LANES <= 16);
        assert!([16, 32].contains(&S::REGISTERS));
        assert_eq!(size_of::<S>(), 0, "tokens cost nothing");
        assert_eq!(size_of::<S::F32>(), S::LANES * size_of::<f32>());
        let expected: Vec<f32> = (0..S::LANES).map(|i| i as f32).collect();
        assert_eq!(lanes(s, s.iota()), expected);
    }
}

#[test]
fn shape() {
    for isa in Isa::available() {
        isa.dispatch(Shape);
        let lanes = match isa.kind() {
            IsaKind::Avx512 => 16,
            IsaKind::Avx2 => 8,
            _ => 4,
        };
        assert_eq!(isa.lanes(), lanes, "{}", isa.kind());
    }
}

/// Every power of two that the reduction can ask for, each in every lane.
struct Powers;

impl SimdOp for Powers {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        for n in -127i16..=128 {
            let want = match n {
                -127 => 0.0,
                128 => f32::INFINITY,
                _ => f32::from_bits(u32::from((n + 127).unsigned_abs()) << 23),
            };
            let biased = s.add(s.splat(f32::from(n)), s.splat(BIASED_ZERO));
            for got in lanes(s, s.pow2_of_biased(biased)) {
                assert_eq!(got.to_bits(), want.to_bits(), "2^{n} on {}", S::KIND);
            }
        }
        // Lanes with different powers, and the rounding of the sum to the nearest whole number.
        let biased = s.add(s.mul(s.iota(), s.splat(-3.37)), s.splat(BIASED_ZERO));
        for (i, got) in lanes(s, s.pow2_of_biased(biased)).into_iter().enumerate() {
            assert_eq!(got, (-3.37 * i as f32).round().exp2());
        }
    }
}

#[test]
fn powers_of_two() {
    Isa::available().into_iter().for_each(|isa| isa.dispatch(Powers));
}

/// Every pattern of a mask, as bits and back through a selection.
struct Bits;

impl SimdOp for Bits {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        for pattern in 0..1u32 << S::LANES {
            let values: Vec<f32> = (0..S::LANES).map(|i| truth(pattern >> i & 1 == 1)).collect();
            let mask = s.lt(s.zero(), s.load(&values));
            assert_eq!(s.bits(mask), pattern, "on {}", S::KIND);
            assert_eq!(lanes(s, shown(s, mask)), values);
            let all = s.eq(s.zero(), s.zero());
            assert_eq!(s.bits(s.and(mask, all)), pattern);
            assert_eq!(s.bits(s.or(mask, all)).count_ones() as usize, S::LANES);
        }
    }
}

#[test]
fn bits_of_masks() {
    Isa::available().into_iter().for_each(|isa| isa.dispatch(Bits));
}

/// The sum by halves, as documented: the upper half is added to the lower until one is left.
fn sum_by_halves(values: &[f32]) -> f32 {
    let mut values = values.to_vec();
    while values.len() > 1 {
        let (low, high) = values.split_at(values.len() / 2);
        values = low.iter().zip(high).map(|(a, b)| a + b).collect();
    }
    values[0]
}

/// Sums and maxima of sixteen values, as many as there are lanes at a time.
struct Reduce<'a>(&'a [f32]);

impl SimdOp for Reduce<'_> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        for values in self.0.chunks_exact(S::LANES) {
            let x = s.load(values);
            let sum = s.reduce_add(x);
            assert!(same(sum, sum_by_halves(values), true), "sum of {values:?} on {}: {sum:e}", S::KIND);
            if values.iter().any(|x| x.is_nan()) {
                continue;
            }
            let max = s.reduce_max(x);
            let want = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!(max, want, "maximum of {values:?} on {}", S::KIND);
        }
    }
}

#[test]
fn reductions() {
    for isa in Isa::available() {
        // The extreme value in each lane, among values whose sum depends on the order.
        for lane in 0..16 {
            for extreme in [3e9, -3e9, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 0.0] {
                let mut values: Vec<f32> = (0..16).map(|i| 0.1 + 1e3 * (i % 5) as f32 - 1.7e3).collect();
                values[lane] = extreme;
                isa.dispatch(Reduce(&values));
            }
        }
        isa.dispatch(Reduce(&[f32::NEG_INFINITY; 16]));
        isa.dispatch(Reduce(&[-0.0; 16]));
    }
}

/// The sums of several rows at a time: right, and each to the bit what it is in any other company.
struct ReduceEach<'a>(&'a [f32]);

impl SimdOp for ReduceEach<'_> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let rows: Vec<S::F32> = self.0.chunks_exact(S::LANES).map(|row| s.load(row)).collect();
        let alone: Vec<f32> = rows.iter().map(|row| lanes(s, s.reduce_each(&[*row]))[0]).collect();
        for (values, &got) in self.0.chunks_exact(S::LANES).zip(&alone) {
            let exact: f64 = values.iter().map(|&x| f64::from(x)).sum();
            let size: f64 = values.iter().map(|&x| f64::from(x).abs()).sum();
            let error = (f64::from(got) - exact).abs();
            assert!(error <= size * 1e-6, "{values:?} on {}: {got:e}, not {exact:e}", S::KIND);
        }
        for count in [1, 4, 8, S::LANES] {
            for (group, want) in rows.chunks_exact(count).zip(alone.chunks_exact(count)) {
                let got = lanes(s, s.reduce_each(group));
                let used = count.min(S::LANES);
                assert_eq!(got[..used], want[..used], "{count} rows on {}", S::KIND);
            }
        }
    }
}

#[test]
fn sums_of_several_rows() {
    for isa in Isa::available() {
        let values: Vec<f32> = (0..16 * 16).map(|i| ((i * 7919) % 1013) as f32 * 0.37 - 150.0).collect();
        isa.dispatch(ReduceEach(&values));
    }
}

/// Lanes from anywhere, by their numbers modulo the number of lanes.
struct Permute<'a>(&'a [f32], &'a [u32; 16]);

impl SimdOp for Permute<'_> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let got = lanes(s, s.permute(s.load(self.0), self.1));
        let want: Vec<f32> =
            self.1[..S::LANES].iter().map(|&from| self.0[from as usize % S::LANES]).collect();
        assert_eq!(got[..S::LANES], want[..], "{:?} on {}", self.1, S::KIND);
    }
}

#[test]
fn permutations() {
    for isa in Isa::available() {
        let values: Vec<f32> = (0..16).map(|i| i as f32 * 1.5 - 7.0).collect();
        for step in 0..32u32 {
            for factor in [0, 1, 3, 31] {
                isa.dispatch(Permute(&values, &core::array::from_fn(|i| i as u32 * factor + step)));
            }
        }
    }
}
