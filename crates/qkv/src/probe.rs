//! What this machine can do: the two ceilings that every rate in this project is compared with.
//!
//! - [`fma_peak`]: the rate of fused multiply-adds on registers alone, one of them counted as 2 FLOP. No memory is
//!   touched, so it is the ceiling of the matrix products and of attention as long as they are not bound by memory.
//! - [`read_bandwidth`]: bytes per second that reach the registers from main memory. It is the ceiling of a product of
//!   a matrix with a vector, and of decoding one token at a time.
//!
//! Both are *measured*, not looked up: the clock of a CPU moves with its temperature and with the number of busy cores,
//! and on a shared machine also with its neighbours. A percentage of the peak therefore means something only where the
//! peak was measured next to the work, which is why a probe takes a fraction of a second and is run between the rounds
//! of what it is compared with.
//!
//! Each thread counts what it did from a start that all threads share until the round's time is over, and the rates are
//! added. A thread that gets its core late, or is taken off it for a while, lowers the sum by just that.

use core::fmt;
use core::hint::black_box;
use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use qkv_gemm::{CacheInfo, prefer_huge_pages};
use qkv_simd::{Isa, IsaError, Simd, SimdOp};

/// How a probe measures. The defaults take 0.2 seconds for the peak and about half a second for the bandwidth.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ProbeOptions {
    /// The instruction set; `None` is the active one ([`Isa::active`]).
    pub isa: Option<Isa>,
    /// Threads, started by the probe itself; 0 counts as 1. The default is one for each CPU this process may use.
    pub threads: usize,
    /// Rounds, of which the median is returned; 0 counts as 1.
    pub rounds: usize,
    /// How long a round takes, about.
    pub round: Duration,
    /// Bytes that [`read_bandwidth`] reads, over all threads; `None` is four times the third-level cache, but at least
    /// 256 MiB and at most 2 GiB. Twice the cache would not do: replacement is not strictly by age, so a part of such a
    /// buffer stays and is read at the cache's speed. At least 256 MiB, because a virtual machine may report the share
    /// of the cache that it was given, or none.
    pub buffer_bytes: Option<usize>,
    /// Whether that buffer asks for huge pages, as qkv's own caches do ([`prefer_huge_pages`]). The default, since they are read
    /// fastest. For data that lies in ordinary memory, the limit is that of ordinary memory.
    pub huge_pages: bool,
}

impl Default for ProbeOptions {
    fn default() -> Self {
        Self {
            isa: None,
            threads: thread::available_parallelism().map_or(1, usize::from),
            rounds: 9,
            round: Duration::from_millis(20),
            buffer_bytes: None,
            huge_pages: true,
        }
    }
}

impl ProbeOptions {
    /// The defaults: all CPUs, the active instruction set, the median of nine rounds of 20 ms.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// With this instruction set.
    #[must_use]
    pub fn with_isa(self, isa: Isa) -> Self {
        Self { isa: Some(isa), ..self }
    }

    /// With this number of threads.
    #[must_use]
    pub fn with_threads(self, threads: usize) -> Self {
        Self { threads, ..self }
    }

    /// With this number of rounds; one is for callers that alternate rounds of the probe with rounds of their own.
    #[must_use]
    pub fn with_rounds(self, rounds: usize) -> Self {
        Self { rounds, ..self }
    }

    /// With rounds of about this length.
    #[must_use]
    pub fn with_round(self, round: Duration) -> Self {
        Self { round, ..self }
    }

    /// With a buffer of this size for [`read_bandwidth`].
    #[must_use]
    pub fn with_buffer_bytes(self, bytes: usize) -> Self {
        Self { buffer_bytes: Some(bytes), ..self }
    }

    /// With or without huge pages for [`read_bandwidth`].
    #[must_use]
    pub fn with_huge_pages(self, huge_pages: bool) -> Self {
        Self { huge_pages, ..self }
    }

