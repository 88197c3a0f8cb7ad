//! Batches that broadcast, and matrices packed ahead, against the oracle.

mod common;

use common::{Layout, Matrix, Rng, assert_close, reference};
use qkv_gemm::{
    Activation, BatchAxes, BatchMut, BatchRef, GemmSpec, MatRef, PackedRhs, gemm_batched, gemm_packed,
};
use qkv_simd::Isa;

/// Row-major strides of a batch of dense matrices.
fn dense(shape: &[usize], matrix: usize) -> Vec<isize> {
    let mut strides = vec![0; shape.len()];
    let mut stride = matrix;
    for (s, &len) in strides.iter_mut().zip(shape).rev() {
        *s = stride as isize;
        stride *= len;
    }
    strides
}

/// The matrix number `index` of batch `target`, in an operand of batch `shape` that broadcasts.
fn pick(shape: &[usize], target: &[usize], mut index: usize) -> usize {
    let shift = target.len() - shape.len();
    let (mut at, mut scale) = (0, 1);
    for axis in (0..target.len()).rev() {
        let i = index % target[axis];
        index /= target[axis];
        if axis >= shift {
            let len = shape[axis - shift];
            at += if len == 1 { 0 } else { i * scale };
            scale *= len;
        }
    }
    at
}

#[test]
fn batches_broadcast_as_numpy_does() {
    let cases: [(&[usize], &[usize], &[usize]); 9] = [
        (&[3], &[3], &[3]),
        (&[3], &[1], &[3]),
        (&[1], &[4], &[4]),
        (&[5], &[], &[5]),
        (&[], &[2, 3], &[2, 3]),
        (&[2, 1], &[3], &[2, 3]),
        (&[2, 3], &[2, 1], &[2, 3]),
        (&[], &[], &[]),
        (&[0], &[1], &[0]),
    ];
    for isa in Isa::available() {
        for (a_batch, b_batch, c_batch) in cases {
            for (m, k, n) in [(7, 12, 19), (1, 30, 40), (40, 20, 1), (4, 0, 3), (30, 270, 20), (0, 3, 3)] {
                for (beta, activation) in [(0.0, None), (0.5, Some(Activation::Silu))] {
                    let mut rng = Rng::new((m * 31 + k * 7 + n) as u64);
                    let count = |batch: &[usize]| batch.iter().product::<usize>();
                    let mut make = |len: usize| (0..len).map(|_| rng.value()).collect::<Vec<f32>>();
                    let (a, b) = (make(count(a_batch) * m * k), make(count(b_batch) * k * n));
                    let (mut c, bias) = (make(count(c_batch) * m * n), make(n));
                    let before = c.clone();
                    let spec = GemmSpec {
                        beta,
                        activation,
                        bias: Some(&bias),
                        isa: Some(isa),
                        ..Default::default()
                    };
                    let axes =
                        |batch: &[usize], size| BatchAxes::new(batch, &dense(batch, size)).expect("axes");
                    gemm_batched(
                        BatchRef::from_slice(&a, 0, axes(a_batch, m * k), (m, k, k as isize, 1)).expect("a"),
                        BatchRef::from_slice(&b, 0, axes(b_batch, k * n), (k, n, n as isize, 1)).expect("b"),
                        &mut BatchMut::from_slice(&mut c, 0, axes(c_batch, m * n), (m, n, n as isize, 1))
                            .expect("c"),
                        &spec,
                    )
                    .expect("a product");
                    for i in 0..count(c_batch) {
                        let part = |x: &[f32], at: usize, rows: usize, cols: usize| {
                            let mut values = x[at * rows * cols..][..rows * cols].iter().copied();
                            Matrix::filled(Layout::RowMajor, rows, cols, || values.next().expect("a value"))
                        };
                        let a = part(&a, pick(a_batch, c_batch, i), m, k);
                        let b = part(&b, pick(b_batch, c_batch, i), k, n);
                        let expected = reference(a.view(), b.view(), part(&before, i, m, n).view(), &spec);
                        let what = format!("{a_batch:?} @ {b_batch:?}, matrix {i}, {}", isa.kind());
                        assert_close(&part(&c, i, m, n), &expected, &what);
                    }
                }
            }
        }
    }
}

#[test]
fn one_matrix_serves_the_whole_batch() {
    let mut rng = Rng::new(5);
    let (batch, m, k, n) = (6, 3, 20, 30);
    let a = Matrix::random(Layout::RowMajor, batch * m, k, &mut rng);
    let b = Matrix::random(Layout::ColMajor, k, n, &mut rng);
    let mut c = Matrix::filled(Layout::RowMajor, batch * m, n, || f32::NAN);
    let spec = GemmSpec::default();
    let expected = reference(a.view(), b.view(), c.view(), &spec);
    let axes = |size: usize| BatchAxes::new(&[batch], &[size as isize]).expect("axes");
    gemm_batched(
        BatchRef::from_slice(&a.data, 0, axes(m * k), (m, k, k as isize, 1)).expect("a"),
        b.view().into(),
        &mut BatchMut::from_slice(&mut c.data, 0, axes(m * n), (m, n, n as isize, 1)).expect("c"),
        &spec,
    )
    .expect("a product");
    assert_close(&c, &expected, "a folded batch");
}

