//! `measure decode`: one step of decoding against the roofline, and prefill over 16-bit keys against f32.
//!
//! What one row is beside another (pages beside a contiguous cache, narrow keys beside f32) is measured call by call in turns,
//! for a bandwidth that neighbours change from second to second would decide between two figures of its own.
//!
//! The roofline of a step is the larger of its bytes over the read bandwidth and its operations over the peak, both
//! measured in the same round, before and after it, in huge pages like the caches. The cache is as many copies, taken
//! in turn, as make several times the last-level cache: a real model's weights pass through the caches between two
//! steps as well.

use std::error::Error;
use std::io::{self, Write};
use std::time::Duration;

use clap::Args;
use qkv::cache::{KvCache, KvCacheConfig, PagedCache, PagedCacheConfig, Storage};
use qkv::{AttentionSpec, Causal, Data, Outputs, Tensor, TensorRef, attention_into, attention_paged};
use qkv_benches::{
    Environment, Random, fma_peak, median, quartiles, ratio_of_two, read_bandwidth, seconds_per_call,
};

/// What `measure decode` can be told.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Rounds, of which the medians are printed.
    #[arg(long, default_value = "9", value_parser = crate::positive)]
    rounds: usize,
    /// Least length of each stretch, in seconds.
    #[arg(long, default_value = "0.1", value_parser = crate::seconds)]
    seconds: Duration,
    /// Rows whose name contains this text; may be given several times.
    #[arg(long, value_name = "TEXT")]
    filter: Vec<String>,
}

/// Bytes of all copies of a cache together, at least.
const COPIES: usize = 128 << 20;

struct Row<'a> {
    name: String,
    call: Box<dyn FnMut() + 'a>,
    bytes: f64,
    flops: f64,
    goal: f64,
}

/// (batch, query heads, kv heads, keys, dim).
type Shape = [usize; 5];

/// The steps that are measured with every storage, the last of them without groups.
const SHAPES: [(&str, Shape); 3] = [
    ("32 over 8, 8192 keys", [1, 32, 8, 8192, 128]),
    ("B 8, 32 over 8, 1024 keys", [8, 32, 8, 1024, 128]),
    ("32 over 32, 4096 keys", [1, 32, 32, 4096, 128]),
];
const PREFILL: &str = "prefill causal S 2048 d 128";

/// A step with a cache of this storage, contiguous or in pages of 16.
fn step(
    name: &str,
    shape: Shape,
    storage: Storage,
    paged: bool,
    goal: f64,
) -> Result<Row<'static>, Box<dyn Error>> {
    let [batch, heads, kv_heads, keys, dim] = shape;
    let mut random = Random::new(7);
    let mut tensor = |shape| Tensor::from_fn(shape, |_| random.next_f32());
    let q = if paged { tensor([1, heads, batch, dim])? } else { tensor([batch, heads, 1, dim])? };
    let (k, v) = (tensor([batch, kv_heads, keys, dim])?, tensor([batch, kv_heads, keys, dim])?);
    let mut out = Tensor::zeros(q.shape())?;
    let spec = AttentionSpec::new().with_causal(Causal::BottomRight);
    let flops = (4 * batch * heads * keys * dim) as f64;
    let one = KvCacheConfig::new(1, 1, 1, dim, dim).with_storage(storage);
    let mut row = KvCache::new(one)?;
    let first = TensorRef::from_slice(&k.data()[..dim], [1, 1, 1, dim])?;
    row.append(first, first)?;
    let bytes = 2 * batch * kv_heads * keys * row.keys().row_bytes();
    let copies = COPIES.div_ceil(bytes).min(64);
    let mut turn = 0;
    let call: Box<dyn FnMut()> = if paged {
        let mut caches = Vec::new();
        let pages = batch * keys.div_ceil(16);
        for _ in 0..copies {
            let config = PagedCacheConfig::new(pages, 16, kv_heads, dim, dim).with_storage(storage);
            let mut cache = PagedCache::new(config)?;
            let ids: Vec<_> = (0..batch).map(|_| cache.create()).collect();
            // Token by token over the batch, as sequences grow that are decoded together.
            for at in (0..keys).step_by(16) {
                for (i, &id) in ids.iter().enumerate() {
                    let part = |x: &Tensor| {
                        let shape = [1, kv_heads, 16.min(keys - at), dim];
                        Tensor::from_fn(shape, |[_, h, j, d]| x.view().row(i, h, at + j)[d])
                    };
                    cache.append(id, part(&k)?.view(), part(&v)?.view())?;
                }
            }
            caches.push((cache, ids));
        }
        let ends: Vec<usize> = (0..=batch).collect();
        Box::new(move || {
            turn = (turn + 1) % caches.len();
            let (cache, ids) = &caches[turn];
            let view = cache.view(ids).expect("live sequences");
            let outputs = Outputs::new(out.view_mut());
            attention_paged(q.view(), &ends, view.as_ref(), &spec, outputs).expect("it fits");
        })
    } else {
        let mut caches = Vec::new();
        for _ in 0..copies {
            let config = KvCacheConfig::new(batch, kv_heads, keys, dim, dim).with_storage(storage);
            let mut cache = KvCache::new(config)?;
            cache.append(k.view(), v.view())?;
            caches.push(cache);
        }
        Box::new(move || {
            turn = (turn + 1) % caches.len();
            let (k, v) = (caches[turn].keys(), caches[turn].values());
            attention_into(q.view(), k, v, &spec, Outputs::new(out.view_mut())).expect("it fits");
        })
    };
    Ok(Row { name: name.to_owned(), call, bytes: bytes as f64, flops, goal })
}

