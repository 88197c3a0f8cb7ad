//! Key/value caches: what each storage type keeps of a value, what the calls do, and that refusals change
//! nothing.

mod common;

use common::random;
use half::{bf16, f16};
use qkv_attention::cache::{CacheError, KvCache, KvCacheConfig, PagedCache, PagedCacheConfig, Storage};
use qkv_attention::{Argument, AttentionSpec, Causal, Data, Int8Ref, Tensor, TensorRef, attention};

const INT8: Storage = Storage::Int8 { group: None, zero_point: false };

fn storages() -> [Storage; 7] {
    [
        Storage::F32,
        Storage::F16,
        Storage::Bf16,
        INT8,
        Storage::Int8 { group: None, zero_point: true },
        Storage::Int8 { group: Some(32), zero_point: false },
        Storage::Int8 { group: Some(32), zero_point: true },
    ]
}

/// A row as it reads, and the scale of each value (0 where there are none).
fn read(data: &Data<'_>, [b, h, p]: [usize; 3]) -> (Vec<f32>, Vec<f32>) {
    match data {
        Data::F32(x) => (x.row(b, h, p).to_vec(), vec![0.0; x.shape()[3]]),
        Data::F16(x) => (x.row(b, h, p).iter().map(|x| x.to_f32()).collect(), vec![0.0; x.shape()[3]]),
        Data::Bf16(x) => (x.row(b, h, p).iter().map(|x| x.to_f32()).collect(), vec![0.0; x.shape()[3]]),
        Data::Int8(x) => {
            let (values, scales) = (x.values().row(b, h, p), x.scales().row(b, h, p));
            let zeros = x.zeros().map_or(vec![0.0; scales.len()], |zeros| zeros.row(b, h, p).to_vec());
            let group = values.len() / scales.len();
            let value = |(d, &q): (usize, &i8)| scales[d / group] * (f32::from(q) - zeros[d / group]);
            let scales = (0..values.len()).map(|d| scales[d / group]).collect();
            (values.iter().enumerate().map(value).collect(), scales)
        }
        _ => panic!("a type without a reader"),
    }
}

/// All that can be read of a cache, for comparisons before and after.
fn contents(cache: &KvCache) -> (Vec<usize>, Vec<usize>, Vec<Vec<f32>>) {
    let lengths = cache.lengths().to_vec();
    let dropped = (0..lengths.len()).map(|batch| cache.dropped(batch).unwrap()).collect();
    let mut rows = Vec::new();
    for data in [cache.keys(), cache.values()] {
        for (batch, &length) in lengths.iter().enumerate() {
            for head in 0..data.shape()[1] {
                rows.extend((0..length).map(|p| read(&data, [batch, head, p]).0));
            }
        }
    }
    (lengths, dropped, rows)
}

fn one(values: &[f32]) -> Tensor<f32> {
    Tensor::from_vec(values.to_vec(), [1, 1, 1, values.len()]).unwrap()
}

/// What comes back of one row, with scales.
fn round_trip(storage: Storage, row: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let config = KvCacheConfig::new(1, 1, 1, row.len(), row.len()).with_storage(storage);
    let mut cache = KvCache::new(config).unwrap();
    cache.append(one(row).view(), one(row).view()).unwrap_or_else(|e| panic!("{storage:?} {row:?}: {e}"));
    let (key, value) = (read(&cache.keys(), [0, 0, 0]), read(&cache.values(), [0, 0, 0]));
    assert_eq!(key, value);
    key
}

