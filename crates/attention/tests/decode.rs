//! Decoding: caches and pages step by step, the same bits for any threads, batch and pages, rotary positions, refusals.

mod common;

use common::random;
use qkv_attention::cache::{KvCache, KvCacheConfig, PagedCache, PagedCacheConfig, SequenceId, Storage};
use qkv_attention::rotary::{Pairing, Rotary, RotaryConfig};
use qkv_attention::{
    AttentionError, AttentionSpec, BlockMask, Broadcast, Causal, Data, Outputs, Packed, PagedRef,
    QueryRotary, Tensor, TensorRef, Window, attention, attention_into, attention_packed, attention_paged,
    attention_with_lse,
};

const STORAGES: [Storage; 4] =
    [Storage::F32, Storage::F16, Storage::Bf16, Storage::Int8 { group: Some(8), zero_point: true }];

/// Output and LSE, as bits.
type Bits = (Vec<u32>, Vec<u32>);

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

fn close(a: &[f32], b: &[f32], tolerance: f32, what: &str) {
    assert_eq!(a.len(), b.len(), "{what}");
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        assert!((a - b).abs() <= tolerance, "{what}: [{i}] {a} {b}");
    }
}

/// Tokens `first` .. `last` of a batch and of the first `heads` heads, copied.
fn part(t: &Tensor, batch: usize, heads: usize, [first, last]: [usize; 2]) -> Tensor {
    let shape = [1, heads, last - first, t.shape()[3]];
    Tensor::from_fn(shape, |[_, h, i, d]| t.view().row(batch, h, first + i)[d]).unwrap()
}

fn alone<'a>(q: &Tensor, k: Data<'a>, v: Data<'a>, spec: &AttentionSpec<'_>) -> Bits {
    let [batch, heads, length, _] = q.shape();
    let mut out = Tensor::zeros([batch, heads, length, v.shape()[3]]).unwrap();
    let mut lse = vec![9.0; batch * heads * length];
    attention_into(q.view(), k, v, spec, Outputs::new(out.view_mut()).with_lse(&mut lse)).unwrap();
    (bits(out.data()), bits(&lse))
}

/// Bits of a paged call, sequence by sequence.
fn paged(q: &Tensor, ends: &[usize], pages: PagedRef<'_>, spec: &AttentionSpec<'_>) -> Vec<Bits> {
    let [_, heads, length, _] = q.shape();
    let dim = pages.values.shape()[3];
    let mut out = Tensor::zeros([1, heads, length, dim]).unwrap();
    let mut lse = vec![9.0; heads * length];
    let outputs = Outputs::new(out.view_mut()).with_lse(&mut lse);
    attention_paged(q.view(), ends, pages, spec, outputs).unwrap();
    per_sequence(&out, &lse, ends)
}

fn per_sequence(out: &Tensor, lse: &[f32], ends: &[usize]) -> Vec<Bits> {
    let [_, heads, length, _] = out.shape();
    ends.windows(2)
        .map(|ends| {
            let out = part(out, 0, heads, [ends[0], ends[1]]);
            let lse: Vec<f32> =
                (0..heads).flat_map(|h| &lse[h * length..][ends[0]..ends[1]]).copied().collect();
            (bits(out.data()), bits(&lse))
        })
        .collect()
}

