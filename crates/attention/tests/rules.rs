//! What a number alone does not show: rows without keys, NaN and infinity, strides, bits that do not
//! depend on threads or on the batch.

mod common;

use common::{Case, random};
use qkv_attention::{
    AttentionSpec, Causal, Outputs, Tensor, TensorMut, TensorRef, attention, attention_into,
    attention_with_lse, explain,
};

fn bits(tensor: &[f32]) -> Vec<u32> {
    tensor.iter().map(|x| x.to_bits()).collect()
}

/// One head of one batch, as a tensor of its own.
fn head_of(t: &Tensor, batch: usize, head: usize) -> Tensor {
    let [_, _, length, dim] = t.shape();
    Tensor::from_fn([1, 1, length, dim], |[_, _, i, d]| t.view().row(batch, head, i)[d]).unwrap()
}

#[test]
fn a_row_without_keys_is_zero_and_its_lse_minus_infinity() {
    let (q, k, v) = (random([1, 2, 40, 16], 1), random([1, 2, 20, 16], 2), random([1, 2, 20, 16], 3));
    let spec = AttentionSpec::new().with_causal(Causal::BottomRight);
    let mut out = Tensor::from_fn([1, 2, 40, 16], |_| f32::NAN).unwrap();
    let mut lse = vec![f32::NAN; 80];
    let outputs = Outputs::new(out.view_mut()).with_lse(&mut lse);
    attention_into(q.view(), k.view(), v.view(), &spec, outputs).unwrap();
    for head in 0..2 {
        for i in 0..20 {
            assert_eq!(bits(out.view().row(0, head, i)), vec![0; 16]);
            assert_eq!(lse[head * 40 + i], f32::NEG_INFINITY);
        }
        assert!(out.view().row(0, head, 20).iter().all(|x| x.is_finite() && *x != 0.0));
    }
    // No keys at all.
    let (out, lse) = attention_with_lse(
        q.view(),
        Tensor::zeros([1, 2, 0, 16]).unwrap().view(),
        Tensor::zeros([1, 2, 0, 16]).unwrap().view(),
        &AttentionSpec::new(),
    )
    .unwrap();
    assert!(out.data().iter().all(|x| x.to_bits() == 0) && lse.iter().all(|x| *x == f32::NEG_INFINITY));
}

