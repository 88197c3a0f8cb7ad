//! `qkv info`: what qkv finds on this machine, and the two ceilings it measures there.

use qkv::gemm::{CacheInfo, CacheSource, KernelShape};
use qkv::probe::{ProbeOptions, fma_peak, read_bandwidth};
use qkv::simd::Isa;
use serde::Serialize;

use crate::memory::{Machine, bytes_text, require};
use crate::output::{Grid, Progress, heading, paragraph, three_digits};
use crate::{Context, Failure, Report};

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Document {
    version: &'static str,
    cpu: Option<String>,
    arch: &'static str,
    os: &'static str,
    cores: Option<usize>,
    /// CPUs that the process may use.
    cpus: usize,
    /// Threads that qkv uses.
    threads: usize,
    memory_bytes: Option<u64>,
    available_bytes: Option<u64>,
    isa: Instructions,
    caches: Caches,
    measured: Measured,
}

#[derive(Debug, Serialize)]
struct Instructions {
    active: &'static str,
    available: Vec<&'static str>,
    /// f32 in a vector.
    lanes: usize,
    /// Rows and columns of the register tile.
    tile: [usize; 2],
}

/// Bytes; 0 where there is none.
#[derive(Debug, Serialize)]
struct Caches {
    l1d: usize,
    l2: usize,
    l3: usize,
    source: &'static str,
}

/// On one thread, and on all that qkv uses.
#[derive(Debug, Serialize)]
struct Measured {
    peak_gflops_one_thread: f64,
    peak_gflops: f64,
    read_gbytes_per_second_one_thread: f64,
    read_gbytes_per_second: f64,
    /// Bytes of the buffer that was read.
    buffer_bytes: usize,
}

pub(crate) fn run(context: &Context) -> Result<Report, Failure> {
    let machine = Machine::look();
    let measured = measure(context)?;
    let caches = CacheInfo::get();
    let tile = KernelShape::of(context.isa);
    let document = Document {
        version: env!("CARGO_PKG_VERSION"),
        cpu: machine.cpu,
        arch: std::env::consts::ARCH,
        os: std::env::consts::OS,
        cores: machine.cores,
        cpus: machine.cpus,
        threads: context.threads,
        memory_bytes: machine.memory,
        available_bytes: machine.available,
        isa: Instructions {
            active: context.isa.kind().name(),
            available: Isa::available().into_iter().map(|isa| isa.kind().name()).collect(),
            lanes: context.isa.lanes(),
            tile: [tile.mr, tile.nr],
        },
        caches: Caches { l1d: caches.l1d, l2: caches.l2, l3: caches.l3, source: source(caches.source) },
        measured,
    };
    Report::new(context, &document, || text(&document))
}

fn measure(context: &Context) -> Result<Measured, Failure> {
    let all = ProbeOptions::new().with_isa(context.isa).with_threads(context.threads);
    let one = all.clone().with_threads(1);
    require("the bandwidth probe", all.buffer_bytes() as f64)?;
    let mut progress = Progress::new(4, 1.0);
    let mut probe = |what: &str, measurement: &dyn Fn() -> Result<f64, qkv::probe::ProbeError>| {
        progress.doing(format!("measuring {what}"));
        let rate = measurement();
        progress.step();
        rate
    };
    Ok(Measured {
        peak_gflops_one_thread: probe("the peak of one thread", &|| fma_peak(&one))?,
        peak_gflops: probe("the peak of all threads", &|| fma_peak(&all))?,
        read_gbytes_per_second_one_thread: probe("the bandwidth of one thread", &|| read_bandwidth(&one))?,
        read_gbytes_per_second: probe("the bandwidth of all threads", &|| read_bandwidth(&all))?,
        buffer_bytes: all.buffer_bytes(),
    })
}

/// Where the cache sizes come from, in a word.
fn source(source: CacheSource) -> &'static str {
    match source {
        CacheSource::Cpuid => "cpuid",
        CacheSource::Sysfs => "kernel",
        CacheSource::Assumed => "assumed",
        _ => "unknown",
    }
}

fn text(document: &Document) -> String {
    let unknown = || "unknown".to_owned();
    let size = |bytes: usize| if bytes == 0 { "none".to_owned() } else { bytes_text(bytes as f64) };
    let memory = |bytes: Option<u64>| bytes.map_or_else(unknown, |bytes| bytes_text(bytes as f64));
    let (isa, caches, measured) = (&document.isa, &document.caches, &document.measured);

    let mut text = heading(&format!("qkv {}", document.version));
    text.push('\n');
    let mut facts = Grid::headless(2);
    let cores = document.cores.map_or_else(unknown, |cores| cores.to_string());
    for (what, value) in [
        ("CPU", document.cpu.clone().unwrap_or_else(unknown)),
        ("system", format!("{}, {}", document.os, document.arch)),
        (
            "cores",
            format!("{cores}, CPUs for this process {}, threads in use {}", document.cpus, document.threads),
        ),
        (
            "memory",
            format!("{}, {} available", memory(document.memory_bytes), memory(document.available_bytes)),
        ),
        (
            "caches",
            format!(
                "L1d {}, L2 {}, L3 {} (source: {})",
                size(caches.l1d),
                size(caches.l2),
                size(caches.l3),
                caches.source
            ),
        ),
        ("instruction sets", isa.available.join(", ")),
        (
            "active",
            format!("{}: {} f32 lanes, register tile {}x{}", isa.active, isa.lanes, isa.tile[0], isa.tile[1]),
        ),
    ] {
        facts.row([what.to_owned(), value]);
    }
    text.push_str(&facts.text());
    text.push('\n');

    let all = format!("{} thread{}", document.threads, if document.threads == 1 { "" } else { "s" });
    let mut rates = Grid::new(1, ["measured".to_owned(), "one thread".to_owned(), all]);
    for (what, one, all) in [
        ("FMA peak, GFLOP/s", measured.peak_gflops_one_thread, measured.peak_gflops),
        ("read bandwidth, GB/s", measured.read_gbytes_per_second_one_thread, measured.read_gbytes_per_second),
    ] {
        rates.row([what.to_owned(), three_digits(one), three_digits(all)]);
    }
    text.push_str(&rates.text());
    text.push('\n');
    text.push_str(&paragraph(&format!(
        "Peak: f32 multiply-adds on registers, 2 FLOP each. Bandwidth: adding up a buffer of {}. Medians of short \
         rounds; on a shared machine both move with its other users.",
        bytes_text(measured.buffer_bytes as f64)
    )));
    text
}
