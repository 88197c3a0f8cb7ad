//! ndarray's views against the same numbers in plain tensors.
#![cfg(feature = "ndarray")]

use half::{bf16, f16};
use ndarray::{Array, Array2, Array3, Array4, ArrayView4, Axis, Dimension, IxDyn, s};
use qkv::gemm::{GemmError, GemmSpec, MatMut, MatRef, gemm};
use qkv::ndarray::{Element, ViewError, attention, attention_into_array, attention_with_lse, matmul};
use qkv::{
    Argument, AttentionError, AttentionSpec, Bias, Broadcast, Causal, Data, Tensor, TensorError, TensorMut,
    TensorRef, reference,
};

/// A number that depends on all of the index.
fn number(index: &[usize], seed: usize) -> f32 {
    let mut state = seed as u64;
    for &i in index {
        state = (state ^ i as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(23);
    }
    (state >> 40) as f32 / (1u64 << 24) as f32 * 2.0 - 1.0
}

fn array(shape: [usize; 4], seed: usize) -> Array4<f32> {
    Array4::from_shape_fn(shape, |(a, b, c, d)| number(&[a, b, c, d], seed))
}

/// The same numbers, contiguous.
fn tensor<T: Copy>(view: ArrayView4<'_, T>) -> Tensor<T> {
    Tensor::from_vec(view.iter().copied().collect(), view.dim().into()).unwrap()
}

/// Attention of the same numbers in plain tensors.
fn plain(view: ArrayView4<'_, f32>, spec: &AttentionSpec<'_>) -> Vec<f32> {
    fn data<T: Element>(x: &Tensor<T>) -> Data<'_> {
        T::data(x.view())
    }
    let x = tensor(view);
    qkv::attention(data(&x), data(&x), data(&x), spec).unwrap().into_vec()
}