/// Causal prefill over keys and values of a storage type.
fn prefill(name: &str, storage: Storage) -> Result<Row<'static>, Box<dyn Error>> {
    let (heads, length, dim) = (4, 2048, 128);
    let mut random = Random::new(8);
    let mut tensor = || Tensor::from_fn([1, heads, length, dim], |_| random.next_f32());
    let (q, k, v) = (tensor()?, tensor()?, tensor()?);
    let mut cache = KvCache::new(KvCacheConfig::new(1, heads, length, dim, dim).with_storage(storage))?;
    cache.append(k.view(), v.view())?;
    let mut out = Tensor::zeros(q.shape())?;
    let spec = AttentionSpec::new().with_causal(Causal::TopLeft);
    let call = move || {
        let (k, v): (Data<'_>, Data<'_>) = (cache.keys(), cache.values());
        attention_into(q.view(), k, v, &spec, Outputs::new(out.view_mut())).expect("it fits");
    };
    let flops = (2 * heads * length * (length + 1) * dim) as f64;
    Ok(Row { name: name.to_owned(), call: Box::new(call), bytes: 0.0, flops, goal: 0.0 })
}

/// Two rows that are compared: how many times as quick one is as the other.
struct Pair {
    row: usize,
    beside: usize,
    goal: f64,
    speeds: Vec<f64>,
}

