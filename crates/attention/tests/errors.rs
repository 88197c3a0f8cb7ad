//! Every refusal is typed, carries the numbers, reads well, and leaves the outputs alone.

mod common;

use common::random;
use qkv_attention::{
    Argument, AttentionError, AttentionSpec, Outputs, Tensor, TensorError, TensorMut, TensorRef, attention,
    attention_into,
};

fn refusal(q: [usize; 4], k: [usize; 4], v: [usize; 4], spec: &AttentionSpec<'_>) -> AttentionError {
    let (q, k, v) = (random(q, 1), random(k, 2), random(v, 3));
    attention(q.view(), k.view(), v.view(), spec).expect_err("must be refused")
}

#[test]
fn shapes_that_do_not_fit() {
    let spec = AttentionSpec::new();
    let cases = [
        ([1, 2, 3, 8], [2, 2, 3, 8], [1, 2, 3, 8], "key: batch is 2, expected 1 to match query"),
        ([1, 2, 3, 8], [1, 2, 3, 8], [2, 2, 3, 8], "value: batch is 2, expected 1 to match query"),
        ([1, 2, 3, 8], [1, 2, 3, 9], [1, 2, 3, 8], "key: head dim is 9, expected 8 to match query"),
        ([1, 2, 3, 8], [1, 2, 4, 8], [1, 2, 5, 8], "value: length is 5, expected 4 to match key"),
        ([1, 2, 3, 8], [1, 2, 4, 8], [1, 1, 4, 8], "value: heads is 1, expected 2 to match key"),
        (
            [1, 3, 3, 8],
            [1, 2, 4, 8],
            [1, 2, 4, 8],
            "query: 3 heads, expected a multiple of the 2 key/value heads",
        ),
        ([1, 0, 3, 8], [1, 2, 4, 8], [1, 2, 4, 8], "query: heads is 0, expected at least 1"),
        ([1, 2, 3, 8], [1, 0, 4, 8], [1, 0, 4, 8], "key: heads is 0, expected at least 1"),
        ([1, 2, 3, 0], [1, 2, 4, 0], [1, 2, 4, 8], "query: head dim is 0, expected at least 1"),
    ];
    for (q, k, v, text) in cases {
        assert_eq!(refusal(q, k, v, &spec).to_string(), text);
    }
}

#[test]
fn scales_that_are_not_finite() {
    for scale in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let error =
            refusal([1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], &AttentionSpec::new().with_scale(scale));
        assert!(matches!(error, AttentionError::BadScale { .. }), "{error}");
        assert!(error.to_string().starts_with("scale: "), "{error}");
    }
}

#[test]
fn outputs_that_do_not_fit_are_left_alone() {
    let q = random([1, 2, 3, 8], 1);
    let spec = AttentionSpec::new();
    for shape in [[2, 2, 3, 8], [1, 1, 3, 8], [1, 2, 4, 8], [1, 2, 3, 7]] {
        let mut out = Tensor::from_fn(shape, |_| 5.0).unwrap();
        let outputs = Outputs::new(out.view_mut());
        let error = attention_into(q.view(), q.view(), q.view(), &spec, outputs).unwrap_err();
        assert!(matches!(error, AttentionError::ShapeMismatch { argument: Argument::Output, .. }), "{error}");
        assert!(out.data().iter().all(|&x| x == 5.0));
    }
    let mut out = Tensor::from_fn([1, 2, 3, 8], |_| 5.0).unwrap();
    let mut lse = [5.0; 7];
    let outputs = Outputs::new(out.view_mut()).with_lse(&mut lse);
    let error = attention_into(q.view(), q.view(), q.view(), &spec, outputs).unwrap_err();
    assert_eq!(error, AttentionError::LseLength { argument: Argument::Lse, given: 7, expected: 6 });
    assert!(out.data().iter().chain(&lse).all(|&x| x == 5.0));
}

