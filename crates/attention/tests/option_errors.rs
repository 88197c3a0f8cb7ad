//! Every option that can be wrong is refused by a typed error that names it, and nothing is written.

use qkv_attention::cache::{KvCache, KvCacheConfig};
use qkv_attention::merge::{Part, merge};
use qkv_attention::rotary::{Rotary, RotaryConfig};
use qkv_attention::{
    AttentionError, AttentionSpec, Bias, BlockMask, Broadcast, Causal, KeysValues, Outputs, Packed,
    QueryRotary, T5Bias, Tensor, TensorMut, TensorRef, Window, attention, attention_cascade, attention_into,
    attention_packed,
};

fn tensors() -> (Tensor, Tensor) {
    (Tensor::zeros([2, 4, 10, 8]).unwrap(), Tensor::zeros([2, 2, 20, 8]).unwrap())
}

/// The refusal of a call with this spec, as text; the output must be left alone.
fn refusal(spec: &AttentionSpec<'_>) -> String {
    let (q, k) = tensors();
    let mut out = Tensor::from_fn([2, 4, 10, 8], |_| 7.0).unwrap();
    let error = attention_into(q.view(), k.view(), k.view(), spec, Outputs::new(out.view_mut())).unwrap_err();
    assert!(out.data().iter().all(|&x| x == 7.0));
    error.to_string()
}

#[test]
fn masks_and_biases_that_do_not_broadcast() {
    let full = "[2, 4, 10, 20]";
    let (bits, numbers, halves) = (vec![true; 4000], vec![0.0f32; 4000], vec![0u16; 4000]);
    for shape in [[2, 4, 10, 19], [3, 1, 1, 1], [1, 2, 10, 20], [1, 1, 2, 20], [1, 1, 1, 0]] {
        let spec = AttentionSpec::new();
        let mask = Broadcast::from_slice(&bits, shape).unwrap();
        let text = refusal(&spec.clone().with_mask(mask));
        assert_eq!(text, format!("mask: shape {shape:?} does not broadcast to {full}"));
        let bias = Broadcast::from_slice(&numbers, shape).unwrap();
        assert!(refusal(&spec.clone().with_bias(Bias::F32(bias))).starts_with("bias: shape"));
        let bias = Broadcast::from_slice(&halves, shape).unwrap();
        assert!(
            refusal(&spec.clone().with_bias(Bias::Half(qkv_attention::HalfKind::F16, bias)))
                .starts_with("bias")
        );
    }
    assert!(Broadcast::from_slice(&bits[..199], [1, 1, 10, 20]).is_err());
    assert!(Broadcast::from_slice_strided(&bits, 3990, [1, 1, 10, 20], [0, 0, 0, 1]).is_err());
    assert!(Broadcast::from_slice_strided(&bits, 3980, [1, 1, 10, 20], [0, 0, 0, 1]).is_ok());
    assert!(Broadcast::from_slice_strided(&bits, 19, [1, 1, 10, 20], [0, 0, 20, -1]).is_ok());
    assert!(Broadcast::from_slice_strided(&bits, 18, [1, 1, 10, 20], [0, 0, 20, -1]).is_err());
}

#[test]
fn lists_of_a_wrong_count_or_with_wrong_entries() {
    let spec = AttentionSpec::new;
    assert_eq!(refusal(&spec().with_sinks(&[0.0; 3])), "sinks: 3 entries, expected 4");
    assert_eq!(
        refusal(&spec().with_sinks(&[0.0, f32::NAN, 0.0, 0.0])),
        "sinks[1]: NaN, expected a number below infinity"
    );
    assert_eq!(refusal(&spec().with_alibi_slopes(&[0.0; 5])), "alibi_slopes: 5 entries, expected 8");
    assert_eq!(
        refusal(&spec().with_alibi_slopes(&[0.0, 0.0, f32::INFINITY, 0.0])),
        "alibi_slopes[2]: inf, expected a finite number"
    );
    assert_eq!(refusal(&spec().with_key_lengths(&[20])), "key_lengths: 1 entries, expected 2");
    assert_eq!(refusal(&spec().with_key_lengths(&[20, 21])), "key_lengths[1]: 21, expected at most 20");
    assert_eq!(refusal(&spec().with_key_starts(&[25, 0])), "key_starts[0]: 25, expected at most 20");
    let causal = spec().with_causal(Causal::TopLeft);
    assert_eq!(refusal(&causal.with_prefix(&[1, 30])), "prefix[1]: 30, expected at most 20");
    assert_eq!(refusal(&spec().with_prefix(&[1, 3])), "prefix: not supported together with no causal mask");
    assert_eq!(refusal(&spec().with_documents(&[5, 4, 20])), "documents[1]: 4 after 5, expected ascending");
    assert_eq!(refusal(&spec().with_documents(&[5, 19])), "documents: 19 entries, expected 20");
    assert_eq!(refusal(&spec().with_documents(&[5, 21])), "documents[1]: 21, expected at most 20");
}