#[test]
fn what_each_type_keeps() {
    for (seed, (factor, shift)) in
        [(1.0, 0.0), (1e-3, 0.0), (300.0, 0.0), (1.0, 5.0), (0.01, -7.0), (1e-6, 1000.0)]
            .into_iter()
            .enumerate()
    {
        for round in 0..200 {
            let row: Vec<f32> = random([1, 1, 1, 64], (seed * 1000 + round) as u64)
                .data()
                .iter()
                .map(|x| x * factor + shift)
                .collect();
            for storage in storages() {
                let (back, scales) = round_trip(storage, &row);
                for ((&x, &y), &scale) in row.iter().zip(&back).zip(&scales) {
                    let error = (f64::from(x) - f64::from(y)).abs();
                    let (x, scale) = (f64::from(x), f64::from(scale));
                    let bound = match storage {
                        Storage::F32 => 0.0,
                        // Half a unit in the last place, of normal numbers and below them.
                        Storage::F16 => (x.abs() * 2f64.powi(-11)).max(2f64.powi(-25)),
                        Storage::Bf16 => x.abs() * 2f64.powi(-8),
                        // The products are rounded to f32; where the zero point is large, the differences as
                        // well.
                        Storage::Int8 { zero_point: false, .. } => scale * (0.5 + 1e-4),
                        Storage::Int8 { zero_point: true, .. } => scale * (0.5 + 0.01),
                        _ => unreachable!(),
                    };
                    assert!(error <= bound, "{storage:?}: {x} came back as {y}: {error} > {bound}");
                }
            }
        }
    }
}

#[test]
fn scales_are_as_fine_as_the_range_allows() {
    let row: Vec<f32> = random([1, 1, 1, 64], 3).data().iter().map(|x| x + 1.0).collect();
    for group in [64, 32, 16] {
        let (_, symmetric) = round_trip(Storage::Int8 { group: Some(group), zero_point: false }, &row);
        let (_, ranged) = round_trip(Storage::Int8 { group: Some(group), zero_point: true }, &row);
        for ((row, symmetric), ranged) in
            row.chunks(group).zip(symmetric.chunks(group)).zip(ranged.chunks(group))
        {
            let low = row.iter().copied().fold(f32::INFINITY, f32::min);
            let high = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert!(symmetric.iter().all(|scale| (scale * 127.0 / high - 1.0).abs() < 1e-6));
            assert!(ranged.iter().all(|scale| (scale * 255.0 / (high - low) - 1.0).abs() < 1e-6));
        }
    }
}

#[test]
fn halves_round_to_even() {
    // Between 1 and its neighbours, and between the second and third.
    let row =
        [1.0 + 2f32.powi(-11), 1.0 + 3.0 * 2f32.powi(-11), 1.0 + 2f32.powi(-8), 1.0 + 3.0 * 2f32.powi(-8)];
    let half = round_trip(Storage::F16, &row).0;
    assert_eq!(half[..2], [1.0, 1.0 + 2f32.powi(-9)]);
    assert_eq!(round_trip(Storage::Bf16, &row).0[2..], [1.0, 1.0 + 2f32.powi(-6)]);
    assert_eq!(
        round_trip(Storage::F16, &[65519.0, 65520.0, -1e9]).0,
        [65504.0, f32::INFINITY, f32::NEG_INFINITY]
    );
}

#[test]
fn odd_rows_of_8_bits() {
    let (tiny, least, most) = (f32::MIN_POSITIVE, f32::from_bits(1), f32::MAX);
    let rows: [&[f32]; 10] = [
        &[0.0; 4],
        &[-0.0, 0.0],
        &[3.7; 5],
        &[-3.7; 5],
        &[least; 3],
        &[tiny, -tiny, 0.0],
        &[most, -most, 0.0],
        &[most; 3],
        &[1e6, 1e6 + 0.0625],
        &[-1e30, 1e-30],
    ];
    for zero_point in [false, true] {
        for row in rows {
            let (back, scales) = round_trip(Storage::Int8 { group: None, zero_point }, row);
            for ((x, y), scale) in row.iter().zip(back).zip(scales) {
                let error = (f64::from(*x) - f64::from(y)).abs();
                assert!(error <= f64::from(scale) * 0.51, "{row:?} ({zero_point}): {x} came back as {y}");
            }
        }
        // Constant rows come back as they were.
        for x in [0.0, 3.7, -1e-3] {
            let back = round_trip(Storage::Int8 { group: None, zero_point }, &[x; 4]).0;
            assert!(back.iter().all(|y| (x - y).abs() <= x.abs() * f32::EPSILON), "{x}: {back:?}");
        }
    }
}

