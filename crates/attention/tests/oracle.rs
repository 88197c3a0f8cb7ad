//! The fused forward pass against the f64 reference, over shapes at every edge of tile, strip and key block.

mod common;

use common::{Case, assert_close, random};
use qkv_attention::{AttentionSpec, Causal, reference};

#[test]
fn lengths_and_dims_at_the_edges() {
    let lengths = [0, 1, 2, 5, 6, 7, 15, 16, 17, 95, 96, 97, 127, 128, 129, 131, 132, 133, 200, 257];
    for query_len in lengths {
        for key_len in lengths {
            for causal in [None, Some(Causal::TopLeft), Some(Causal::BottomRight)] {
                let case = Case { query_len, key_len, causal, ..Case::default() };
                case.check();
            }
        }
    }
}

#[test]
fn head_dims() {
    for key_dim in
        [1, 2, 3, 7, 8, 9, 12, 16, 31, 32, 33, 63, 64, 65, 80, 96, 127, 128, 129, 192, 256, 512, 576]
    {
        Case { query_len: 33, key_len: 50, key_dim, value_dim: key_dim, ..Case::default() }.check();
        Case { query_len: 20, key_len: 37, key_dim, value_dim: 13, ..Case::default() }.check();
        Case { query_len: 20, key_len: 37, key_dim: 13, value_dim: key_dim, ..Case::default() }.check();
    }
    Case { query_len: 20, key_len: 37, value_dim: 0, ..Case::default() }.check();
}

#[test]
fn grouped_heads() {
    for group in [1, 2, 3, 4, 5, 7, 8, 12] {
        for query_len in [1, 3, 16, 40, 100] {
            for causal in [None, Some(Causal::BottomRight), Some(Causal::Offset(-2))] {
                Case { group, query_len, key_len: 110, causal, ..Case::default() }.check();
            }
        }
    }
}

#[test]
fn causal_offsets() {
    for offset in [i64::MIN, -1000, -97, -40, -1, 0, 1, 5, 96, 1000, i64::MAX] {
        let causal = Some(Causal::Offset(offset));
        Case { query_len: 120, key_len: 110, causal, ..Case::default() }.check();
    }
}

#[test]
fn large_scores_and_scales() {
    for scale in [0.0, -0.5, 1.0, 30.0, 1e-3] {
        Case { query_len: 40, key_len: 120, scale: Some(scale), ..Case::default() }.check();
    }
}

#[test]
fn reference_in_f32_agrees_with_f64() {
    let shape = [1, 2, 30, 16];
    let (q, k, v) = (random(shape, 1), random(shape, 2), random(shape, 3));
    let spec = AttentionSpec::new().with_causal(Causal::TopLeft);
    let exact = reference::oracle(q.view(), k.view(), v.view(), &spec);
    let naive = reference::naive(q.view(), k.view(), v.view(), &spec);
    assert_close("naive", naive.output.data(), exact.output.data(), 1e-6);
}
