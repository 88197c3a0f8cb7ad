//! The machine: what it is, and the limits that it shows at this moment.
//!
//! Percentages are of limits measured in the same breath, never of nominal ones: the clock moves, and on a shared machine
//! so does what is left of a core or of the memory. The probes themselves are qkv's ([`qkv::probe`]).

use std::error::Error;
use std::fmt;
use std::hint::black_box;
use std::process::Command;
use std::time::{Duration, Instant};

use qkv::gemm::CacheInfo;
use qkv::probe::{ProbeError, ProbeOptions};
use qkv::simd::Isa;
use serde::Serialize;

use crate::median;

/// What a list of figures must be headed by.
#[derive(Clone, Debug, Serialize)]
pub struct Environment {
    /// The CPU's name for itself.
    pub cpu: String,
    /// The instruction set that qkv uses.
    pub isa: &'static str,
    /// Threads that it uses.
    pub threads: usize,
    /// Bytes of the data caches, from the first level on; 0 where there is none.
    pub caches: [usize; 3],
    /// Version of qkv.
    pub version: &'static str,
    /// Commit of the working directory's repository, with a `+` where it has been changed since.
    pub commit: Option<String>,
}

impl Environment {
    /// Reads it off.
    ///
    /// # Errors
    /// Where `QKV_ISA` asks for what this CPU lacks.
    pub fn read() -> Result<Self, Box<dyn Error>> {
        let CacheInfo { l1d, l2, l3, .. } = CacheInfo::get();
        Ok(Self {
            cpu: cpu_name().unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
            isa: Isa::active()?.kind().name(),
            threads: rayon::current_num_threads(),
            caches: [l1d, l2, l3],
            version: env!("CARGO_PKG_VERSION"),
            commit: commit(),
        })
    }
}

impl fmt::Display for Environment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [l1d, l2, l3] = self.caches.map(|bytes| bytes >> 10);
        write!(f, "{}, {}, {} threads, caches {l1d}/{l2}/{l3} KiB", self.cpu, self.isa, self.threads)?;
        write!(f, ", qkv {}", self.version)?;
        self.commit.as_ref().map_or(Ok(()), |commit| write!(f, " at {commit}"))
    }
}

/// The name that Linux gives; None elsewhere.
fn cpu_name() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

fn commit() -> Option<String> {
    let git = |arguments: &[&str]| {
        let done = Command::new("git").args(arguments).output().ok()?;
        done.status.success().then(|| String::from_utf8_lossy(&done.stdout).trim().to_owned())
    };
    let hash = git(&["rev-parse", "--short", "HEAD"])?;
    let changed = !git(&["status", "--porcelain", "--untracked-files=no"])?.is_empty();
    Some(if changed { hash + "+" } else { hash })
}

/// Makes `threads` the number that everything on rayon's pool uses, before anything has been computed.
///
/// # Errors
/// Where the pool is already there with another number.
pub fn use_threads(threads: Option<usize>) -> Result<usize, Box<dyn Error>> {
    if let Some(threads) = threads {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
    }
    Ok(rayon::current_num_threads())
}

/// Rounds of a probe: its answer is their median, as that of a workload is the median of its batches, so that a moment in
/// which a core was taken away counts for neither.
const PROBE_ROUNDS: u32 = 5;

fn probe(threads: usize, stretch: Duration) -> ProbeOptions {
    ProbeOptions::new()
        .with_threads(threads)
        .with_rounds(PROBE_ROUNDS as usize)
        .with_round(stretch / PROBE_ROUNDS)
}

/// GFLOP/s of `threads` threads that do nothing but fused multiply-adds, over about this long.
///
/// # Errors
/// Where `QKV_ISA` is wrong or the threads cannot be started.
pub fn fma_peak(threads: usize, stretch: Duration) -> Result<f64, ProbeError> {
    qkv::probe::fma_peak(&probe(threads, stretch))
}

/// GB/s that `threads` threads read out of `bytes` of memory, over about this long.
///
/// Size and pages are those of what the figure is the limit of: where a cache is large enough to keep a part, it does so for
/// both, and huge pages are read faster than small ones.
///
/// # Errors
/// As [`fma_peak`], and where that much cannot be allocated.
pub fn read_bandwidth(
    threads: usize,
    stretch: Duration,
    bytes: usize,
    huge_pages: bool,
) -> Result<f64, ProbeError> {
    qkv::probe::read_bandwidth(&probe(threads, stretch).with_buffer_bytes(bytes).with_huge_pages(huge_pages))
}

/// Cycles per second of a busy core, counted by a chain of operations that take one cycle each on every CPU of the last
/// twenty years (the shifts and exclusive ors of a xorshift generator, none of which can begin before the last ended).
#[must_use]
pub fn clock_hz(stretch: Duration) -> f64 {
    const STEPS: u32 = 10_000;
    const CYCLES_PER_STEP: f64 = 6.0;
    let mut x = black_box(1u64);
    let mut best = 0.0f64;
    let start = Instant::now();
    // The fastest batch: whatever disturbs a batch can only slow it down.
    while start.elapsed() < stretch {
        let batch = Instant::now();
        for _ in 0..STEPS {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
        }
        x = black_box(x);
        best = best.max(f64::from(STEPS) * CYCLES_PER_STEP / batch.elapsed().as_secs_f64());
    }
    best
}

/// f32 operations per cycle of one core (two per lane of a fused multiply-add), rounded to a power of two: 16 where
/// 256-bit vectors are done in halves (AMD Zen 1), 32 with two whole pipes.
///
/// # Errors
/// As [`fma_peak`].
pub fn flops_per_cycle() -> Result<u32, ProbeError> {
    let stretch = Duration::from_millis(10);
    // Three tries, the middle one: either figure may fall into a moment when the core was taken away.
    let mut ratios = Vec::new();
    for _ in 0..3 {
        ratios.push(1e9 * fma_peak(1, stretch)? / clock_hz(stretch));
    }
    Ok(1 << median(&ratios).log2().round().clamp(0.0, 10.0) as u32)
}