#[test]
fn rows_of_every_type_in_every_type() {
    let shape = [2, 3, 4, 32];
    let exact = random(shape, 5);
    let halves: Vec<f16> = exact.data().iter().map(|&x| f16::from_f32(x)).collect();
    let brains: Vec<bf16> = exact.data().iter().map(|&x| bf16::from_f32(x)).collect();
    let halves = TensorRef::from_slice(&halves, shape).unwrap();
    let brains = TensorRef::from_slice(&brains, shape).unwrap();
    let wide = |f: &dyn Fn([usize; 4]) -> f32| Tensor::from_fn(shape, f).unwrap();
    let wide_halves = wide(&|[b, h, p, d]| halves.row(b, h, p)[d].to_f32());
    let wide_brains = wide(&|[b, h, p, d]| brains.row(b, h, p)[d].to_f32());
    for storage in storages() {
        let new = || KvCache::new(KvCacheConfig::new(2, 3, 6, 32, 32).with_storage(storage)).unwrap();
        for (narrow, wide) in
            [(Data::from(halves), wide_halves.view()), (Data::from(brains), wide_brains.view())]
        {
            let (mut a, mut b, mut c) = (new(), new(), new());
            a.append(narrow, narrow).unwrap();
            b.append(wide, wide).unwrap();
            c.append_with(narrow, wide, |_, _| {}).unwrap();
            assert_eq!(contents(&a), contents(&b));
            assert_eq!(contents(&a), contents(&c));
        }
    }
}

#[test]
fn strided_rows_are_read_where_they_lie() {
    // (batch, length, heads, dim), and a slice of a packed projection.
    let packed = random([2, 5, 3, 24], 7);
    let (offset, strides) = (8, [5 * 3 * 24, 24, 3 * 24, 1]);
    let k = TensorRef::from_slice_strided(packed.data(), offset, [2, 3, 5, 8], strides).unwrap();
    let mut cache = KvCache::new(KvCacheConfig::new(2, 3, 5, 8, 8)).unwrap();
    cache.append(k, k).unwrap();
    for ([b, h], p) in [([0, 0], 0), ([1, 2], 4), ([0, 1], 3)] {
        let at = ((b * 5 + p) * 3 + h) * 24 + 8;
        assert_eq!(read(&cache.keys(), [b, h, p]).0, packed.data()[at..at + 8]);
    }
}

#[test]
fn lengths_differ_and_come_back() {
    let mut cache = KvCache::new(KvCacheConfig::new(3, 2, 8, 4, 6)).unwrap();
    assert_eq!((cache.keys().shape(), cache.values().shape()), ([3, 2, 0, 4], [3, 2, 0, 6]));
    cache.append(random([3, 2, 2, 4], 1).view(), random([3, 2, 2, 6], 2).view()).unwrap();
    let (k, v) = (random([1, 2, 5, 4], 3), random([1, 2, 5, 6], 4));
    cache.append_to(1, k.view(), v.view()).unwrap();
    assert_eq!(cache.lengths(), [2, 7, 2]);
    assert_eq!(cache.keys().shape(), [3, 2, 7, 4]);
    assert_eq!(read(&cache.keys(), [1, 1, 2]).0, k.view().row(0, 1, 0));
    assert_eq!(read(&cache.values(), [1, 0, 6]).0, v.view().row(0, 0, 4));
    cache.truncate(1, 3).unwrap();
    assert_eq!(cache.lengths(), [2, 3, 2]);
    cache.clear(0).unwrap();
    assert_eq!(cache.lengths(), [0, 3, 2]);
    cache.reset();
    assert_eq!(cache.lengths(), [0, 0, 0]);
    assert_eq!(cache.bytes(), 3 * 2 * 8 * (4 + 6) * 4);
}

