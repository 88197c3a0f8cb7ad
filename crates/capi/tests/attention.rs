//! Attention through the C functions, against the Rust crate's f64 reference, which is given the same values.

mod support;

use qkv::reference::oracle;
use qkv::{AttentionSpec, Bias, Broadcast, Causal, Window};
use qkv_capi::*;
use support::*;

/// Rows of results.
fn rows([batch, heads, length, _]: [usize; 4]) -> usize {
    batch * heads * length
}

/// Random options in both languages, over lists that the caller keeps.
struct Lists {
    mask: Vec<u8>,
    bias: Vec<f32>,
    slopes: Vec<f32>,
    sinks: Vec<f32>,
    lengths: Vec<i64>,
    starts: Vec<i64>,
}

#[test]
fn random_calls_agree_with_the_reference() {
    let mut seen = [0; 12];
    for seed in 0..400 {
        let random = &mut Random::new(seed);
        let (batch, kv_heads, group) = (random.below(3) + 1, random.below(3) + 1, random.below(3) + 1);
        let (queries, keys) = (random.below(40), random.below(70));
        let (dim, value_dim) = (random.below(40) + 1, random.below(40) + 1);
        let heads = kv_heads * group;
        let dtype = random.below(3) as qkv_dtype;
        let (bshd, value_bshd, bias_is_half) = (random.chance(2), random.chance(2), random.chance(2));
        let q = Made::random(random, [batch, heads, queries, dim], dtype, bshd);
        let k = Made::random(random, [batch, kv_heads, keys, dim], dtype, bshd);
        let v = Made::random(random, [batch, kv_heads, keys, value_dim], dtype, value_bshd);

        let full = [batch, heads, queries, keys];
        let part = |random: &mut Random| full.map(|size| if random.chance(2) { 1 } else { size });
        let (mask_shape, bias_shape) = (part(random), part(random));
        let count = |shape: [usize; 4]| shape.iter().product::<usize>();
        let slopes = if random.chance(2) { heads } else { batch * heads };
        let lists = Lists {
            mask: (0..count(mask_shape)).map(|_| u8::from(!random.chance(3))).collect(),
            bias: random.floats(count(bias_shape)),
            slopes: random.floats(slopes),
            sinks: random.floats(heads),
            lengths: (0..batch).map(|_| random.below(keys + 1) as i64).collect(),
            starts: (0..batch).map(|_| random.below(keys + 1) as i64).collect(),
        };
        let sizes = |list: &[i64]| list.iter().map(|&x| x as usize).collect::<Vec<_>>();
        let (lengths, starts) = (sizes(&lists.lengths), sizes(&lists.starts));
        let bools: Vec<bool> = lists.mask.iter().map(|&byte| byte == 1).collect();
        let made_bias: Vec<f32> = match bias_is_half {
            true => lists.bias.iter().map(|&x| qkv::bf16::from_f32(x).to_f32()).collect(),
            false => lists.bias.clone(),
        };
        let half_bias: Vec<qkv::bf16> = lists.bias.iter().map(|&x| qkv::bf16::from_f32(x)).collect();

        let mut options: qkv_attention_options = zeroed();
        let mut spec = AttentionSpec::new();
        let contiguous = |data: *const u8, dtype, shape: [usize; 4]| {
            let [a, b, c, d] = shape.map(|size| size as i64);
            qkv_tensor_bhsd(data.cast(), dtype, a, b, c, d)
        };
        let mask_tensor = contiguous(lists.mask.as_ptr(), QKV_DTYPE_BOOL, mask_shape);
        let bias_tensor = match bias_is_half {
            true => contiguous(half_bias.as_ptr().cast(), QKV_DTYPE_BF16, bias_shape),
            false => contiguous(lists.bias.as_ptr().cast(), QKV_DTYPE_F32, bias_shape),
        };
        let mut option = |which: usize, one_in| {
            let take = random.chance(one_in);
            seen[which] += u32::from(take);
            take
        };
        if option(0, 3) {
            options.mask = &mask_tensor;
            spec = spec.with_mask(Broadcast::from_slice(&bools, mask_shape).expect("fits"));
        }
        if option(1, 3) {
            options.bias = &bias_tensor;
            spec = spec.with_bias(Bias::F32(Broadcast::from_slice(&made_bias, bias_shape).expect("fits")));
        }
        if option(2, 4) {
            options.alibi_slopes = floats(&lists.slopes);
            spec = spec.with_alibi_slopes(&lists.slopes);
        }
        if option(3, 4) {
            options.sinks = floats(&lists.sinks);
            spec = spec.with_sinks(&lists.sinks);
        }
        if option(4, 4) {
            options.key_lengths = integers(&lists.lengths);
            spec = spec.with_key_lengths(&lengths);
        }
        if option(5, 6) {
            options.key_starts = integers(&lists.starts);
            spec = spec.with_key_starts(&starts);
        }
        if option(6, 4) {
            (options.has_scale, options.scale) = (1, 0.3);
            spec = spec.with_scale(0.3);
        }
        if option(7, 4) {
            options.softcap = 0.8;
            spec = spec.with_softcap(0.8);
        }
        if option(8, 4) {
            options.causal = QKV_CAUSAL_TOP_LEFT;
            spec = spec.with_causal(Causal::TopLeft);
        } else if option(9, 4) {
            options.causal = QKV_CAUSAL_BOTTOM_RIGHT;
            spec = spec.with_causal(Causal::BottomRight);
        } else if option(10, 4) {
            (options.causal, options.causal_offset) = (QKV_CAUSAL_OFFSET, -3);
            spec = spec.with_causal(Causal::Offset(-3));
        }
        if option(11, 4) {
            (options.has_window, options.window_left, options.window_right) = (1, 7, -1);
            options.window_dilation = 2;
            spec = spec.with_window(Window::new(Some(7), None).with_dilation(2));
        }

        let shape = [batch, heads, queries, value_dim];
        let mut out = vec![f32::NAN; count(shape)];
        let (mut lse, mut maxima) = (vec![f32::NAN; rows(shape)], vec![f32::NAN; rows(shape)]);
        let mut outputs = output(&mut out, shape);
        (outputs.lse, outputs.maxima) = (list(&mut lse), list(&mut maxima));
        // SAFETY: everything described is there.
        ok(unsafe { qkv_attention(&q.tensor(), &k.tensor(), &v.tensor(), &options, &outputs) });

        let expected = oracle(q.view(), k.view(), v.view(), &spec);
        assert!(difference(&out, expected.output.data()) < 2e-5, "seed {seed}");
        assert!(difference(&lse, &expected.lse) < 2e-5, "seed {seed}");
        assert!(maxima.iter().zip(&lse).all(|(max, lse)| max <= &(lse + 1e-5)), "seed {seed}");
    }
    assert!(seen.iter().all(|&times| times > 20), "{seen:?}");
}

