//! Steps of decoding over a cache, by what keys and values are stored as and where they lie, and prefill over the same
//! storage types.
//!
//! A step has one query row for each head and reads all keys and values once, so its throughput is in bytes of these,
//! scales among them; that of prefill is in operations, as in the other groups. Steps take turns on as many copies of the
//! cache as make twice the last-level cache of most machines, since a model's weights pass through the caches between
//! two steps; only the smallest step, which is there for what a call costs at least, has one copy. The recorded figures,
//! against the bandwidth and the peak, come from `measure -- decode`.

mod gauge;

use std::error::Error;
use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput};
use gauge::{Gauge, bench};
use qkv::cache::{KvCache, KvCacheConfig, PagedCache, PagedCacheConfig, SequenceId, Storage};
use qkv::{
    AttentionSpec, Causal, Data, Outputs, Tensor, TensorRef, attention_into, attention_paged, reference,
};
use qkv_benches::{Random, check_close};

/// Bytes of all copies of a cache together, at least.
const COPIES: usize = 128 << 20;
/// Tokens of a page.
const PAGE: usize = 16;

const STORAGES: [(&str, Storage); 4] = [
    ("f32", Storage::F32),
    ("bf16", Storage::Bf16),
    ("f16", Storage::F16),
    ("int8", Storage::Int8 { group: None, zero_point: false }),
];

/// Sizes of a step.
#[derive(Clone, Copy, Debug)]
struct Shape {
    batch: usize,
    heads: usize,
    kv_heads: usize,
    keys: usize,
    dim: usize,
}

const SHAPES: [Shape; 3] = [
    Shape { batch: 1, heads: 32, kv_heads: 8, keys: 8192, dim: 128 },
    Shape { batch: 8, heads: 32, kv_heads: 8, keys: 1024, dim: 128 },
    Shape { batch: 1, heads: 32, kv_heads: 32, keys: 4096, dim: 128 },
];
/// What a call costs at least.
const SMALLEST: Shape = Shape { batch: 1, heads: 8, kv_heads: 8, keys: 64, dim: 64 };

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { batch, heads, kv_heads, keys, dim } = self;
        write!(f, "b{batch} h{heads}")?;
        if kv_heads != heads {
            write!(f, "/{kv_heads}")?;
        }
        write!(f, " keys {keys} d{dim}")
    }
}

impl Shape {
    fn query_shape(&self) -> [usize; 4] {
        [self.batch, self.heads, 1, self.dim]
    }

    fn key_shape(&self) -> [usize; 4] {
        [self.batch, self.kv_heads, self.keys, self.dim]
    }

    /// Bytes that a step reads, in rows of a key and a value.
    fn bytes(&self, keys: Data<'_>, values: Data<'_>) -> usize {
        self.batch * self.kv_heads * self.keys * (keys.row_bytes() + values.row_bytes())
    }
}

/// Random queries, keys and values of a step.
fn inputs(shape: Shape) -> Result<[Tensor; 3], Box<dyn Error>> {
    let mut random = Random::new(5);
    let mut tensor = |shape| Tensor::from_fn(shape, |_| random.next_f32());
    Ok([tensor(shape.query_shape())?, tensor(shape.key_shape())?, tensor(shape.key_shape())?])
}

/// The last query sees the last key.
fn spec() -> AttentionSpec<'static> {
    AttentionSpec::new().with_causal(Causal::BottomRight)
}

/// A step over copies of a cache in one piece per sequence.
struct Contiguous {
    q: Tensor,
    out: Tensor,
    caches: Vec<KvCache>,
    next: usize,
}

impl Contiguous {
    fn new(shape: Shape, storage: Storage, total: usize) -> Result<Self, Box<dyn Error>> {
        let [q, k, v] = inputs(shape)?;
        let Shape { batch, kv_heads, keys, dim, .. } = shape;
        let config = KvCacheConfig::new(batch, kv_heads, keys, dim, dim).with_storage(storage);
        let mut cache = KvCache::new(config)?;
        cache.append(k.view(), v.view())?;
        let copies = total.div_ceil(cache.bytes()).max(1);
        Ok(Self { out: Tensor::zeros(q.shape())?, q, caches: vec![cache; copies], next: 0 })
    }

    fn call(&mut self) {
        let cache = &self.caches[self.next];
        self.next = (self.next + 1) % self.caches.len();
        let outputs = Outputs::new(self.out.view_mut());
        attention_into(self.q.view(), cache.keys(), cache.values(), &spec(), outputs).expect("it fits");
    }
}

