//! `gemm` against the oracle: every instruction set, sizes around every block size, every layout, alpha and beta.

mod common;

use common::{Layout, Matrix, Rng, assert_close, reference};
use qkv_gemm::{Blocking, GemmSpec, KernelShape, gemm};
use qkv_simd::Isa;

/// One product against the oracle.
#[track_caller]
fn check(layouts: [Layout; 3], (m, k, n): (usize, usize, usize), spec: &GemmSpec<'_>, what: &str) {
    let mut rng = Rng::new((m * 1_000_003 + k * 1009 + n) as u64);
    let a = Matrix::random(layouts[0], m, k, &mut rng);
    let b = Matrix::random(layouts[1], k, n, &mut rng);
    // With beta = 0 what is in C must not matter, so it is the worst that could be there.
    let mut c = Matrix::filled(layouts[2], m, n, || if spec.beta == 0.0 { f32::NAN } else { rng.value() });
    let expected = reference(a.view(), b.view(), c.view(), spec);
    let what = format!("{what}: {m} x {k} x {n}, {layouts:?}, {spec:?}");
    gemm(a.view(), b.view(), &mut c.view_mut(), spec).expect(&what);
    assert_close(&c, &expected, &what);
}

const ROW: [Layout; 3] = [Layout::RowMajor; 3];

#[test]
fn sizes_around_the_tile() {
    for isa in Isa::available() {
        let KernelShape { mr, nr } = KernelShape::of(isa);
        let spec = GemmSpec { isa: Some(isa), ..Default::default() };
        for m in [0, 1, 2, 3, mr - 1, mr, mr + 1, 2 * mr - 1, 2 * mr, 2 * mr + 1, 17, 18, 19, 31, 40] {
            for n in [0, 1, 2, nr - 1, nr, nr + 1, 2 * nr, 2 * nr + 3, 17, 40] {
                for k in [0, 1, 2, 3, 4, 5, 8, 13] {
                    check(ROW, (m, k, n), &spec, isa.kind().name());
                }
            }
        }
    }
}

#[test]
fn sizes_around_the_blocks() {
    for isa in Isa::available() {
        let spec = GemmSpec { isa: Some(isa), ..Default::default() };
        for k in [255, 256, 257, 264, 511, 513, 520, 700] {
            for (m, n) in [(33, 35), (1, 70), (70, 1), (20, 20)] {
                check(ROW, (m, k, n), &spec, isa.kind().name());
            }
        }
        // More rows than a block of A, more columns than a task, few and many of either.
        for (m, k, n) in
            [(95, 20, 97), (96, 30, 64), (97, 300, 130), (200, 17, 600), (1100, 9, 33), (30, 40, 1100)]
        {
            check(ROW, (m, k, n), &spec, isa.kind().name());
        }
    }
}

/// One and two rows (or columns) times a matrix that is read from memory: k is cut into parts, and six rows of a part are
/// read side by side. Columns around panels and strips, parts of any length, the last shorter than six.
#[test]
fn large_matrix_and_few_rows() {
    for isa in Isa::available() {
        let nr = KernelShape::of(isa).nr;
        let spec = GemmSpec { alpha: 0.7, beta: -0.5, isa: Some(isa), ..Default::default() };
        for (m, k, n) in [
            (1, 1024, 1024),
            (2, 515, 2048 + nr + 1),
            (1, 256, 4096 + 1),
            (1, 257, 4096 - 1),
            (2, 3, 350_001),
            (1, 600_001, 2),
            (3, 600, 2000),
        ] {
            check(ROW, (m, k, n), &spec, isa.kind().name());
            check([Layout::Strided, Layout::UpsideDown, Layout::ColMajor], (m, k, n), &spec, "strided");
        }
        check([Layout::ColMajor, Layout::RowMajor, Layout::Sub], (1100, 1000, 2), &spec, isa.kind().name());
    }
}

#[test]
fn every_layout() {
    for isa in Isa::available() {
        for a in Layout::INPUTS {
            for b in Layout::INPUTS {
                for c in Layout::OUTPUTS {
                    for (i, size) in [(1, 9, 37), (5, 37, 19), (37, 21, 3), (26, 35, 41), (40, 1, 40)]
                        .into_iter()
                        .enumerate()
                    {
                        let beta = if (i + a as usize).is_multiple_of(2) { 0.0 } else { -0.5 };
                        let spec = GemmSpec { isa: Some(isa), beta, ..Default::default() };
                        check([a, b, c], size, &spec, isa.kind().name());
                    }
                }
            }
        }
    }
}