/// So many vectors times one large matrix that the sums of parts of k are kept for some of them at a time.
#[test]
fn many_vectors_times_a_large_matrix() {
    let (k, n, count) = (600_001, 2, 70);
    let mut rng = Rng::new(5);
    let mut make = |len: usize| (0..len).map(|_| rng.value()).collect::<Vec<f32>>();
    // Each vector begins one value after the one before.
    let (a, b) = (make(k + count - 1), make(k * n));
    let axes = |stride| BatchAxes::new(&[count], &[stride]).expect("axes");
    for isa in Isa::available() {
        let spec = GemmSpec { isa: Some(isa), ..Default::default() };
        let mut c = vec![f32::NAN; count * n];
        gemm_batched(
            BatchRef::from_slice(&a, 0, axes(1), (1, k, k as isize, 1)).expect("a"),
            BatchRef::from_slice(&b, 0, axes(0), (k, n, n as isize, 1)).expect("b"),
            &mut BatchMut::from_slice(&mut c, 0, axes(n as isize), (1, n, n as isize, 1)).expect("c"),
            &spec,
        )
        .expect("a product");
        for (i, row) in c.chunks_exact(n).enumerate() {
            let a = Matrix::filled(Layout::RowMajor, 1, k, {
                let mut values = a[i..].iter().copied();
                move || values.next().expect("a value")
            });
            let b = MatRef::from_slice(&b, k, n).expect("b");
            let none = Matrix::filled(Layout::RowMajor, 1, n, || 0.0);
            let mut values = row.iter().copied();
            let got = Matrix::filled(Layout::RowMajor, 1, n, || values.next().expect("a value"));
            let expected = reference(a.view(), b, none.view(), &spec);
            assert_close(&got, &expected, &format!("vector {i}, {}", isa.kind().name()));
        }
    }
}

#[test]
fn packed_is_the_same_to_the_bit_and_serves_many_threads() {
    for isa in Isa::available() {
        let mut rng = Rng::new(11);
        for (m, k, n) in [(40, 300, 70), (33, 64, 16), (50, 513, 300), (64, 20, 1000)] {
            let a = Matrix::random(Layout::RowMajor, m, k, &mut rng);
            for layout in [Layout::RowMajor, Layout::ColMajor, Layout::Strided] {
                let b = Matrix::random(layout, k, n, &mut rng);
                let packed = PackedRhs::new_for(isa, b.view()).expect("a packed matrix");
                assert_eq!((packed.rows(), packed.cols()), (k, n));
                assert_eq!(packed.isa().kind(), isa.kind());
                assert!(packed.bytes() >= 4 * k * n);
                let spec = GemmSpec { isa: Some(isa), ..Default::default() };
                let mut plain = Matrix::filled(Layout::RowMajor, m, n, || 0.0);
                qkv_gemm::gemm(a.view(), b.view(), &mut plain.view_mut(), &spec).expect("a product");
                std::thread::scope(|scope| {
                    for _ in 0..3 {
                        scope.spawn(|| {
                            let mut c = Matrix::filled(Layout::RowMajor, m, n, || f32::NAN);
                            gemm_packed(a.view(), &packed, &mut c.view_mut(), &spec).expect("a product");
                            assert_eq!(plain.data, c.data);
                        });
                    }
                });
            }
        }
    }
}

#[test]
fn packed_sizes_around_panels() {
    for isa in Isa::available() {
        let mut rng = Rng::new(3);
        for m in [0, 1, 5, 40] {
            for k in [0, 1, 255, 257] {
                for n in [0, 1, 7, 8, 9, 15, 16, 17, 33, 300] {
                    let a = Matrix::random(Layout::RowMajor, m, k, &mut rng);
                    let b = Matrix::random(Layout::RowMajor, k, n, &mut rng);
                    let mut c = Matrix::random(Layout::Sub, m, n, &mut rng);
                    let spec = GemmSpec { beta: 0.5, isa: Some(isa), ..Default::default() };
                    let expected = reference(a.view(), b.view(), c.view(), &spec);
                    let packed = PackedRhs::new_for(isa, b.view()).expect("a packed matrix");
                    gemm_packed(a.view(), &packed, &mut c.view_mut(), &spec).expect("a product");
                    assert_close(&c, &expected, "packed");
                }
            }
        }
    }
}

#[test]
fn packed_views_are_checked_by_size_not_by_reading() {
    // Stride 0 makes a matrix larger than memory out of one value: an error, not an abort.
    let one = [1.0f32];
    let huge = MatRef::from_slice_strided(&one, 0, 1 << 40, 1 << 20, 0, 0).expect("a broadcast view");
    let error = PackedRhs::new(huge).expect_err("more memory than there is");
    assert!(matches!(error, qkv_gemm::GemmError::Memory { .. }), "{error:?}");
}
