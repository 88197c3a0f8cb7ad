//! The same bits for any number of threads, any pool, and from run to run.

mod common;

use common::{Layout, Matrix, Rng};
use qkv_gemm::{Activation, GemmSpec, PackedRhs, gemm, gemm_packed};
use qkv_simd::Isa;

#[test]
fn bits_do_not_depend_on_the_number_of_threads() {
    let pools: Vec<rayon::ThreadPool> = [1, 2, 3]
        .map(|threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a small pool"))
        .into();
    let mut rng = Rng::new(1);
    for isa in Isa::available() {
        for (m, k, n) in [
            (200, 300, 250),
            (1, 700, 900),
            (900, 700, 1),
            (2, 1300, 1100),
            (7, 1000, 1200),
            (40, 2000, 40),
            (600, 64, 600),
        ] {
            for b_layout in [Layout::RowMajor, Layout::ColMajor, Layout::Strided] {
                let a = Matrix::random(Layout::RowMajor, m, k, &mut rng);
                let b = Matrix::random(b_layout, k, n, &mut rng);
                let bias: Vec<f32> = (0..n).map(|_| rng.value()).collect();
                let spec = GemmSpec {
                    alpha: 0.3,
                    beta: 0.7,
                    bias: Some(&bias),
                    activation: Some(Activation::Gelu),
                    isa: Some(isa),
                    ..Default::default()
                };
                let start = Matrix::random(Layout::RowMajor, m, n, &mut rng);
                let packed = PackedRhs::new_for(isa, b.view()).expect("a packed matrix");
                let run = |with_packed: bool| {
                    let mut c = start.clone();
                    if with_packed {
                        gemm_packed(a.view(), &packed, &mut c.view_mut(), &spec).expect("a product");
                    } else {
                        gemm(a.view(), b.view(), &mut c.view_mut(), &spec).expect("a product");
                    }
                    c.data
                };
                for with_packed in [false, true] {
                    let wanted = pools[0].install(|| run(with_packed));
                    for pool in &pools {
                        for _ in 0..2 {
                            let got = pool.install(|| run(with_packed));
                            assert!(wanted == got, "{} threads, {m} x {k} x {n}", pool.current_num_threads());
                        }
                    }
                    assert!(wanted == run(with_packed), "outside of a pool, {m} x {k} x {n}");
                }
            }
        }
    }
}

#[test]
fn many_callers_at_once() {
    let mut rng = Rng::new(2);
    let (m, k, n) = (130, 140, 150);
    let a = Matrix::random(Layout::RowMajor, m, k, &mut rng);
    let b = Matrix::random(Layout::RowMajor, k, n, &mut rng);
    let run = || {
        let mut c = Matrix::filled(Layout::RowMajor, m, n, || f32::NAN);
        gemm(a.view(), b.view(), &mut c.view_mut(), &GemmSpec::default()).expect("a product");
        c.data
    };
    let wanted = run();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..10 {
                    assert!(wanted == run());
                }
            });
        }
    });
}

#[test]
fn products_inside_tasks_of_the_pool() {
    use rayon::prelude::*;
    let mut rng = Rng::new(4);
    let (m, k, n) = (130, 140, 150);
    let a = Matrix::random(Layout::RowMajor, m, k, &mut rng);
    let b = Matrix::random(Layout::RowMajor, k, n, &mut rng);
    let run = || {
        let mut c = Matrix::filled(Layout::RowMajor, m, n, || f32::NAN);
        gemm(a.view(), b.view(), &mut c.view_mut(), &GemmSpec::default()).expect("a product");
        c.data
    };
    let wanted = run();
    assert!((0..40).into_par_iter().all(|_| wanted == run()));
}
