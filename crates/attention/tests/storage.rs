//! Storage types of queries, keys, values and outputs, for few query rows and for tiles, in one part of keys and in
//! several: against the f64 oracle on the widened values, which are exact there.

mod common;

use std::cell::RefCell;

use common::problem::{Problem, problems};
use common::{assert_close, random};
use half::{bf16, f16};
use proptest::prelude::*;
use qkv_attention::{
    AttentionSpec, Bias, Broadcast, Causal, Data, Int8Ref, Outputs, Tensor, TensorRef, Window,
    attention_into, attention_with_lse, reference,
};

/// How a tensor is stored.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    F32,
    F16,
    Bf16,
    /// One scale per row, or one per group of at most 32 dims; zero points or none.
    Int8 {
        grouped: bool,
        zeros: bool,
    },
}

const KINDS: [Kind; 7] = [
    Kind::F32,
    Kind::F16,
    Kind::Bf16,
    Kind::Int8 { grouped: false, zeros: false },
    Kind::Int8 { grouped: true, zeros: false },
    Kind::Int8 { grouped: false, zeros: true },
    Kind::Int8 { grouped: true, zeros: true },
];

/// Where rows lie: 0: contiguous; 1: (batch, length, heads, dim); 2: that, with a gap after each row and before the first.
fn strides([batch, heads, length, dim]: [usize; 4], layout: usize) -> (usize, [isize; 4], usize) {
    let (offset, row) = if layout == 2 { (3, dim + 5) } else { (0, dim) };
    let [h, s] = if layout == 0 { [length * row, row] } else { [row, heads * row] };
    let b = heads * length * row;
    (offset, [b as isize, h as isize, s as isize, 1], offset + batch * b)
}

fn lay<T: Copy>(shape: [usize; 4], layout: usize, gap: T, mut value: impl FnMut([usize; 4]) -> T) -> Vec<T> {
    let (offset, [b, h, s, _], size) = strides(shape, layout);
    let mut data = vec![gap; size];
    for i in 0..shape.iter().product::<usize>() {
        let d = i % shape[3];
        let (row, at) = (i / shape[3], i / shape[3] / shape[2]);
        let [batch, head, position] = [at / shape[1], at % shape[1], row % shape[2]];
        let to = batch as isize * b + head as isize * h + position as isize * s;
        data[offset + to as usize + d] = value([batch, head, position, d]);
    }
    data
}

fn seen<T>(data: &[T], shape: [usize; 4], layout: usize) -> TensorRef<'_, T> {
    let (offset, strides, _) = strides(shape, layout);
    TensorRef::from_slice_strided(data, offset, shape, strides).unwrap()
}

/// A tensor as it is stored, and widened.
struct Stored {
    shape: [usize; 4],
    layout: usize,
    kind: Kind,
    groups: usize,
    wide: Tensor,
    f32s: Vec<f32>,
    f16s: Vec<f16>,
    bf16s: Vec<bf16>,
    bytes: Vec<i8>,
    scales: Vec<f32>,
    zeros: Vec<f32>,
}

impl Stored {
    fn new(from: &Tensor, kind: Kind, layout: usize) -> Self {
        let shape @ [batch, heads, length, dim] = from.shape();
        let size = [32, 16, 8, 4, 2, 1].into_iter().find(|size| dim % size == 0).unwrap();
        let groups = if matches!(kind, Kind::Int8 { grouped: true, .. }) { dim / size } else { 1 };
        let beside = [batch, heads, length, groups];
        let at = |[b, h, s, d]: [usize; 4]| from.view().row(b, h, s)[d];
        let byte = |index| (at(index) * 127.0) as i8;
        let [scale_of, zero_of] = [random(beside, 77), random(beside, 78)];
        let scale = |[b, h, s, d]: [usize; 4]| (1.5 + scale_of.view().row(b, h, s)[d] * 0.5) / 320.0;
        let zero = |[b, h, s, d]: [usize; 4]| zero_of.view().row(b, h, s)[d] * 30.0;
        let (mut f32s, mut f16s, mut bf16s) = (vec![], vec![], vec![]);
        let (mut bytes, mut scales, mut zeros) = (vec![], vec![], vec![]);
        match kind {
            Kind::F32 => f32s = lay(shape, layout, f32::NAN, at),
            Kind::F16 => f16s = lay(shape, layout, f16::NAN, |i| f16::from_f32(at(i))),
            Kind::Bf16 => bf16s = lay(shape, layout, bf16::NAN, |i| bf16::from_f32(at(i))),
            Kind::Int8 { zeros: with_zeros, .. } => {
                bytes = lay(shape, layout, 99, byte);
                scales = lay(beside, layout, f32::NAN, scale);
                if with_zeros {
                    zeros = lay(beside, layout, f32::NAN, zero);
                }
            }
        }
        let wide = Tensor::from_fn(shape, |index @ [b, h, s, d]| match kind {
            Kind::F32 => at(index),
            Kind::F16 => f16::from_f32(at(index)).to_f32(),
            Kind::Bf16 => bf16::from_f32(at(index)).to_f32(),
            Kind::Int8 { zeros, .. } => {
                let group = [b, h, s, d / (dim / groups)];
                scale(group) * (f32::from(byte(index)) - if zeros { zero(group) } else { 0.0 })
            }
        });
        let wide = wide.unwrap();
        Self { shape, layout, kind, groups, wide, f32s, f16s, bf16s, bytes, scales, zeros }
    }

