//! What must stay the same, or the same bits, when a problem is put in another way.

mod common;

use common::random as tensor;
use half::bf16;
use qkv_attention::merge::{Part, merge};
use qkv_attention::{
    AttentionSpec, Bias, BlockMask, Broadcast, Causal, Outputs, Packed, Selection, Tensor, TensorRef, Window,
    attention, attention_into, attention_packed, attention_weights, attention_with_lse, explain,
};

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

fn close(a: &[f32], b: &[f32], tolerance: f32) {
    assert_eq!(a.len(), b.len());
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        assert!((a - b).abs() <= tolerance || a == b, "[{i}] {a} {b}");
    }
}

/// Keys first .. last of a tensor, in place.
fn keys<'a>(t: &'a Tensor, first: usize, last: usize) -> TensorRef<'a> {
    let [b, h, s, d] = t.shape();
    let strides = [(h * s * d) as isize, (s * d) as isize, d as isize, 1];
    TensorRef::from_slice_strided(t.data(), first * d, [b, h, last - first, d], strides).unwrap()
}

fn qkv(heads: usize, kv_heads: usize, lq: usize, lk: usize) -> (Tensor, Tensor, Tensor) {
    (tensor([2, heads, lq, 32], 1), tensor([2, kv_heads, lk, 32], 2), tensor([2, kv_heads, lk, 24], 3))
}

#[test]
fn permuting_the_keys_of_full_attention_changes_nothing() {
    let (q, k, v) = qkv(2, 2, 40, 301);
    let permuted = |t: &Tensor| {
        Tensor::from_fn(t.shape(), |[b, h, i, d]| t.view().row(b, h, (i * 170 + 13) % 301)[d]).unwrap()
    };
    let spec = AttentionSpec::new();
    let a = attention(q.view(), k.view(), v.view(), &spec).unwrap();
    let b = attention(q.view(), permuted(&k).view(), permuted(&v).view(), &spec).unwrap();
    close(a.data(), b.data(), 1e-6);
}

#[test]
fn splitting_the_keys_anywhere_and_merging() {
    let (q, k, v) = qkv(4, 2, 33, 300);
    let spec = AttentionSpec::new().with_softcap(2.0);
    let (want, want_lse) = attention_with_lse(q.view(), k.view(), v.view(), &spec).unwrap();
    for split in [0, 1, 128, 150, 299, 300] {
        let a = attention_with_lse(q.view(), keys(&k, 0, split), keys(&v, 0, split), &spec).unwrap();
        let b = attention_with_lse(q.view(), keys(&k, split, 300), keys(&v, split, 300), &spec).unwrap();
        let mut out = Tensor::zeros(want.shape()).unwrap();
        let mut lse = vec![0.0; want_lse.len()];
        merge(
            Part { out: a.0.view(), lse: &a.1 },
            Part { out: b.0.view(), lse: &b.1 },
            out.view_mut(),
            &mut lse,
        )
        .unwrap();
        close(out.data(), want.data(), 1e-6);
        close(&lse, &want_lse, 1e-5);
    }
}

#[test]
fn merging_nothing_with_nothing_and_garbage_without_weight() {
    let nan = Tensor::from_fn([1, 1, 2, 3], |_| f32::NAN).unwrap();
    let one = Tensor::from_fn([1, 1, 2, 3], |_| 1.0).unwrap();
    let mut out = Tensor::zeros([1, 1, 2, 3]).unwrap();
    let mut lse = [9.0; 2];
    let none = [f32::NEG_INFINITY; 2];
    merge(
        Part { out: nan.view(), lse: &none },
        Part { out: nan.view(), lse: &none },
        out.view_mut(),
        &mut lse,
    )
    .unwrap();
    assert_eq!((out.data(), &lse), (&[0.0; 6][..], &none));
    merge(
        Part { out: nan.view(), lse: &none },
        Part { out: one.view(), lse: &[2.0; 2] },
        out.view_mut(),
        &mut lse,
    )
    .unwrap();
    assert_eq!((out.data(), &lse), (&[1.0; 6][..], &[2.0; 2]));
    let error = merge(
        Part { out: nan.view(), lse: &none[..1] },
        Part { out: one.view(), lse: &[2.0; 2] },
        out.view_mut(),
        &mut lse,
    )
    .unwrap_err();
    assert_eq!(error.to_string(), "lse: 1 values, expected batch x heads x query length = 2");
}