#[test]
fn views_are_checked_when_they_are_made() {
    let data = vec![0.0f32; 100];
    let shape = [1, 2, 5, 10];
    assert!(TensorRef::from_slice(&data, shape).is_ok());
    assert!(matches!(
        TensorRef::from_slice(&data[1..], shape),
        Err(TensorError::OutOfBounds { buffer: 99, .. })
    ));
    let strided = |offset, strides| TensorRef::from_slice_strided(&data, offset, shape, strides);
    assert!(strided(0, [100, 50, 10, 1]).is_ok());
    assert!(strided(1, [100, 50, 10, 1]).is_err());
    assert!(strided(40, [100, 50, -10, 1]).is_ok());
    assert!(strided(39, [100, 50, -10, 1]).is_err());
    assert!(strided(0, [0, 0, 0, 1]).is_ok());
    assert!(strided(90, [0, 0, 0, 1]).is_ok());
    assert!(strided(91, [0, 0, 0, 1]).is_err());
    assert_eq!(strided(0, [100, 50, 1, 5]).unwrap_err(), TensorError::LastAxisNotContiguous { stride: 5 });
    assert!(matches!(strided(0, [isize::MAX, isize::MAX, isize::MAX, 1]), Err(TensorError::TooLarge { .. })));
    assert!(strided(usize::MAX, [100, 50, 10, 1]).is_err());
    for huge in
        [[usize::MAX, 1, 1, 1], [1 << 32, 1 << 32, 1, 1], [1 << 62, 1, 1, 1], [3, usize::MAX / 2, 1, 1]]
    {
        assert!(matches!(TensorRef::from_slice(&data, huge), Err(TensorError::TooLarge { .. })), "{huge:?}");
        assert!(Tensor::<f32>::zeros(huge).is_err());
    }
    // Huge but without elements.
    assert!(TensorRef::from_slice(&data[..0], [0, 4, 1000, 64]).is_ok());
    assert!(Tensor::from_vec(vec![0.0; 3], [1, 1, 2, 2]).is_err());
}

#[test]
fn outputs_may_not_overlap_themselves() {
    let mut data = vec![0.0f32; 1000];
    let mut strided =
        |strides| TensorMut::from_slice_strided(&mut data, 500, [2, 2, 3, 4], strides).map(|_| ());
    assert!(strided([24, 12, 4, 1]).is_ok());
    assert!(strided([4, 24, 8, 1]).is_ok());
    assert!(strided([-100, 30, -5, 1]).is_ok());
    for bad in [[0, 12, 4, 1], [24, 0, 4, 1], [24, 12, 0, 1], [24, 12, 3, 1], [24, 8, 4, 1], [12, 12, 4, 1]] {
        assert!(matches!(strided(bad), Err(TensorError::Overlapping { .. })), "{bad:?}");
    }
    // An axis of one element may have any stride.
    assert!(TensorMut::from_slice_strided(&mut data, 0, [1, 1, 3, 4], [0, 0, 4, 1]).is_ok());
}

#[test]
fn sizes_that_overflow_are_refused_before_anything_is_allocated() {
    // Views with stride 0 make huge inputs out of nothing; their output would not fit.
    let data = [0.0f32; 8];
    let huge = [1 << 20, 1 << 20, 1 << 20, 8];
    let view = TensorRef::from_slice_strided(&data, 0, huge, [0, 0, 0, 1]).unwrap();
    let error = attention(view, view, view, &AttentionSpec::new()).unwrap_err();
    assert!(matches!(error, AttentionError::TooLarge { .. }), "{error}");
    let long = TensorRef::from_slice_strided(&data, 0, [1, 1, 1 << 49, 8], [0, 0, 0, 1]).unwrap();
    let one = TensorRef::from_slice(&data, [1, 1, 1, 8]).unwrap();
    let error = attention(one, long, long, &AttentionSpec::new()).unwrap_err();
    assert!(matches!(error, AttentionError::TooLong { argument: Argument::Key, .. }), "{error}");
}
