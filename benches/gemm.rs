//! Matrix products, square and skinny, beside the two crates that Rust programs use for them: `matrixmultiply` (ndarray
//! stands on it) and `gemm` (candle and faer do). Row-major, dense, C = A B, all on the same number of threads.
//!
//! Libraries that are not in Rust are timed by scripts/gemm_peers.py.

mod gauge;

use std::error::Error;

use criterion::{BenchmarkId, Criterion};
use gauge::{Gauge, bench};
use qkv::gemm::GemmSpec;
use qkv_benches::{GEMM_SKINNY, GEMM_SQUARE, GemmInput, GemmShape, check_close, product};

/// What each library is asked: the shape, A, B, and C to be overwritten.
type Product = fn(GemmShape, &[f32], &[f32], &mut [f32]);

/// The names under which criterion shows them.
const LIBRARIES: [(&str, Product); 3] =
    [("qkv", of_qkv), ("matrixmultiply", of_matrixmultiply), ("gemm", of_gemm)];

fn of_qkv(shape: GemmShape, a: &[f32], b: &[f32], c: &mut [f32]) {
    product(shape, a, b, c, &GemmSpec::default()).expect("slices of the right length");
}

fn of_matrixmultiply(shape: GemmShape, a: &[f32], b: &[f32], c: &mut [f32]) {
    let GemmShape { m, k, n } = shape;
    assert!(a.len() == m * k && b.len() == k * n && c.len() == m * n);
    let (k_stride, n_stride) = (k as isize, n as isize);
    // SAFETY: the three matrices fill their slices exactly.
    unsafe {
        let (a, b, c) = (a.as_ptr(), b.as_ptr(), c.as_mut_ptr());
        matrixmultiply::sgemm(m, k, n, 1.0, a, k_stride, 1, b, n_stride, 1, 0.0, c, n_stride, 1);
    }
}

fn of_gemm(shape: GemmShape, a: &[f32], b: &[f32], c: &mut [f32]) {
    let GemmShape { m, k, n } = shape;
    assert!(a.len() == m * k && b.len() == k * n && c.len() == m * n);
    let (k_stride, n_stride) = (k as isize, n as isize);
    let threads = gemm::Parallelism::Rayon(rayon::current_num_threads());
    // SAFETY: as above. Its alpha is the factor of the old C, which is not read; its beta that of the product.
    unsafe {
        let (a, b, c) = (a.as_ptr(), b.as_ptr(), c.as_mut_ptr());
        gemm::gemm(
            m, n, k, c, 1, n_stride, false, a, 1, k_stride, b, 1, n_stride, 0.0f32, 1.0f32, false, false,
            false, threads,
        );
    }
}

/// All must agree on a small product.
fn check() -> Result<(), Box<dyn Error>> {
    let shape = GemmShape::new(33, 65, 47);
    let GemmInput { a, b } = GemmInput::random(shape);
    let exact = |at: usize| {
        let (i, j) = (at / shape.n, at % shape.n);
        (0..shape.k).map(|p| f64::from(a[i * shape.k + p]) * f64::from(b[p * shape.n + j])).sum()
    };
    let expected: Vec<f64> = (0..shape.m * shape.n).map(exact).collect();
    for (name, library) in LIBRARIES {
        // What stood in C must not matter.
        let mut c = vec![f32::NAN; shape.m * shape.n];
        library(shape, &a, &b, &mut c);
        check_close(name, &c, &expected)?;
    }
    Ok(())
}

fn group(criterion: &mut Criterion<Gauge>, name: &str, shapes: &[GemmShape]) {
    let mut group = criterion.benchmark_group(name);
    for &shape in shapes {
        let GemmInput { a, b } = GemmInput::random(shape);
        let mut c = vec![0.0; shape.m * shape.n];
        for (library, product) in LIBRARIES {
            bench(
                &mut group,
                BenchmarkId::new(library, shape),
                rayon::current_num_threads(),
                shape.flops(),
                || {
                    product(shape, &a, &b, &mut c);
                },
            );
        }
    }
    group.finish();
}

fn main() -> Result<(), Box<dyn Error>> {
    // matrixmultiply has threads of its own and would take one for each physical core.
    let threads = rayon::current_num_threads().to_string();
    // SAFETY: rayon's threads are there by now, but sleep; nothing reads the environment meanwhile.
    unsafe { std::env::set_var("MATMUL_NUM_THREADS", threads) };
    let mut criterion = gauge::criterion();
    check()?;
    group(&mut criterion, "gemm square", &GEMM_SQUARE);
    group(&mut criterion, "gemm skinny", &GEMM_SKINNY);
    criterion.final_summary();
    Ok(())
}