#[test]
fn what_is_seen_counts_in_a_merge_though_its_weight_is_zero() {
    let of = |x: f32| Tensor::from_fn([1, 1, 1, 2], |[_, _, _, d]| if d == 0 { x } else { 1.0 }).unwrap();
    let (nan, one) = (of(f32::NAN), of(1.0));
    let mut out = Tensor::zeros([1, 1, 1, 2]).unwrap();
    for [a, b] in [[(&nan, -300.0), (&one, 300.0)], [(&one, 300.0), (&nan, -300.0)]] {
        let mut lse = [0.0];
        let (lse_a, lse_b) = ([a.1], [b.1]);
        let (a, b) = (Part { out: a.0.view(), lse: &lse_a }, Part { out: b.0.view(), lse: &lse_b });
        merge(a, b, out.view_mut(), &mut lse).unwrap();
        assert!(out.data()[0].is_nan() && out.data()[1] == 1.0 && lse == [300.0], "{:?} {lse:?}", out.data());
    }
}

#[test]
fn a_packed_batch_is_each_sequence_alone() {
    let query_ends = [0, 5, 5, 100, 101, 260, 300];
    let key_ends = [0, 7, 20, 150, 150, 420, 450];
    for (heads, kv_heads) in [(2, 2), (6, 2)] {
        for causal in [None, Some(Causal::TopLeft), Some(Causal::BottomRight), Some(Causal::Offset(4))] {
            let q = tensor([1, heads, 300, 32], 1);
            let (k, v) = (tensor([1, kv_heads, 450, 32], 2), tensor([1, kv_heads, 450, 16], 3));
            let slopes: Vec<f32> = (0..heads).map(|h| 0.1 / (h + 1) as f32).collect();
            let sinks = vec![0.3; heads];
            let mut spec = AttentionSpec::new()
                .with_window(Window::new(Some(60), Some(3)))
                .with_alibi_slopes(&slopes)
                .with_sinks(&sinks);
            spec.causal = causal;
            let mut out = Tensor::zeros([1, heads, 300, 16]).unwrap();
            let mut lse = vec![0.0; heads * 300];
            let packed = Packed { query_ends: &query_ends, key_ends: &key_ends };
            let outputs = Outputs::new(out.view_mut()).with_lse(&mut lse);
            attention_packed(q.view(), k.view(), v.view(), packed, &spec, outputs).unwrap();
            for i in 0..query_ends.len() - 1 {
                let (qs, ks) = (query_ends[i]..query_ends[i + 1], key_ends[i]..key_ends[i + 1]);
                let (alone, alone_lse) = attention_with_lse(
                    keys(&q, qs.start, qs.end),
                    keys(&k, ks.start, ks.end),
                    keys(&v, ks.start, ks.end),
                    &spec,
                )
                .unwrap();
                for head in 0..heads {
                    for row in 0..qs.len() {
                        let got = out.view().row(0, head, qs.start + row);
                        assert_eq!(bits(got), bits(alone.view().row(0, head, row)), "sequence {i} row {row}");
                    }
                    let got = &lse[head * 300..][qs.clone()];
                    assert_eq!(bits(got), bits(&alone_lse[head * qs.len()..][..qs.len()]));
                }
            }
        }
    }
}

