//! A shared prefix and own keys against attention over both joined.

mod common;

use common::random;
use qkv_attention::{
    AttentionSpec, Causal, KeysValues, Outputs, Tensor, attention_cascade, attention_with_lse,
};

/// The prefix, repeated for each batch, and then the batch's own rows.
fn joined(shared: &Tensor, own: &Tensor) -> Tensor {
    let [batch, heads, length, dim] = own.shape();
    let prefix = shared.shape()[2];
    Tensor::from_fn([batch, heads, prefix + length, dim], |[b, h, i, d]| {
        if i < prefix { shared.view().row(0, h, i)[d] } else { own.view().row(b, h, i - prefix)[d] }
    })
    .unwrap()
}

#[test]
fn equals_attention_over_both() {
    for (batch, group, length, prefix, own_len) in [
        (1, 1, 1, 100, 7),
        (3, 2, 1, 300, 40),
        (4, 4, 2, 1500, 1),
        (2, 1, 20, 64, 33),
        (2, 2, 3, 0, 9),
        (2, 1, 1, 9, 0),
    ] {
        let (kv_heads, dk, dv) = (2, 24, 16);
        let mut seed = 0;
        let mut tensor = |shape| {
            seed += 1;
            random(shape, seed)
        };
        let q = tensor([batch, kv_heads * group, length, dk]);
        let (k0, v0) = (tensor([1, kv_heads, prefix, dk]), tensor([1, kv_heads, prefix, dv]));
        let (k1, v1) = (tensor([batch, kv_heads, own_len, dk]), tensor([batch, kv_heads, own_len, dv]));
        let sinks: Vec<f32> = (0..kv_heads * group).map(|h| h as f32 * 0.1).collect();
        let spec = AttentionSpec::new().with_causal(Causal::BottomRight).with_sinks(&sinks).with_softcap(5.0);
        let (k, v) = (joined(&k0, &k1), joined(&v0, &v1));
        let (want, want_lse) = attention_with_lse(q.view(), k.view(), v.view(), &spec).unwrap();
        let mut out = Tensor::zeros(want.shape()).unwrap();
        let mut lse = vec![0.0; want_lse.len()];
        let (shared, own) = (KeysValues::new(k0.view(), v0.view()), KeysValues::new(k1.view(), v1.view()));
        let outputs = Outputs::new(out.view_mut()).with_lse(&mut lse);
        // With more queries than own keys the alignment with all keys and with the own ones differ.
        if length > own_len && own_len > 0 {
            continue;
        }
        attention_cascade(q.view(), shared, own, &spec, outputs).unwrap();
        if own_len > 0 {
            for (got, want) in out.data().iter().zip(want.data()) {
                assert!((got - want).abs() < 2e-6, "{got} instead of {want}");
            }
            for (got, want) in lse.iter().zip(&want_lse) {
                assert!((got - want).abs() < 2e-6, "{got} instead of {want}");
            }
        }
    }
}

#[test]
fn what_would_need_positions_is_refused() {
    let x = Tensor::filled([1, 1, 2, 4], 1.0).unwrap();
    let both = KeysValues::new(x.view(), x.view());
    let slopes = [0.5];
    let mut out = Tensor::filled([1, 1, 2, 4], 7.0).unwrap();
    let spec = AttentionSpec::new().with_alibi_slopes(&slopes);
    let error = attention_cascade(x.view(), both, both, &spec, Outputs::new(out.view_mut())).unwrap_err();
    assert!(error.to_string().contains("alibi_slopes"), "{error}");
    let two = Tensor::filled([2, 1, 2, 4], 1.0).unwrap();
    let shared = KeysValues::new(two.view(), two.view());
    let error =
        attention_cascade(x.view(), shared, both, &AttentionSpec::new(), Outputs::new(out.view_mut()))
            .unwrap_err();
    assert!(error.to_string().starts_with("key: batch is 2"), "{error}");
    assert!(out.data().iter().all(|&x| x == 7.0));
}