/// A step over copies of a cache of pages.
struct Paged {
    /// (1, heads, batch, dim), as `out`: one row after the other.
    q: Tensor,
    out: Tensor,
    query_ends: Vec<usize>,
    caches: Vec<PagedCache>,
    sequences: Vec<SequenceId>,
    next: usize,
}

impl Paged {
    fn new(shape: Shape, storage: Storage, total: usize) -> Result<Self, Box<dyn Error>> {
        let [q, k, v] = inputs(shape)?;
        let Shape { batch, heads, kv_heads, keys, dim } = shape;
        let each = keys.div_ceil(PAGE);
        let pages = batch * each;
        let config = PagedCacheConfig::new(pages, PAGE, kv_heads, dim, dim).with_storage(storage);
        let mut cache = PagedCache::new(config)?;
        let rows = |tensor: &Tensor, sequence: usize, first: usize, length: usize| {
            Tensor::from_fn([1, kv_heads, length, dim], |[_, h, j, d]| {
                tensor.view().row(sequence, h, first + j)[d]
            })
        };
        // The pages of a pool that has been full for a while are in no order: others hold all of them and give them
        // back one by one, each of which is then the only one that is free.
        let token = rows(&k, 0, 0, 1)?;
        let mut others = Vec::with_capacity(pages);
        for _ in 0..pages {
            let other = cache.create();
            cache.append(other, token.view(), token.view())?;
            others.push(other);
        }
        let mut order: Vec<usize> = (0..pages).collect();
        order.sort_by_key(|&page| (page as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15).reverse_bits());
        let sequences: Vec<SequenceId> = (0..batch).map(|_| cache.create()).collect();
        for (i, &other) in order.iter().enumerate() {
            cache.free(others[other])?;
            let (sequence, first) = (i / each, i % each * PAGE);
            let length = PAGE.min(keys - first);
            let [k, v] = [rows(&k, sequence, first, length)?, rows(&v, sequence, first, length)?];
            cache.append(sequences[sequence], k.view(), v.view())?;
        }
        let q = Tensor::from_fn([1, heads, batch, dim], |[_, h, i, d]| q.view().row(i, h, 0)[d])?;
        let copies = total.div_ceil(cache.bytes()).max(1);
        let (out, query_ends) = (Tensor::zeros(q.shape())?, (0..=batch).collect());
        Ok(Self { q, out, query_ends, caches: vec![cache; copies], sequences, next: 0 })
    }

    fn call(&mut self) {
        let view = self.caches[self.next].view(&self.sequences).expect("its own sequences");
        self.next = (self.next + 1) % self.caches.len();
        let outputs = Outputs::new(self.out.view_mut());
        attention_paged(self.q.view(), &self.query_ends, view.as_ref(), &spec(), outputs).expect("it fits");
    }
}

/// Either kind of step.
enum Step {
    Contiguous(Contiguous),
    Paged(Paged),
}

impl Step {
    fn new(shape: Shape, storage: Storage, paged: bool, total: usize) -> Result<Self, Box<dyn Error>> {
        Ok(if paged {
            Self::Paged(Paged::new(shape, storage, total)?)
        } else {
            Self::Contiguous(Contiguous::new(shape, storage, total)?)
        })
    }

    fn call(&mut self) {
        match self {
            Self::Contiguous(step) => step.call(),
            Self::Paged(step) => step.call(),
        }
    }
}

/// Every storage type and both kinds of cache must give what the reference gives for the rounded keys and values.
fn check() -> Result<(), Box<dyn Error>> {
    let shape = Shape { batch: 2, heads: 4, kv_heads: 2, keys: 70, dim: 32 };
    for (name, storage) in STORAGES {
        let mut contiguous = Contiguous::new(shape, storage, 0)?;
        let cache = &contiguous.caches[0];
        let (k, v) = (widened(cache.keys())?, widened(cache.values())?);
        let expected = reference::oracle(contiguous.q.view(), k.view(), v.view(), &spec()).output;
        contiguous.call();
        check_close(name, contiguous.out.data(), expected.data())?;
        let mut paged = Paged::new(shape, storage, 0)?;
        paged.call();
        let out =
            Tensor::from_fn(shape.query_shape(), |[b, h, _, d]| paged.out.view().row(0, h, b)[d])?.into_vec();
        check_close(&format!("{name} paged"), &out, expected.data())?;
    }
    Ok(())
}