#[test]
fn numbers_out_of_range() {
    let spec = AttentionSpec::new;
    for cap in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        assert_eq!(
            refusal(&spec().with_softcap(cap)),
            format!("softcap: {cap}, expected a positive finite number")
        );
    }
    for (scale, cap) in [(1.0, 1e-39), (1e10, 1e-30), (0.5, 1e-45)] {
        let text = refusal(&spec().with_scale(scale).with_softcap(cap));
        assert!(
            text.starts_with("softcap: ") && text.ends_with("by which the scale can be divided"),
            "{text}"
        );
    }
    let window = Window::new(None, None).with_dilation(0);
    assert_eq!(refusal(&spec().with_window(window)), "window: dilation 0, expected at least 1");
    let table = [0.0; 32 * 4];
    let t5 =
        |buckets, max_distance, bidirectional| T5Bias { table: &table, buckets, max_distance, bidirectional };
    for bad in [t5(31, 128, false), t5(0, 128, false), t5(2, 128, true), t5(32, 16, false), t5(32, 8, true)] {
        assert!(refusal(&spec().with_t5_bias(bad)).starts_with("t5_bias: "), "{bad:?}");
    }
    let short = T5Bias { table: &table[1..], ..t5(32, 128, true) };
    assert_eq!(refusal(&spec().with_t5_bias(short)), "t5_bias: 127 entries, expected 128");
}

#[test]
fn block_tables_out_of_range() {
    assert_eq!(
        BlockMask::empty([1, 1, 2, 2], [0, 5]).unwrap_err().to_string(),
        "block_mask: blocks of [0, 5], expected at least 1 x 1"
    );
    assert_eq!(
        BlockMask::from_indices([1, 1, 2, 2], [5, 5], [[0, 0, 1, 2]]).unwrap_err().to_string(),
        "block_mask: index [0, 0, 1, 2] outside the table of [1, 1, 2, 2]"
    );
    assert!(matches!(
        BlockMask::empty([usize::MAX, 2, 2, 2], [1, 1]).unwrap_err(),
        AttentionError::TooLarge { .. }
    ));
    for shape in [[1, 1, 2, 3], [1, 1, 1, 4], [3, 1, 2, 4], [1, 2, 2, 4]] {
        let table = BlockMask::empty(shape, [5, 5]).unwrap();
        assert_eq!(
            refusal(&AttentionSpec::new().with_block_mask(&table)),
            format!("block_mask: shape {shape:?} does not broadcast to [2, 4, 2, 4]")
        );
    }
    let good = BlockMask::from_indices([1, 4, 2, 4], [5, 5], [[0, 3, 1, 2], [0, 3, 1, 2]]).unwrap();
    let (q, k) = tensors();
    assert!(attention(q.view(), k.view(), k.view(), &AttentionSpec::new().with_block_mask(&good)).is_ok());
}

#[test]
fn packed_batches() {
    let (q, k) = (Tensor::<f32>::zeros([1, 2, 10, 8]).unwrap(), Tensor::zeros([1, 2, 20, 8]).unwrap());
    let refusal = |query_ends: &[usize], key_ends: &[usize], spec: &AttentionSpec<'_>| {
        let mut out = Tensor::from_fn([1, 2, 10, 8], |_| 7.0).unwrap();
        let packed = Packed { query_ends, key_ends };
        let outputs = Outputs::new(out.view_mut());
        let error = attention_packed(q.view(), k.view(), k.view(), packed, spec, outputs).unwrap_err();
        assert!(out.data().iter().all(|&x| x == 7.0));
        error.to_string()
    };
    let spec = AttentionSpec::new();
    assert_eq!(
        refusal(&[0, 6, 5, 10], &[0, 1, 2, 20], &spec),
        "query_ends[2]: 5 after 6, expected ascending"
    );
    assert_eq!(refusal(&[0, 10], &[0, 21], &spec), "key_ends[1]: 21, expected at most 20");
    assert_eq!(refusal(&[0, 9], &[0, 20], &spec), "query_ends: 9 entries, expected 10");
    assert_eq!(refusal(&[1, 10], &[0, 20], &spec), "query_ends[0]: 1, expected at most 0");
    assert_eq!(refusal(&[], &[0, 20], &spec), "query_ends: 0 entries, expected 1");
    assert_eq!(refusal(&[0, 10], &[0, 5, 20], &spec), "key_ends: 3 entries, expected 2");
    let ones = [true];
    let mask = Broadcast::from_slice(&ones, [1, 1, 1, 1]).unwrap();
    let spec = AttentionSpec::new().with_mask(mask);
    assert_eq!(refusal(&[0, 10], &[0, 20], &spec), "mask: not supported together with a packed batch");
    let (q, k) = tensors();
    let mut out = Tensor::zeros([2, 4, 10, 8]).unwrap();
    let packed = Packed { query_ends: &[0, 10], key_ends: &[0, 20] };
    let outputs = Outputs::new(out.view_mut());
    let error =
        attention_packed(q.view(), k.view(), k.view(), packed, &AttentionSpec::new(), outputs).unwrap_err();
    assert!(error.to_string().starts_with("query: batch is 2, expected 1"));
}