#[test]
fn rolling_keeps_the_window_and_counts_what_it_drops() {
    let mut cache = KvCache::new(KvCacheConfig::new(1, 1, 8, 1, 1).with_window(3)).unwrap();
    let mut seen = Vec::new();
    for token in 0..40 {
        let row = one(&[0.0]);
        cache.append_with(row.view(), row.view(), |position, row| row[0] = position as f32).unwrap();
        let (length, dropped) = (cache.lengths()[0], cache.dropped(0).unwrap());
        assert_eq!(dropped + length, token + 1);
        assert!(length >= 3.min(token + 1) && length <= 8);
        for row in 0..length {
            assert_eq!(read(&cache.keys(), [0, 0, row]).0, [(dropped + row) as f32]);
        }
        seen.push(dropped);
    }
    seen.dedup();
    // It moves once in capacity - window tokens.
    assert_eq!(seen, [0, 5, 10, 15, 20, 25, 30, 35]);
    cache.clear(0).unwrap();
    assert_eq!(cache.dropped(0), Ok(0));
}

#[test]
fn decoding_with_a_cache_is_attention_over_all_tokens() {
    let (heads, dim) = (2, 16);
    let (q, k, v) =
        (random([1, 4, 20, dim], 1), random([1, heads, 20, dim], 2), random([1, heads, 20, dim], 3));
    let spec = AttentionSpec::new().with_causal(Causal::BottomRight);
    let whole = attention(q.view(), k.view(), v.view(), &spec).unwrap();
    let mut cache = KvCache::new(KvCacheConfig::new(1, heads, 32, dim, dim)).unwrap();
    for token in 0..20 {
        let part = |x: &Tensor<f32>| {
            let [_, heads, ..] = x.shape();
            Tensor::from_fn([1, heads, 1, dim], |[_, h, _, d]| x.view().row(0, h, token)[d]).unwrap()
        };
        let (q, k, v) = (part(&q), part(&k), part(&v));
        cache.append(k.view(), v.view()).unwrap();
        let (Data::F32(keys), Data::F32(values)) = (cache.keys(), cache.values()) else { panic!("f32") };
        let spec = spec.clone().with_key_lengths(cache.lengths());
        let out = attention(q.view(), keys, values, &spec).unwrap();
        for head in 0..4 {
            for (x, y) in out.view().row(0, head, 0).iter().zip(whole.view().row(0, head, token)) {
                assert!((x - y).abs() < 1e-5, "{x} {y}");
            }
        }
    }
}

#[test]
fn a_cache_of_many_pages_of_memory_and_its_copy_hold_what_was_appended() {
    // 3 and 6 MiB: not whole huge pages, and more than one.
    let (heads, length, dims) = (3, 4096, [64, 128]);
    let mut cache = KvCache::new(KvCacheConfig::new(1, heads, length, dims[0], dims[1])).expect("a cache");
    let [k, v] = dims.map(|dim| random([1, heads, length, dim], dim as u64));
    assert!(matches!(cache.values(), Data::F32(x) if x.shape()[2] == 0));
    cache.append(k.view(), v.view()).expect("it fits");
    let copy = cache.clone();
    for data in [cache.keys(), cache.values(), copy.keys(), copy.values()] {
        let Data::F32(rows) = data else { panic!("{}", data.type_name()) };
        assert_eq!(rows.row(0, 0, 0).as_ptr().addr() % 64, 0, "rows begin with a line");
    }
    cache.reset();
    for (data, from) in [(copy.keys(), &k), (copy.values(), &v)] {
        for head in 0..heads {
            for position in 0..length {
                assert_eq!(read(&data, [0, head, position]).0, from.view().row(0, head, position));
            }
        }
    }
}