    /// Bytes that [`read_bandwidth`] will take.
    #[must_use]
    pub fn buffer_bytes(&self) -> usize {
        self.buffer_bytes.unwrap_or_else(|| (4 * CacheInfo::get().l3).clamp(256 << 20, 2 << 30))
    }
}

/// Why a probe gave no number.
#[derive(Debug)]
#[non_exhaustive]
pub enum ProbeError {
    /// `QKV_ISA` names an instruction set that cannot be used.
    Isa(IsaError),
    /// The buffer of [`read_bandwidth`] could not be allocated.
    OutOfMemory {
        /// Its bytes, over all threads.
        bytes: usize,
    },
    /// The system refused to start the threads.
    Threads(std::io::Error),
}

impl fmt::Display for ProbeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ProbeError::Isa(error) => error.fmt(f),
            ProbeError::OutOfMemory { bytes } => {
                write!(f, "the bandwidth probe could not allocate its buffer of {bytes} bytes")
            }
            ProbeError::Threads(error) => write!(f, "the probe's threads could not be started: {error}"),
        }
    }
}

impl core::error::Error for ProbeError {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        match self {
            ProbeError::Isa(error) => Some(error),
            ProbeError::Threads(error) => Some(error),
            ProbeError::OutOfMemory { .. } => None,
        }
    }
}

impl From<IsaError> for ProbeError {
    fn from(error: IsaError) -> Self {
        ProbeError::Isa(error)
    }
}

/// The peak of f32 arithmetic in GFLOP/s (1e9 per second) over all threads of `options`: the median of its rounds.
///
/// Independent chains of multiply-adds run on registers, more of them than latency times pipes of any CPU known, so
/// that the pipes are the limit. A multiply-add counts as 2 FLOP, also where the instruction set takes two
/// instructions for it.
///
/// ```
/// use qkv::probe::{ProbeOptions, fma_peak};
///
/// let one_short_round = ProbeOptions::new().with_threads(1).with_rounds(1);
/// assert!(fma_peak(&one_short_round)? > 0.0);
/// # Ok::<(), qkv::probe::ProbeError>(())
/// ```
///
/// # Errors
/// Where `QKV_ISA` is wrong or the threads cannot be started.
pub fn fma_peak(options: &ProbeOptions) -> Result<f64, ProbeError> {
    let isa = options.isa.map_or_else(Isa::active, Ok)?;
    // About 20 microseconds: long beside the two readings of the clock around it, short beside a round.
    let steps = 10_000;
    measure(options, |_| Some(()), move |()| isa.dispatch(Chains { steps }))
}

/// The read bandwidth of main memory in GB/s (1e9 bytes per second) over all threads of `options`: the median of its
/// rounds.
///
/// Each thread adds up its share of a buffer much larger than the caches ([`ProbeOptions::buffer_bytes`]), over and
/// over, as vectors in ascending order, which is what hardware prefetchers are best at. The share is written by the
/// thread that reads it, so that it lies in real memory, and in the thread's own on machines with several.
///
/// # Errors
/// As [`fma_peak`], and where the buffer cannot be allocated.
pub fn read_bandwidth(options: &ProbeOptions) -> Result<f64, ProbeError> {
    let isa = options.isa.map_or_else(Isa::active, Ok)?;
    let values = (options.buffer_bytes() / options.threads.max(1) / size_of::<f32>()).max(PIECE);
    let make = |_| {
        let mut buffer = Vec::new();
        buffer.try_reserve_exact(values).ok()?;
        if options.huge_pages {
            prefer_huge_pages(buffer.spare_capacity_mut());
        }
        buffer.resize(values, 1.0f32);
        Some((buffer, 0))
    };
    measure(options, make, move |(buffer, at): &mut (Vec<f32>, usize)| {
        let piece = &buffer[*at..][..PIECE];
        *at = if *at + 2 * PIECE <= buffer.len() { *at + PIECE } else { 0 };
        isa.dispatch(Sum { values: piece });
        size_of_val(piece) as f64
    })
}