#[test]
fn decoding_step_by_step_is_prefill() {
    let (steps, heads, kv_heads, dk, dv) = (200, 4, 2, 32, 24);
    let q = random([1, heads, steps, dk], 1);
    let (k, v) = (random([1, kv_heads, steps, dk], 2), random([1, kv_heads, steps, dv], 3));
    for storage in STORAGES {
        for window in [None, Some(37)] {
            let mut spec = AttentionSpec::new().with_causal(Causal::BottomRight);
            spec.window = window.map(|left| Window::new(Some(left), None));
            let new = |capacity, rolling: Option<usize>| {
                let config = KvCacheConfig::new(1, kv_heads, capacity, dk, dv).with_storage(storage);
                KvCache::new(config.with_window(rolling)).unwrap()
            };
            let mut whole = new(steps, None);
            // The query's own key and `left` before it.
            let mut rolling = new(90, window.map(|left| left + 1));
            let mut paged_caches: Vec<(PagedCache, [SequenceId; 2])> = [1, 3, 16, 64]
                .into_iter()
                .map(|size| {
                    let pages = 2 * steps.div_ceil(size);
                    let config = PagedCacheConfig::new(pages, size, kv_heads, dk, dv).with_storage(storage);
                    let mut cache = PagedCache::new(config).unwrap();
                    let ids = [cache.create(), cache.create()];
                    (cache, ids)
                })
                .collect();
            let mut got = Tensor::zeros([1, heads, steps, dv]).unwrap();
            for step in 0..steps {
                let (q, k, v) = (
                    part(&q, 0, heads, [step, step + 1]),
                    part(&k, 0, kv_heads, [step, step + 1]),
                    part(&v, 0, kv_heads, [step, step + 1]),
                );
                whole.append(k.view(), v.view()).unwrap();
                let out = attention(q.view(), whole.keys(), whole.values(), &spec).unwrap();
                for head in 0..heads {
                    let at = (head * steps + step) * dv;
                    got.data_mut()[at..at + dv].copy_from_slice(out.view().row(0, head, 0));
                }
                if window.is_some() {
                    rolling.append(k.view(), v.view()).unwrap();
                    let rolled = attention(q.view(), rolling.keys(), rolling.values(), &spec).unwrap();
                    close(rolled.data(), out.data(), 2e-6, "rolling");
                }
                let want = alone(&q, whole.keys(), whole.values(), &spec);
                for (cache, [id, other]) in &mut paged_caches {
                    // The other sequence takes pages in between.
                    cache.append(*other, k.view(), v.view()).unwrap();
                    cache.append(*id, k.view(), v.view()).unwrap();
                    let view = cache.view(&[*id]).unwrap();
                    assert_eq!(
                        paged(&q, &[0, 1], view.as_ref(), &spec),
                        std::slice::from_ref(&want),
                        "{storage:?}"
                    );
                }
            }
            if window.is_some() {
                assert!(rolling.dropped(0).unwrap() > 0);
            }
            let want = attention(q.view(), whole.keys(), whole.values(), &spec).unwrap();
            close(got.data(), want.data(), 3e-6, &format!("{storage:?}, {window:?}"));
        }
    }
}

