//! Bad input: every refusal is the right variant with the numbers in it, and the output is untouched.

use qkv_gemm::{
    BatchAxes, BatchMut, BatchRef, Blocking, GemmError, GemmSpec, MatMut, MatRef, PackedRhs, gemm,
    gemm_batched, gemm_packed, pack_lhs, pack_rhs,
};
use qkv_simd::{Isa, Simd, SimdOp};

const MAX: usize = usize::MAX;

#[test]
fn views_are_checked() {
    let data = [0.0; 12];
    let length = |given, expected| Err(GemmError::Length { argument: "data", given, expected });
    assert_eq!(MatRef::from_slice(&data, 3, 5).map(|_| ()), length(12, 15));
    assert_eq!(MatRef::from_slice(&data, 2, 5).map(|_| ()), length(12, 10));
    assert_eq!(MatRef::from_slice_strided(&data, 0, 3, 4, 5, 1).map(|_| ()), length(12, 14));
    assert_eq!(MatRef::from_slice_strided(&data, 13, 0, 4, 5, 1).map(|_| ()), length(12, 13));
    assert_eq!(
        MatRef::from_slice_strided(&data, 7, 3, 4, -4, 1).map(|_| ()),
        Err(GemmError::BeforeStart { argument: "data", given: 7, expected: 8 })
    );
    assert!(MatRef::from_slice_strided(&data, 8, 3, 4, -4, 1).is_ok());
    assert!(MatRef::from_slice_strided(&data, 12, 0, 4, -4, 1).is_ok());
    for (rows, cols, row_stride, col_stride) in [
        (MAX, MAX, 1, 1),
        (2, 2, isize::MAX, 1),
        (2, 2, isize::MIN, 1),
        (2, 3, 1, isize::MIN),
        (MAX, 1, 1, 1),
        (3, 3, isize::MIN, isize::MAX),
    ] {
        let error =
            MatRef::from_slice_strided(&data, 0, rows, cols, row_stride, col_stride).expect_err("too far");
        assert_eq!(error, GemmError::Overflow { argument: "data", rows, cols, row_stride, col_stride });
    }
    assert!(matches!(MatRef::from_slice(&data, MAX, 2), Err(GemmError::Overflow { .. })));
    assert!(matches!(MatRef::from_slice(&data, MAX, 0), Err(GemmError::Length { .. })));
    // An offset near the end of the address space must not wrap around.
    assert!(matches!(
        MatRef::from_slice_strided(&data, MAX, 2, 2, 2, 1),
        Err(GemmError::Overflow { .. } | GemmError::Length { .. })
    ));
    let view = MatRef::from_slice(&data, 3, 4).expect("3 x 4");
    assert_eq!(view.get(3, 0), None);
    assert_eq!(
        view.sub(1..4, 0..1).map(|_| ()),
        Err(GemmError::Range { argument: "rows", given: (1, 4), expected: 3 })
    );
    #[allow(clippy::reversed_empty_ranges, reason = "a range that runs backwards is what is refused")]
    let backwards = view.sub(0..1, 3..2).map(|_| ());
    assert_eq!(backwards, Err(GemmError::Range { argument: "cols", given: (3, 2), expected: 4 }));
    assert_eq!(view.sub(3..3, 4..4).map(|v| (v.rows(), v.cols())), Ok((0, 0)));
}

#[test]
fn outputs_do_not_overlap() {
    let mut data = [0.0; 100];
    let mut refused = |rows, cols, row_stride, col_stride| match MatMut::from_slice_strided(
        &mut data, 50, rows, cols, row_stride, col_stride,
    ) {
        Ok(_) => false,
        Err(GemmError::Overlap { shape, strides, .. }) => {
            assert_eq!((shape, strides), (vec![rows, cols], vec![row_stride, col_stride]));
            true
        }
        Err(other) => panic!("{other:?}"),
    };
    assert!(refused(2, 2, 0, 1));
    assert!(refused(2, 2, 1, 0));
    assert!(refused(2, 1, 0, 0));
    assert!(refused(2, 2, 1, 1));
    assert!(refused(3, 4, 3, 1));
    assert!(refused(4, 3, 2, 3));
    assert!(refused(3, 3, 2, -2));
    assert!(!refused(1, 1, 0, 0));
    assert!(!refused(1, 5, 0, 1));
    assert!(!refused(0, 5, 0, 0));
    assert!(!refused(3, 4, 4, 1));
    assert!(!refused(2, 2, 2, 3)); // offsets 0, 3, 2, 5
    assert!(!refused(3, 2, 2, 3)); // 0, 3, 2, 5, 4, 7
    assert!(!refused(3, 4, -4, -1));
    // Against a count of the addresses.
    for rows in 0..5usize {
        for cols in 0..5usize {
            for row_stride in -5..6isize {
                for col_stride in -5..6isize {
                    let mut seen = std::collections::HashSet::new();
                    let distinct = (0..rows * cols).all(|i| {
                        seen.insert((i / cols) as isize * row_stride + (i % cols) as isize * col_stride)
                    });
                    assert_eq!(
                        refused(rows, cols, row_stride, col_stride),
                        !distinct,
                        "{rows} x {cols}, strides ({row_stride}, {col_stride})"
                    );
                }
            }
        }
    }
}