    fn data(&self) -> Data<'_> {
        let Self { shape, layout, .. } = *self;
        match self.kind {
            Kind::F32 => seen(&self.f32s, shape, layout).into(),
            Kind::F16 => seen(&self.f16s, shape, layout).into(),
            Kind::Bf16 => seen(&self.bf16s, shape, layout).into(),
            Kind::Int8 { zeros, .. } => {
                let beside = [shape[0], shape[1], shape[2], self.groups];
                let zeros = zeros.then(|| seen(&self.zeros, beside, layout));
                let scales = seen(&self.scales, beside, layout);
                Int8Ref::new(seen(&self.bytes, shape, layout), scales, zeros).unwrap().into()
            }
        }
    }
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// Output, LSE and maxima.
fn run(q: &Stored, k: &Stored, v: &Stored, spec: &AttentionSpec<'_>) -> (Tensor, Vec<f32>, Vec<f32>) {
    let [batch, heads, length, _] = q.shape;
    let mut out = Tensor::filled([batch, heads, length, v.shape[3]], 9.0f32).unwrap();
    let (mut lse, mut maxima) = (vec![9.0; batch * heads * length], vec![9.0; batch * heads * length]);
    let outputs = Outputs::new(out.view_mut()).with_lse(&mut lse).with_maxima(&mut maxima);
    attention_into(q.data(), k.data(), v.data(), spec, outputs).unwrap();
    (out, lse, maxima)
}

/// The 16-bit outputs are the f32 output rounded once, bit for bit, wherever their rows lie.
fn check_narrow_outputs(q: &Stored, k: &Stored, v: &Stored, spec: &AttentionSpec<'_>, wide: &Tensor) {
    let shape = wide.shape();
    let exact = |x: &[f32], i: usize| (f16::from_f32(x[i]).to_bits(), bf16::from_f32(x[i]).to_bits());
    let mut half = Tensor::filled(shape, f16::ONE).unwrap();
    attention_into(q.data(), k.data(), v.data(), spec, Outputs::new(half.view_mut())).unwrap();
    let mut brain = vec![bf16::ONE; shape.iter().product()];
    let view = qkv_attention::TensorMut::from_slice_bshd(&mut brain, shape).unwrap();
    attention_into(q.data(), k.data(), v.data(), spec, Outputs::new(view)).unwrap();
    let brain = TensorRef::from_slice_bshd(&brain, shape).unwrap();
    for (i, half) in half.data().iter().enumerate() {
        let (row, d) = (i / shape[3], i % shape[3]);
        let (head, position) = (row / shape[2], row % shape[2]);
        let brain = brain.row(head / shape[1], head % shape[1], position)[d];
        assert_eq!((half.to_bits(), brain.to_bits()), exact(wide.data(), i), "{i} of {shape:?}");
    }
}

/// The largest score per row of plain attention with an alignment, in f64.
fn largest_scores(q: &Stored, k: &Stored, v: &Stored, causal: Option<Causal>) -> Vec<f64> {
    let [batch, heads, length, dim] = q.shape;
    let max = RefCell::new(vec![f64::NEG_INFINITY; batch * heads * length]);
    let offset = causal.map_or(i64::MAX / 2, |causal| causal.offset(length, k.shape[2]));
    let scale = AttentionSpec::new().scale_for(dim);
    let _ = reference::by_the_book(q.wide.view(), k.wide.view(), v.wide.view(), scale, |at, score: f64| {
        if at.key as i64 <= at.query as i64 + offset {
            let max = &mut max.borrow_mut()[(at.batch * heads + at.head) * length + at.query];
            *max = max.max(score);
        }
        score
    });
    max.into_inner()
}

