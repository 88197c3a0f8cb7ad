//! `qkv bench decode`: steps of decoding over a cache, against the roofline.
//!
//! A step is one call in which every head has one new query row, or a few. It reads each key and value once and does
//! little with it, so what limits it is the bandwidth of memory, or the peak where the rows are many. To be read from
//! memory a cache must not lie in the L3 cache, so the steps of a row take turns on copies of it ([`copies`]).
//!
//! The storage types of one shape are measured side by side, round by round (see [`crate::measure`]); the limits are
//! measured before and after each turn.

use std::ops::Range;
use std::time::Instant;

use qkv::cache::{KvCache, KvCacheConfig, PagedCache, PagedCacheConfig, SequenceId};
use qkv::gemm::CacheInfo;
use qkv::probe::{ProbeError, fma_peak, read_bandwidth};
use qkv::{
    AttentionSpec, Causal, Outputs, Shape, Tensor, TensorError, TensorRef, attention_into, attention_paged,
};
use serde::Serialize;

use crate::args::{DecodeArgs, ShapeArg, StorageArg};
use crate::bench::{ShapeFields, percent_cell};
use crate::input::Uniform;
use crate::measure::{median, probe_options, repetitions, round_seconds};
use crate::memory::{bytes_text, require};
use crate::output::{Grid, Progress, Tone, paragraph, seconds_text, three_digits};
use crate::{Context, Failure, Report};

/// Without `--shape`: batch, heads, keys and head dim, and the key/value heads.
const SHAPES: [(ShapeArg, usize); 3] = [
    (ShapeArg { batch: 1, heads: 32, length: 8192, dim: 128 }, 8),
    (ShapeArg { batch: 8, heads: 32, length: 1024, dim: 128 }, 8),
    (ShapeArg { batch: 1, heads: 32, length: 4096, dim: 128 }, 32),
];
/// `--quick` divides their keys by this.
const SHORTER: usize = 4;
/// Tokens of a page.
const PAGE: usize = 16;