#[test]
fn every_way_to_lie_in_memory_gives_the_same_bits() {
    let spec = AttentionSpec::new().with_causal(Causal::BottomRight);
    let large = array([3, 6, 50, 21], 1);
    let own = array([2, 4, 17, 9], 5);
    let bshd = array([2, 17, 4, 9], 2);
    let row = array([1, 4, 1, 9], 3);
    let turned = array([2, 4, 9, 17], 4);
    let ways: [(&str, ArrayView4<'_, f32>); 7] = [
        ("contiguous", own.view()),
        ("sliced", large.slice(s![1.., ..4, 3..20, 5..14])),
        ("every second, heads backwards", large.slice(s![..2, ..4;-1, ..34;2, ..9])),
        ("permuted", bshd.view().permuted_axes([0, 2, 1, 3])),
        ("broadcast", row.broadcast((2, 4, 17, 9)).unwrap()),
        ("turned: copied", turned.view().permuted_axes([0, 1, 3, 2])),
        ("dims backwards: copied", large.slice(s![..2, ..4, ..17, ..9;-1])),
    ];
    for (name, view) in ways {
        let out = attention(view, view, view, &spec).unwrap();
        assert_eq!(out.dim(), (2, 4, 17, 9), "{name}");
        assert_eq!(out.into_raw_vec_and_offset().0, plain(view, &spec), "{name}");
    }
}

#[test]
fn half_types_and_mixed_types() {
    let (q, k, v) = (array([1, 4, 5, 8], 1), array([1, 2, 9, 8], 2), array([1, 2, 9, 3], 3));
    let spec = AttentionSpec::new();
    let exact = attention(q.view(), k.view(), v.view(), &spec).unwrap();
    let [k16, v16] = [&k, &v].map(|x| x.mapv(f16::from_f32));
    let out: Array4<f32> = attention(q.view(), k16.view(), v16.view(), &spec).unwrap();
    let widened = [&k16, &v16].map(|x| x.mapv(f16::to_f32));
    let expected = attention(q.view(), widened[0].view(), widened[1].view(), &spec).unwrap();
    assert!((&out - &expected).iter().all(|x| x.abs() < 1e-6));
    let [q16, k16, v16] = [&q, &k, &v].map(|x| x.mapv(bf16::from_f32));
    let out: Array4<bf16> = attention(q16.view(), k16.view(), v16.view(), &spec).unwrap();
    assert!(out.iter().zip(&exact).all(|(a, b)| (a.to_f32() - b).abs() < 0.05));
}

#[test]
fn log_sum_exp_and_own_output() {
    let (q, k, v) = (array([2, 4, 5, 8], 1), array([2, 2, 9, 8], 2), array([2, 2, 9, 3], 3));
    let spec = AttentionSpec::new().with_causal(Causal::TopLeft);
    let (out, lse) = attention_with_lse(q.view(), k.view(), v.view(), &spec).unwrap();
    let [qt, kt, vt] = [&q, &k, &v].map(|x| tensor(x.view()));
    let expected = reference::oracle(qt.view(), kt.view(), vt.view(), &spec);
    assert!(out.iter().zip(expected.output.data()).all(|(&a, b)| (f64::from(a) - b).abs() < 1e-5));
    assert!(lse.iter().zip(&expected.lse).all(|(&a, b)| (f64::from(a) - b).abs() < 1e-5));
    assert_eq!(lse.dim(), (2, 4, 5));

    // A part of a larger array, in another order of axes; the rest stays.
    let mut large = Array4::from_elem((2, 7, 4, 3), 7.0f32);
    let part = large.slice_mut(s![.., 1..6, .., ..]).permuted_axes([0, 2, 1, 3]);
    attention_into_array(q.view(), k.view(), v.view(), &spec, part).unwrap();
    assert_eq!(large.slice(s![.., 1..6, .., ..]).permuted_axes([0, 2, 1, 3]), out);
    assert!(large.slice(s![.., ..1, .., ..]).iter().all(|&x| x == 7.0));
    assert!(large.slice(s![.., 6.., .., ..]).iter().all(|&x| x == 7.0));
}

/// A bias and a mask of any number of axes, and the same ones written out in full.
fn masked<D: Dimension>(bias: &Array<f32, D>) {
    let (q, k) = (array([2, 4, 5, 8], 1), array([2, 2, 9, 8], 2));
    let mask = bias.mapv(|x| x > -0.5);
    let spec = AttentionSpec::new()
        .with_bias(Bias::try_from(bias.view()).unwrap())
        .with_mask(Broadcast::try_from(mask.view()).unwrap());
    let full = bias.broadcast((2, 4, 5, 9)).unwrap();
    let (all, all_mask) = (tensor(full), tensor(full.mapv(|x| x > -0.5).view()));
    let expected = AttentionSpec::new().with_bias(all.view().into()).with_mask(all_mask.view().into());
    let out = attention(q.view(), k.view(), k.view(), &spec).unwrap();
    assert_eq!(out, attention(q.view(), k.view(), k.view(), &expected).unwrap());
}

#[test]
fn masks_and_biases() {
    let four = array([2, 1, 5, 9], 5);
    masked(&four);
    masked(&Array3::from_shape_fn((4, 1, 9), |(a, b, c)| number(&[a, b, c], 6)));
    // Not contiguous on the last axis, which a mask may be.
    let two = Array2::from_shape_fn((9, 5), |(a, b)| number(&[a, b], 7)).reversed_axes();
    masked(&two);
    masked(&two.into_dyn());

    let (q, k) = (array([2, 4, 5, 8], 1), array([2, 2, 9, 8], 2));
    let with = |bias| attention(q.view(), k.view(), k.view(), &AttentionSpec::new().with_bias(bias)).unwrap();
    let half = four.mapv(bf16::from_f32);
    let widened = half.mapv(bf16::to_f32);
    assert_eq!(with(half.view().try_into().unwrap()), with(widened.view().try_into().unwrap()));
    let half = four.mapv(f16::from_f32);
    let widened = half.mapv(f16::to_f32);
    assert_eq!(with(half.view().try_into().unwrap()), with(widened.view().try_into().unwrap()));

    let five = Array::<f32, _>::zeros(IxDyn(&[1, 1, 1, 5, 9]));
    assert_eq!(Bias::try_from(five.view()).unwrap_err(), ViewError::Axes { given: 5 });
    let error = Broadcast::try_from(five.view()).unwrap_err();
    assert_eq!(error.to_string(), "an array of 5 axes, expected at most 4");
}

#[test]
fn empty_arrays() {
    let spec = AttentionSpec::new();
    let (q, none) = (array([2, 4, 5, 8], 1), array([2, 2, 0, 8], 2));
    let out = attention(q.view(), none.view(), none.view(), &spec).unwrap();
    assert_eq!(out, Array4::<f32>::zeros((2, 4, 5, 8)));
    assert_eq!(attention(none.view(), none.view(), none.view(), &spec).unwrap().dim(), (2, 2, 0, 8));
    assert_eq!(TensorRef::try_from(none.view()).unwrap().shape(), [2, 2, 0, 8]);
}

#[test]
fn refusals() {
    let turned = array([2, 4, 9, 17], 4);
    let view = turned.view().permuted_axes([0, 1, 3, 2]);
    let error = TensorRef::try_from(view).unwrap_err();
    assert_eq!(error, TensorError::LastAxisNotContiguous { stride: 17 });
    let mut out = array([2, 4, 17, 9], 4);
    let error = TensorMut::try_from(out.slice_mut(s![.., .., .., ..;2])).unwrap_err();
    assert_eq!(error, TensorError::LastAxisNotContiguous { stride: 2 });

    let spec = AttentionSpec::new();
    let q = array([2, 4, 17, 9], 1);
    let mut wide = Array4::zeros((2, 4, 17, 18));
    let gaps = wide.slice_mut(s![.., .., .., ..;2]);
    let error = attention_into_array(q.view(), q.view(), q.view(), &spec, gaps).unwrap_err();
    assert!(error.to_string().starts_with("output: "));
    let error = attention_into_array(q.view(), q.view(), q.view(), &spec, wide.view_mut()).unwrap_err();
    assert!(matches!(
        error,
        AttentionError::ShapeMismatch { argument: Argument::Output, given: 18, expected: 9, .. }
    ));
    assert!(attention(q.view(), q.slice(s![..1, .., .., ..]), q.view(), &spec).is_err());
    // A result that no memory holds, asked for by broadcasting alone.
    let one = array([1, 1, 1, 9], 1);
    let huge = one.broadcast((1 << 31, 1 << 20, 1, 9)).unwrap();
    let error = attention(huge, huge, huge, &spec).unwrap_err();
    assert!(matches!(error, AttentionError::TooLarge { .. }));
    // Or a copy of the keys or values.
    let gaps = one.slice(s![.., .., .., ..;3]);
    let long = gaps.broadcast((1, 1, 1 << 42, 3)).unwrap();
    for (k, v, argument) in [(long, one.view(), "key"), (gaps, long, "value")] {
        let error = attention(gaps, k, v, &spec).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!(
                "{argument}: not supported together with a last axis that is not contiguous, where memory has no room \
                 for a copy"
            )
        );
    }
    // Or a product.
    let (a, b) = (Array2::zeros((1, 1)), Array2::zeros((1, 1)));
    for (rows, cols) in [(1 << 21, 1 << 22), (1 << 40, 1 << 40)] {
        let error = matmul(a.broadcast((rows, 1)).unwrap(), b.broadcast((1, cols)).unwrap()).unwrap_err();
        assert_eq!(error, GemmError::Memory { argument: "c", given: (rows, cols) });
    }
}