/// Pages alone, in pairs side by side, and from the last to the first, which a pool hands out when it has been full.
#[test]
fn pages_in_any_order() {
    let (kv_heads, length, dk, dv) = (2, 300, 32, 72);
    let (k, v) = (random([1, kv_heads, length, dk], 2), random([1, kv_heads, length, dv], 3));
    let spec = AttentionSpec::new().with_causal(Causal::BottomRight);
    for (storage, size) in STORAGES.into_iter().flat_map(|storage| [1, 3, 16].map(|size| (storage, size))) {
        let mut whole =
            KvCache::new(KvCacheConfig::new(1, kv_heads, length, dk, dv).with_storage(storage)).unwrap();
        whole.append(k.view(), v.view()).unwrap();
        let pages = length.div_ceil(size);
        let hash = |page: usize| (page as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
        let mut orders = [(0..pages).collect::<Vec<_>>(), (0..pages).collect(), (0..pages).rev().collect()];
        orders[0].sort_by_key(|&page| hash(page));
        orders[1].sort_by_key(|&page| (hash(page / 2), page));
        for order in orders {
            let config = PagedCacheConfig::new(pages, size, kv_heads, dk, dv).with_storage(storage);
            let mut pool = PagedCache::new(config).unwrap();
            // Others hold all pages and give them back one by one.
            let mut others: Vec<SequenceId> = (0..pages).map(|_| pool.create()).collect();
            let (one_k, one_v) = (part(&k, 0, kv_heads, [0, 1]), part(&v, 0, kv_heads, [0, 1]));
            for &other in &others {
                pool.append(other, one_k.view(), one_v.view()).unwrap();
            }
            others.sort_by_key(|&other| pool.view(&[other]).unwrap().as_ref().tables[0][0]);
            let id = pool.create();
            for (i, &page) in order.iter().enumerate() {
                pool.free(others[page]).unwrap();
                let tokens = [i * size, (i * size + size).min(length)];
                let (k, v) = (part(&k, 0, kv_heads, tokens), part(&v, 0, kv_heads, tokens));
                pool.append(id, k.view(), v.view()).unwrap();
            }
            let view = pool.view(&[id]).unwrap();
            let table: Vec<usize> = view.as_ref().tables[0].iter().map(|&page| page as usize).collect();
            assert_eq!(table, order);
            for group in [1, 2, 4, 8] {
                let q = random([1, kv_heads * group, 1, dk], 1);
                let want = alone(&q, whole.keys(), whole.values(), &spec);
                let got = paged(&q, &[0, 1], view.as_ref(), &spec);
                assert!(got == [want], "{storage:?}, pages of {size}, a group of {group}");
            }
        }
    }
}

const LENGTHS: [usize; 9] = [5, 255, 256, 257, 700, 1024, 1500, 5000, 0];

/// Bits of every sequence alone, against the same in batches, packed, paged, on 1, 2 and 3 threads.
fn any_company(group: usize, query_len: usize, storage: Storage) {
    let (kv_heads, dk, dv) = (2, 16, 8);
    let (batch, heads) = (LENGTHS.len(), kv_heads * group);
    let q = random([batch, heads, query_len, dk], 1);
    let (k, v) = (random([batch, kv_heads, 5000, dk], 2), random([batch, kv_heads, 5000, dv], 3));
    let new = |batch, capacity| {
        KvCache::new(KvCacheConfig::new(batch, kv_heads, capacity, dk, dv).with_storage(storage)).unwrap()
    };
    let spec = AttentionSpec::new().with_causal(Causal::BottomRight);
    // Of each sequence a chunk of 40 queries as well.
    let chunk = random([batch, heads, 40, dk], 4);
    let mut together = new(batch, 5100);
    let config = PagedCacheConfig::new(700, 16, kv_heads, dk, dv).with_storage(storage);
    let mut pool = PagedCache::new(config).unwrap();
    let ids: Vec<SequenceId> = LENGTHS.iter().map(|_| pool.create()).collect();
    let (mut steps, mut chunks) = (vec![], vec![]);
    for (i, &length) in LENGTHS.iter().enumerate() {
        let (k, v) = (part(&k, i, kv_heads, [0, length]), part(&v, i, kv_heads, [0, length]));
        let mut own = new(1, length);
        own.append(k.view(), v.view()).unwrap();
        together.append_to(i, k.view(), v.view()).unwrap();
        steps.push(alone(&part(&q, i, heads, [0, query_len]), own.keys(), own.values(), &spec));
        chunks.push(alone(&part(&chunk, i, heads, [0, 40]), own.keys(), own.values(), &spec));
    }
    // Pages in turns, 333 tokens at a time.
    for first in (0..5000).step_by(333) {
        for (i, &length) in LENGTHS.iter().enumerate() {
            let tokens = [first.min(length), (first + 333).min(length)];
            let (k, v) = (part(&k, i, kv_heads, tokens), part(&v, i, kv_heads, tokens));
            pool.append(ids[i], k.view(), v.view()).unwrap();
        }
    }
    // Ragged: chunks of the odd ones, steps of the others, an idle sequence between.
    let ragged_ids = [ids[0], ids[1], ids[4], ids[2], ids[3], ids[4], ids[5]];
    let ragged = [(0, false), (1, true), (4, false), (2, false), (3, true), (4, true), (5, false)];
    let mut ends = vec![0];
    for &(_, is_chunk) in &ragged {
        ends.push(ends.last().unwrap() + if is_chunk { 40 } else { query_len });
    }
    let ragged_q = Tensor::from_fn([1, heads, *ends.last().unwrap(), dk], |[_, h, row, d]| {
        let at = ends.partition_point(|&end| end <= row) - 1;
        let (sequence, is_chunk) = ragged[at];
        let from = if is_chunk { &chunk } else { &q };
        from.view().row(sequence, h, row - ends[at])[d]
    })
    .unwrap();
    for threads in [1, 2, 3] {
        let threads_pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        threads_pool.install(|| {
            let what = format!("{threads} threads, {group} x {query_len} rows, {storage:?}");
            let spec_of_all = spec.clone().with_key_lengths(together.lengths());
            let all = alone(&q, together.keys(), together.values(), &spec_of_all);
            for (i, (out, lse)) in steps.iter().enumerate() {
                assert_eq!(all.0[i * out.len()..][..out.len()], *out, "batch, {i}, {what}");
                assert_eq!(all.1[i * lse.len()..][..lse.len()], *lse, "batch, {i}, {what}");
            }
            let view = pool.view(&ragged_ids).unwrap();
            let got = paged(&ragged_q, &ends, view.as_ref(), &spec);
            for (at, &(i, is_chunk)) in ragged.iter().enumerate() {
                assert!(got[at] == if is_chunk { &chunks } else { &steps }[i], "ragged, {at}, {what}");
            }
            let Data::F32(_) = together.keys() else { return };
            let key_ends: Vec<usize> = (0..=batch).map(|i| LENGTHS[..i].iter().sum()).collect();
            let query_ends: Vec<usize> = (0..=batch).map(|i| i * query_len).collect();
            let pack = |t: &Tensor, ends: &[usize]| {
                let [_, heads, _, dim] = t.shape();
                Tensor::from_fn([1, heads, ends[batch], dim], |[_, h, row, d]| {
                    let at = ends.partition_point(|&end| end <= row) - 1;
                    t.view().row(at, h, row - ends[at])[d]
                })
                .unwrap()
            };
            let mut out = Tensor::zeros([1, heads, query_ends[batch], dv]).unwrap();
            let mut lse = vec![9.0; heads * query_ends[batch]];
            attention_packed(
                pack(&q, &query_ends).view(),
                pack(&k, &key_ends).view(),
                pack(&v, &key_ends).view(),
                Packed { query_ends: &query_ends, key_ends: &key_ends },
                &spec,
                Outputs::new(out.view_mut()).with_lse(&mut lse),
            )
            .unwrap();
            assert!(per_sequence(&out, &lse, &query_ends) == steps, "packed, {what}");
        });
    }
}

#[test]
fn the_same_bits_in_any_company() {
    for storage in [Storage::F32, Storage::F16, Storage::Int8 { group: None, zero_point: false }] {
        for (group, query_len) in [(1, 1), (3, 1), (2, 4), (4, 3)] {
            any_company(group, query_len, storage);
        }
    }
}

#[test]
fn many_heads_and_few_have_the_same_bits() {
    let (many, few) = (36, 2);
    for (group, query_len) in [(1, 1), (5, 1), (2, 5)] {
        let q = random([1, many * group, query_len, 16], 1);
        let (k, v) = (random([1, many, 2500, 16], 2), random([1, many, 2500, 8], 3));
        let all = alone(&q, k.view().into(), v.view().into(), &AttentionSpec::new());
        let tokens = [0, 2500];
        let (k, v) = (part(&k, 0, few, tokens), part(&v, 0, few, tokens));
        let q = part(&q, 0, few * group, [0, query_len]);
        let (out, lse) = alone(&q, k.view().into(), v.view().into(), &AttentionSpec::new());
        assert_eq!(all.0[..out.len()], out, "{group} x {query_len}");
        assert_eq!(all.1[..lse.len()], lse, "{group} x {query_len}");
    }
}

/// A cache may have room, or another sequence, that is cut into fewer and larger parts than a shorter sequence.
#[test]
fn a_longer_tensor_with_fewer_parts() {
    let (room, lengths) = (32_769, [32_768, 32_767, 31_745, 32_769]);
    let k = random([1, 1, room, 4], 2);
    let q = random([1, 1, 1, 4], 1);
    for length in lengths {
        let own = TensorRef::from_slice(k.data(), [1, 1, length, 4]).unwrap();
        let want = alone(&q, own.into(), own.into(), &AttentionSpec::new());
        let spec = AttentionSpec::new();
        let got = alone(&q, k.view().into(), k.view().into(), &spec.with_key_lengths(&[length]));
        assert_eq!(got, want, "{length} keys in a tensor of {room}");
    }
}

/// However a mask is written, it cuts the sums of a row at the same keys.
#[test]
fn masks_of_one_meaning_give_few_rows_the_same_bits() {
    for (group, query_len) in [(1, 1), (2, 1), (3, 1), (2, 3)] {
        for key_len in [37, 1500] {
            let q = random([1, group, query_len, 16], 1);
            let (k, v) = (random([1, 1, key_len, 16], 2), random([1, 1, key_len, 8], 3));
            let sees = |i: usize, j: usize| j <= i + 20 && j >= 3;
            let spec = AttentionSpec::new();
            let mask: Vec<bool> = (0..query_len * key_len).map(|x| sees(x / key_len, x % key_len)).collect();
            let mask = Broadcast::from_slice(&mask, [1, 1, query_len, key_len]).unwrap();
            let shape = [1, 1, query_len, key_len];
            let table = BlockMask::from_fn(shape, [1, 1], |[_, _, i, j]| sees(i, j)).unwrap();
            let (k, v) = (Data::from(k.view()), Data::from(v.view()));
            let causal = spec.clone().with_causal(Causal::Offset(20)).with_key_starts(&[3]);
            let want = alone(&q, k, v, &causal);
            let what = format!("{group} x {query_len} rows, {key_len} keys");
            assert_eq!(alone(&q, k, v, &spec.clone().with_mask(mask)), want, "mask, {what}");
            assert_eq!(alone(&q, k, v, &spec.clone().with_block_mask(&table)), want, "table, {what}");
        }
    }
}

/// A NaN and an infinity among the values reach those of few rows that see them, in their dims, and change nothing else.
#[test]
fn some_of_few_rows_see_a_nan() {
    let (key_len, dv) = (150, 40);
    for (group, query_len) in [(1, 1), (1, 2), (2, 2), (1, 5), (3, 1), (2, 4)] {
        let q = random([1, group, query_len, 16], 1);
        let (k, v) = (random([1, 1, key_len, 16], 2), random([1, 1, key_len, dv], 3));
        let sees = |i: usize, j: usize| !(i + j).is_multiple_of(3);
        let mask: Vec<bool> = (0..query_len * key_len).map(|x| sees(x / key_len, x % key_len)).collect();
        let mask = Broadcast::from_slice(&mask, [1, 1, query_len, key_len]).unwrap();
        let spec = AttentionSpec::new().with_mask(mask);
        let poisons = [(70, 3, f32::NAN), (71, 4, f32::INFINITY)];
        let mut poisoned = v.clone();
        for (key, dim, poison) in poisons {
            poisoned.data_mut()[key * dv + dim] = poison;
        }
        let clean = alone(&q, k.view().into(), v.view().into(), &spec);
        let got = alone(&q, k.view().into(), poisoned.view().into(), &spec);
        for (at, (&clean, &got)) in clean.0.iter().zip(&got.0).enumerate() {
            let (query, dim) = (at / dv % query_len, at % dv);
            let (got, what) =
                (f32::from_bits(got), format!("{group} x {query_len}: query {query}, dim {dim}"));
            match poisons.iter().find(|&&(key, of, _)| of == dim && sees(query, key)) {
                Some((_, _, poison)) if poison.is_nan() => assert!(got.is_nan(), "{what}: {got}"),
                Some((_, _, poison)) => assert_eq!(got, *poison, "{what}"),
                None => assert_eq!(got.to_bits(), clean, "{what}"),
            }
        }
        assert_eq!(got.1, clean.1);
    }
}

#[test]
fn rotary_at_load_and_on_append() {
    for (pairing, rotary_dim) in [(Pairing::Halves, 16), (Pairing::Interleaved, 10)] {
        let config = RotaryConfig::new(16).with_rotary_dim(rotary_dim).with_pairing(pairing);
        let table = Rotary::new(&config).unwrap();
        for (query_len, key_len) in [(1, 60), (2, 1300), (40, 60)] {
            let (q, k) = (random([2, 4, query_len, 16], 1), random([2, 2, key_len, 16], 2));
            let positions: Vec<usize> = (key_len - query_len..key_len).collect();
            let per_batch: Vec<usize> = positions.iter().chain(&positions).copied().collect();
            let (mut turned_q, mut turned_k) = (q.clone(), k.clone());
            table.rotate_rows(&mut turned_q.view_mut(), &positions).unwrap();
            let all: Vec<usize> = (0..key_len).collect();
            table.rotate_rows(&mut turned_k.view_mut(), &all).unwrap();
            let mut cache = KvCache::new(KvCacheConfig::new(2, 2, key_len + 7, 16, 16)).unwrap();
            let turn = |position: usize, row: &mut [f32]| table.rotate(row, position).unwrap();
            cache.append_with(k.view(), k.view(), turn).unwrap();
            let spec = AttentionSpec::new().with_causal(Causal::BottomRight);
            let want = alone(&turned_q, turned_k.view().into(), k.view().into(), &spec);
            for positions in [&positions, &per_batch] {
                let spec = spec.clone().with_rotary(QueryRotary { table: &table, positions });
                assert_eq!(alone(&q, cache.keys(), cache.values(), &spec), want, "{query_len} {key_len}");
            }
            // Packed queries have a position each.
            let packed_q = Tensor::from_fn([1, 4, 2 * query_len, 16], |[_, h, i, d]| {
                q.view().row(i / query_len, h, i % query_len)[d]
            });
            let mut pool = PagedCache::new(PagedCacheConfig::new(2000, 3, 2, 16, 16)).unwrap();
            let ids = [pool.create(), pool.create()];
            for (batch, &id) in ids.iter().enumerate() {
                let k = part(&k, batch, 2, [0, key_len]);
                pool.append_with(id, k.view(), k.view(), turn).unwrap();
            }
            let spec = spec.clone().with_rotary(QueryRotary { table: &table, positions: &per_batch });
            let ends = [0, query_len, 2 * query_len];
            let got = paged(&packed_q.unwrap(), &ends, pool.view(&ids).unwrap().as_ref(), &spec);
            let got: Vec<u32> = got.into_iter().flat_map(|(out, _)| out).collect();
            assert_eq!(got, want.0, "paged, {query_len} {key_len}");
        }
    }
}

#[test]
fn refusals_write_nothing() {
    let pages = random([4, 2, 8, 16], 1);
    let q = random([1, 4, 3, 16], 2);
    let tables: [&[u32]; 2] = [&[0, 3], &[2]];
    let good = PagedRef {
        keys: pages.view().into(),
        values: pages.view().into(),
        tables: &tables,
        lengths: &[12, 8],
    };
    let refuse = |q: &Tensor, ends: &[usize], pages: PagedRef<'_>, spec: &AttentionSpec<'_>| {
        let [_, heads, length, _] = q.shape();
        let mut out = Tensor::filled([1, heads, length, 16], 7.0f32).unwrap();
        let mut lse = vec![7.0; heads * length];
        let outputs = Outputs::new(out.view_mut()).with_lse(&mut lse);
        let error = attention_paged(q.view(), ends, pages, spec, outputs).unwrap_err();
        assert!(out.data().iter().chain(&lse).all(|&x| x == 7.0), "{error}: written");
        error.to_string()
    };
    let plain = AttentionSpec::new();
    let of = |pages| refuse(&q, &[0, 1, 3], pages, &plain);
    assert_eq!(of(PagedRef { lengths: &[17, 8], ..good }), "lengths[0]: 17, expected at most 16");
    let beyond: [&[u32]; 2] = [&[0, 4], &[2]];
    assert_eq!(of(PagedRef { tables: &beyond, ..good }), "tables[0]: 4, expected at most 3");
    assert_eq!(of(PagedRef { lengths: &[12], ..good }), "tables: 2 entries, expected 1");
    let narrow = random([4, 2, 8, 12], 1);
    let short = random([4, 2, 7, 16], 1);
    let keys = PagedRef { keys: narrow.view().into(), ..good };
    assert_eq!(of(keys), "key: head dim is 12, expected 16 to match query");
    let values = PagedRef { values: short.view().into(), ..good };
    assert_eq!(of(values), "value: length is 7, expected 8 to match key");
    let none = random([4, 2, 0, 16], 1);
    let empty = PagedRef { keys: none.view().into(), values: none.view().into(), ..good };
    assert_eq!(of(empty), "lengths[0]: 12, expected at most 0");
    // What lies behind the pages in use is not looked at.
    let unused: [&[u32]; 2] = [&[0, 3, 99], &[2, 77]];
    let mut out = Tensor::zeros([1, 4, 3, 16]).unwrap();
    let outputs = Outputs::new(out.view_mut());
    attention_paged(q.view(), &[0, 1, 3], PagedRef { tables: &unused, ..good }, &plain, outputs).unwrap();
    for (ends, expected) in [
        (&[][..], "query_ends: 0 entries, expected 1"),
        (&[0, 3], "lengths: 2 entries, expected 1"),
        (&[0, 1, 2], "query_ends: 2 entries, expected 3"),
        (&[0, 2, 1], "query_ends[2]: 1 after 2, expected ascending"),
        (&[1, 2, 3], "query_ends[0]: 1, expected at most 0"),
        (&[0, 1, 4], "query_ends[2]: 4, expected at most 3"),
    ] {
        assert_eq!(refuse(&q, ends, good, &plain), expected);
    }
    let spec = plain.clone().with_key_lengths(&[1, 1]);
    let expected = "key_lengths: not supported together with a packed batch";
    assert_eq!(refuse(&q, &[0, 1, 3], good, &spec), expected);
    let two = random([2, 4, 3, 16], 2);
    let mut out = Tensor::filled([2, 4, 3, 16], 7.0f32).unwrap();
    let outputs = Outputs::new(out.view_mut());
    assert!(attention_paged(two.view(), &[0, 1, 3], good, &plain, outputs).is_err());
    assert!(out.data().iter().all(|&x| x == 7.0));

    let table = |dim, length| Rotary::new(&RotaryConfig::new(dim).with_max_length(length)).unwrap();
    let (right, wrong, nothing) = (table(16, 10), table(32, 10), table(16, 0));
    for (table, positions, expected) in [
        (&right, &[1, 10, 2][..], "rotary.positions[1]: 10, expected at most 9"),
        (&right, &[1, 2], "rotary.positions: 2 entries, expected 3"),
        (&wrong, &[1, 2, 3], "rotary.table: 32 entries, expected 16"),
    ] {
        let spec = plain.clone().with_rotary(QueryRotary { table, positions });
        assert_eq!(refuse(&q, &[0, 1, 3], good, &spec), expected);
    }
    // A table without positions has none to rotate to.
    let spec = plain.clone().with_rotary(QueryRotary { table: &nothing, positions: &[0, 0, 0] });
    let error = attention(q.view(), q.view(), q.view(), &spec).unwrap_err();
    assert!(matches!(error, AttentionError::Beyond { index: 0, given: 0, .. }), "{error}");
}

#[test]
fn sizes_of_0() {
    let plain = AttentionSpec::new().with_causal(Causal::BottomRight);
    let pages = random([3, 2, 4, 16], 1);
    for lengths in [[0, 0], [0, 5], [5, 0]] {
        for ends in [[0, 0, 0], [0, 2, 2], [0, 0, 2], [0, 1, 2]] {
            let tables: [&[u32]; 2] = [&[2, 0], &[1, 1]];
            let q = random([1, 4, ends[2], 16], 2);
            let keys = Data::from(pages.view());
            let pages = PagedRef { keys, values: keys, tables: &tables, lengths: &lengths };
            for (i, (out, lse)) in paged(&q, &ends, pages, &plain).into_iter().enumerate() {
                let seen = lengths[i] > 0;
                assert_eq!(out.iter().any(|&x| x != 0), seen && !out.is_empty());
                assert!(lse.iter().all(|&x| f32::from_bits(x).is_finite() == seen));
            }
        }
    }
    let nobody =
        PagedRef { keys: pages.view().into(), values: pages.view().into(), tables: &[], lengths: &[] };
    assert!(paged(&random([1, 4, 0, 16], 1), &[0], nobody, &plain).is_empty());
    for (batch, query_len, key_len, dv) in [(0, 1, 5, 4), (2, 0, 5, 4), (2, 1, 0, 4), (2, 1, 1500, 0)] {
        let q = random([batch, 4, query_len, 16], 1);
        let (k, v) = (random([batch, 2, key_len, 16], 2), random([batch, 2, key_len, dv], 3));
        let (out, lse) = attention_with_lse(q.view(), k.view(), v.view(), &plain).unwrap();
        assert_eq!(out.shape(), [batch, 4, query_len, dv]);
        assert!(lse.iter().all(|lse| if key_len == 0 { *lse == f32::NEG_INFINITY } else { lse.is_finite() }));
        assert!(out.data().iter().all(|&x| x == 0.0));
    }
}