#[test]
fn wide_windows_full_tables_zero_biases_are_nothing_bit_for_bit() {
    let (q, k, v) = qkv(4, 2, 150, 300);
    for causal in [None, Some(Causal::TopLeft), Some(Causal::BottomRight), Some(Causal::Offset(100))] {
        let mut plain = AttentionSpec::new();
        plain.causal = causal;
        let want = attention(q.view(), k.view(), v.view(), &plain).unwrap();
        let same = |what: &str, spec: &AttentionSpec<'_>| {
            let got = attention(q.view(), k.view(), v.view(), spec).unwrap();
            assert_eq!(bits(got.data()), bits(want.data()), "{what}, {causal:?}");
        };
        same("window", &plain.clone().with_window(Window::new(Some(300), Some(300))));
        for block in [[64, 64], [16, 128], [100, 33], [1, 1], [150, 300]] {
            let shape = [1, 4, 150usize.div_ceil(block[0]), 300usize.div_ceil(block[1])];
            let all = BlockMask::from_fn(shape, block, |_| true).unwrap();
            same("block table", &plain.clone().with_block_mask(&all));
        }
        let ones = vec![true; 150 * 300];
        same("mask", &plain.clone().with_mask(Broadcast::from_slice(&ones, [1, 1, 150, 300]).unwrap()));
        let zeros = vec![0.0; 4 * 150 * 300];
        let bias = Bias::F32(Broadcast::from_slice(&zeros, [1, 4, 150, 300]).unwrap());
        same("bias", &plain.clone().with_bias(bias));
        same("slopes", &plain.clone().with_alibi_slopes(&[0.0; 4]));
        same("lengths", &plain.clone().with_key_lengths(&[300, 300]).with_key_starts(&[0, 0]));
        same("documents", &plain.clone().with_documents(&[300]));
        same("sinks", &plain.clone().with_sinks(&[f32::NEG_INFINITY; 4]));
    }
}

#[test]
fn a_dense_mask_is_what_it_describes_bit_for_bit() {
    let (q, k, v) = qkv(4, 2, 150, 300);
    // Causal by mask, by block table of single keys and queries, by bias.
    let sees = |i: usize, j: usize| j <= i + 20;
    let spec = AttentionSpec::new();
    let want =
        attention(q.view(), k.view(), v.view(), &spec.clone().with_causal(Causal::Offset(20))).unwrap();
    let mask: Vec<bool> = (0..150 * 300).map(|at| sees(at / 300, at % 300)).collect();
    let mask = Broadcast::from_slice(&mask, [1, 1, 150, 300]).unwrap();
    let table = BlockMask::from_fn([1, 1, 150, 300], [1, 1], |[_, _, i, j]| sees(i, j)).unwrap();
    let bias: Vec<f32> =
        (0..150 * 300).map(|at| if sees(at / 300, at % 300) { 0.0 } else { f32::NEG_INFINITY }).collect();
    let bias = Bias::F32(Broadcast::from_slice(&bias, [1, 1, 150, 300]).unwrap());
    for (what, spec) in [
        ("mask", spec.clone().with_mask(mask)),
        ("table", spec.clone().with_block_mask(&table)),
        ("bias", spec.clone().with_bias(bias)),
    ] {
        let got = attention(q.view(), k.view(), v.view(), &spec).unwrap();
        assert_eq!(bits(got.data()), bits(want.data()), "{what}");
    }
}