/// Runs a call that must fail and checks that C is as it was.
#[track_caller]
fn fails(call: impl FnOnce(&mut MatMut<'_>) -> Result<(), GemmError>, (m, n): (usize, usize)) -> GemmError {
    let mut c = vec![7.0; m * n];
    let error = call(&mut MatMut::from_slice(&mut c, m, n).expect("dense")).expect_err("refused");
    assert!(c.iter().all(|&x| x == 7.0), "C was touched");
    assert!(!error.to_string().is_empty());
    error
}

#[test]
fn shapes_and_options_are_checked() {
    let data = [1.0; 64];
    let view =
        |rows: usize, cols: usize| MatRef::from_slice(&data[..rows * cols], rows, cols).expect("dense");
    let spec = GemmSpec::default();
    let shape = |argument, given, expected| GemmError::Shape { argument, given, expected };
    assert_eq!(fails(|c| gemm(view(2, 3), view(4, 5), c, &spec), (2, 5)), shape("b", (4, 5), (3, 5)));
    assert_eq!(fails(|c| gemm(view(2, 3), view(3, 5), c, &spec), (3, 5)), shape("c", (3, 5), (2, 5)));
    assert_eq!(fails(|c| gemm(view(2, 3), view(3, 5), c, &spec), (2, 4)), shape("c", (2, 4), (2, 5)));
    let bias = GemmSpec { bias: Some(&data[..4]), ..spec };
    assert_eq!(
        fails(|c| gemm(view(2, 3), view(3, 5), c, &bias), (2, 5)),
        GemmError::BiasLength { given: 4, expected: 5 }
    );
    for sizes in [[0, 1, 1, 1], [1, 0, 1, 1], [1, 1, 0, 1], [1, 1, 1, 0]] {
        let [kc, mc, nc, rows] = sizes;
        let given = Blocking { kc, mc, nc, rows, pack_a: false, pack_b: false };
        let blocking = GemmSpec { blocking: Some(given), ..spec };
        assert_eq!(
            fails(|c| gemm(view(2, 3), view(3, 5), c, &blocking), (2, 5)),
            GemmError::Blocking { given }
        );
    }
    let packed = PackedRhs::new(view(3, 5)).expect("packed");
    assert_eq!(fails(|c| gemm_packed(view(2, 4), &packed, c, &spec), (2, 5)), shape("b", (3, 5), (4, 5)));
    for isa in Isa::available() {
        for other in Isa::available() {
            let packed = PackedRhs::new_for(isa, view(3, 5)).expect("packed");
            let spec = GemmSpec { isa: Some(other), ..spec };
            if isa.kind() != other.kind() {
                assert_eq!(
                    fails(|c| gemm_packed(view(2, 3), &packed, c, &spec), (2, 5)),
                    GemmError::PackedFor { given: isa.kind(), expected: other.kind() }
                );
            }
        }
    }
}

#[test]
fn huge_block_sizes_are_no_danger() {
    let data = [1.0; 64];
    let view =
        |rows: usize, cols: usize| MatRef::from_slice(&data[..rows * cols], rows, cols).expect("dense");
    let mut c = [0.0; 10];
    let blocking = Some(Blocking { kc: MAX, mc: MAX, nc: MAX, rows: MAX, pack_a: true, pack_b: true });
    let spec = GemmSpec { blocking, ..Default::default() };
    gemm(view(2, 3), view(3, 5), &mut MatMut::from_slice(&mut c, 2, 5).expect("dense"), &spec)
        .expect("a product");
    assert_eq!(c, [3.0; 10]);
}

#[test]
fn batches_are_checked() {
    assert_eq!(
        BatchAxes::new(&[2, 3], &[1]),
        Err(GemmError::BatchAxes { argument: "batch", given: (2, 1), expected: 8 })
    );
    assert!(matches!(BatchAxes::new(&[1; 9], &[1; 9]), Err(GemmError::BatchAxes { .. })));
    let data = [1.0; 24];
    let axes = |shape: &[usize], strides: &[isize]| BatchAxes::new(shape, strides).expect("axes");
    let matrix = (2, 3, 3, 1);
    assert!(matches!(
        BatchRef::from_slice(&data, 0, axes(&[5], &[6]), matrix),
        Err(GemmError::Length { given: 24, expected: 30, .. })
    ));
    assert!(matches!(
        BatchRef::from_slice(&data, 0, axes(&[2], &[-6]), matrix),
        Err(GemmError::BeforeStart { given: 0, expected: 6, .. })
    ));
    assert!(matches!(
        BatchRef::from_slice(&data, 0, axes(&[MAX, MAX], &[0, 0]), matrix),
        Err(GemmError::Overflow { .. })
    ));
    let mut out = [7.0; 24];
    for (shape, strides) in [(4, 5), (2, 0), (2, 3)] {
        assert!(matches!(
            BatchMut::from_slice(&mut out, 0, axes(&[shape], &[strides]), matrix),
            Err(GemmError::Overlap { .. })
        ));
    }
    let spec = GemmSpec::default();
    let mut call = |a: &[usize], b: &[usize], c: &[usize], (k, n): (usize, usize)| {
        let strides = |shape: &[usize]| -> Vec<isize> {
            (0..shape.len()).map(|i| shape[i + 1..].iter().product::<usize>() as isize).collect()
        };
        // One value per matrix and operand, but for the inner axis that is to be wrong.
        let result = gemm_batched(
            BatchRef::from_slice(&data, 0, axes(a, &strides(a)), (1, 1, 1, 1)).expect("a"),
            BatchRef::from_slice(&data, 0, axes(b, &strides(b)), (k, 1, 1, 1)).expect("b"),
            &mut BatchMut::from_slice(&mut out, 0, axes(c, &strides(c)), (1, n, 1, 1)).expect("c"),
            &spec,
        );
        (result, out == [7.0; 24])
    };
    let batch = |argument, given: &[usize], expected: &[usize]| {
        (Err(GemmError::Batch { argument, given: given.to_vec(), expected: expected.to_vec() }), true)
    };
    assert_eq!(call(&[2], &[3], &[3], (1, 1)), batch("a", &[2], &[3]));
    assert_eq!(call(&[3], &[2], &[3], (1, 1)), batch("b", &[2], &[3]));
    assert_eq!(call(&[2, 3], &[3], &[3], (1, 1)), batch("a", &[2, 3], &[3]));
    assert_eq!(call(&[2], &[2], &[1], (1, 1)), batch("a", &[2], &[1]));
    assert!(matches!(call(&[], &[], &[], (2, 1)), (Err(GemmError::Shape { argument: "b", .. }), true)));
    assert!(matches!(call(&[], &[], &[], (1, 2)), (Err(GemmError::Shape { argument: "c", .. }), true)));
}

#[test]
fn panels_that_are_too_small_are_refused() {
    struct Pack(usize);
    impl SimdOp for Pack {
        type Output = (Result<(), GemmError>, Result<(), GemmError>);
        #[inline(always)]
        fn eval<S: Simd>(self, s: S) -> Self::Output {
            let data = [1.0; 15];
            let view = MatRef::from_slice(&data, 5, 3).expect("5 x 3");
            let mut panel = vec![0.0; self.0];
            (pack_lhs::<S, 4>(s, view, &mut panel), pack_rhs::<S, 1>(s, view, &mut panel))
        }
    }
    for isa in Isa::available() {
        let (lhs, rhs) = isa.dispatch(Pack(4));
        assert_eq!(lhs, Err(GemmError::Length { argument: "dst", given: 4, expected: 24 }));
        assert_eq!(rhs, Err(GemmError::Length { argument: "dst", given: 4, expected: 5 * isa.lanes() }));
        assert_eq!(isa.dispatch(Pack(200)), (Ok(()), Ok(())));
    }
}

#[test]
fn errors_name_the_argument_and_the_numbers() {
    let data = [0.0; 6];
    let error = MatRef::from_slice(&data, 2, 4).expect_err("too short");
    assert_eq!(error.to_string(), "data: 6 values given, its shape and strides ask for 8");
    let error: Box<dyn std::error::Error> = Box::new(error);
    assert!(error.source().is_none());
    let error = GemmError::from(qkv_simd::IsaError::Unknown { given: "mmx".to_owned() });
    assert!(error.to_string().contains("mmx"));
}