#[test]
fn matrices() {
    let large = Array2::from_shape_fn((40, 60), |(i, j)| number(&[i, j], 8));
    let (a, b) = (large.slice(s![..;2, 3..30]), large.slice(s![..27, ..50;-3]));
    for (a, b) in [(a, b), (b.reversed_axes(), a.reversed_axes())] {
        let c = matmul(a, b).unwrap();
        let expected = a.mapv(f64::from).dot(&b.mapv(f64::from));
        assert!(c.iter().zip(&expected).all(|(&x, y)| (f64::from(x) - y).abs() < 1e-4));
        // Into a transposed view of another.
        let mut out = Array2::zeros((c.ncols(), c.nrows()));
        let mut view = MatMut::from(out.view_mut().reversed_axes());
        gemm(MatRef::from(a), MatRef::from(b), &mut view, &GemmSpec::default()).unwrap();
        assert!(c.iter().zip(out.t().iter()).all(|(x, y)| (x - y).abs() < 1e-5));
    }
    assert!(matmul(a, large.view()).unwrap_err().to_string().starts_with('b'));
    let empty = matmul(a.slice(s![.., ..0]), b.slice(s![..0, ..])).unwrap();
    assert_eq!((empty.dim(), empty.sum_axis(Axis(0)).sum()), ((20, 17), 0.0));
}