/// What stored values stand for.
fn widened(data: Data<'_>) -> Result<Tensor, Box<dyn Error>> {
    let shape = data.shape();
    Ok(match data {
        Data::F32(x) => Tensor::from_fn(shape, |[b, h, j, d]| x.row(b, h, j)[d])?,
        Data::Bf16(x) => Tensor::from_fn(shape, |[b, h, j, d]| x.row(b, h, j)[d].to_f32())?,
        Data::F16(x) => Tensor::from_fn(shape, |[b, h, j, d]| x.row(b, h, j)[d].to_f32())?,
        Data::Int8(x) => Tensor::from_fn(shape, |[b, h, j, d]| {
            f32::from(x.values().row(b, h, j)[d]) * x.scales().row(b, h, j)[0]
        })?,
        _ => return Err("a storage type without a meaning here".into()),
    })
}

/// Bytes that a step reads.
fn step_bytes(shape: Shape, storage: Storage) -> Result<usize, Box<dyn Error>> {
    // Of one token, since the cache itself is made only where it is measured.
    let config = KvCacheConfig::new(1, 1, 1, shape.dim, shape.dim).with_storage(storage);
    let mut cache = KvCache::new(config)?;
    let token = vec![1.0; shape.dim];
    let token = TensorRef::from_slice(&token, [1, 1, 1, shape.dim])?;
    cache.append(token, token)?;
    Ok(shape.bytes(cache.keys(), cache.values()))
}

/// Steps of some shapes; each has a name, a storage type, and may be paged.
fn steps(
    criterion: &mut Criterion<Gauge>,
    name: &str,
    shapes: &[Shape],
    kinds: &[(&str, Storage, bool)],
    total: usize,
) -> Result<(), Box<dyn Error>> {
    let mut group = criterion.benchmark_group(name);
    for &shape in shapes {
        for &(kind, storage, paged) in kinds {
            group.throughput(Throughput::Bytes(step_bytes(shape, storage)? as u64));
            group.sampling_mode(if shape.keys < 256 { SamplingMode::Auto } else { SamplingMode::Flat });
            // Made where criterion comes only if the benchmark was not filtered out; it comes several times.
            let mut step = None;
            group.bench_function(BenchmarkId::new(kind, shape), |bencher| {
                let step = step.get_or_insert_with(|| {
                    Step::new(shape, storage, paged, total).expect("there is memory for the cache")
                });
                bencher.iter(|| step.call());
            });
        }
    }
    group.finish();
    Ok(())
}

/// Causal prefill of a text into an empty cache.
fn prefill(criterion: &mut Criterion<Gauge>) -> Result<(), Box<dyn Error>> {
    let (heads, len, dim) = (4, 2048, 128);
    let shape = Shape { batch: 1, heads, kv_heads: heads, keys: len, dim };
    let mut random = Random::new(6);
    let q = Tensor::from_fn(shape.key_shape(), |_| random.next_f32())?;
    let [_, k, v] = inputs(shape)?;
    let mut out = Tensor::zeros(q.shape())?;
    // 4 d for each score; half of them are visible, as in the other groups.
    let flops = 2.0 * (heads * len * len * dim) as f64;
    let mut group = criterion.benchmark_group("prefill causal");
    for (name, storage) in &STORAGES[..3] {
        let mut cache = KvCache::new(KvCacheConfig::new(1, heads, len, dim, dim).with_storage(*storage))?;
        cache.append(k.view(), v.view())?;
        let id = BenchmarkId::new(*name, format!("b1 h{heads} s{len} d{dim}"));
        bench(&mut group, id, rayon::current_num_threads(), flops, || {
            let outputs = Outputs::new(out.view_mut());
            attention_into(q.view(), cache.keys(), cache.values(), black_box(&spec()), outputs)
        });
    }
    group.finish();
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut criterion = gauge::criterion();
    check()?;
    let storages = STORAGES.map(|(name, storage)| (name, storage, false));
    let pages = [("contiguous", Storage::F32, false), ("paged", Storage::F32, true)];
    steps(&mut criterion, "decode", &SHAPES, &storages, COPIES)?;
    steps(&mut criterion, "decode pages", &SHAPES, &pages, COPIES)?;
    steps(&mut criterion, "decode smallest", &[SMALLEST], &storages[..1], 0)?;
    prefill(&mut criterion)?;
    criterion.final_summary();
    Ok(())
}
