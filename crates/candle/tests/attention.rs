//! The operator against the f64 reference and against candle's own products and softmax.

mod common;

use candle_core::{DType, Device, Result, Tensor};
use common::{Random, as_bhsd, assert_close, assert_same, oracle, values};
use qkv_candle::{Axes, Causal, Options, Window, attention, attention_with_lse};

/// Random options for these sizes, most of them absent.
fn random_options(r: &mut Random, [b, h, s, t]: [usize; 4], dtype: DType) -> Result<Options> {
    let mut options = Options::new();
    if r.one_in(3) {
        options.scale = Some(r.float());
    }
    if r.one_in(4) {
        options.softcap = Some(r.float().abs() + 0.5);
    }
    if r.one_in(2) {
        let offset = r.between(0, t) as i64 - 2;
        options.causal = Some(r.pick(&[Causal::TopLeft, Causal::BottomRight, Causal::Offset(offset)]));
    }
    if r.one_in(4) {
        let (left, right) = (r.between(0, 9), r.between(0, 9));
        options.window = Some(Window::new((left < 8).then_some(left), (right < 8).then_some(right)));
    }
    // Each axis of a mask or bias may stand for all, and the ones in front may be missing.
    let shape_of = |r: &mut Random| -> Vec<usize> {
        let shape = [b, h, s, t].map(|size| if r.one_in(2) { size } else { 1 });
        let first = r.between(0, 3);
        if shape[..first].iter().all(|&size| size == 1) { shape[first..].to_vec() } else { shape.to_vec() }
    };
    if r.one_in(3) {
        let shape = shape_of(r);
        let bytes: Vec<u8> = (0..shape.iter().product()).map(|_| r.pick(&[0, 1, 1])).collect();
        options.mask = Some(Tensor::from_vec(bytes, shape, &Device::Cpu)?);
    }
    if r.one_in(3) {
        let shape = shape_of(r);
        let mut bias = r.floats(shape.iter().product());
        bias.iter_mut().for_each(|x| {
            if r.one_in(9) {
                *x = f32::NEG_INFINITY;
            }
        });
        let bias = Tensor::from_vec(bias, shape, &Device::Cpu)?;
        options.bias = Some(if r.one_in(2) { bias } else { bias.to_dtype(dtype)? });
    }
    if r.one_in(5) {
        let shape = if r.one_in(2) { vec![h] } else { vec![b, h] };
        options.alibi_slopes = Some(r.tensor(&shape, DType::F32)?.abs()?);
    }
    if r.one_in(5) {
        options.sinks = Some(r.tensor(&[h], DType::F32)?);
    }
    if r.one_in(4) {
        options.kv_lengths = Some((0..b).map(|_| r.between(0, t)).collect());
    }
    Ok(options)
}

#[test]
fn random_calls_agree_with_the_reference() -> Result<()> {
    let mut r = Random(1);
    for case in 0..400 {
        let (b, kv_heads, group) = (r.between(1, 3), r.between(1, 3), r.between(1, 3));
        let (s, t, d, dv) = (r.between(0, 19), r.between(0, 70), r.between(1, 40), r.between(1, 40));
        let dtype = r.pick(&[DType::F32, DType::F16, DType::BF16]);
        let kv_dtype = if r.one_in(5) { DType::BF16 } else { dtype };
        let h = kv_heads * group;
        let mut options = random_options(&mut r, [b, h, s, t], dtype)?;
        options.axes = r.pick(&[Axes::Bhsd, Axes::Bshd]);
        let q = as_bhsd(&r.strided([b, h, s, d], dtype)?, options.axes)?;
        let k = as_bhsd(&r.strided([b, kv_heads, t, d], kv_dtype)?, options.axes)?;
        let v = as_bhsd(&r.strided([b, kv_heads, t, dv], kv_dtype)?, options.axes)?;

        let what =
            format!("case {case}: q {:?} k {:?} v {:?} {options:?}", q.layout(), k.layout(), v.layout());
        let (out, lse) = attention_with_lse(&q, &k, &v, &options)?;
        let (expected, expected_lse) = oracle(&q, &k, &v, &options)?;
        assert_eq!(out.dtype(), dtype);
        assert!(out.is_contiguous());
        let out_shape = if options.axes == Axes::Bhsd { [b, h, s, dv] } else { [b, s, h, dv] };
        assert_eq!(out.dims(), out_shape, "{what}");
        assert_close(&as_bhsd(&out, options.axes)?, &expected, &what)?;
        assert_eq!(lse.dims(), [b, h, s], "{what}");
        assert_close(&lse, &expected_lse, &what)?;
        // The log-sum-exp is an addition, the output the same.
        let alone = attention(&q, &k, &v, &options)?;
        assert_eq!(values(&alone)?, values(&out)?, "{what}");
    }
    Ok(())
}