#[test]
fn nan_and_infinity_behind_any_mask_change_nothing() {
    // Tiles, and rows that are few; the first keys too, and nothing else in their block.
    for (rows, first, later) in [
        (70, 0, true),
        (3, 0, true),
        (70, 7, false),
        (3, 1, false),
        (1, 5, true),
        (1, 13, false),
        (2, 135, false),
    ] {
        let (q, k, v) = qkv(4, 2, rows, 200);
        let hidden = |j: usize| j < first || later && (j % 50 == 30 || (100..110).contains(&j));
        let mask: Vec<bool> = (0..200).map(|j| !hidden(j)).collect();
        let bias: Vec<f32> = mask.iter().map(|&sees| if sees { 0.5 } else { f32::NEG_INFINITY }).collect();
        let half: Vec<u16> = bias.iter().map(|&x| bf16::from_f32(x).to_bits()).collect();
        let table = BlockMask::from_fn([1, 1, rows, 200], [1, 1], |[_, _, _, j]| !hidden(j)).unwrap();
        let shape = [1, 1, 1, 200];
        let plain = AttentionSpec::new();
        let specs = [
            plain.clone().with_mask(Broadcast::from_slice(&mask, shape).unwrap()),
            plain.clone().with_bias(Bias::F32(Broadcast::from_slice(&bias, shape).unwrap())),
            plain.clone().with_bias(Bias::Half(
                qkv_attention::HalfKind::Bf16,
                Broadcast::from_slice(&half, shape).unwrap(),
            )),
            plain.clone().with_block_mask(&table),
            plain.clone().with_mask(Broadcast::from_slice(&mask, shape).unwrap()).with_softcap(3.0),
        ];
        for spec in &specs {
            let want = everything(&q, &k, &v, spec);
            // Without value dims scores alone show what has got through.
            let no_dims = Tensor::zeros([2, 2, 200, 0]).unwrap();
            let want_lse = everything(&q, &k, &no_dims, spec);
            for poison in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let poisoned = |t: &Tensor| {
                    Tensor::from_fn(t.shape(), |[b, h, j, d]| {
                        if hidden(j) && (j + d) % 3 == 0 { poison } else { t.view().row(b, h, j)[d] }
                    })
                    .unwrap()
                };
                let (bad_k, bad_v) = (poisoned(&k), poisoned(&v));
                for (k, v) in [(&bad_k, &v), (&k, &bad_v), (&bad_k, &bad_v)] {
                    assert_eq!(everything(&q, k, v, spec), want, "{rows} {poison}");
                }
                assert_eq!(everything(&q, &bad_k, &no_dims, spec), want_lse, "{rows} {poison}");
            }
        }
    }
}

#[test]
fn nan_behind_a_mask_moves_no_bit_of_narrow_values() {
    let seen = Broadcast::from_slice(&SEEN, [1, 1, 1, 57]).unwrap();
    let spec = AttentionSpec::new().with_mask(seen);
    for (rows, dim) in [(1, 40), (1, 192), (4, 255), (8, 320), (20, 192)] {
        let (q, k, v) = (tensor([1, 1, rows, 80], 1), tensor([1, 1, 57, 80], 2), tensor([1, 1, 57, dim], 3));
        let run = |poison: Option<f32>| {
            let mut values: Vec<bf16> = v.data().iter().map(|&x| bf16::from_f32(x)).collect();
            if let Some(poison) = poison {
                values[56 * dim + 3] = bf16::from_f32(poison);
            }
            let values = TensorRef::from_slice(&values, [1, 1, 57, dim]).unwrap();
            bits(attention(q.view(), k.view(), values, &spec).unwrap().data())
        };
        assert_eq!(run(Some(f32::NAN)), run(None), "{rows} rows, {dim} dims");
    }
}

/// All but the last.
const SEEN: [bool; 57] = {
    let mut seen = [true; 57];
    seen[56] = false;
    seen
};

#[test]
fn all_bytes_but_zero_of_a_mask_from_elsewhere_take_part() {
    let bytes: Vec<u8> = (0..70 * 301).map(|i| [0, 1, 2, 0, 128, 255, 254][i * i % 7]).collect();
    let mask: Vec<bool> = bytes.iter().map(|&byte| byte != 0).collect();
    for rows in [1, 70] {
        let (q, k, v) = qkv(4, 2, rows, 301);
        for strides in [[0, 0, 301, 1], [0, 0, 1, 70]] {
            let shape = [1, 1, rows, 301];
            // SAFETY: 70 x 301 bytes, of which all are looked at as such.
            let given = unsafe { Broadcast::from_raw_parts(bytes.as_ptr().cast::<bool>(), shape, strides) };
            let spec = AttentionSpec::new().with_mask(given.unwrap());
            let expected = AttentionSpec::new()
                .with_mask(Broadcast::from_slice_strided(&mask, 0, shape, strides).unwrap());
            assert_eq!(
                everything(&q, &k, &v, &spec),
                everything(&q, &k, &v, &expected),
                "{rows} {strides:?}"
            );
        }
    }
}

