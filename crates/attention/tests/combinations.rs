//! Every mask and score option, alone and in 500 random combinations, against the f64 oracle.

mod common;

use common::problem::{Options, Problem, problems};
use common::random;
use proptest::prelude::*;
use qkv_attention::{AttentionSpec, Causal, Outputs, Tensor, attention_into};

fn none() -> Options {
    Options {
        causal: None,
        window: None,
        softcap: None,
        prefix: false,
        mask: None,
        bias: None,
        alibi: None,
        t5: None,
        key_lengths: false,
        key_starts: false,
        documents: false,
        blocks: None,
        sinks: false,
    }
}

/// Each option over lengths at the edges of tile, strip and block, for single and grouped heads.
fn sweep(options: Options) {
    for (query_len, key_len) in [
        (0, 5),
        (5, 0),
        (1, 1),
        (1, 300),
        (6, 7),
        (15, 16),
        (16, 17),
        (17, 129),
        (40, 128),
        (33, 257),
        (150, 150),
    ] {
        for group in [1, 3] {
            Problem {
                batch: 2,
                kv_heads: 2,
                group,
                query_len,
                key_len,
                key_dim: 16,
                value_dim: 9,
                seed: 7,
                options: options.clone(),
            }
            .check();
        }
    }
}

#[test]
fn windows() {
    for causal in [None, Some(Causal::TopLeft), Some(Causal::BottomRight), Some(Causal::Offset(3))] {
        for window in
            [(Some(0), Some(0)), (Some(20), None), (None, Some(7)), (Some(9), Some(200)), (None, None)]
        {
            for dilation in [1, 2, 5] {
                sweep(Options { causal, window: Some((window.0, window.1, dilation)), ..none() });
            }
        }
    }
}

#[test]
fn masks_and_biases_broadcast_over_every_set_of_axes() {
    for bits in 0..16 {
        let axes = core::array::from_fn(|i| bits >> i & 1 == 1);
        sweep(Options { mask: Some(axes), ..none() });
        for kind in 0..3 {
            sweep(Options { bias: Some((axes, kind)), ..none() });
        }
    }
}

#[test]
fn position_biases() {
    for causal in [None, Some(Causal::TopLeft), Some(Causal::BottomRight)] {
        for flag in [false, true] {
            sweep(Options { causal, alibi: Some(flag), ..none() });
            sweep(Options { causal, t5: Some(flag), ..none() });
        }
    }
}

#[test]
fn lengths_padding_prefixes_documents() {
    for causal in [None, Some(Causal::TopLeft), Some(Causal::BottomRight)] {
        sweep(Options { causal, key_lengths: true, ..none() });
        sweep(Options { causal, key_starts: true, ..none() });
        sweep(Options { causal, documents: true, ..none() });
        if causal.is_some() {
            sweep(Options { causal, prefix: true, ..none() });
        }
    }
}

#[test]
fn a_sink_alone_is_the_log_sum_exp() {
    let sinks: Vec<f32> = (0..12).map(|head| head as f32 * 0.77 - 3.0).collect();
    for (rows, keys) in [(1, 0), (1, 40), (20, 40), (3, 3000), (40, 3000)] {
        let (q, k) = (random([1, 12, rows, 17], 1), random([1, 4, keys, 17], 2));
        let spec = AttentionSpec::new().with_sinks(&sinks).with_key_lengths(&[0]);
        let (mut out, mut lse, mut maxima) =
            (Tensor::zeros(q.shape()).unwrap(), vec![1.0; 12 * rows], vec![1.0; 12 * rows]);
        let outputs = Outputs::new(out.view_mut()).with_lse(&mut lse).with_maxima(&mut maxima);
        attention_into(q.view(), k.view(), k.view(), &spec, outputs).unwrap();
        for (i, (lse, max)) in lse.iter().zip(&maxima).enumerate() {
            assert_eq!((*lse, *max), (sinks[i / rows], sinks[i / rows]), "{rows} rows, {keys} keys");
        }
    }
}

#[test]
fn soft_caps_and_sinks() {
    sweep(Options { softcap: Some(0.7), ..none() });
    sweep(Options { sinks: true, ..none() });
    sweep(Options { sinks: true, key_starts: true, key_lengths: true, ..none() });
}

#[test]
fn block_sparse_at_any_block_size() {
    for block in [[1, 1], [16, 16], [7, 13], [64, 64], [48, 96], [128, 128], [100, 30], [300, 300]] {
        for (per_batch, per_head) in [(false, false), (true, true)] {
            sweep(Options { blocks: Some((block, per_batch, per_head)), ..none() });
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]
    #[test]
    fn combinations(problem in problems()) {
        problem.check();
    }
}
