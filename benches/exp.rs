//! The elementary functions, one thread, values in the first-level cache: what a score costs beside its products.
//!
//! Beside them the standard library's (scalar, the system's mathematical library) and those of the crate `wide`. The
//! latter are compiled for the instruction set that is the compiler's target (SSE2 on x86-64 unless `-C target-cpu` says
//! otherwise), as they are in a program that does not choose at run time.
//!
//! Elements are values here, not operations: "Gelem/s" are 10^9 function values per second.

use std::hint::black_box;
use std::time::Duration;

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput};
use qkv::simd::{Isa, Simd, SimdOp, math};
use qkv_benches::{Environment, Random};
use wide::f32x8;

/// Values in a call: 16 KiB read and 16 KiB written.
const VALUES: usize = 4096;

/// Which function of `qkv-simd`.
#[derive(Clone, Copy, Debug)]
enum Function {
    Exp2Nonpositive,
    Exp,
    Tanh,
    Erf,
}

/// `to[i] = f(from[i])`.
struct Map<'a> {
    function: Function,
    from: &'a [f32],
    to: &'a mut [f32],
}

impl SimdOp for Map<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        /// Applies `f` vector by vector; a macro, as a closure would not be compiled with the instruction set.
        macro_rules! map {
            ($f:path) => {
                for (from, to) in self.from.chunks_exact(S::LANES).zip(self.to.chunks_exact_mut(S::LANES)) {
                    s.store($f(s, s.load(from)), to);
                }
            };
        }
        match self.function {
            Function::Exp2Nonpositive => map!(math::exp2_nonpositive),
            Function::Exp => map!(math::exp),
            Function::Tanh => map!(math::tanh),
            Function::Erf => map!(math::erf),
        }
    }
}

/// `to[i] = f(from[i])` by a scalar function.
fn by_one(from: &[f32], to: &mut [f32], f: impl Fn(f32) -> f32) {
    for (&x, y) in from.iter().zip(to) {
        *y = f(x);
    }
}

/// `to[i] = f(from[i])` by a function of `wide`.
fn by_eight(from: &[f32], to: &mut [f32], f: impl Fn(f32x8) -> f32x8) {
    for (from, to) in from.as_chunks::<8>().0.iter().zip(to.as_chunks_mut::<8>().0) {
        *to = f(f32x8::from(*from)).to_array();
    }
}

fn bench(
    group: &mut BenchmarkGroup<'_, WallTime>,
    name: &str,
    from: &[f32],
    mut call: impl FnMut(&[f32], &mut [f32]),
) {
    let mut to = vec![0.0; from.len()];
    group.throughput(Throughput::Elements(from.len() as u64));
    group.bench_function(name, |bencher| bencher.iter(|| call(black_box(from), black_box(&mut to))));
}

fn main() {
    match Environment::read() {
        Ok(environment) => eprintln!("{environment}"),
        Err(problem) => panic!("{problem}"),
    }
    let isa = Isa::active().expect("it was read for the environment");
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(500))
        .configure_from_args();
    let mut group = criterion.benchmark_group("exp");
    let mut random = Random::new(4);
    let signed: Vec<f32> = (0..VALUES).map(|_| 8.0 * random.next_f32()).collect();
    // What the softmax asks for: scores less their maximum, in octaves.
    let nonpositive: Vec<f32> = signed.iter().map(|x| -x.abs()).collect();

    let own = |function| move |from: &[f32], to: &mut [f32]| isa.dispatch(Map { function, from, to });
    bench(&mut group, "exp2_nonpositive/qkv", &nonpositive, own(Function::Exp2Nonpositive));
    bench(&mut group, "exp2_nonpositive/std", &nonpositive, |from, to| by_one(from, to, f32::exp2));
    bench(&mut group, "exp2_nonpositive/wide", &nonpositive, |from, to| by_eight(from, to, f32x8::exp2));
    bench(&mut group, "exp/qkv", &signed, own(Function::Exp));
    bench(&mut group, "exp/std", &signed, |from, to| by_one(from, to, f32::exp));
    bench(&mut group, "exp/wide", &signed, |from, to| by_eight(from, to, f32x8::exp));
    bench(&mut group, "tanh/qkv", &signed, own(Function::Tanh));
    bench(&mut group, "tanh/std", &signed, |from, to| by_one(from, to, f32::tanh));
    bench(&mut group, "tanh/wide", &signed, |from, to| by_eight(from, to, f32x8::tanh));
    bench(&mut group, "erf/qkv", &signed, own(Function::Erf));
    group.finish();
    criterion.final_summary();
}