#[test]
fn nan_and_infinity_behind_the_mask_change_nothing() {
    for group in [1, 3] {
        let case =
            Case { group, query_len: 130, key_len: 230, causal: Some(Causal::Offset(20)), ..Case::default() };
        let [q, k, v] = case.tensors();
        let clean = attention_with_lse(q.view(), k.view(), v.view(), &case.spec()).unwrap();
        for poison in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::from_bits(0x7F80_0001)] {
            // Key 100 is seen from query 80 on.
            for first_hidden in [21, 22, 60, 96, 100, 149] {
                let (mut k, mut v) = (k.clone(), v.clone());
                let shape = k.shape();
                for key in first_hidden..shape[2] {
                    k.data_mut()[key * shape[3] + 3] = poison;
                    v.data_mut()[key * shape[3] + key % 16] = poison;
                }
                let (out, lse) = attention_with_lse(q.view(), k.view(), v.view(), &case.spec()).unwrap();
                for head in 0..group {
                    for query in 0..(first_hidden - 20).min(130) {
                        let what =
                            format!("group {group} poison {poison} from {first_hidden}, query {query}");
                        let (got, want) = (out.view().row(0, head, query), clean.0.view());
                        assert_eq!(bits(got), bits(want.row(0, head, query)), "{what}");
                        let at = head * 130 + query;
                        assert_eq!(lse[at].to_bits(), clean.1[at].to_bits(), "{what}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_visible_nan_value_reaches_the_rows_that_see_it_and_only_its_dim() {
    let case = Case { query_len: 64, key_len: 64, causal: Some(Causal::TopLeft), ..Case::default() };
    let [q, k, mut v] = case.tensors();
    let clean = attention(q.view(), k.view(), v.view(), &case.spec()).unwrap();
    v.data_mut()[30 * 16 + 5] = f32::NAN;
    v.data_mut()[31 * 16 + 6] = f32::INFINITY;
    let out = attention(q.view(), k.view(), v.view(), &case.spec()).unwrap();
    for query in 0..64 {
        let (got, want) = (out.view().row(0, 0, query), clean.view().row(0, 0, query));
        for d in 0..16 {
            match d {
                5 if query >= 30 => assert!(got[d].is_nan(), "query {query}"),
                6 if query >= 31 => assert_eq!(got[d], f32::INFINITY, "query {query}"),
                _ => assert_eq!(got[d].to_bits(), want[d].to_bits(), "query {query} dim {d}"),
            }
        }
    }
}

#[test]
fn a_nan_score_poisons_its_row_alone() {
    let case = Case { group: 2, query_len: 50, key_len: 120, ..Case::default() };
    let [mut q, k, v] = case.tensors();
    let clean = attention_with_lse(q.view(), k.view(), v.view(), &case.spec()).unwrap();
    // A NaN with a payload, which arithmetic on exponents would turn into a number.
    q.data_mut()[17 * 16 + 2] = f32::from_bits(0x7FC0_0001);
    let (out, lse) = attention_with_lse(q.view(), k.view(), v.view(), &case.spec()).unwrap();
    for head in 0..2 {
        for query in 0..50 {
            let (got, want) = (out.view().row(0, head, query), clean.0.view().row(0, head, query));
            if (head, query) == (0, 17) {
                assert!(got.iter().all(|x| x.is_nan()) && lse[17].is_nan());
            } else {
                assert_eq!(bits(got), bits(want), "head {head} query {query}");
            }
        }
    }
    // A NaN in a key that everybody sees poisons everybody.
    let [q, mut k, v] = case.tensors();
    k.data_mut()[100 * 16] = f32::NAN;
    let out = attention(q.view(), k.view(), v.view(), &case.spec()).unwrap();
    assert!(out.data().iter().all(|x| x.is_nan()));
}

#[test]
fn infinite_scores() {
    let (q, k, v) = (random([1, 1, 3, 4], 1), random([1, 1, 120, 4], 2), random([1, 1, 120, 4], 3));
    let mut k_minus = k.clone();
    // -infinity times a positive entry: the score is -infinity, the key has no weight.
    let mut q_plus = q.clone();
    q_plus.data_mut().iter_mut().for_each(|x| *x = x.abs() + 0.1);
    k_minus.data_mut()[..40 * 4].fill(f32::NEG_INFINITY);
    let spec = AttentionSpec::new();
    let part = |t: &Tensor| Tensor::from_vec(t.data()[40 * 4..].to_vec(), [1, 1, 80, 4]).unwrap();
    let got = attention(q_plus.view(), k_minus.view(), v.view(), &spec).unwrap();
    let want = attention(q_plus.view(), part(&k).view(), part(&v).view(), &spec).unwrap();
    for (a, b) in got.data().iter().zip(want.data()) {
        assert!((a - b).abs() < 1e-6, "{a} {b}");
    }
    // All scores -infinity: as if there were no key.
    k_minus.data_mut().fill(f32::NEG_INFINITY);
    let (out, lse) = attention_with_lse(q_plus.view(), k_minus.view(), v.view(), &spec).unwrap();
    assert!(out.data().iter().all(|&x| x == 0.0) && lse.iter().all(|&x| x == f32::NEG_INFINITY));
}

#[test]
fn strides_are_read_and_written_in_place() {
    let (b, h, hk, s, d) = (2, 4, 2, 37, 24);
    let (q, k, v) = (random([b, h, s, d], 1), random([b, hk, s, d], 2), random([b, hk, s, d], 3));
    let spec = AttentionSpec::new().with_causal(Causal::TopLeft);
    let want = attention(q.view(), k.view(), v.view(), &spec).unwrap();

    // Everything packed in one (batch, length, [q heads, k heads, v heads], dim + 3) buffer, keys in reverse order.
    let row = d + 3;
    let heads = h + 2 * hk;
    let mut packed = vec![f32::NAN; b * s * heads * row];
    let mut put = |t: &Tensor, first_head: usize, reversed: bool| {
        let [_, t_heads, _, _] = t.shape();
        for batch in 0..b {
            for head in 0..t_heads {
                for i in 0..s {
                    let at = if reversed { s - 1 - i } else { i };
                    let at = ((batch * s + at) * heads + first_head + head) * row;
                    packed[at..at + d].copy_from_slice(t.view().row(batch, head, i));
                }
            }
        }
    };
    put(&q, 0, false);
    put(&k, h, true);
    put(&v, h + hk, true);
    let step = (heads * row) as isize;
    let strides = [s as isize * step, row as isize, step, 1];
    let back = [strides[0], strides[1], -step, 1];
    let last = (s - 1) * heads * row;
    let view =
        |offset, shape, strides| TensorRef::from_slice_strided(&packed, offset, shape, strides).unwrap();
    let q = view(0, [b, h, s, d], strides);
    let k = view(last + h * row, [b, hk, s, d], back);
    let v = view(last + (h + hk) * row, [b, hk, s, d], back);

    // BSHD with a gap after every row; the gaps must not be touched.
    let mut out = vec![7.0; b * s * h * (d + 1)];
    let shape = [b, h, s, d];
    let out_strides = [(s * h * (d + 1)) as isize, (d + 1) as isize, (h * (d + 1)) as isize, 1];
    let view = TensorMut::from_slice_strided(&mut out, 0, shape, out_strides).unwrap();
    attention_into(q, k, v, &spec, Outputs::new(view)).unwrap();
    for batch in 0..b {
        for head in 0..h {
            for i in 0..s {
                let at = ((batch * s + i) * h + head) * (d + 1);
                assert_eq!(bits(&out[at..at + d]), bits(want.view().row(batch, head, i)));
                assert_eq!(out[at + d], 7.0);
            }
        }
    }

    // One key/value head and batch for all, by stride 0.
    let (k1, v1) = (random([1, 1, s, d], 5), random([1, 1, s, d], 6));
    let broadcast = |t| TensorRef::from_slice_strided(t, 0, [b, hk, s, d], [0, 0, d as isize, 1]).unwrap();
    let repeat = |t: &Tensor| Tensor::from_fn([b, hk, s, d], |[_, _, i, e]| t.data()[i * d + e]).unwrap();
    assert_eq!(
        attention(q, broadcast(k1.data()), broadcast(v1.data()), &spec).unwrap(),
        attention(q, repeat(&k1).view(), repeat(&v1).view(), &spec).unwrap()
    );
}

#[test]
fn bits_do_not_depend_on_threads_batch_or_grouping() {
    let (b, hk, group, lq, lk, d) = (3, 2, 3, 150, 210, 32);
    let h = hk * group;
    let (q, k, v) = (random([b, h, lq, d], 1), random([b, hk, lk, d], 2), random([b, hk, lk, d], 3));
    for causal in [None, Some(Causal::TopLeft), Some(Causal::BottomRight), Some(Causal::Offset(-7))] {
        let mut spec = AttentionSpec::new();
        spec.causal = causal;
        let want = attention_with_lse(q.view(), k.view(), v.view(), &spec).unwrap();
        for threads in [1, 2, 3, 8] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let got = pool.install(|| attention_with_lse(q.view(), k.view(), v.view(), &spec).unwrap());
            assert_eq!(bits(want.0.data()), bits(got.0.data()), "{threads} threads");
            assert_eq!(bits(&want.1), bits(&got.1), "{threads} threads");
        }
        for batch in 0..b {
            for head in 0..h {
                let (q1, k1, v1) = (
                    head_of(&q, batch, head),
                    head_of(&k, batch, head / group),
                    head_of(&v, batch, head / group),
                );
                let (out, lse) = attention_with_lse(q1.view(), k1.view(), v1.view(), &spec).unwrap();
                let all = head_of(&want.0, batch, head);
                assert_eq!(bits(out.data()), bits(all.data()), "{causal:?} batch {batch} head {head} alone");
                assert_eq!(bits(&lse), bits(&want.1[(batch * h + head) * lq..][..lq]));
            }
        }
    }
}

#[test]
fn empty_batches_and_sequences_are_valid() {
    for shape in [[0, 2, 5, 8], [2, 2, 0, 8], [0, 1, 0, 8]] {
        let q = Tensor::zeros(shape).unwrap();
        let (out, lse) = attention_with_lse(q.view(), q.view(), q.view(), &AttentionSpec::new()).unwrap();
        assert_eq!(out.shape(), shape);
        assert!(lse.is_empty());
    }
}

#[test]
fn the_plan_says_what_will_be_done() {
    let q = random([1, 2, 300, 64], 1);
    let plan = explain(q.view(), q.view(), q.view(), &AttentionSpec::new()).unwrap();
    let text = plan.to_string();
    assert!(
        text.contains("prefill") && text.contains("tasks") && text.contains("bytes of scratch"),
        "{text}"
    );
    assert!(plan.plan.tasks() > 2);
}

#[test]
fn scratch_does_not_grow_with_the_length() {
    // Views with stride 0: so many positions of the same 64 values.
    let data = [0.5f32; 64];
    let of_length = |length| {
        let view = TensorRef::from_slice_strided(&data, 0, [1, 1, length, 64], [0, 0, 0, 1]).unwrap();
        let spec = AttentionSpec::new().with_causal(Causal::TopLeft);
        explain(view, view, view, &spec).unwrap().plan.scratch_bytes()
    };
    // Room for the rows of the largest task, of which a short sequence or many cores leave less; a row of scores of the
    // longest alone would take 512 KiB.
    for length in [512, 4096, 65536, 131_072] {
        assert!(of_length(length) < 256 << 10, "{length} keys: {} bytes", of_length(length));
    }
}