#[test]
fn constructions_that_are_refused() {
    let text = |config: KvCacheConfig| KvCache::new(config).unwrap_err().to_string();
    let paged = |config: PagedCacheConfig| PagedCache::new(config).unwrap_err().to_string();
    let group = |group| Storage::Int8 { group: Some(group), zero_point: true };
    let plain = KvCacheConfig::new(1, 2, 8, 64, 48);
    for (refusal, expected) in [
        (text(KvCacheConfig::new(1, 0, 8, 64, 64)), "kv_heads: 0, expected at least 1"),
        (text(KvCacheConfig::new(1, 2, 8, 0, 64)), "key_dim: 0, expected at least 1"),
        (text(plain.with_window(0)), "window: 0, expected at least 1"),
        (text(plain.with_window(5)), "window: 5, expected at most half the capacity of 8"),
        (text(plain.with_storage(group(0))), "storage group: 0, expected at least 1"),
        (
            text(plain.with_storage(group(24))),
            "storage: groups of 24 dims, expected a divisor of key_dim = 64",
        ),
        (
            text(plain.with_storage(group(32))),
            "storage: groups of 32 dims, expected a divisor of value_dim = 48",
        ),
        (
            text(KvCacheConfig::new(1 << 20, 1 << 20, 1 << 20, 64, 64)),
            "keys: shape [1048576, 1048576, 1048576, 64] does not fit the address space or the memory",
        ),
        // Fits an isize, but no machine.
        (
            text(KvCacheConfig::new(1, 1, 1 << 46, 1, 64)),
            "keys: shape [1, 1, 70368744177664, 1] does not fit the address space or the memory",
        ),
        (
            text(KvCacheConfig::new(0, 4, usize::MAX, 64, 64)),
            "keys: shape [0, 4, 18446744073709551615, 64] does not fit the address space or the memory",
        ),
        (paged(PagedCacheConfig::new(8, 0, 2, 64, 64)), "page_size: 0, expected at least 1"),
        (
            paged(PagedCacheConfig::new(1 << 32, 1, 1, 1, 0)),
            "pages: shape [4294967296, 1, 1, 1] does not fit the address space or the memory",
        ),
    ] {
        assert_eq!(refusal, expected);
    }
}

#[test]
fn sizes_of_0_that_mean_something() {
    for storage in storages() {
        let empty = KvCache::new(KvCacheConfig::new(0, 1, 0, 32, 0).with_storage(storage)).unwrap();
        assert_eq!((empty.keys().shape(), empty.values().shape()), ([0, 1, 0, 32], [0, 1, 0, 0]));
        let mut cache = KvCache::new(KvCacheConfig::new(1, 1, 4, 32, 0).with_storage(storage)).unwrap();
        let (k, v) = (random([1, 1, 3, 32], 1), random([1, 1, 3, 0], 1));
        cache.append(k.view(), v.view()).unwrap();
        assert_eq!(cache.values().shape(), [1, 1, 3, 0]);
        let none = random([1, 1, 0, 32], 1);
        cache.append(none.view(), random([1, 1, 0, 0], 1).view()).unwrap();
        assert_eq!(cache.lengths(), [3]);
        let mut pool = PagedCache::new(PagedCacheConfig::new(0, 4, 1, 32, 0).with_storage(storage)).unwrap();
        let id = pool.create();
        assert_eq!(pool.append(id, k.view(), v.view()), Err(CacheError::PoolFull { needed: 1, free: 0 }));
        assert_eq!(pool.view(&[id]).unwrap().as_ref().keys.shape(), [0, 1, 4, 32]);
    }
}