/// (group, query length): few rows of every number, then tiles of one strip and of more.
const ROWS: [(usize, usize); 19] = [
    (1, 1),
    (2, 1),
    (3, 1),
    (4, 1),
    (5, 1),
    (6, 1),
    (7, 1),
    (8, 1),
    (1, 5),
    (1, 3),
    (2, 4),
    (2, 2),
    (4, 2),
    (9, 1),
    (3, 3),
    (4, 4),
    (1, 17),
    (5, 4),
    (2, 40),
];

struct Sizes {
    group: usize,
    query_len: usize,
    key_len: usize,
    dims: [usize; 2],
}

fn check(sizes: &Sizes, kinds: [Kind; 3], layout: usize, causal: Option<Causal>, narrow: bool) {
    let Sizes { group, query_len, key_len, dims: [dk, dv] } = *sizes;
    let q = Stored::new(&random([1, 2 * group, query_len, dk], 1), kinds[0], layout);
    let k = Stored::new(&random([1, 2, key_len, dk], 2), kinds[1], layout);
    let v = Stored::new(&random([1, 2, key_len, dv], 3), kinds[2], (layout + 1) % 3);
    let mut spec = AttentionSpec::new();
    spec.causal = causal;
    let (out, lse, maxima) = run(&q, &k, &v, &spec);
    let exact = reference::oracle(q.wide.view(), k.wide.view(), v.wide.view(), &spec);
    let largest = (dk as f64).sqrt();
    let eps = f64::from(f32::EPSILON);
    let tolerance = 8.0 * eps + 2.0 * eps * (dk as f64).sqrt() * largest.max(1.0);
    let what = format!("{group} x {query_len} rows, {key_len} keys, dims {dk} {dv}, {kinds:?}, {causal:?}");
    assert_close(&what, out.data(), exact.output.data(), tolerance);
    assert_close(&format!("{what}: lse"), &lse, &exact.lse, tolerance * largest.max(8.0));
    let largest_scores = largest_scores(&q, &k, &v, causal);
    assert_close(&format!("{what}: maxima"), &maxima, &largest_scores, tolerance * largest.max(8.0));
    if narrow {
        check_narrow_outputs(&q, &k, &v, &spec, &out);
    }
}

#[test]
fn every_mix_of_types() {
    for (group, query_len) in [(3, 1), (1, 20)] {
        for key_len in [45, 1100] {
            for q in &KINDS[..4] {
                for (i, k) in KINDS.iter().enumerate() {
                    for (j, v) in KINDS.iter().enumerate() {
                        let sizes = Sizes { group, query_len, key_len, dims: [64, 32] };
                        check(&sizes, [*q, *k, *v], (i + j) % 3, None, key_len == 45);
                    }
                }
            }
        }
    }
}

#[test]
fn lengths_and_dims_at_every_edge() {
    const DIMS: [usize; 8] = [1, 7, 8, 32, 64, 80, 128, 129];
    let mut turn = 0;
    for key_len in [0, 1, 31, 32, 33, 127, 128, 129, 1023, 1024, 1025, 2050, 4100] {
        for (group, query_len) in ROWS {
            turn += 1;
            let dims = [DIMS[turn % 8], DIMS[(turn * 3 + turn / 8) % 8]];
            let kinds = [KINDS[turn % 4], KINDS[turn % 7], KINDS[(turn / 2) % 7]];
            let causal = [None, Some(Causal::BottomRight), Some(Causal::TopLeft)][turn / 2 % 3];
            check(&Sizes { group, query_len, key_len, dims }, kinds, turn % 3, causal, turn % 4 == 0);
        }
    }
}

#[derive(Clone, Debug)]
struct Mixed {
    problem: Problem,
    kinds: [Kind; 3],
    layout: usize,
}

