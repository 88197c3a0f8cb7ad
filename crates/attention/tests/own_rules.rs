//! Rules of a caller: closures, masks, vector rules, on all storage types.
//!
//! All of them are one type here: for each type of rule the kernels are compiled again.

mod common;

use std::ops::Range;

use common::{assert_close, random};
use half::{bf16, f16};
use qkv_attention::reference::{self, Place};
use qkv_attention::rule::{PerPlace, PerScore, RuleLanes, RuleRows, ScoreRule, mask_mod, score_mod};
use qkv_attention::{
    AttentionSpec, Bias, Broadcast, Causal, Data, Int8Ref, Outputs, Tensor, TensorRef, attention,
    attention_with_rule,
};
use qkv_simd::Simd;

/// A rule of any kind.
#[derive(Clone, Copy)]
enum Rule<'f> {
    /// ALiBi as a caller would write it, with its slope.
    Alibi(f32),
    /// Only the keys around 100, skipping all others.
    Around100,
    Score(PerScore<&'f (dyn Fn(Place, f32) -> f32 + Send + Sync)>),
    Mask(PerPlace<&'f (dyn Fn(Place) -> bool + Send + Sync)>),
}

impl ScoreRule for Rule<'_> {
    fn keys(&self, rows: &RuleRows) -> Range<usize> {
        match self {
            Rule::Around100 => {
                assert!(rows.queries.end <= rows.query_len && rows.heads.end <= 4);
                95..105.min(rows.key_len)
            }
            _ => 0..rows.key_len,
        }
    }
    #[inline(always)]
    fn apply<S: Simd>(&self, s: S, lanes: &RuleLanes<S>, key: usize, scores: S::F32) -> S::F32 {
        match self {
            Rule::Alibi(slope) => {
                let distance = s.abs(s.sub(lanes.position, s.splat(key as f32)));
                s.mul_add(distance, s.splat(-slope), scores)
            }
            Rule::Around100 if (95..105).contains(&key) => scores,
            Rule::Around100 => s.splat(f32::NEG_INFINITY),
            Rule::Score(closure) => closure.apply(s, lanes, key, scores),
            Rule::Mask(closure) => closure.apply(s, lanes, key, scores),
        }
    }
}

/// The output under a rule.
fn ruled<'a>(
    [q, k, v]: [impl Into<Data<'a>>; 3],
    shape: [usize; 4],
    spec: &AttentionSpec<'_>,
    rule: Rule<'_>,
) -> Tensor {
    let mut out = Tensor::filled(shape, f32::NAN).unwrap();
    attention_with_rule(q, k, v, spec, rule, Outputs::new(out.view_mut())).unwrap();
    out
}

fn qkv(heads: usize, kv_heads: usize, lq: usize, lk: usize) -> [Tensor; 3] {
    [random([2, heads, lq, 32], 1), random([2, kv_heads, lk, 32], 2), random([2, kv_heads, lk, 24], 3)]
}

fn views(tensors: &[Tensor; 3]) -> [TensorRef<'_>; 3] {
    tensors.each_ref().map(Tensor::view)
}

/// What a f32 result is compared with.
fn wide(t: &Tensor) -> Vec<f64> {
    t.data().iter().map(|&x| f64::from(x)).collect()
}

#[test]
fn an_own_alibi_is_the_built_in_one() {
    let qkv = qkv(4, 2, 70, 200);
    let [q, k, v] = views(&qkv);
    let spec = AttentionSpec::new().with_causal(Causal::BottomRight);
    let want = attention(q, k, v, &spec.clone().with_alibi_slopes(&[0.07; 4])).unwrap();
    let got = ruled([q, k, v], want.shape(), &spec, Rule::Alibi(0.07));
    assert_close("vectors", got.data(), &wide(&want), 2e-6);
    // The same per score; query 0 stands at position 130.
    let closure = |at: Place, score: f32| score - 0.07 * (at.query as f32 + 130.0 - at.key as f32).abs();
    let got = ruled([q, k, v], want.shape(), &spec, Rule::Score(score_mod(&closure)));
    assert_close("scores", got.data(), &wide(&want), 2e-6);
}

#[test]
fn keys_outside_of_the_rule_are_not_there() {
    let qkv = qkv(4, 2, 70, 200);
    let [q, k, v] = views(&qkv);
    let part = |t: &Tensor| {
        let [b, h, _, d] = t.shape();
        Tensor::from_fn([b, h, 10, d], |[b, h, i, d]| t.view().row(b, h, 95 + i)[d]).unwrap()
    };
    let spec = AttentionSpec::new();
    let want = attention(q, part(&qkv[1]).view(), part(&qkv[2]).view(), &spec).unwrap();
    let got = ruled([q, k, v], want.shape(), &spec, Rule::Around100);
    assert_close("around 100", got.data(), &wide(&want), 1e-6);
}

#[test]
fn a_mask_is_the_same_keys_left_out() {
    let qkv = qkv(4, 2, 150, 300);
    let [q, k, v] = views(&qkv);
    let sees = |at: Place| at.key <= at.query + 100;
    let spec = AttentionSpec::new();
    let want = attention(q, k, v, &spec.clone().with_causal(Causal::Offset(100))).unwrap();
    let got = ruled([q, k, v], want.shape(), &spec, Rule::Mask(mask_mod(&sees)));
    assert_close("mask", got.data(), &wide(&want), 1e-6);
}