#[test]
fn appends_that_are_refused_change_nothing() {
    for storage in storages() {
        for window in [None, Some(3)] {
            let config = KvCacheConfig::new(2, 2, 8, 32, 32).with_storage(storage).with_window(window);
            let mut cache = KvCache::new(config).unwrap();
            cache.append(random([2, 2, 4, 32], 1).view(), random([2, 2, 4, 32], 2).view()).unwrap();
            cache.append_to(1, random([1, 2, 3, 32], 3).view(), random([1, 2, 3, 32], 4).view()).unwrap();
            let before = contents(&cache);
            let good = random([2, 2, 2, 32], 5);
            let mut refused = |k: [usize; 4], v: [usize; 4], expected: &str| {
                let error = cache.append(random(k, 6).view(), random(v, 7).view()).unwrap_err();
                assert_eq!(error.to_string(), expected);
                assert_eq!(contents(&cache), before);
            };
            let fits = [2, 2, 2, 32];
            refused([1, 2, 2, 32], fits, "key: batch is 1, expected 2");
            refused([2, 3, 2, 32], fits, "key: heads is 3, expected 2");
            refused([2, 2, 2, 31], fits, "key: head dim is 31, expected 32");
            refused(fits, [2, 2, 1, 32], "value: length is 1, expected 2");
            refused(fits, [2, 2, 2, 64], "value: head dim is 64, expected 32");
            match window {
                None => {
                    let text = "key: 2 new tokens for batch 1, expected at most 1 after 7 of 8";
                    refused(fits, fits, text);
                }
                Some(_) => {
                    let text = "key: 6 new tokens, expected at most capacity - window = 5";
                    refused([2, 2, 6, 32], [2, 2, 6, 32], text);
                }
            }
            // Integers with scales are no input.
            let (values, scales) =
                (Tensor::<i8>::filled(fits, 0).unwrap(), Tensor::zeros([2, 2, 2, 1]).unwrap());
            let bytes = Int8Ref::new(values.view(), scales.view(), None).unwrap();
            let error = cache.append(bytes, good.view()).unwrap_err();
            assert_eq!(error.to_string(), "key: int8, expected f32, f16 or bf16");
            let error = cache.append(good.view(), bytes).unwrap_err();
            assert_eq!(error, CacheError::Type { argument: Argument::Value, given: "int8" });
            let batch = cache.append_to(2, good.view(), good.view()).unwrap_err();
            assert_eq!(batch.to_string(), "batch: 2, expected an index below 2");
            assert_eq!(
                cache.truncate(0, 5).unwrap_err().to_string(),
                "length: 5, expected at most the 4 tokens held"
            );
            assert_eq!(cache.clear(2), Err(CacheError::Batch { given: 2, batches: 2 }));
            assert_eq!(contents(&cache), before);
        }
    }
}

#[test]
fn values_without_a_scale_are_refused_before_they_count() {
    for zero_point in [false, true] {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            // Once with room for the new tokens, once where the second batch must roll for them.
            for more in [1, 3] {
                let config = KvCacheConfig::new(2, 2, 8, 4, 4)
                    .with_storage(Storage::Int8 { group: Some(2), zero_point })
                    .with_window(3);
                let mut cache = KvCache::new(config).unwrap();
                cache.append(random([2, 2, 4, 4], 1).view(), random([2, 2, 4, 4], 2).view()).unwrap();
                cache
                    .append_to(1, random([1, 2, more, 4], 3).view(), random([1, 2, more, 4], 4).view())
                    .unwrap();
                let before = contents(&cache);
                let good = random([2, 2, 2, 4], 5);
                let mut broken = good.clone();
                *broken.data_mut().last_mut().unwrap() = bad;
                let error = cache.append(broken.view(), good.view()).unwrap_err();
                let expected = "in row [1, 1, 1], expected finite values for 8-bit storage";
                assert_eq!(error.to_string(), format!("key: {bad} {expected}"));
                assert_eq!(contents(&cache), before);
                let error = cache.append(good.view(), broken.view()).unwrap_err();
                assert_eq!(error.to_string(), format!("value: {bad} {expected}"));
                assert_eq!(contents(&cache), before);
                // What `prepare` makes of a key counts, not what came.
                let last = |at: usize, row: &mut [f32]| row[0] = if at == 5 { bad } else { 0.0 };
                let error = cache.append_with(good.view(), good.view(), last).unwrap_err();
                assert!(matches!(error, CacheError::NotFinite { row: [0, 0, 1], .. }), "{error}");
                assert_eq!(contents(&cache), before);
                cache.append_with(broken.view(), good.view(), |_, row| row.fill(1.0)).unwrap();
            }
        }
    }
}