/// The copies of a cache have together so many times the bytes of the L3 cache. With twice, steps and the probe of the bandwidth found
/// as much of theirs there as the neighbours left, which was not the same for both.
const TIMES_L3: usize = 4;
/// At least this many: a virtual machine may report no L3 cache.
const LEAST: usize = 128 << 20;
/// And no more than this, where one copy has not.
const MOST: usize = 1 << 30;
/// Copies of a cache so small that they would take more memory than what is in them.
const MOST_COPIES: usize = 1 << 16;
/// Bytes of a cache beside its keys and values, generously.
const BESIDE: f64 = 512.0;

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Document {
    version: &'static str,
    isa: &'static str,
    threads: usize,
    /// Rounds of which the medians are.
    rounds: usize,
    /// The L3 cache, 0 where it is unknown.
    l3: usize,
    rows: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Row {
    #[serde(with = "ShapeFields")]
    shape: Shape,
    storage: &'static str,
    /// Tokens of a page; null where a sequence lies in one piece.
    page_size: Option<usize>,
    /// Copies of the cache that steps take turns on.
    copies: usize,
    /// Bytes of keys and values that a step reads.
    bytes: usize,
    /// 2 (key dim + value dim) for each visible score.
    flops: f64,
    #[serde(flatten)]
    timing: Timing,
}

/// Medians over the rounds.
#[derive(Clone, Copy, Debug, Serialize)]
struct Timing {
    /// Seconds of a step.
    seconds: f64,
    /// Batch times queries over the time.
    tokens_per_second: f64,
    /// Bytes of keys and values over the time, in 10^9.
    gbytes_per_second: f64,
    /// What the machine reads from memory, in 10^9 bytes per second.
    bandwidth_gbytes_per_second: f64,
    /// The peak, GFLOP/s.
    peak_gflops: f64,
    /// The median of the rounds' percentages (not the percentage of the medians).
    percent_of_roofline: f64,
}

/// A shape that has been checked, and what to measure on it.
#[derive(Debug)]
struct Case {
    given: ShapeArg,
    kv_heads: usize,
    queries: usize,
    /// Storage, and whether in pages.
    rows: Vec<(StorageArg, bool)>,
}

pub(crate) fn run(args: &DecodeArgs, context: &Context) -> Result<Report, Failure> {
    let rounds = args.rounds();
    let cases = cases(args)?;
    let steps = rounds * cases.iter().map(|case| case.rows.len()).sum::<usize>();
    let mut progress = Progress::new(steps, steps as f64 * 3.0 * round_seconds());
    let mut rows = Vec::new();
    for case in cases {
        progress.doing(format!("measuring {}", case.given));
        let about = |failure: Failure| failure.about(&case.name());
        let mut steps = case.steps().map_err(about)?;
        let timings = interleaved(&mut steps, rounds, &mut progress).map_err(about)?;
        rows.extend(steps.into_iter().zip(timings).map(|(step, timing)| step.row(timing)));
    }
    drop(progress);
    let document = Document {
        version: env!("CARGO_PKG_VERSION"),
        isa: context.isa.kind().name(),
        threads: context.threads,
        rounds,
        l3: CacheInfo::get().l3,
        rows,
    };
    Report::new(context, &document, || text(&document, context))
}

/// What is asked for; refused before anything is measured.
fn cases(args: &DecodeArgs) -> Result<Vec<Case>, Failure> {
    let shapes: Vec<(ShapeArg, usize)> = if args.shape.is_empty() {
        let shorter = if args.quick { SHORTER } else { 1 };
        SHAPES
            .map(|(shape, kv_heads)| (ShapeArg { length: shape.length / shorter, ..shape }, kv_heads))
            .to_vec()
    } else {
        args.shape.iter().map(|&shape| (shape, args.kv_heads.unwrap_or(shape.heads))).collect()
    };
    let mut cases = Vec::new();
    for (index, (given, kv_heads)) in shapes.into_iter().enumerate() {
        let mut rows: Vec<(StorageArg, bool)> =
            args.storage.iter().map(|&storage| (storage, false)).collect();
        if index == 0 && args.shape.is_empty() && args.storage.contains(&StorageArg::F32) {
            rows.push((StorageArg::F32, true));
        }
        let case = Case { given, kv_heads, queries: args.queries, rows };
        case.check().map_err(|failure| failure.about(&case.name()))?;
        cases.push(case);
    }
    Ok(cases)
}

impl Case {
    /// What messages call it.
    fn name(&self) -> String {
        format!("--shape {}", self.given)
    }

    fn shape(&self) -> Shape {
        let ShapeArg { batch, heads, length, dim } = self.given;
        Shape {
            batch,
            query_heads: heads,
            kv_heads: self.kv_heads,
            query_len: self.queries,
            key_len: length,
            key_dim: dim,
            value_dim: dim,
        }
    }

    /// Refuses sizes that make no step, or that the machine cannot hold.
    fn check(&self) -> Result<(), Failure> {
        let (ShapeArg { batch, heads, length, dim }, kv_heads) = (self.given, self.kv_heads);
        for (axis, size) in [
            ("batch", batch),
            ("heads", heads),
            ("keys", length),
            ("head dim", dim),
            ("--kv-heads", kv_heads),
        ] {
            if size == 0 {
                return Err(Failure::new(format!("{axis} is 0, expected at least 1")));
            }
        }
        if !heads.is_multiple_of(kv_heads) {
            return Err(Failure::new(format!(
                "{heads} heads, expected a multiple of the {kv_heads} key/value heads"
            )));
        }
        if self.queries > length {
            let queries = self.queries;
            return Err(Failure::new(format!(
                "--queries {queries}, expected at most the {length} keys, of which they are the last"
            )));
        }
        require("the cache", self.bytes())
    }

    /// Bytes that its rows take together, in f64, which does not overflow: the keys and values they are made from, all
    /// copies, the buffer of the probe, queries and outputs, and the scratch of each thread.
    fn bytes(&self) -> f64 {
        let [batch, heads, kv_heads, keys, dim, queries] = [
            self.given.batch,
            self.given.heads,
            self.kv_heads,
            self.given.length,
            self.given.dim,
            self.queries,
        ]
        .map(|size| size as f64);
        let (mut caches, mut buffer) = (0.0, 0.0f64);
        for &(storage, _) in &self.rows {
            let one = 2.0 * batch * kv_heads * keys * storage.row_bytes(dim);
            let all = copies(one) as f64 * one;
            caches += all + copies(one) as f64 * BESIDE;
            buffer = buffer.max(buffer_bytes(all) as f64);
        }
        let source = 2.0 * batch * kv_heads * keys * 4.0 * dim;
        let rows = self.rows.len() as f64 * 2.0 * batch * heads * queries * 4.0 * dim;
        let scratch = rayon::current_num_threads() as f64 * 512.0 * 4.0 * dim;
        source + caches + buffer + rows + scratch
    }

    /// Makes the caches, and a step over each.
    fn steps(&self) -> Result<Vec<Step>, Failure> {
        let shape = self.shape();
        let mut random = [1, 2, 3].map(Uniform::new);
        let mut tensor = |seed: usize, heads, length| {
            Tensor::from_fn([shape.batch, heads, length, shape.key_dim], |_| random[seed].next())
                .map_err(|error: TensorError| Failure::new(error.to_string()))
        };
        let q = tensor(0, shape.query_heads, shape.query_len)?;
        let (k, v) = (tensor(1, shape.kv_heads, shape.key_len)?, tensor(2, shape.kv_heads, shape.key_len)?);
        self.rows.iter().map(|&(storage, paged)| Step::new(shape, storage, paged, [&q, &k, &v])).collect()
    }
}

/// How many copies of a cache of so many bytes steps take turns on.
fn copies(bytes: f64) -> usize {
    let wanted = (TIMES_L3 * CacheInfo::get().l3).clamp(LEAST, MOST) as f64;
    ((wanted / bytes).ceil() as usize).clamp(1, MOST_COPIES)
}

/// Bytes of the probe's buffer beside copies of so many bytes together: as many, so that where the L3 cache keeps a part
/// of one, it does of the other.
fn buffer_bytes(all: f64) -> usize {
    (all as usize).clamp(LEAST, MOST)
}

/// A step of decoding, ready to be made again and again.
#[derive(Debug)]
struct Step {
    shape: Shape,
    storage: StorageArg,
    q: Tensor,
    out: Tensor,
    spec: AttentionSpec<'static>,
    caches: Caches,
    /// The copy that is next.
    next: usize,
    bytes: usize,
    flops: f64,
}

/// Copies of a cache.
#[derive(Debug)]
enum Caches {
    Contiguous(Vec<KvCache>),
    /// The sequences are the same in every copy; their queries lie one after the other and end here.
    Paged(Vec<PagedCache>, Vec<SequenceId>, Vec<usize>),
}

impl Step {
    /// Fills the caches and makes each step once, so that everything that can be refused has been, and the threads are
    /// awake.
    fn new(shape: Shape, storage: StorageArg, paged: bool, [q, k, v]: [&Tensor; 3]) -> Result<Self, Failure> {
        let spec = AttentionSpec::new().with_causal(Causal::BottomRight);
        let copies = |row_bytes: usize| {
            let bytes = shape.batch * shape.kv_heads * shape.key_len * row_bytes;
            (bytes, copies(bytes as f64))
        };
        let too_large = |error: TensorError| Failure::new(error.to_string());
        let (q, caches, bytes) = if paged {
            let (cache, ids) = paged_cache(&shape, storage, k, v)?;
            let row_bytes = {
                let view = cache.view(&ids)?;
                view.as_ref().keys.row_bytes() + view.as_ref().values.row_bytes()
            };
            let (bytes, copies) = copies(row_bytes);
            let rows = shape.query_len;
            let q =
                Tensor::from_fn([1, shape.query_heads, shape.batch * rows, shape.key_dim], |[_, h, i, d]| {
                    q.view().row(i / rows, h, i % rows)[d]
                })
                .map_err(too_large)?;
            let ends = (0..=shape.batch).map(|sequence| sequence * rows).collect();
            (q, Caches::Paged(vec![cache; copies], ids, ends), bytes)
        } else {
            let Shape { batch, kv_heads, key_len, key_dim, value_dim, .. } = shape;
            let config = KvCacheConfig::new(batch, kv_heads, key_len, key_dim, value_dim);
            let mut cache = KvCache::new(config.with_storage(storage.storage()))?;
            cache.append(k.view(), v.view())?;
            let (bytes, copies) = copies(cache.keys().row_bytes() + cache.values().row_bytes());
            (q.clone(), Caches::Contiguous(vec![cache; copies]), bytes)
        };
        let [batch, heads, rows, _] = q.shape();
        let out = Tensor::zeros([batch, heads, rows, shape.value_dim]).map_err(too_large)?;
        let flops = shape.flops(spec.causal);
        let mut step = Self { shape, storage, q, out, spec, caches, next: 0, bytes, flops };
        step.call()?;
        Ok(step)
    }

    fn copies(&self) -> usize {
        match &self.caches {
            Caches::Contiguous(caches) => caches.len(),
            Caches::Paged(caches, ..) => caches.len(),
        }
    }

    /// Makes it on the next copy.
    fn call(&mut self) -> Result<(), Failure> {
        let outputs = Outputs::new(self.out.view_mut());
        match &self.caches {
            Caches::Contiguous(caches) => {
                let cache = &caches[self.next];
                attention_into(self.q.view(), cache.keys(), cache.values(), &self.spec, outputs)?;
            }
            Caches::Paged(caches, ids, ends) => {
                let view = caches[self.next].view(ids)?;
                attention_paged(self.q.view(), ends, view.as_ref(), &self.spec, outputs)?;
            }
        }
        self.next = (self.next + 1) % self.copies();
        Ok(())
    }

    fn row(self, timing: Timing) -> Row {
        Row {
            shape: self.shape,
            storage: self.storage.name(),
            page_size: matches!(self.caches, Caches::Paged(..)).then_some(PAGE),
            copies: self.copies(),
            bytes: self.bytes,
            flops: self.flops,
            timing,
        }
    }
}

/// A pool whose pages have been handed out in no order, as in one that has been full for a while, and its sequences.
fn paged_cache(
    shape: &Shape,
    storage: StorageArg,
    k: &Tensor,
    v: &Tensor,
) -> Result<(PagedCache, Vec<SequenceId>), Failure> {
    let &Shape { batch, kv_heads, key_len, key_dim, value_dim, .. } = shape;
    let each = key_len.div_ceil(PAGE);
    let pages = batch * each;
    let config = PagedCacheConfig::new(pages, PAGE, kv_heads, key_dim, value_dim);
    let mut cache = PagedCache::new(config.with_storage(storage.storage()))?;
    // Others hold all pages and give them back one by one, each of which is then the only one that is free.
    let mut others = Vec::with_capacity(pages);
    for _ in 0..pages {
        let other = cache.create();
        cache.append(other, part(k, 0, 0..1)?, part(v, 0, 0..1)?)?;
        others.push(other);
    }
    let mut order: Vec<usize> = (0..pages).collect();
    order.sort_by_key(|&page| (page as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15).reverse_bits());
    let ids: Vec<SequenceId> = (0..batch).map(|_| cache.create()).collect();
    for (i, &other) in order.iter().enumerate() {
        cache.free(others[other])?;
        let (sequence, first) = (i / each, i % each * PAGE);
        let tokens = first..(first + PAGE).min(key_len);
        cache.append(ids[sequence], part(k, sequence, tokens.clone())?, part(v, sequence, tokens)?)?;
    }
    Ok((cache, ids))
}

/// Some tokens of a sequence, as a batch of one.
fn part(tensor: &Tensor, sequence: usize, tokens: Range<usize>) -> Result<TensorRef<'_>, Failure> {
    let [_, heads, all, dim] = tensor.shape();
    let first = (sequence * heads * all + tokens.start) * dim;
    let strides = [0, (all * dim) as isize, dim as isize, 1];
    TensorRef::from_slice_strided(tensor.data(), first, [1, heads, tokens.len(), dim], strides)
        .map_err(|error| Failure::new(error.to_string()))
}

