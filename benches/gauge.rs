//! How the criterion groups measure and what they print: time, as usual, and beside it GFLOP/s and percent of the peak.
//!
//! `Throughput::Elements` is the number of operations of a call, so what criterion would call "Gelem/s" are GFLOP/s.
//! The peak, of as many threads as the group uses, is measured again before every benchmark, when its turn comes: a
//! percentage of something that was measured minutes ago means little on a machine whose clock moves. The recorded
//! figures come from `measure`, which goes further and measures the peak around every turn.

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use criterion::measurement::{Measurement, ValueFormatter, WallTime};
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, SamplingMode, Throughput};
use qkv_benches::{Environment, fma_peak};

/// The peak that percentages refer to, as the bits of an `f64` in GFLOP/s; 0 before the first.
static PEAK: AtomicU64 = AtomicU64::new(0);

/// How long the peak is measured before a benchmark.
const PROBE: Duration = Duration::from_millis(30);

/// From this many operations on (some milliseconds; hundreds of them for the slowest peer) every sample is one call or a
/// few: criterion's usual plan, one more in each sample, would take minutes.
const SLOW: f64 = 1e8;

/// Wall time that is also shown as a part of the peak.
#[derive(Debug)]
pub(crate) struct Gauge;

impl Measurement for Gauge {
    type Intermediate = Instant;
    type Value = Duration;

    fn start(&self) -> Instant {
        WallTime.start()
    }
    fn end(&self, start: Instant) -> Duration {
        WallTime.end(start)
    }
    fn add(&self, a: &Duration, b: &Duration) -> Duration {
        *a + *b
    }
    fn zero(&self) -> Duration {
        Duration::ZERO
    }
    fn to_f64(&self, value: &Duration) -> f64 {
        WallTime.to_f64(value)
    }
    fn formatter(&self) -> &dyn ValueFormatter {
        self
    }
}

impl ValueFormatter for Gauge {
    fn format_throughput(&self, throughput: &Throughput, nanoseconds: f64) -> String {
        let Throughput::Elements(flops) = *throughput else {
            return WallTime.formatter().format_throughput(throughput, nanoseconds);
        };
        // Operations per nanosecond are GFLOP/s.
        let rate = flops as f64 / nanoseconds;
        let peak = f64::from_bits(PEAK.load(Ordering::Relaxed));
        if peak > 0.0 {
            format!("{rate:.1} GFLOP/s {:.1}%", 100.0 * rate / peak)
        } else {
            format!("{rate:.1} GFLOP/s")
        }
    }
    fn scale_values(&self, typical: f64, values: &mut [f64]) -> &'static str {
        WallTime.formatter().scale_values(typical, values)
    }
    fn scale_throughputs(&self, typical: f64, throughput: &Throughput, values: &mut [f64]) -> &'static str {
        WallTime.formatter().scale_throughputs(typical, throughput, values)
    }
    fn scale_for_machines(&self, values: &mut [f64]) -> &'static str {
        WallTime.formatter().scale_for_machines(values)
    }
}

/// Ten samples in about a second for each benchmark, so that all of `cargo bench` takes a few minutes; the options of
/// the command line come after and win.
pub(crate) fn criterion() -> Criterion<Gauge> {
    match Environment::read() {
        Ok(environment) => eprintln!("{environment}"),
        Err(problem) => panic!("{problem}"),
    }
    Criterion::default()
        .with_measurement(Gauge)
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(800))
        .configure_from_args()
}

/// One benchmark: a call of `flops` operations on `threads` threads.
pub(crate) fn bench<T>(
    group: &mut BenchmarkGroup<'_, Gauge>,
    id: BenchmarkId,
    threads: usize,
    flops: f64,
    mut call: impl FnMut() -> T,
) {
    group.throughput(Throughput::Elements(flops as u64));
    group.sampling_mode(if flops < SLOW { SamplingMode::Auto } else { SamplingMode::Flat });
    let mut first = true;
    group.bench_function(id, |bencher| {
        // Inside, where criterion comes only if the benchmark was not filtered out; it comes several times.
        if std::mem::take(&mut first) {
            let peak =
                fma_peak(threads, PROBE).expect("the environment was read, so there is an instruction set");
            PEAK.store(peak.to_bits(), Ordering::Relaxed);
        }
        bencher.iter(|| black_box(call()));
    });
}