#[test]
fn pages_are_shared_until_they_differ() {
    let mut cache = PagedCache::new(PagedCacheConfig::new(7, 4, 1, 2, 3)).unwrap();
    let append = |cache: &mut PagedCache, id, new, seed| {
        cache.append(id, random([1, 1, new, 2], seed).view(), random([1, 1, new, 3], seed + 1).view())
    };
    let first = cache.create();
    append(&mut cache, first, 10, 1).unwrap();
    assert_eq!(cache.pages_of(first), Ok(&[0, 1, 2][..]));
    let second = cache.fork(first).unwrap();
    assert_eq!((0..4).map(|page| cache.sharers(page)).collect::<Vec<_>>(), [2, 2, 2, 0]);
    append(&mut cache, second, 1, 3).unwrap();
    // Between what the first may grow into and its own room.
    assert_eq!(cache.pages_of(second), Ok(&[0, 1, 4][..]));
    assert_eq!(cache.sharers(2), 1);
    // The other's last page is its own again, so it goes on in place.
    append(&mut cache, first, 2, 5).unwrap();
    assert_eq!((cache.pages_of(first), cache.free_pages()), (Ok(&[0, 1, 2][..]), 3));
    // Into the middle of a shared page.
    cache.truncate(second, 6).unwrap();
    assert_eq!((cache.pages_of(second), cache.free_pages()), (Ok(&[0, 1][..]), 4));
    append(&mut cache, second, 1, 7).unwrap();
    assert_eq!(cache.pages_of(second), Ok(&[0, 4][..]));
    // At the end of a page nothing is copied.
    cache.truncate(second, 4).unwrap();
    append(&mut cache, second, 4, 9).unwrap();
    assert_eq!((cache.sharers(0), cache.free_pages()), (2, 3));

    let view = cache.view(&[second, first, second]).unwrap();
    let paged = view.as_ref();
    assert_eq!(paged.lengths, [8, 12, 8]);
    assert_eq!(paged.tables, [&[0, 4][..], &[0, 1, 2], &[0, 4]]);
    assert_eq!((paged.keys.shape(), paged.values.shape()), ([7, 1, 4, 2], [7, 1, 4, 3]));

    // 13 tokens need 4 pages, of which 3 are free.
    let error = append(&mut cache, second, 13, 11).unwrap_err();
    assert_eq!(error.to_string(), "key: the new tokens need 4 pages, expected at most the 3 that are free");
    assert_eq!((cache.len(second), cache.free_pages()), (Ok(8), 3));
    cache.free(first).unwrap();
    assert_eq!((cache.free_pages(), cache.sharers(0), cache.sharers(99)), (5, 1, 0));
    let stale = cache.free(first).unwrap_err();
    assert_eq!(stale.to_string(), "id: sequence 0.0, expected a sequence that has not been freed");
    // Its place is used again, its handle is not.
    let third = cache.create();
    assert_ne!(third, first);
    assert_eq!(append(&mut cache, first, 1, 1), Err(CacheError::Stale { given: first }));
    assert_eq!(cache.len(third), Ok(0));
    let length = cache.truncate(second, 9).unwrap_err();
    assert_eq!(length.to_string(), "length: 9, expected at most the 8 tokens held");
}

#[test]
fn a_copy_for_an_append_that_is_refused_is_no_copy() {
    let config = PagedCacheConfig::new(4, 4, 2, 4, 4).with_storage(INT8);
    let mut cache = PagedCache::new(config).unwrap();
    let first = cache.create();
    let rows = random([1, 2, 3, 4], 1);
    cache.append(first, rows.view(), rows.view()).unwrap();
    let second = cache.fork(first).unwrap();
    let mut broken = rows.clone();
    *broken.data_mut().last_mut().unwrap() = f32::NAN;
    for (k, v) in [(&broken, &rows), (&rows, &broken)] {
        let error = cache.append(second, k.view(), v.view()).unwrap_err();
        assert!(matches!(error, CacheError::NotFinite { row: [0, 1, 2], .. }), "{error}");
        assert_eq!((cache.free_pages(), cache.sharers(0)), (3, 2));
        assert_eq!((cache.pages_of(second), cache.len(second)), (Ok(&[0][..]), Ok(3)));
    }
    let batch = random([2, 2, 1, 4], 1);
    let error = cache.append(second, batch.view(), batch.view()).unwrap_err();
    assert_eq!(error.to_string(), "key: batch is 2, expected 1");
}