prop_compose! {
    /// Any options; few rows more often than tiles, and keys of several parts now and then.
    fn mixes()(
        mut problem in problems(),
        few in proptest::option::weighted(0.7, (1usize..10, 0usize..6)),
        long in proptest::option::weighted(0.3, 1000usize..2200),
        kinds in (0usize..4, 0usize..7, 0usize..7),
        layout in 0usize..3,
    ) -> Mixed {
        if let Some((group, query_len)) = few {
            (problem.group, problem.query_len) = (group, query_len);
        }
        if let Some(key_len) = long {
            problem.key_len = key_len;
        }
        Mixed { problem, kinds: [KINDS[kinds.0], KINDS[kinds.1], KINDS[kinds.2]], layout }
    }
}

impl Mixed {
    fn check(&self) {
        let p = &self.problem;
        let owned = p.own();
        let spec = p.spec(&owned);
        let q = Stored::new(&owned.q, self.kinds[0], self.layout);
        let k = Stored::new(&owned.k, self.kinds[1], (self.layout + 1) % 3);
        let v = Stored::new(&owned.v, self.kinds[2], (self.layout + 2) % 3);
        let (out, lse, maxima) = run(&q, &k, &v, &spec);
        let exact = reference::oracle(q.wide.view(), k.wide.view(), v.wide.view(), &spec);
        let (dk, o) = (p.key_dim as f64, &p.options);
        let mut largest = dk.sqrt();
        largest += if o.bias.is_some() { 2.0 } else { 0.0 };
        largest += if o.t5.is_some() { 1.0 } else { 0.0 };
        largest += if o.alibi.is_some() { 0.1 * (p.key_len + p.query_len + 150) as f64 } else { 0.0 };
        let eps = f64::from(f32::EPSILON);
        let cap = o.softcap.map_or(0.0, |cap| 3.0 * f64::from(cap));
        let tolerance = 8.0 * eps + 2.0 * eps * (dk.sqrt() * largest.max(1.0) + cap);
        assert_close(&format!("{self:?} output"), out.data(), exact.output.data(), tolerance);
        let wider = tolerance * largest.max(8.0);
        assert_close(&format!("{self:?} lse"), &lse, &exact.lse, wider);
        // The largest of n scores and a sink is within ln(n + 1) of their log-sum-exp.
        let most = ((p.key_len + 1) as f64).ln();
        for (row, (&max, &lse)) in maxima.iter().zip(&exact.lse).enumerate() {
            let max = f64::from(max);
            let fits = max <= lse + wider && max >= lse - most - wider || max == lse;
            assert!(fits, "{self:?} maxima[{row}]: {max}, lse {lse}");
        }
        check_narrow_outputs(&q, &k, &v, &spec, &out);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn combinations_of_types_and_options(mixed in mixes()) {
        mixed.check();
    }
}

/// Rows, keys: few rows, one strip of tiles and several strips, in one part of keys and in several.
const POISONED: [(usize, usize, usize); 7] =
    [(1, 1, 90), (4, 2, 90), (1, 1, 2100), (2, 3, 2100), (5, 3, 90), (3, 3, 2100), (1, 40, 300)];

#[test]
fn nan_behind_a_mask_changes_nothing() {
    for (group, query_len, key_len) in POISONED {
        let hidden =
            |j: usize| j % 50 == 30 || (j + 20 > key_len && j.is_multiple_of(2)) || j.is_multiple_of(1024);
        let mask: Vec<bool> = (0..key_len).map(|j| !hidden(j)).collect();
        let bias: Vec<f32> = mask.iter().map(|&sees| if sees { 0.5 } else { f32::NEG_INFINITY }).collect();
        let shape = [1, 1, 1, key_len];
        let plain = AttentionSpec::new().with_window(Window::new(Some(1500), None));
        let specs = [
            plain.clone().with_mask(Broadcast::from_slice(&mask, shape).unwrap()),
            plain.clone().with_bias(Bias::F32(Broadcast::from_slice(&bias, shape).unwrap())),
        ];
        for kind in &KINDS[..3] {
            let q = Stored::new(&random([1, 2 * group, query_len, 24], 1), Kind::F32, 0);
            let (k, v) = (random([1, 2, key_len, 24], 2), random([1, 2, key_len, 20], 3));
            for poison in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let poisoned = |t: &Tensor| {
                    let make = |[b, h, j, d]: [usize; 4]| {
                        if hidden(j) && (j + d) % 3 == 0 { poison } else { t.view().row(b, h, j)[d] }
                    };
                    Stored::new(&Tensor::from_fn(t.shape(), make).unwrap(), *kind, 1)
                };
                for spec in &specs {
                    let want = run(&q, &Stored::new(&k, *kind, 1), &Stored::new(&v, *kind, 1), spec);
                    let got = run(&q, &poisoned(&k), &poisoned(&v), spec);
                    let what = format!("{group} x {query_len} rows, {key_len} keys, {kind:?}, {poison}");
                    assert_eq!(bits(got.0.data()), bits(want.0.data()), "{what}");
                    assert_eq!((bits(&got.1), bits(&got.2)), (bits(&want.1), bits(&want.2)), "{what}");
                }
            }
        }
    }
}