#[test]
fn sizes_whose_products_wrap_around() {
    // 2^63 buckets for 4 heads, and 2^20 batches of 2^48 queries, come to 0.
    let t5 = T5Bias { table: &[], buckets: 1 << 63, max_distance: usize::MAX, bidirectional: false };
    assert!(refusal(&AttentionSpec::new().with_t5_bias(t5)).starts_with("t5_bias: "));
    let table = Rotary::new(&RotaryConfig::new(4)).unwrap();
    let rotary = QueryRotary { table: &table, positions: &[] };
    let values = [0.0; 4];
    let q = TensorRef::from_slice_strided(&values, 0, [1 << 20, 1, 1 << 44, 4], [0, 0, 0, 1]).unwrap();
    let k = TensorRef::from_slice_strided(&values, 0, [1 << 20, 1, 1, 4], [0, 0, 0, 1]).unwrap();
    let v = TensorRef::from_slice(&values[..0], [1 << 20, 1, 1, 0]).unwrap();
    let mut out: [f32; 0] = [];
    let out = TensorMut::from_slice(&mut out, [1 << 20, 1, 1 << 44, 0]).unwrap();
    let spec = AttentionSpec::new().with_rotary(rotary);
    let error = attention_into(q, k, v, &spec, Outputs::new(out)).unwrap_err();
    assert!(error.to_string().starts_with("rotary.positions: "), "{error}");
}

#[test]
fn nothing_in_any_number_takes_neither_time_nor_memory() {
    let values = [0.0; 4];
    let many = 1 << 42;
    let q = TensorRef::from_slice_strided(&values, 0, [many, 1, 1, 4], [0, 0, 0, 1]).unwrap();
    let v = TensorRef::from_slice(&values[..0], [many, 1, 1, 0]).unwrap();
    let no_dims = || TensorMut::<f32>::from_slice(&mut [], [many, 1, 1, 0]).unwrap();
    attention_into(q, q, v, &AttentionSpec::new(), Outputs::new(no_dims())).unwrap();
    let one = |dim| TensorRef::from_slice(&values[..dim], [1, 1, 1, dim]).unwrap();
    let (shared, own) = (KeysValues::new(one(4), one(0)), KeysValues::new(q, v));
    let error =
        attention_cascade(q, shared, own, &AttentionSpec::new(), Outputs::new(no_dims())).unwrap_err();
    assert!(matches!(error, AttentionError::TooLarge { .. }), "{error}");

    assert!(Rotary::new(&RotaryConfig::new(1 << 45).with_max_length(0)).is_err());
    assert!(Rotary::new(&RotaryConfig::new(usize::MAX - 1)).is_err());
    BlockMask::from_fn([1 << 40, 1, 1, 0], [1, 1], |_| unreachable!()).unwrap();
    let wide = 1 << 45;
    let rows = || TensorRef::from_slice(&values[..0], [0, 1, 1, wide]).unwrap();
    let out = TensorMut::<f32>::from_slice(&mut [], [0, 1, 1, wide]).unwrap();
    let part = || Part { out: rows(), lse: &[] };
    merge(part(), part(), out, &mut []).unwrap();
    let mut cache = KvCache::new(KvCacheConfig::new(1, 1, 0, wide, 1)).unwrap();
    let none = |dim| TensorRef::from_slice(&values[..0], [1, 1, 0, dim]).unwrap();
    cache.append(none(wide), none(1)).unwrap();
}