/// Read bandwidth in GB/s, and peak in GFLOP/s.
fn limits(step: &Step) -> Result<[f64; 2], ProbeError> {
    let probe = probe_options();
    let bandwidth =
        read_bandwidth(&probe.clone().with_buffer_bytes(buffer_bytes((step.copies() * step.bytes) as f64)))?;
    Ok([bandwidth, fma_peak(&probe)?])
}

/// Measures the steps side by side.
fn interleaved(steps: &mut [Step], rounds: usize, progress: &mut Progress) -> Result<Vec<Timing>, Failure> {
    let mut counts = Vec::with_capacity(steps.len());
    for step in &mut *steps {
        counts.push(repetitions(|| step.call())?);
    }
    let mut samples: Vec<Vec<[f64; 6]>> = vec![Vec::with_capacity(rounds); steps.len()];
    for _ in 0..rounds {
        for ((step, &count), samples) in steps.iter_mut().zip(&counts).zip(&mut samples) {
            let before = limits(step)?;
            let start = Instant::now();
            for _ in 0..count {
                step.call()?;
            }
            let seconds = (start.elapsed().as_secs_f64() / count as f64).max(1e-12);
            let after = limits(step)?;
            let [bandwidth, peak] = [0, 1].map(|limit| (before[limit] + after[limit]) / 2.0);
            let roofline = (step.bytes as f64 / bandwidth).max(step.flops / peak) / 1e9;
            let tokens = (step.shape.batch * step.shape.query_len) as f64;
            samples.push([
                seconds,
                tokens / seconds,
                step.bytes as f64 / seconds / 1e9,
                bandwidth,
                peak,
                100.0 * roofline / seconds,
            ]);
            progress.step();
        }
    }
    Ok(samples
        .into_iter()
        .map(|samples| {
            let [
                seconds,
                tokens_per_second,
                gbytes_per_second,
                bandwidth_gbytes_per_second,
                peak_gflops,
                percent_of_roofline,
            ] = [0, 1, 2, 3, 4, 5]
                .map(|column| median(samples.iter().map(|sample| sample[column]).collect()));
            Timing {
                seconds,
                tokens_per_second,
                gbytes_per_second,
                bandwidth_gbytes_per_second,
                peak_gflops,
                percent_of_roofline,
            }
        })
        .collect())
}