/// The options that the random calls leave out.
#[test]
fn prefix_documents_t5_and_blocks() {
    let random = &mut Random::new(5);
    let shape = [2, 4, 24, 16];
    let [q, k, v] = [0; 3].map(|_| Made::f32(random, shape));
    let table = random.floats(8 * 4);
    let blocks: Vec<u8> = (0..2 * 3 * 6).map(|i| u8::from(i % 3 != 1)).collect();
    let block_mask = qkv_tensor_bhsd(blocks.as_ptr().cast(), QKV_DTYPE_BOOL, 2, 1, 3, 6);
    let of_blocks =
        qkv::BlockMask::from_fn([2, 1, 3, 6], [8, 4], |[b, _, i, j]| (b * 18 + i * 6 + j) % 3 != 1)
            .expect("not empty");

    let with = |change: &dyn Fn(&mut qkv_attention_options), spec: &AttentionSpec<'_>| {
        let mut options: qkv_attention_options = zeroed();
        change(&mut options);
        let mut out = vec![f32::NAN; shape.iter().product()];
        let outputs = output(&mut out, shape);
        // SAFETY: everything described is there.
        ok(unsafe { qkv_attention(&q.tensor(), &k.tensor(), &v.tensor(), &options, &outputs) });
        let expected = oracle(q.view(), k.view(), v.view(), spec);
        assert!(difference(&out, expected.output.data()) < 2e-5, "{spec:?}");
    };
    with(
        &|options| {
            options.causal = QKV_CAUSAL_TOP_LEFT;
            options.prefix = integers(&[5, 0]);
        },
        &AttentionSpec::new().with_causal(Causal::TopLeft).with_prefix(&[5, 0]),
    );
    with(
        &|options| options.documents = integers(&[3, 3, 10, 24]),
        &AttentionSpec::new().with_documents(&[3, 3, 10, 24]),
    );
    let t5 = qkv::T5Bias { table: &table, buckets: 8, max_distance: 20, bidirectional: true };
    with(
        &|options| {
            options.t5_table = floats(&table);
            (options.t5_buckets, options.t5_max_distance, options.t5_bidirectional) = (8, 20, 1);
        },
        &AttentionSpec::new().with_t5_bias(t5),
    );
    with(
        &|options| {
            options.block_mask = &block_mask;
            (options.block_mask_queries, options.block_mask_keys) = (8, 4);
        },
        &AttentionSpec::new().with_block_mask(&of_blocks),
    );
}