#[test]
fn agrees_with_products_and_softmax_of_candle() -> Result<()> {
    let mut r = Random(2);
    for case in 0..30 {
        let (b, h, s, d) = (r.between(1, 2), r.between(1, 4), r.between(1, 130), r.between(1, 80));
        let [q, k, v] = [0; 3].map(|_| r.tensor(&[b, h, s, d], DType::F32).unwrap());
        let scores = (q.matmul(&k.t()?)? / (d as f64).sqrt())?;
        let expected = candle_nn::ops::softmax_last_dim(&scores)?.matmul(&v)?;
        assert_same(&attention(&q, &k, &v, &Options::new())?, &expected, &format!("case {case}"))?;
    }
    Ok(())
}

#[test]
fn every_value_of_a_byte_but_zero_takes_part() -> Result<()> {
    let mut r = Random(3);
    let [q, k, v] = [0; 3].map(|_| r.tensor(&[1, 2, 3, 8], DType::F32).unwrap());
    let with = |bytes: [u8; 9]| -> Result<Vec<f32>> {
        // Narrowed out of a larger one and transposed: its strides are its own.
        let mask = Tensor::from_slice(&bytes, (1, 3, 3), &Device::Cpu)?;
        let mask = Tensor::cat(&[mask.ones_like()?, mask], 0)?.narrow(0, 1, 1)?.transpose(1, 2)?;
        values(&attention(&q, &k, &v, &Options::new().with_mask(mask))?)
    };
    assert_eq!(with([2, 0, 255, 1, 7, 0, 0, 3, 1])?, with([1, 0, 1, 1, 1, 0, 0, 1, 1])?);
    Ok(())
}

#[test]
fn nothing_to_see_gives_zero() -> Result<()> {
    let mut r = Random(4);
    let q = r.tensor(&[2, 2, 3, 8], DType::F32)?;
    let k = r.tensor(&[2, 1, 0, 8], DType::F32)?;
    let (out, lse) = attention_with_lse(&q, &k, &k, &Options::new())?;
    assert!(values(&out)?.iter().all(|&x| x == 0.0));
    assert!(values(&lse)?.iter().all(|&x| x == f32::NEG_INFINITY));
    // No batch, no query.
    let empty = r.tensor(&[0, 2, 3, 8], DType::BF16)?;
    assert_eq!(attention(&empty, &empty, &empty, &Options::new())?.dims(), [0, 2, 3, 8]);
    Ok(())
}

#[test]
fn results_do_not_depend_on_threads() -> Result<()> {
    let mut r = Random(5);
    let [q, k, v] = [0; 3].map(|_| r.tensor(&[2, 4, 200, 64], DType::F32).unwrap());
    let options = Options::new().with_causal(Causal::TopLeft);
    let with = |threads: usize| -> Result<Vec<f32>> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        values(&pool.install(|| attention(&q, &k, &v, &options))?)
    };
    assert_eq!(with(1)?, with(3)?);
    Ok(())
}