/// Batch, heads (of queries/of keys and values), keys and head dim.
fn shape_text(shape: &Shape) -> String {
    let &Shape { batch, query_heads, kv_heads, key_len, key_dim, .. } = shape;
    let heads =
        if query_heads == kv_heads { kv_heads.to_string() } else { format!("{query_heads}/{kv_heads}") };
    format!("{batch},{heads},{key_len},{key_dim}")
}

fn text(document: &Document, context: &Context) -> String {
    let mut text = context.title();
    text.push('\n');
    let mut grid =
        Grid::new(2, ["b,h,keys,d", "storage", "time", "tokens/s", "GB/s", "bandwidth", "of roofline"]);
    for row in &document.rows {
        let plain = |text: String| (text, Tone::Plain);
        let storage = match row.page_size {
            None => row.storage.to_owned(),
            Some(size) => format!("{}, pages of {size}", row.storage),
        };
        grid.row_with([
            plain(shape_text(&row.shape)),
            plain(storage),
            plain(seconds_text(row.timing.seconds)),
            plain(three_digits(row.timing.tokens_per_second)),
            plain(three_digits(row.timing.gbytes_per_second)),
            (three_digits(row.timing.bandwidth_gbytes_per_second), Tone::Quiet),
            percent_cell(row.timing.percent_of_roofline),
        ]);
    }
    text.push_str(&grid.text());
    text.push('\n');
    let queries = document.rows.first().map_or(1, |row| row.shape.query_len);
    let rows = match queries {
        1 => "one query row for each head, which sees all keys".to_owned(),
        n => format!(
            "{n} query rows for each head, the last tokens of the cache, each of which sees the keys up to its own"
        ),
    };
    let rounds = document.rounds;
    text.push_str(&paragraph(&format!(
        "Time is that of one step: {rows}. Medians of {rounds} rounds. Tokens are batch times queries, GB/s are of all \
         keys and values. The roofline is the time that a step takes at least: the larger of its bytes over the \
         bandwidth of reading memory and its FLOP, 2 (key dim + value dim) for each visible score, over the FMA peak, \
         both measured with the same threads in the same rounds."
    )));
    let l3 = match document.l3 {
        0 => "four times the L3 cache".to_owned(),
        l3 => format!("four times the L3 cache of {}", bytes_text(l3 as f64)),
    };
    text.push_str(&paragraph(&format!(
        "So that keys and values come from memory, each step reads another copy of the cache, of as many as make at \
         least {l3} (and {} at least, {} at most).",
        bytes_text(LEAST as f64),
        bytes_text(MOST as f64)
    )));
    let middle = |of: fn(&Timing) -> f64| {
        three_digits(median(document.rows.iter().map(|row| of(&row.timing)).collect()))
    };
    text.push_str(&paragraph(&format!(
        "Medians of the run: bandwidth {} GB/s, peak {} GFLOP/s.",
        middle(|timing| timing.bandwidth_gbytes_per_second),
        middle(|timing| timing.peak_gflops)
    )));
    text
}