#[test]
fn large_layouts_are_packed() {
    for isa in Isa::available() {
        for a in [Layout::RowMajor, Layout::ColMajor, Layout::Strided, Layout::SameRows] {
            for b in [Layout::RowMajor, Layout::ColMajor, Layout::Strided, Layout::Mirrored] {
                let spec = GemmSpec { isa: Some(isa), beta: 1.0, ..Default::default() };
                check([a, b, Layout::Sub], (130, 300, 150), &spec, isa.kind().name());
                check([a, b, Layout::ColMajor], (130, 300, 150), &spec, isa.kind().name());
            }
        }
    }
}

#[test]
fn alpha_and_beta() {
    for isa in Isa::available() {
        for alpha in [0.0, 1.0, -1.0, 0.3, 1e3] {
            for beta in [0.0, 1.0, -1.0, 0.7] {
                let spec = GemmSpec { alpha, beta, isa: Some(isa), ..Default::default() };
                for size in [(7, 300, 21), (1, 20, 50), (50, 20, 1), (20, 0, 20), (1, 0, 9), (33, 600, 33)] {
                    check(ROW, size, &spec, isa.kind().name());
                    check([Layout::ColMajor, Layout::ColMajor, Layout::Strided], size, &spec, "strided");
                }
            }
        }
    }
}

#[test]
fn given_blocking_is_followed() {
    for isa in Isa::available() {
        for (kc, mc, nc, rows) in [(1, 1, 1, 1), (3, 5, 20, 11), (8, 6, 16, 100), (64, 1000, 48, 7)] {
            for (pack_a, pack_b) in [(false, false), (false, true), (true, false), (true, true)] {
                let blocking = Some(Blocking { kc, mc, nc, rows, pack_a, pack_b });
                let spec = GemmSpec { isa: Some(isa), blocking, beta: 0.5, ..Default::default() };
                for layouts in [ROW, [Layout::ColMajor; 3], [Layout::Strided; 3]] {
                    check(layouts, (25, 19, 37), &spec, isa.kind().name());
                }
            }
        }
    }
}

#[test]
fn nan_and_infinity_take_part_as_numbers_do() {
    for isa in Isa::available() {
        for (m, k, n) in [(1, 40, 40), (40, 40, 1), (30, 40, 50), (30, 300, 50), (3, 17, 5)] {
            let spec = GemmSpec { isa: Some(isa), ..Default::default() };
            let mut rng = Rng::new(7);
            let mut a = Matrix::random(Layout::RowMajor, m, k, &mut rng);
            let mut b = Matrix::random(Layout::RowMajor, k, n, &mut rng);
            let mut c = Matrix::filled(Layout::RowMajor, m, n, || 0.0);
            // A zero in A does not hide a NaN in B.
            a.data.fill(0.0);
            b.data[(k - 1) * n] = f32::NAN;
            gemm(a.view(), b.view(), &mut c.view_mut(), &spec).expect("a product");
            for i in 0..m {
                assert!(c.at(i, 0).is_nan(), "row {i}");
                for j in 1..n {
                    assert_eq!(c.at(i, j), 0.0, "({i}, {j})");
                }
            }
            // Nor does alpha = 0; an infinity stays one.
            a.data.fill(1.0);
            b.data[(k - 1) * n] = f32::INFINITY;
            gemm(a.view(), b.view(), &mut c.view_mut(), &spec).expect("a product");
            assert_eq!(c.at(m - 1, 0), f32::INFINITY);
            gemm(a.view(), b.view(), &mut c.view_mut(), &GemmSpec { alpha: 0.0, ..spec }).expect("a product");
            assert!(c.at(m - 1, 0).is_nan());
            assert!((1..n).all(|j| c.at(0, j) == 0.0));
        }
    }
}

#[test]
fn forced_instruction_set_is_the_one_in_use() {
    // A run that was told to use an instruction set must not quietly test another one.
    if let Ok(name) = std::env::var("QKV_ISA") {
        assert_eq!(Isa::active().expect("a usable instruction set").kind().name(), name);
    }
    assert!(Isa::available().len() >= if cfg!(target_arch = "x86_64") { 1 } else { 0 });
}