/// Values that are read between two looks at the clock: 1 MiB, some tens of microseconds.
const PIECE: usize = 256 << 10;

/// Chains of multiply-adds; answers with their FLOP.
struct Chains {
    steps: usize,
}

impl SimdOp for Chains {
    type Output = f64;

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) -> f64 {
        // AVX2 needs 4 cycles x 2 pipes = 8 chains, and 12 with the two factors still fit its 16 registers. NEON has
        // cores with 4 pipes of 4 cycles, which take 16; where there are 32 registers, 24 chains fit.
        if S::REGISTERS >= 32 { chains::<S, 24>(s, self.steps) } else { chains::<S, 12>(s, self.steps) }
    }
}

/// `N` chains of `steps` multiply-adds each; their FLOP.
#[inline(always)]
fn chains<S: Simd, const N: usize>(s: S, steps: usize) -> f64 {
    // The compiler may know nothing of the factors, nor that two chains are equal. The fixed point is 2, so the values
    // stay normal numbers however long this runs.
    let factor = s.splat(black_box(0.5));
    let summand = s.splat(black_box(1.0));
    let mut chain: [S::F32; N] = core::array::from_fn(|i| s.splat(black_box(i as f32)));
    for _ in 0..steps {
        for x in &mut chain {
            *x = s.mul_add(*x, factor, summand);
        }
    }
    let sum = chain.into_iter().fold(s.zero(), |sum, x| s.add(sum, x));
    black_box(s.reduce_add(sum));
    2.0 * (steps * N * S::LANES) as f64
}

/// The sum of values, which is thrown away.
struct Sum<'a> {
    values: &'a [f32],
}

impl SimdOp for Sum<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        // Eight sums: the latency of an addition must not be what limits reading.
        const SUMS: usize = 8;
        let mut sums = [s.zero(); SUMS];
        for block in self.values.chunks_exact(SUMS * S::LANES) {
            for (sum, x) in sums.iter_mut().zip(block.chunks_exact(S::LANES)) {
                *sum = s.add(*sum, s.load(x));
            }
        }
        let sum = sums.into_iter().fold(s.zero(), |sum, x| s.add(sum, x));
        black_box(s.reduce_add(sum));
    }
}

/// Runs `step` on all threads for the rounds of `options`. `make` prepares a thread's state (`None`: no memory), and
/// `step` answers with the amount of work done (FLOP or bytes). The median over the rounds of work per nanosecond,
/// added over the threads.
fn measure<T>(
    options: &ProbeOptions,
    make: impl Fn(usize) -> Option<T> + Sync,
    step: impl Fn(&mut T) -> f64 + Sync,
) -> Result<f64, ProbeError> {
    let (threads, rounds) = (options.threads.max(1), options.rounds.max(1));
    let gate = Gate::new();

    // One thread's rate in each round; None where its state could not be made or another thread is missing.
    let work = |index: usize| -> Option<Vec<f64>> {
        let Some(mut state) = make(index) else {
            gate.give_up();
            return None;
        };
        // Once for warmth: the first step pays for waking the wide vector units.
        step(&mut state);
        let mut rates = Vec::with_capacity(rounds);
        for round in 0..rounds {
            let start = gate.pass(round)?;
            let mut done = 0.0;
            let taken = loop {
                done += step(&mut state);
                let taken = start.elapsed();
                if taken >= options.round {
                    break taken;
                }
            };
            rates.push(done / taken.as_nanos().max(1) as f64);
        }
        Some(rates)
    };

    thread::scope(|scope| {
        let mut workers = Vec::with_capacity(threads);
        for index in 0..threads {
            let work = &work;
            match thread::Builder::new().spawn_scoped(scope, move || work(index)) {
                Ok(worker) => workers.push(worker),
                Err(error) => {
                    gate.give_up();
                    return Err(ProbeError::Threads(error));
                }
            }
        }
        gate.conduct(threads, rounds);
        let mut sums = vec![0.0; rounds];
        for worker in workers {
            let rates = worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            let rates = rates.ok_or(ProbeError::OutOfMemory { bytes: options.buffer_bytes() })?;
            for (sum, rate) in sums.iter_mut().zip(rates) {
                *sum += rate;
            }
        }
        sums.sort_by(f64::total_cmp);
        Ok(sums[rounds / 2])
    })
}