#[cfg(test)]
mod tests {
    use qkv::reference;

    use super::*;

    fn case(storage: StorageArg) -> Case {
        let given = ShapeArg { batch: 2, heads: 4, length: 37, dim: 16 };
        Case { given, kv_heads: 2, queries: 3, rows: vec![(storage, false), (storage, true)] }
    }

    #[test]
    fn steps_compute_attention_over_the_cache_on_every_copy() {
        let steps = case(StorageArg::F32).steps().unwrap();
        let Caches::Contiguous(caches) = &steps[0].caches else { panic!("contiguous first") };
        let (qkv::Data::F32(k), qkv::Data::F32(v)) = (caches[0].keys(), caches[0].values()) else {
            panic!("f32")
        };
        let expected = reference::oracle(steps[0].q.view(), k, v, &steps[0].spec).output;
        let expected = expected.data().to_vec();
        for mut step in steps {
            for _ in 0..3 {
                step.out.data_mut().fill(f32::NAN);
                step.call().unwrap();
                // Packed: (1, heads, batch x rows, dim).
                let (shape, out) = (step.shape, step.out.view());
                for (i, &expected) in expected.iter().enumerate() {
                    let (d, at) = (i % shape.value_dim, i / shape.value_dim);
                    let (row, at) = (at % shape.query_len, at / shape.query_len);
                    let (head, batch) = (at % shape.query_heads, at / shape.query_heads);
                    let given = match step.caches {
                        Caches::Contiguous(_) => out.row(batch, head, row)[d],
                        Caches::Paged(..) => out.row(0, head, batch * shape.query_len + row)[d],
                    };
                    assert!((f64::from(given) - expected).abs() < 1e-5, "{i}: {given} {expected}");
                }
            }
        }
    }

