//! How fast products are, as a share of what the machine can do at that moment.
//!
//! ```text
//! cargo run --release -p qkv-gemm --example throughput                  # the shapes that are tuned for
//! cargo run --release -p qkv-gemm --example throughput -- 128 384 384   # m k n
//! cargo run --release -p qkv-gemm --example throughput -- 128 384 384 nt --seconds 2
//! ```
//!
//! `nn`, `nt`, `tn`, `tt` say whether A and B are stored transposed, `packed` that B is packed ahead. Every round
//! measures the peak first (independent multiply-adds in registers on every thread of the pool, or for products that
//! are bound by memory a sum over 256 MiB) and then the product, so that both see the same clock and the same
//! neighbours; medians are printed. `RAYON_NUM_THREADS` sets the threads, `QKV_ISA` the instruction set.

use std::hint::black_box;
use std::time::{Duration, Instant};

use qkv_gemm::{AlignedBuf, GemmError, GemmSpec, MatMut, MatRef, PackedRhs, gemm, gemm_packed};
use qkv_simd::{Isa, Simd, SimdOp};

/// Independent multiply-adds: twelve accumulators cover the latency of any CPU with two pipes.
struct Peak {
    turns: usize,
}

const CHAINS: usize = 12;

impl SimdOp for Peak {
    type Output = f32;
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) -> f32 {
        let mut acc = [s.zero(); CHAINS];
        let (a, b) = (s.splat(black_box(1.0)), s.splat(black_box(1e-9)));
        for _ in 0..self.turns {
            for x in &mut acc {
                *x = s.mul_add(a, b, *x);
            }
        }
        acc.into_iter().map(|x| s.reduce_add(x)).sum()
    }
}

/// A sum over a slice, read as eight streams side by side: one stream leaves a good part of the bandwidth unused.
struct Sum<'a>(&'a [f32]);

const STREAMS: usize = 8;

impl SimdOp for Sum<'_> {
    type Output = f32;
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) -> f32 {
        let len = self.0.len() / STREAMS / S::LANES * S::LANES;
        let mut acc = [s.zero(); STREAMS];
        for at in (0..len).step_by(S::LANES) {
            for (i, x) in acc.iter_mut().enumerate() {
                *x = s.add(*x, s.load(&self.0[i * len + at..]));
            }
        }
        acc.into_iter().map(|x| s.reduce_add(x)).sum()
    }
}

/// Seconds that `work(0..threads)` takes on as many threads at once, the caller's among them as it is in a product.
fn on_all_threads(work: impl Fn(usize) -> f32 + Sync) -> f64 {
    let work = &work;
    let start = Instant::now();
    rayon::in_place_scope(|scope| {
        for i in 1..rayon::current_num_threads() {
            scope.spawn(move |_| {
                black_box(work(i));
            });
        }
        black_box(work(0));
    });
    start.elapsed().as_secs_f64()
}

/// GFLOP/s of all threads.
fn peak(isa: Isa, turns: usize) -> f64 {
    let seconds = on_all_threads(|_| isa.dispatch(Peak { turns }));
    (rayon::current_num_threads() * turns * CHAINS * 2 * isa.lanes()) as f64 / seconds / 1e9
}