#[test]
fn nan_in_the_open_stays_in_its_rows_and_dims() {
    for (group, query_len, key_len) in POISONED {
        for kind in &KINDS[..3] {
            let q = Stored::new(&random([1, 2 * group, query_len, 24], 1), *kind, 0);
            let (k, v) = (random([1, 2, key_len, 24], 2), random([1, 2, key_len, 20], 3));
            let spec = AttentionSpec::new().with_causal(Causal::BottomRight);
            let want = run(&q, &Stored::new(&k, *kind, 0), &Stored::new(&v, *kind, 0), &spec);
            // A key that the last half of the queries see, and one that all do, in the first part and a later one.
            for key in [key_len - query_len.div_ceil(2), key_len / 2, 3] {
                for in_value in [true, false] {
                    let broken = |t: &Tensor| {
                        let make = |[b, h, j, d]: [usize; 4]| {
                            if (h, j, d) == (1, key, 7) { f32::NAN } else { t.view().row(b, h, j)[d] }
                        };
                        Tensor::from_fn(t.shape(), make).unwrap()
                    };
                    let (k, v) = if in_value { (k.clone(), broken(&v)) } else { (broken(&k), v.clone()) };
                    let got = run(&q, &Stored::new(&k, *kind, 0), &Stored::new(&v, *kind, 0), &spec);
                    for row in 0..2 * group * query_len {
                        let (head, query) = (row / query_len, row % query_len);
                        let sees = head >= group && key + query_len <= query + key_len;
                        let what = format!("{kind:?}, {group} x {query_len} rows, key {key}, row {row}");
                        for d in 0..20 {
                            let (got, want) = (got.0.data()[row * 20 + d], want.0.data()[row * 20 + d]);
                            if sees && (!in_value || d == 7) {
                                assert!(got.is_nan(), "{what}: {got}");
                            } else {
                                assert_eq!(got.to_bits(), want.to_bits(), "{what}");
                            }
                        }
                        if sees && !in_value {
                            assert!(got.1[row].is_nan(), "{what}: {}", got.1[row]);
                        } else {
                            assert_eq!(got.1[row].to_bits(), want.1[row].to_bits(), "{what}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn scales_that_do_not_fit_are_refused() {
    let bytes = vec![0i8; 2 * 3 * 5 * 12];
    let floats = vec![1.0f32; 2 * 3 * 5 * 24];
    let values = TensorRef::from_slice(&bytes, [2, 3, 5, 12]).unwrap();
    let beside = |shape| TensorRef::from_slice(&floats, shape).unwrap();
    for groups in [1, 2, 3, 4, 6, 12] {
        assert!(Int8Ref::new(values, beside([2, 3, 5, groups]), Some(beside([2, 3, 5, groups]))).is_ok());
    }
    for shape in [[1, 3, 5, 1], [2, 1, 5, 1], [2, 3, 4, 1], [2, 3, 5, 0], [2, 3, 5, 5], [2, 3, 5, 24]] {
        let error = Int8Ref::new(values, beside(shape), None).unwrap_err().to_string();
        assert!(error.starts_with(&format!("scales of shape {shape:?} do not fit values of")), "{error}");
        assert!(Int8Ref::new(values, beside([2, 3, 5, 1]), Some(beside(shape))).is_err());
    }
    assert!(Int8Ref::new(values, beside([2, 3, 5, 2]), Some(beside([2, 3, 5, 1]))).is_err());
    let q = random([2, 3, 1, 12], 1);
    let int8 = Int8Ref::new(values, beside([2, 3, 5, 1]), None).unwrap();
    assert!(attention_with_lse(q.view(), int8, int8, &AttentionSpec::new()).is_ok());
}