/// The bits of outputs, LSE, maxima and some weights.
fn everything(q: &Tensor, k: &Tensor, v: &Tensor, spec: &AttentionSpec<'_>) -> [Vec<u32>; 4] {
    let [batch, heads, rows, _] = q.shape();
    let mut out = Tensor::zeros([batch, heads, rows, v.shape()[3]]).unwrap();
    let (mut lse, mut maxima) = (vec![0.0; batch * heads * rows], vec![0.0; batch * heads * rows]);
    let outputs = Outputs::new(out.view_mut()).with_lse(&mut lse).with_maxima(&mut maxima);
    attention_into(q.view(), k.view(), v.view(), spec, outputs).unwrap();
    let selection = Selection { batch: 1, heads: 1..3, rows: rows / 2..rows };
    let weights = attention_weights(q.view(), k.view(), spec, selection).unwrap();
    [bits(out.data()), bits(&lse), bits(&maxima), bits(weights.data())]
}

#[test]
fn weights_and_maxima_on_request() {
    let (q, k, v) = qkv(4, 2, 70, 200);
    let spec = AttentionSpec::new().with_causal(Causal::Offset(3)).with_softcap(1.5);
    let selection = Selection { batch: 1, heads: 1..3, rows: 20..50 };
    let weights = attention_weights(q.view(), k.view(), &spec, selection).unwrap();
    assert_eq!(weights.shape(), [1, 2, 30, 200]);
    let mut maxima = vec![0.0; 2 * 4 * 70];
    let mut out = Tensor::zeros([2, 4, 70, 24]).unwrap();
    let outputs = Outputs::new(out.view_mut()).with_maxima(&mut maxima);
    attention_into(q.view(), k.view(), v.view(), &spec, outputs).unwrap();
    for head in 1..3 {
        for row in 20..50 {
            let weights = weights.view().row(0, head - 1, row - 20);
            assert!(weights[row + 4..].iter().all(|&w| w == 0.0));
            assert!((weights.iter().sum::<f32>() - 1.0).abs() < 1e-5);
            for d in 0..24 {
                let sum: f32 = (0..200).map(|j| weights[j] * v.view().row(1, head / 2, j)[d]).sum();
                assert!((sum - out.view().row(1, head, row)[d]).abs() < 1e-5);
            }
            let scores = (0..row + 4).map(|j| {
                let dot: f32 = q
                    .view()
                    .row(1, head, row)
                    .iter()
                    .zip(k.view().row(1, head / 2, j))
                    .map(|(a, b)| a * b)
                    .sum();
                1.5 * (dot / 32f32.sqrt() / 1.5).tanh()
            });
            let largest = scores.fold(f32::NEG_INFINITY, f32::max);
            assert!((largest - maxima[(4 + head) * 70 + row]).abs() < 1e-5);
        }
    }
    for (batch, heads, rows) in [(2, 0..1, 0..1), (0, 0..5, 0..1), (0, 0..1, 0..71)] {
        let selection = Selection { batch, heads, rows };
        assert!(
            attention_weights(q.view(), k.view(), &spec, selection)
                .unwrap_err()
                .to_string()
                .contains("selection")
        );
    }
}

#[test]
fn explain_counts_blocks() {
    let q = tensor([1, 1, 512, 32], 1);
    let blocks = |spec: &AttentionSpec<'_>| explain(q.view(), q.view(), q.view(), spec).unwrap().blocks;
    let full = blocks(&AttentionSpec::new());
    assert_eq!((full.partial, full.skipped), (0, 0));
    let causal = blocks(&AttentionSpec::new().with_causal(Causal::TopLeft));
    assert_eq!(causal.whole + causal.partial + causal.skipped, full.whole);
    assert!(causal.skipped > full.whole / 3 && causal.partial > 0 && causal.whole > full.whole / 3);
    let window =
        blocks(&AttentionSpec::new().with_causal(Causal::TopLeft).with_window(Window::new(Some(10), None)));
    assert!(window.skipped > causal.skipped && window.whole == 0);
    let table = BlockMask::from_fn([1, 1, 8, 8], [64, 64], |[_, _, i, j]| i == j).unwrap();
    let sparse = blocks(&AttentionSpec::new().with_block_mask(&table));
    assert!(sparse.skipped >= full.whole * 3 / 4);
    let text = explain(q.view(), q.view(), q.view(), &AttentionSpec::new()).unwrap().to_string();
    assert!(text.contains("whole") && text.contains("skipped"), "{text}");
}