/// GB/s that all threads read.
fn bandwidth(isa: Isa, data: &[f32]) -> f64 {
    let share = data.len() / rayon::current_num_threads();
    let seconds = on_all_threads(|i| isa.dispatch(Sum(&data[share * i..][..share])));
    size_of_val(data) as f64 / seconds / 1e9
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

#[derive(Clone, Copy, Debug)]
struct Case {
    m: usize,
    k: usize,
    n: usize,
    a_transposed: bool,
    b_transposed: bool,
    packed: bool,
}

impl Case {
    fn new((m, k, n): (usize, usize, usize)) -> Self {
        Self { m, k, n, a_transposed: false, b_transposed: false, packed: false }
    }

    fn name(&self) -> String {
        let letter = |transposed| if transposed { 't' } else { 'n' };
        let packed = if self.packed { " packed" } else { "" };
        let (a, b) = (letter(self.a_transposed), letter(self.b_transposed));
        format!("({}, {}, {}) {a}{b}{packed}", self.m, self.k, self.n)
    }

    /// Whether reading the operands takes longer than multiplying them.
    fn bound_by_memory(&self) -> bool {
        self.m.min(self.n) < 16 && self.m.max(self.n) * self.k > 4 << 20
    }

    fn run(&self, isa: Isa, time: Duration, large: &[f32]) -> Result<(), GemmError> {
        let &Self { m, k, n, .. } = self;
        let (mut a, mut b, mut c) = (AlignedBuf::new(), AlignedBuf::new(), AlignedBuf::new());
        let (a, b, c) = (a.reserve(m * k), b.reserve(k * n), c.reserve(m * n));
        for (i, x) in a.iter_mut().chain(b.iter_mut()).enumerate() {
            *x = (i % 61) as f32 / 61.0 - 0.5;
        }
        let a =
            if self.a_transposed { MatRef::from_slice(a, k, m)?.t() } else { MatRef::from_slice(a, m, k)? };
        let b =
            if self.b_transposed { MatRef::from_slice(b, n, k)?.t() } else { MatRef::from_slice(b, k, n)? };
        let packed = if self.packed { Some(PackedRhs::new_for(isa, b)?) } else { None };
        let spec = GemmSpec { isa: Some(isa), ..Default::default() };
        let mut once = || {
            let c = &mut MatMut::from_slice(c, m, n)?;
            match &packed {
                Some(packed) => gemm_packed(a, packed, c, &spec),
                None => gemm(a, b, c, &spec),
            }
        };
        let flop = 2.0 * (m * k * n) as f64;
        let bytes = 4.0 * (m * k + k * n + m * n) as f64;
        // A sample of about two milliseconds, between two probes of about one.
        once()?;
        let start = Instant::now();
        once()?;
        let per_sample = (2e-3 / start.elapsed().as_secs_f64().max(1e-9)).ceil().max(1.0) as usize;
        let (mut rates, mut shares, mut probes) = (Vec::new(), Vec::new(), Vec::new());
        let begin = Instant::now();
        while begin.elapsed() < time || rates.len() < 5 {
            let probe = if self.bound_by_memory() { bandwidth(isa, large) } else { peak(isa, 300_000) };
            let start = Instant::now();
            for _ in 0..per_sample {
                once()?;
            }
            let seconds = start.elapsed().as_secs_f64() / per_sample as f64;
            let rate = if self.bound_by_memory() { bytes } else { flop } / seconds / 1e9;
            rates.push(rate);
            probes.push(probe);
            shares.push(100.0 * rate / probe);
        }
        let gflops = flop / if self.bound_by_memory() { bytes } else { flop } * median(&mut rates);
        let (what, unit) = if self.bound_by_memory() { ("bandwidth", "GB/s") } else { ("peak", "GFLOP/s") };
        let us = flop / gflops / 1e3;
        println!(
            "{:<26} {us:>10.1} us {gflops:>8.1} GFLOP/s {:>6.1} % of {what} {:>6.1} {unit}",
            self.name(),
            median(&mut shares),
            median(&mut probes),
        );
        Ok(())
    }
}

/// The shapes that are tuned for: squares, transformer layers, a vector times a matrix.
const TUNED: [(usize, usize, usize); 11] = [
    (64, 64, 64),
    (128, 128, 128),
    (256, 256, 256),
    (512, 512, 512),
    (1024, 1024, 1024),
    (2048, 2048, 2048),
    (128, 384, 384),
    (128, 1536, 384),
    (512, 3072, 768),
    (8, 4096, 4096),
    (1, 4096, 4096),
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let isa = Isa::active()?;
    let mut time = Duration::from_millis(500);
    let mut sizes = Vec::new();
    let (mut a_transposed, mut b_transposed, mut packed) = (false, false, false);
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--seconds" => time = Duration::from_secs_f64(args.next().ok_or("--seconds: a number")?.parse()?),
            "packed" => packed = true,
            "nn" | "nt" | "tn" | "tt" => {
                a_transposed = arg.starts_with('t');
                b_transposed = arg.ends_with('t');
            }
            size => sizes.push(size.parse::<usize>().map_err(|_| format!("\"{size}\": expected m k n"))?),
        }
    }
    if !sizes.len().is_multiple_of(3) {
        return Err("expected sizes in threes: m k n".into());
    }
    let mut cases: Vec<(usize, usize, usize)> = sizes.chunks_exact(3).map(|s| (s[0], s[1], s[2])).collect();
    if cases.is_empty() {
        cases = TUNED.to_vec();
    }
    let mut large = AlignedBuf::new();
    let large = large.reserve(64 << 20);
    large.fill(1.0);
    println!("{}, {} threads", isa.kind(), rayon::current_num_threads());
    for case in cases {
        Case { a_transposed, b_transposed, packed, ..Case::new(case) }.run(isa, time, large)?;
    }
    Ok(())
}