/// Halves scores, tells batches, heads and places apart, masks some.
fn mixed(at: Place, score: f32) -> f32 {
    let far = ((at.query * 7 + at.key * 5) % 11) as f32 * 0.2;
    if at.key % 13 == at.head {
        f32::NEG_INFINITY
    } else {
        score * 0.5 + (at.batch * 3 + at.head) as f32 * 0.1 - far
    }
}

/// Rows and columns of 16- and 8-bit types beside what they stand for.
struct Stored {
    wide: Tensor,
    halves: Vec<f16>,
    bhalves: Vec<bf16>,
    bytes: Vec<i8>,
    scales: Vec<f32>,
}

impl Stored {
    /// `kind`: f32, f16, bf16, int8.
    fn new(from: &Tensor, kind: usize) -> Self {
        let dim = from.shape()[3];
        let (mut halves, mut bhalves) = (Vec::new(), Vec::new());
        let (mut bytes, mut scales) = (Vec::new(), Vec::new());
        let mut wide = Vec::new();
        for row in from.data().chunks_exact(dim) {
            let scale = row.iter().fold(0.0f32, |m, x| m.max(x.abs())) / 127.0;
            scales.push(scale);
            for &x in row {
                halves.push(f16::from_f32(x));
                bhalves.push(bf16::from_f32(x));
                bytes.push((x / scale).round() as i8);
                wide.push(match kind {
                    0 => x,
                    1 => f16::from_f32(x).to_f32(),
                    2 => bf16::from_f32(x).to_f32(),
                    _ => scale * f32::from((x / scale).round() as i8),
                });
            }
        }
        let shape @ [_, heads, length, _] = from.shape();
        let at = |[b, h, i, d]: [usize; 4]| wide[((b * heads + h) * length + i) * dim + d];
        Self { wide: Tensor::from_fn(shape, at).unwrap(), halves, bhalves, bytes, scales }
    }

    fn data(&self, kind: usize) -> Data<'_> {
        let shape @ [b, h, s, _] = self.wide.shape();
        match kind {
            0 => self.wide.view().into(),
            1 => TensorRef::from_slice(&self.halves, shape).unwrap().into(),
            2 => TensorRef::from_slice(&self.bhalves, shape).unwrap().into(),
            _ => {
                let scales = TensorRef::from_slice(&self.scales, [b, h, s, 1]).unwrap();
                let bytes = TensorRef::from_slice(&self.bytes, shape).unwrap();
                Int8Ref::new(bytes, scales, None).unwrap().into()
            }
        }
    }
}

#[test]
fn a_rule_that_tells_places_apart_on_every_storage_type() {
    let spec = AttentionSpec::new();
    for (group, query_len, key_len) in [(1, 1, 70), (4, 2, 1300), (2, 1, 2050), (2, 30, 300), (1, 70, 200)] {
        for kind in 0..4 {
            let q = Stored::new(&random([2, 2 * group, query_len, 24], 1), kind % 3);
            let k = Stored::new(&random([2, 2, key_len, 24], 2), kind);
            let v = Stored::new(&random([2, 2, key_len, 20], 3), kind);
            let shape = [2, 2 * group, query_len, 20];
            let got = ruled(
                [q.data(kind % 3), k.data(kind), v.data(kind)],
                shape,
                &spec,
                Rule::Score(score_mod(&mixed)),
            );
            let rule = |at, score: f64| f64::from(mixed(at, score as f32));
            let exact =
                reference::by_the_book(q.wide.view(), k.wide.view(), v.wide.view(), spec.scale_for(24), rule);
            let what = format!("kind {kind}, {group} x {query_len} rows, {key_len} keys");
            assert_close(&what, got.data(), exact.output.data(), 4e-6);
        }
    }
}

#[test]
fn sequences_whose_positions_f32_cannot_tell_apart_are_refused() {
    let data = [0.0f32; 8];
    let long = TensorRef::from_slice_strided(&data, 0, [1, 1, (1 << 24) + 1, 8], [0, 0, 0, 1]).unwrap();
    let one = TensorRef::from_slice(&data, [1, 1, 1, 8]).unwrap();
    let mut out = Tensor::zeros([1, 1, 1, 8]).unwrap();
    let outputs = Outputs::new(out.view_mut());
    let rule = Rule::Alibi(1.0);
    let error = attention_with_rule(one, long, long, &AttentionSpec::new(), rule, outputs).unwrap_err();
    assert!(error.to_string().starts_with("key: length 16777217, expected at most"), "{error}");
}

#[test]
fn closures_are_asked_about_queries_that_there_are() {
    for rows in [1, 3, 20, 33] {
        let qkv = qkv(4, 2, rows, 50);
        let [q, k, v] = views(&qkv);
        // As long as there are queries, and not a value longer.
        let per_query: Vec<f32> = (0..rows).map(|i| i as f32 / 10.0).collect();
        let per_key: Vec<f32> = (0..50).map(|j| (j as f32 - 25.0) / 25.0).collect();
        let mut got = Tensor::zeros([2, 4, rows, 24]).unwrap();
        let rule = score_mod(|at: Place, score| score + per_query[at.query] * per_key[at.key]);
        let outputs = Outputs::new(got.view_mut());
        attention_with_rule(q, k, v, &AttentionSpec::new(), rule, outputs).unwrap();
        let bias: Vec<f32> = (0..rows * 50).map(|at| per_query[at / 50] * per_key[at % 50]).collect();
        let bias = Bias::F32(Broadcast::from_slice(&bias, [1, 1, rows, 50]).unwrap());
        let want = attention(q, k, v, &AttentionSpec::new().with_bias(bias)).unwrap();
        assert_close("looked up", got.data(), &wide(&want), 1e-6);
    }
}