/// The pairs whose rows are both wanted, with the least that the first is to reach.
fn pairs(rows: &[Row<'_>]) -> Vec<Pair> {
    let mut names = Vec::new();
    for (shape, _) in SHAPES {
        names.push((format!("{shape} f32 paged"), format!("{shape} f32"), 0.95));
    }
    let [.., (last, _)] = SHAPES;
    let ungrouped = |storage: &str| format!("{last} {storage}");
    let prefill = |storage: &str| format!("{PREFILL} {storage}");
    names.push((ungrouped("bf16"), ungrouped("f32"), 1.5));
    names.push((ungrouped("f16"), ungrouped("f32"), 1.5));
    names.push((ungrouped("int8"), ungrouped("bf16"), 1.0));
    names.push((prefill("bf16"), prefill("f32"), 0.93));
    names.push((prefill("f16"), prefill("f32"), 0.93));
    let find = |name: &str| rows.iter().position(|row| row.name == name);
    let pair = |(row, beside, goal): &(String, String, f64)| {
        Some(Pair { row: find(row)?, beside: find(beside)?, goal: *goal, speeds: Vec::new() })
    };
    names.iter().filter_map(pair).collect()
}

/// Runs the rounds and prints the tables.
pub(crate) fn run(options: &Options, threads: usize) -> Result<(), Box<dyn Error>> {
    let int8 = Storage::Int8 { group: None, zero_point: false };
    let storages = [("f32", Storage::F32), ("bf16", Storage::Bf16), ("f16", Storage::F16), ("int8", int8)];
    let wanted = |name: &str| {
        options.filter.is_empty() || options.filter.iter().any(|text| name.contains(text.as_str()))
    };
    let mut rows = Vec::new();
    for (shape_name, shape) in SHAPES {
        for (storage_name, storage) in storages {
            let name = format!("{shape_name} {storage_name}");
            if wanted(&name) {
                let goal = match storage {
                    Storage::F32 => 85.0,
                    Storage::F16 | Storage::Bf16 => 70.0,
                    _ => 0.0,
                };
                rows.push(step(&name, shape, storage, false, goal)?);
            }
        }
        let name = format!("{shape_name} f32 paged");
        if wanted(&name) {
            rows.push(step(&name, shape, Storage::F32, true, 0.0)?);
        }
    }
    if wanted("8 heads, 64 keys, d 64") {
        rows.push(step("8 heads, 64 keys, d 64", [1, 8, 8, 64, 64], Storage::F32, false, 0.0)?);
    }
    for (storage_name, storage) in storages {
        let name = format!("{PREFILL} {storage_name}");
        if wanted(&name) {
            rows.push(prefill(&name, storage)?);
        }
    }

    let probe = Duration::from_millis(40);
    let (mut ratios, mut times) = (vec![Vec::new(); rows.len()], vec![Vec::new(); rows.len()]);
    let mut bandwidths = Vec::new();
    let mut pairs = pairs(&rows);
    for round in 0..options.rounds {
        for turn in 0..rows.len() {
            let at = (turn + round) % rows.len();
            let row = &mut rows[at];
            let limits = || {
                let bandwidth = read_bandwidth(threads, probe, COPIES, true)?;
                Ok::<_, Box<dyn Error>>((bandwidth, fma_peak(threads, probe)?))
            };
            let before = limits()?;
            let seconds = seconds_per_call(options.seconds, &mut row.call);
            let after = limits()?;
            let (bandwidth, peak) = (0.5 * (before.0 + after.0), 0.5 * (before.1 + after.1));
            bandwidths.push(bandwidth);
            let roofline = (row.bytes / bandwidth).max(row.flops / peak) * 1e-9;
            ratios[at].push(100.0 * roofline / seconds);
            times[at].push(seconds);
        }
        for Pair { row, beside, speeds, .. } in &mut pairs {
            let [row, beside] = rows.get_disjoint_mut([*row, *beside])?;
            let turn = |first: bool| if first { (row.call)() } else { (beside.call)() };
            speeds.push(1.0 / ratio_of_two(2 * options.seconds, turn));
        }
    }
    writeln!(io::stdout(), "{}", Environment::read()?)?;
    writeln!(io::stdout(), "percent of the roofline, {} rounds; in brackets the quartiles", options.rounds)?;
    writeln!(io::stdout(), "read bandwidth {:.1} GB/s in the middle\n", median(&bandwidths))?;
    writeln!(
        io::stdout(),
        "{:36} {:>10} {:>8} {:>8} {:^16} {:>6}",
        "row",
        "us a call",
        "GB/s",
        "percent",
        "(quartiles)",
        "goal"
    )?;
    for (i, row) in rows.iter().enumerate() {
        let (low, high) = quartiles(&ratios[i]);
        let (percent, seconds) = (median(&ratios[i]), median(&times[i]));
        writeln!(
            io::stdout(),
            "{:36} {:>10.1} {:>8.1} {percent:>8.1} {:^16} {:>6.0}",
            row.name,
            1e6 * seconds,
            1e-9 * row.bytes / seconds,
            format!("({low:.0} to {high:.0})"),
            row.goal
        )?;
    }
    if !pairs.is_empty() {
        writeln!(io::stdout(), "\ntimes as quick as the row behind it, call by call in turns\n")?;
    }
    for Pair { row, beside, goal, speeds } in &pairs {
        let (low, high) = quartiles(speeds);
        let (row, beside) = (&rows[*row].name, &rows[*beside].name);
        let (speed, quartiles) = (median(speeds), format!("({low:.3} to {high:.3})"));
        writeln!(io::stdout(), "{row:36} {beside:32} {speed:>6.3} {quartiles:^18} {goal:>5.2}")?;
    }
    Ok(())
}
