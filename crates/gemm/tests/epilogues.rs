//! Bias, activations and callers' own epilogues against the oracle, on every path.

mod common;

use common::{Layout, Matrix, Rng, activate, assert_close, reference};
use qkv_gemm::{Activation, Epilogue, GemmError, GemmSpec, Identity, PackedRhs, Place};
use qkv_gemm::{gemm, gemm_packed, gemm_with_epilogue};
use qkv_simd::{Isa, Simd};

/// Sizes that take every path: tiles, several blocks of k, stream, dots, transposed ones, k = 0.
const SIZES: [(usize, usize, usize); 8] =
    [(37, 30, 43), (20, 300, 33), (1, 40, 70), (70, 40, 1), (3, 19, 5), (9, 0, 17), (1, 0, 4), (6, 257, 16)];

#[test]
fn bias_and_activation() {
    for isa in Isa::available() {
        for activation in [None].into_iter().chain(Activation::ALL.map(Some)) {
            for (m, k, n) in SIZES {
                for layouts in [
                    [Layout::RowMajor; 3],
                    [Layout::RowMajor, Layout::ColMajor, Layout::RowMajor],
                    [Layout::ColMajor, Layout::RowMajor, Layout::ColMajor],
                    [Layout::Strided; 3],
                ] {
                    let mut rng = Rng::new((m + 7 * k + n) as u64);
                    let a = Matrix::random(layouts[0], m, k, &mut rng);
                    let b = Matrix::random(layouts[1], k, n, &mut rng);
                    let bias: Vec<f32> = (0..n).map(|_| rng.value()).collect();
                    for (alpha, beta, bias) in [(1.0, 0.0, Some(&bias[..])), (-0.7, 0.3, None)] {
                        let mut c = Matrix::random(layouts[2], m, n, &mut rng);
                        let spec =
                            GemmSpec { alpha, beta, bias, activation, isa: Some(isa), ..Default::default() };
                        let expected = reference(a.view(), b.view(), c.view(), &spec);
                        let what = format!("{} {activation:?} {layouts:?}", isa.kind());
                        let mut packed_c = c.clone();
                        gemm(a.view(), b.view(), &mut c.view_mut(), &spec).expect(&what);
                        assert_close(&c, &expected, &what);
                        let packed = PackedRhs::new_for(isa, b.view()).expect("a packed matrix");
                        gemm_packed(a.view(), &packed, &mut packed_c.view_mut(), &spec).expect(&what);
                        assert_close(&packed_c, &expected, &format!("packed {what}"));
                    }
                }
            }
        }
    }
}

/// Records where it is called and adds a number that tells rows from columns.
struct Mark;

impl Epilogue for Mark {
    #[inline(always)]
    fn apply<S: Simd>(&self, s: S, x: S::F32, place: Place) -> S::F32 {
        assert!(place.lanes >= 1 && place.lanes <= S::LANES && place.batch == 0);
        let columns = s.add(s.splat(place.col as f32), s.iota());
        s.add(x, s.mul_add(s.splat(1000.0), s.splat(place.row as f32), columns))
    }
}

#[test]
fn own_epilogue_sees_every_element_once_at_its_place() {
    for isa in Isa::available() {
        for (m, k, n) in SIZES {
            for layout in Layout::OUTPUTS {
                let a = Matrix::filled(Layout::RowMajor, m, k, || 0.0);
                let b = Matrix::filled(Layout::RowMajor, k, n, || 1.0);
                let mut c = Matrix::filled(layout, m, n, || f32::NAN);
                let spec = GemmSpec { isa: Some(isa), ..Default::default() };
                gemm_with_epilogue(a.view(), b.view(), &mut c.view_mut(), &spec, &Mark).expect("a product");
                for i in 0..m {
                    for j in 0..n {
                        assert_eq!(
                            c.at(i, j),
                            (1000 * i + j) as f32,
                            "({i}, {j}) of {m} x {k} x {n}, {layout:?}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn own_epilogue_comes_after_bias_and_activation() {
    let (a, b, mut c) = ([2.0], [-3.0], [1.0]);
    let spec =
        GemmSpec { beta: 1.0, bias: Some(&[1.0]), activation: Some(Activation::Relu), ..Default::default() };
    let view = |x| qkv_gemm::MatRef::from_slice(x, 1, 1).expect("1 x 1");
    let mut out = qkv_gemm::MatMut::from_slice(&mut c, 1, 1).expect("1 x 1");
    gemm_with_epilogue(view(&a), view(&b), &mut out, &spec, &Mark).expect("a product");
    assert_eq!(c, [0.0]);
    let mut out = qkv_gemm::MatMut::from_slice(&mut c, 1, 1).expect("1 x 1");
    gemm_with_epilogue(view(&a), view(&b), &mut out, &GemmSpec::default(), &Identity).expect("a product");
    assert_eq!(c, [-6.0]);
}

#[test]
fn activations_on_a_dense_sample() {
    // k = 0 and beta = 1 send C through the epilogue alone.
    let values: Vec<f32> = (-4000..4000).map(|i| i as f32 / 100.0).collect();
    for isa in Isa::available() {
        for activation in Activation::ALL {
            let mut c = values.clone();
            let n = c.len();
            gemm(
                qkv_gemm::MatRef::from_slice(&[], 1, 0).expect("empty"),
                qkv_gemm::MatRef::from_slice(&[], 0, n).expect("empty"),
                &mut qkv_gemm::MatMut::from_slice(&mut c, 1, n).expect("a row"),
                &GemmSpec { beta: 1.0, activation: Some(activation), isa: Some(isa), ..Default::default() },
            )
            .expect("a product");
            for (&x, &y) in values.iter().zip(&c) {
                let wanted = activate(Some(activation), f64::from(x));
                let bound =
                    8.0 * f64::from(f32::EPSILON) * (f64::from(x).abs().min(8.0) + wanted.abs()) + 1e-37;
                assert!(
                    (f64::from(y) - wanted).abs() <= bound,
                    "{} {activation}({x}) = {y:e}, expected {wanted:e}",
                    isa.kind()
                );
            }
        }
    }
}

#[test]
fn activations_of_nan_and_infinity() {
    for isa in Isa::available() {
        for activation in Activation::ALL {
            let mut c = [f32::NAN, f32::INFINITY, 0.0, 1e30];
            gemm(
                qkv_gemm::MatRef::from_slice(&[], 1, 0).expect("empty"),
                qkv_gemm::MatRef::from_slice(&[], 0, 4).expect("empty"),
                &mut qkv_gemm::MatMut::from_slice(&mut c, 1, 4).expect("a row"),
                &GemmSpec { beta: 1.0, activation: Some(activation), isa: Some(isa), ..Default::default() },
            )
            .expect("a product");
            assert!(c[0].is_nan(), "{activation} {c:?}");
            assert_eq!(c[1..], [f32::INFINITY, 0.0, 1e30], "{activation}");
        }
    }
}

#[test]
fn names_of_activations() {
    for activation in Activation::ALL {
        assert_eq!(Activation::parse(activation.name()), Ok(activation));
        assert_eq!(activation.name().parse(), Ok(activation));
        assert_eq!(activation.to_string(), activation.name());
    }
    for bad in ["", "Gelu", "swish", "relu "] {
        assert_eq!(Activation::parse(bad), Err(GemmError::UnknownActivation { given: bad.to_owned() }));
    }
}