/// Pages of a sequence follow each other in memory as long as there is room, whoever else grows in between.
#[test]
fn sequences_that_grow_in_turns_keep_their_pages_together() {
    for (sequences, each) in [(1, 64), (2, 32), (8, 8), (16, 4), (64, 1)] {
        let mut cache = PagedCache::new(PagedCacheConfig::new(64, 2, 1, 2, 2)).unwrap();
        let token = random([1, 1, 1, 2], 1);
        for _ in 0..3 {
            let ids: Vec<_> = (0..sequences).map(|_| cache.create()).collect();
            for _ in 0..2 * each {
                for &id in &ids {
                    cache.append(id, token.view(), token.view()).unwrap();
                }
            }
            assert_eq!(cache.free_pages(), 0);
            for &id in &ids {
                let pages = cache.pages_of(id).unwrap();
                assert_eq!(pages.len(), each);
                assert!(pages.windows(2).all(|pair| pair[1] == pair[0] + 1), "{sequences}: {pages:?}");
            }
            ids.into_iter().rev().for_each(|id| cache.free(id).unwrap());
            assert_eq!(cache.free_pages(), 64);
        }
    }
    // A prompt that no gap holds takes the largest first.
    let mut cache = PagedCache::new(PagedCacheConfig::new(10, 1, 1, 2, 2)).unwrap();
    let tokens = |count| random([1, 1, count, 2], 1);
    let ids: Vec<_> = (0..10).map(|_| cache.create()).collect();
    let mut holder = vec![None; 10];
    for &id in &ids {
        cache.append(id, tokens(1).view(), tokens(1).view()).unwrap();
        holder[cache.pages_of(id).unwrap()[0] as usize] = Some(id);
    }
    for page in [1, 3, 4, 6, 7, 8] {
        cache.free(holder[page].unwrap()).unwrap();
    }
    let long = cache.create();
    cache.append(long, tokens(5).view(), tokens(5).view()).unwrap();
    assert_eq!(cache.pages_of(long).unwrap(), [6, 7, 8, 3, 4]);
    assert_eq!(
        cache.append(long, tokens(2).view(), tokens(2).view()),
        Err(CacheError::PoolFull { needed: 2, free: 1 })
    );
    cache.append(long, tokens(1).view(), tokens(1).view()).unwrap();
    assert_eq!(cache.pages_of(long).unwrap(), [6, 7, 8, 3, 4, 1]);
}

#[test]
fn pages_come_back_where_the_callers_code_panics() {
    let mut cache = PagedCache::new(PagedCacheConfig::new(9, 2, 1, 2, 2)).unwrap();
    let id = cache.create();
    let tokens = random([1, 1, 5, 2], 1);
    cache.append(id, tokens.view(), tokens.view()).unwrap();
    let call = std::panic::AssertUnwindSafe(|| {
        let prepare = |position, _: &mut [f32]| assert!(position < 8, "position {position}");
        cache.append_with(id, tokens.view(), tokens.view(), prepare)
    });
    assert!(std::panic::catch_unwind(call).is_err());
    assert_eq!((cache.free_pages(), cache.len(id), cache.pages_of(id).unwrap().len()), (6, Ok(5), 3));
    cache.append(id, tokens.view(), tokens.view()).unwrap();
    assert_eq!((cache.free_pages(), cache.len(id)), (4, Ok(10)));
}