/// Where the threads wait for each other before each round.
///
/// A `Barrier` would do but for two things: it cannot be told that a thread will never come, and it does not say when
/// it opened. Threads that share a core get out of it one after the other, and each must count from the opening.
struct Gate {
    /// What times are counted from.
    zero: Instant,
    /// Arrivals, over all rounds.
    arrived: AtomicUsize,
    /// Rounds that may run.
    open: AtomicUsize,
    /// When the last of them was opened, in nanoseconds.
    opened: AtomicU64,
    /// Somebody is missing; nobody waits any longer.
    given_up: AtomicBool,
}

impl Gate {
    fn new() -> Self {
        Self {
            zero: Instant::now(),
            arrived: AtomicUsize::new(0),
            open: AtomicUsize::new(0),
            opened: AtomicU64::new(0),
            given_up: AtomicBool::new(false),
        }
    }

    fn give_up(&self) {
        self.given_up.store(true, Ordering::Release);
    }

    /// Waits until `round` may run and answers since when; None where it never will. Yields rather than sleeps: a
    /// thread that must first be woken starts late.
    fn pass(&self, round: usize) -> Option<Instant> {
        self.arrived.fetch_add(1, Ordering::AcqRel);
        while self.open.load(Ordering::Acquire) <= round {
            if self.given_up.load(Ordering::Acquire) {
                return None;
            }
            thread::yield_now();
        }
        // Written before `open`, and not again before this thread has arrived for the next round.
        Some(self.zero + Duration::from_nanos(self.opened.load(Ordering::Relaxed)))
    }

    /// Opens each round when all threads have arrived. Sleeps between looks, so as not to take a core from them.
    fn conduct(&self, threads: usize, rounds: usize) {
        for round in 0..rounds {
            while self.arrived.load(Ordering::Acquire) < threads * (round + 1) {
                if self.given_up.load(Ordering::Acquire) {
                    return;
                }
                thread::sleep(Duration::from_micros(50));
            }
            self.opened.store(self.zero.elapsed().as_nanos() as u64, Ordering::Relaxed);
            self.open.store(round + 1, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Short, for tests that look at anything but the number.
    fn quick() -> ProbeOptions {
        ProbeOptions::new().with_rounds(3).with_round(Duration::from_millis(2)).with_buffer_bytes(4 << 20)
    }

    #[test]
    fn every_instruction_set_has_a_peak() {
        for isa in Isa::available() {
            for threads in [0, 1, 3] {
                let rate = fma_peak(&quick().with_isa(isa).with_threads(threads)).unwrap();
                assert!(rate.is_finite() && rate > 0.0, "{isa:?}: {rate}");
            }
        }
    }

    #[test]
    fn reading_has_a_rate() {
        for isa in Isa::available() {
            let rate = read_bandwidth(&quick().with_isa(isa).with_threads(2)).unwrap();
            assert!(rate.is_finite() && rate > 0.0, "{isa:?}: {rate}");
        }
    }

    #[test]
    fn a_buffer_that_no_machine_has_is_refused() {
        let error = read_bandwidth(&quick().with_threads(2).with_buffer_bytes(usize::MAX)).unwrap_err();
        assert!(matches!(error, ProbeError::OutOfMemory { .. }), "{error}");
        assert!(error.to_string().contains("bytes"));
    }

    #[test]
    fn the_buffer_is_well_above_the_cache() {
        let bytes = ProbeOptions::new().buffer_bytes();
        assert!((256 << 20..=2 << 30).contains(&bytes));
        assert!(bytes >= 4 * CacheInfo::get().l3 || bytes == 2 << 30);
    }
}