#[test]
fn int8_keys_and_values() {
    let random = &mut Random::new(6);
    let (shape, groups) = ([1, 2, 30, 16], 4);
    let q = Made::f32(random, [1, 4, 3, 16]);
    let count = shape.iter().product::<usize>();
    let ints: Vec<i8> = (0..count).map(|_| random.below(255) as i8).collect();
    let scales = Made::f32(random, [1, 2, 30, groups]);
    let zeros = Made::f32(random, [1, 2, 30, groups]);
    let (scales_tensor, zeros_tensor) = (scales.tensor(), zeros.tensor());
    let mut k = qkv_tensor_bhsd(ints.as_ptr().cast(), QKV_DTYPE_I8, 1, 2, 30, 16);
    (k.scales, k.zeros) = (&scales_tensor, &zeros_tensor);
    let widened: Vec<f32> = (0..count)
        .map(|i| {
            let group = i / 16 * groups + i % 16 / 4;
            scales.values[group] * (f32::from(ints[i]) - zeros.values[group])
        })
        .collect();
    let wide = qkv::TensorRef::from_slice(&widened, shape).expect("fits");
    let mut out = vec![f32::NAN; 4 * 3 * 16];
    let outputs = output(&mut out, [1, 4, 3, 16]);
    // SAFETY: everything described is there.
    ok(unsafe { qkv_attention(&q.tensor(), &k, &k, std::ptr::null(), &outputs) });
    let expected = oracle(q.view(), wide, wide, &AttentionSpec::new());
    assert!(difference(&out, expected.output.data()) < 2e-3);
}

#[test]
fn packed_and_paged_sequences_have_the_bits_of_single_ones() {
    let random = &mut Random::new(7);
    let (lengths, key_lengths, dim) = ([3usize, 0, 20, 1], [9usize, 4, 33, 50], 24);
    let total = |list: &[usize]| list.iter().sum::<usize>();
    let q = Made::f32(random, [1, 4, total(&lengths), dim]);
    let k = Made::f32(random, [1, 2, total(&key_lengths), dim]);
    let v = Made::f32(random, [1, 2, total(&key_lengths), dim]);
    let ends = |list: &[usize]| {
        let mut end = 0;
        let each = list.iter().map(|&length| {
            end += length as i64;
            end
        });
        std::iter::once(0).chain(each.collect::<Vec<_>>()).collect::<Vec<i64>>()
    };
    let (query_ends, key_ends) = (ends(&lengths), ends(&key_lengths));
    let mut options: qkv_attention_options = zeroed();
    options.causal = QKV_CAUSAL_BOTTOM_RIGHT;
    let shape = [1, 4, total(&lengths), dim];
    let mut packed = vec![f32::NAN; shape.iter().product()];
    let to = output(&mut packed, shape);
    let (query_list, key_list) = (integers(&query_ends), integers(&key_ends));
    // SAFETY: everything described is there.
    ok(unsafe {
        qkv_attention_packed(&q.tensor(), &k.tensor(), &v.tensor(), query_list, key_list, &options, &to)
    });

    // Each alone: the same tensors from a row on, by strides.
    let part = |made: &Made, first: i64, length: usize| {
        let mut tensor = made.tensor();
        tensor.data = tensor.data.cast::<f32>().wrapping_add(first as usize * dim).cast();
        tensor.shape[2] = length as i64;
        tensor
    };
    for i in 0..4 {
        let mut alone = vec![f32::NAN; 4 * lengths[i] * dim];
        let to = output(&mut alone, [1, 4, lengths[i], dim]);
        let [q, k, v] = [
            part(&q, query_ends[i], lengths[i]),
            part(&k, key_ends[i], key_lengths[i]),
            part(&v, key_ends[i], key_lengths[i]),
        ];
        // SAFETY: everything described is there.
        ok(unsafe { qkv_attention(&q, &k, &v, &options, &to) });
        for head in 0..4 {
            let first = (head * shape[2] + query_ends[i] as usize) * dim;
            let rows = lengths[i] * dim;
            assert_eq!(packed[first..first + rows], alone[head * rows..][..rows]);
        }
    }

    // The same keys in pages of 8, handed out in a shuffled order.
    let (page_size, pages) = (8usize, 40usize);
    let mut pool = [vec![f32::NAN; pages * 2 * page_size * dim], vec![f32::NAN; pages * 2 * page_size * dim]];
    let mut tables = [u32::MAX; 4 * 10];
    let mut next = 0;
    for i in 0..4 {
        for j in 0..key_lengths[i] {
            if j % page_size == 0 {
                tables[i * 10 + j / page_size] = (next * 7 % pages) as u32;
                next += 1;
            }
            let page = tables[i * 10 + j / page_size] as usize;
            for head in 0..2 {
                let from = (head * total(&key_lengths) + key_ends[i] as usize + j) * dim;
                let to = ((page * 2 + head) * page_size + j % page_size) * dim;
                pool[0][to..to + dim].copy_from_slice(&k.values[from..from + dim]);
                pool[1][to..to + dim].copy_from_slice(&v.values[from..from + dim]);
            }
        }
    }
    let [keys, values] = [0, 1].map(|which| {
        let data: *const f32 = pool[which].as_ptr();
        qkv_tensor_bhsd(data.cast(), QKV_DTYPE_F32, pages as i64, 2, page_size as i64, dim as i64)
    });
    let lengths_list = key_lengths.map(|length| length as i64);
    let described = qkv_pages {
        keys: &keys,
        values: &values,
        tables: tables.as_ptr(),
        tables_stride: 10,
        lengths: integers(&lengths_list),
    };
    let mut paged = vec![f32::NAN; packed.len()];
    let to = output(&mut paged, shape);
    // SAFETY: everything described is there.
    ok(unsafe { qkv_attention_paged(&q.tensor(), query_list, &described, &options, &to) });
    assert_eq!(packed, paged);
}