    #[test]
    fn copies_fill_four_times_the_third_level_cache() {
        for storage in [StorageArg::F32, StorageArg::Bf16, StorageArg::F16, StorageArg::Int8] {
            for step in case(storage).steps().unwrap() {
                assert_eq!(step.bytes as f64, 2.0 * 2.0 * 2.0 * 37.0 * storage.row_bytes(16.0));
                let all = step.copies() * step.bytes;
                assert!(
                    all >= (TIMES_L3 * CacheInfo::get().l3).clamp(LEAST, MOST)
                        || step.copies() == MOST_COPIES
                );
            }
        }
        assert_eq!(copies(1.0), MOST_COPIES);
        assert_eq!(copies(1e30), 1);
    }

    #[test]
    fn pages_are_in_no_order() {
        let shape = case(StorageArg::F32).shape();
        let shape = Shape { key_len: 1000, ..shape };
        let k = Tensor::zeros([2, 2, 1000, 16]).unwrap();
        let (cache, ids) = paged_cache(&shape, StorageArg::F32, &k, &k).unwrap();
        let pages = cache.pages_of(ids[1]).unwrap();
        assert_eq!((pages.len(), cache.free_pages()), (63, 0));
        assert!(pages.windows(2).filter(|pair| pair[0].abs_diff(pair[1]) == 1).count() < 10, "{pages:?}");
    }

    #[test]
    fn flops_are_those_of_visible_scores() {
        let step = case(StorageArg::F32).steps().unwrap().swap_remove(0);
        // Rows see 35, 36 and 37 keys.
        assert_eq!(step.flops, 2.0 * 4.0 * (35.0 + 36.0 + 37.0) * 2.0 * 32.0);
    }
}
