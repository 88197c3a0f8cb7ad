//! Scores at the ends of f32's range, against the f64 oracle: what one key, a masking bias that is finite, and sinks make of them.

mod common;

use common::random;
use qkv_attention::merge::{Part, merge};
use qkv_attention::reference::oracle;
use qkv_attention::{
    AttentionSpec, Bias, Broadcast, Selection, Tensor, attention_weights, attention_with_lse,
};

/// Compares output and LSE, rows with rows of the same size.
fn agrees(what: &str, [q, k, v]: [&Tensor; 3], spec: &AttentionSpec<'_>) {
    let (out, lse) = attention_with_lse(q.view(), k.view(), v.view(), spec).unwrap();
    let exact = oracle(q.view(), k.view(), v.view(), spec);
    for (at, (got, want)) in out.data().iter().zip(exact.output.data()).enumerate() {
        assert!((f64::from(*got) - want).abs() <= 1e-5 * want.abs().max(1.0), "{what}, {at}: {got}, {want}");
    }
    for (at, (got, want)) in lse.iter().zip(&exact.lse).enumerate() {
        let near = (f64::from(*got) - want).abs() <= 1e-6 * want.abs().max(1.0);
        assert!(near || f64::from(*got) == *want, "{what}, LSE {at}: {got}, {want}");
    }
}

#[test]
fn scores_up_to_the_largest_float() {
    for rows in [1, 16, 40] {
        let q = Tensor::from_fn([1, 1, rows, 1], |_| 1.0).unwrap();
        let v = random([1, 1, 3, 8], 1);
        for sign in [1.0, -1.0] {
            for size in [1e3, 1e8, 1.5e9, 5e9, 1.1e10, 3e15, 1e30, 2.3e38, 2.5e38, f32::MAX] {
                // Neighbours of each other, and one twice.
                let keys = [sign * size, sign * size.next_down(), sign * size];
                let k = Tensor::from_fn([1, 1, 3, 1], |[_, _, j, _]| keys[j]).unwrap();
                for scale in [1.0, 0.7] {
                    let spec = AttentionSpec::new().with_scale(scale);
                    agrees(&format!("{rows} rows, {} x {scale}", sign * size), [&q, &k, &v], &spec);
                }
            }
        }
    }
}

#[test]
fn a_finite_bias_that_masks() {
    // Few rows and tiles; one part of the keys and several.
    for (rows, keys) in [(1, 300), (1, 2048), (7, 2048), (16, 2048), (70, 300)] {
        let (q, k, v) =
            (random([1, 2, rows, 16], 1), random([1, 2, keys, 16], 2), random([1, 2, keys, 8], 3));
        for value in [-1e9, -1e10, -2e10, -1e20, -1e30, -1e38, -3e38, f32::MIN] {
            for masked in [0..keys / 2, keys / 2..keys, 0..keys] {
                let bias: Vec<f32> =
                    (0..keys).map(|j| if masked.contains(&j) { value } else { 0.0 }).collect();
                for scale in [0.25, 0.19] {
                    let spec = AttentionSpec::new().with_scale(scale);
                    let spec =
                        spec.with_bias(Bias::F32(Broadcast::from_slice(&bias, [1, 1, 1, keys]).unwrap()));
                    if masked.len() < keys || value <= -1e20 {
                        agrees(&format!("{rows} x {keys}, {value} in {masked:?}"), [&q, &k, &v], &spec);
                    }
                    if rows == 7 {
                        let selection = Selection { batch: 0, heads: 0..2, rows: 0..rows };
                        let weights = attention_weights(q.view(), k.view(), &spec, selection).unwrap();
                        for row in weights.data().chunks_exact(keys) {
                            assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-4, "{value} in {masked:?}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn sinks_up_to_the_largest_float() {
    let (q, k, v) = (random([1, 2, 5, 16], 1), random([1, 2, 40, 16], 2), random([1, 2, 40, 8], 3));
    let none = [Tensor::zeros([1, 2, 0, 16]).unwrap(), Tensor::zeros([1, 2, 0, 8]).unwrap()];
    for sink in [-f32::MAX, -2.4e38, -1e10, 3.0, 1e10, 2.4e38, f32::MAX] {
        let sinks = [sink; 2];
        for scale in [0.25, 0.19] {
            let spec = AttentionSpec::new().with_sinks(&sinks).with_scale(scale);
            agrees(&format!("sink {sink}"), [&q, &k, &v], &spec);
            agrees(&format!("sink {sink}, no keys"), [&q, &none[0], &none[1]], &spec);
        }
    }
}

#[test]
fn a_query_whose_scores_are_all_minus_infinity_is_as_one_without_keys() {
    for (rows, dim) in [(1, 4), (3, 64), (40, 64)] {
        let q = Tensor::from_fn([1, 1, rows, dim], |_| f32::NEG_INFINITY).unwrap();
        let k = Tensor::from_fn([1, 1, 50, dim], |_| 1.0).unwrap();
        let v = random([1, 1, 50, 8], 3);
        for scale in [0.25, 0.19, 1.0] {
            let spec = AttentionSpec::new().with_scale(scale);
            let (out, lse) = attention_with_lse(q.view(), k.view(), v.view(), &spec).unwrap();
            assert!(out.data().iter().all(|x| *x == 0.0), "{rows} {dim}: {:?}", out.data());
            assert!(lse.iter().all(|x| *x == f32::NEG_INFINITY), "{rows} {dim}: {lse:?}");
        }
    }
}

#[test]
fn merging_large_lses() {
    let (a, b) = (random([1, 1, 1, 4], 1), random([1, 1, 1, 4], 2));
    for lse in [-3e38, -1e20, 1e20, 3e38] {
        let mut out = Tensor::zeros([1, 1, 1, 4]).unwrap();
        let mut joint = [0.0];
        let [a_part, b_part] = [&a, &b].map(|out| Part { out: out.view(), lse: std::slice::from_ref(&lse) });
        merge(a_part, b_part, out.view_mut(), &mut joint).unwrap();
        for d in 0..4 {
            let mean = (a.data()[d] + b.data()[d]) / 2.0;
            assert!((out.data()[d] - mean).abs() < 1e-6, "{lse}");
        }
        assert_eq!(joint, [lse]);
    }
}