#[test]
fn a_merge_of_split_keys_is_the_whole() {
    let random = &mut Random::new(8);
    let q = Made::f32(random, [2, 3, 5, 8]);
    let (k, v) = (Made::f32(random, [2, 3, 40, 8]), Made::f32(random, [2, 3, 40, 8]));
    let shape = [2, 3, 5, 8];
    let part = |first: usize, length: i64| {
        let [mut k, mut v] = [k.tensor(), v.tensor()];
        for tensor in [&mut k, &mut v] {
            tensor.data = tensor.data.cast::<f32>().wrapping_add(first * 8).cast();
            tensor.shape[2] = length;
        }
        let (mut out, mut lse) = (vec![f32::NAN; 240], vec![f32::NAN; 30]);
        let mut to = output(&mut out, shape);
        to.lse = list(&mut lse);
        // SAFETY: everything described is there.
        ok(unsafe { qkv_attention(&q.tensor(), &k, &v, std::ptr::null(), &to) });
        (out, lse)
    };
    let ((a, lse_a), (b, lse_b), (whole, lse_whole)) = (part(0, 13), part(13, 27), part(0, 40));
    let tensor = |data: &[f32]| qkv_tensor_bhsd(data.as_ptr().cast(), QKV_DTYPE_F32, 2, 3, 5, 8);
    let (ta, tb) = (tensor(&a), tensor(&b));
    let [side_a, side_b] =
        [qkv_part { output: &ta, lse: floats(&lse_a) }, qkv_part { output: &tb, lse: floats(&lse_b) }];
    let (mut out, mut lse) = (vec![f32::NAN; 240], vec![f32::NAN; 30]);
    let mut to = output(&mut out, shape);
    to.lse = list(&mut lse);
    // SAFETY: everything described is there.
    ok(unsafe { qkv_merge(&side_a, &side_b, &to) });
    let f64s = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
    assert!(difference(&out, &f64s(&whole)) < 1e-6 && difference(&lse, &f64s(&lse_whole)) < 1e-6);

    // Without the LSE the same output; into an input it is refused.
    let mut again = vec![f32::NAN; 240];
    let to = output(&mut again, shape);
    // SAFETY: everything described is there.
    ok(unsafe { qkv_merge(&side_a, &side_b, &to) });
    assert_eq!(out, again);
    let mut into = to;
    into.output.data = a.as_ptr().cast_mut().cast();
    into.output.buffer = std::ptr::null();
    // SAFETY: an overlap is refused before anything is written.
    assert_eq!(unsafe { qkv_merge(&side_a, &side_b, &into) }, qkv_status::QKV_ERROR_OVERLAP);
    assert_eq!(message(), "output: shares memory with a.output, expected memory of its own");
}

#[test]
fn a_plan_gives_the_same_bits_and_tells_how() {
    let random = &mut Random::new(9);
    let shape = [1, 4, 100, 32];
    let [q, k, v] = [0; 3].map(|_| Made::f32(random, shape));
    let sinks = random.floats(4);
    let mut options: qkv_attention_options = zeroed();
    (options.causal, options.sinks) = (QKV_CAUSAL_TOP_LEFT, floats(&sinks));
    let (mut direct, mut planned) = (vec![f32::NAN; 12800], vec![f32::NAN; 12800]);
    let to = output(&mut direct, shape);
    // SAFETY: everything described is there.
    ok(unsafe { qkv_attention(&q.tensor(), &k.tensor(), &v.tensor(), &options, &to) });

    // Without data, and with a list that is gone afterwards.
    let size = qkv_tensor_bhsd(std::ptr::null(), QKV_DTYPE_F32, 1, 4, 100, 32);
    let mut plan = std::ptr::null_mut();
    let list = sinks.clone();
    options.sinks = floats(&list);
    // SAFETY: as above; a plan reads no data.
    ok(unsafe { qkv_attention_plan_create(&size, &size, &size, &options, &mut plan) });
    drop(list);
    let to = output(&mut planned, shape);
    // SAFETY: everything described is there.
    ok(unsafe { qkv_attention_plan_run(plan, &q.tensor(), &k.tensor(), &v.tensor(), &to) });
    assert_eq!(direct, planned);

    let text = qkv_attention_plan_explain(plan);
    // SAFETY: a C string, alive as long as the plan.
    let text = unsafe { std::ffi::CStr::from_ptr(text) }.to_str().expect("ASCII");
    assert!(text.starts_with("prefill on ") && text.contains("blocks: "), "{text}");

    let other = Made::f32(random, [1, 4, 99, 32]);
    // SAFETY: everything described is there.
    let status = unsafe { qkv_attention_plan_run(plan, &other.tensor(), &k.tensor(), &v.tensor(), &to) };
    assert_eq!(status, qkv_status::QKV_ERROR_SHAPE);
    assert_eq!(message(), "query: shape [1, 4, 99, 32], expected the plan's [1, 4, 100, 32]");
    ok(qkv_attention_plan_destroy(plan));
    assert_eq!(qkv_attention_plan_destroy(plan), qkv_status::QKV_ERROR_HANDLE);
    assert!(qkv_attention_plan_explain(plan).is_null());
    // SAFETY: a handle that is gone is refused.
    let status = unsafe { qkv_attention_plan_run(plan, &q.tensor(), &k.tensor(), &v.tensor(), &to) };
    assert_eq!(status, qkv_status::QKV_ERROR_HANDLE);
    ok(qkv_attention_plan_destroy(std::ptr::null_mut()));
}

#[test]
fn outputs_between_the_parts_of_a_packed_projection() {
    // (tokens, [q, k, v, out], heads, dim) in one buffer: all four are views of it.
    let random = &mut Random::new(10);
    let (tokens, heads, dim) = (9usize, 3usize, 8usize);
    let mut buffer = random.floats(tokens * 4 * heads * dim);
    let before = buffer.clone();
    let size = 4 * buffer.len();
    let data = buffer.as_mut_ptr();
    let part = |index: usize| {
        let mut tensor = qkv_tensor_bhsd(std::ptr::null(), QKV_DTYPE_F32, 1, 3, 9, 8);
        tensor.data = data.wrapping_add(index * heads * dim).cast_const().cast();
        tensor.strides = [0, dim as i64, (4 * heads * dim) as i64, 1];
        (tensor.buffer, tensor.buffer_size) = (data.cast_const().cast(), size);
        tensor
    };
    let [q, k, v, out] = [0, 1, 2, 3].map(part);
    let mut to = output(&mut [], [0; 4]);
    to.output.data = out.data.cast_mut();
    (to.output.shape, to.output.strides) = (out.shape, out.strides);
    to.output.buffer = std::ptr::null();
    // SAFETY: everything described is there, and the output's values are nobody else's.
    ok(unsafe { qkv_attention(&q, &k, &v, std::ptr::null(), &to) });
    let made = |index: usize| {
        let at = |[_, h, s, d]: [usize; 4]| before[((s * 4 + index) * heads + h) * dim + d];
        qkv::Tensor::from_fn([1, heads, tokens, dim], at).expect("small")
    };
    let expected = oracle(made(0).view(), made(1).view(), made(2).view(), &AttentionSpec::new());
    for (i, &value) in buffer.iter().enumerate() {
        let (s, part, h, d) = (i / dim / heads / 4, i / dim / heads % 4, i / dim % heads, i % dim);
        if part < 3 {
            assert_eq!(value, before[i]);
        } else {
            let want = expected.output.data()[(h * tokens + s) * dim + d];
            assert!((f64::from(value) - want).abs() < 1e-5);
        }
    }
}
