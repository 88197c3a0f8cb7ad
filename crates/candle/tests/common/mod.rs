//! What the tests share: random numbers, tensors that lie oddly in memory, and the oracle.
#![allow(dead_code, reason = "each test binary uses a part")]
#![allow(unreachable_pub, reason = "a module of test binaries")]

use candle_core::{DType, Device, Result, Tensor};
use qkv::{AttentionSpec, Bias, Broadcast, TensorRef, reference};
use qkv_candle::{Axes, Options};

/// SplitMix64.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// low ..= high.
    pub fn between(&mut self, low: usize, high: usize) -> usize {
        low + (self.next() % (high - low + 1) as u64) as usize
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        self.next().is_multiple_of(n)
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.between(0, from.len() - 1)]
    }

    /// -2 .. 2.
    pub fn float(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 24) as f32 * 4.0 - 2.0
    }

    pub fn floats(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.float()).collect()
    }

    pub fn tensor(&mut self, shape: &[usize], dtype: DType) -> Result<Tensor> {
        let values = self.floats(shape.iter().product());
        Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)
    }

    /// A tensor of this shape that lies in memory in one of several ways: contiguous, permuted, narrowed out of a larger one,
    /// broadcast along the batch or the length, or with a head dim that is not contiguous.
    pub fn strided(&mut self, shape: [usize; 4], dtype: DType) -> Result<Tensor> {
        let [b, h, s, d] = shape;
        match self.between(0, 6) {
            0 => self.tensor(&shape, dtype),
            1 => self.tensor(&[b, s, h, d], dtype)?.transpose(1, 2),
            // A part of a packed projection.
            2 => self.tensor(&[b, s, h, 3 * d], dtype)?.narrow(3, d, d)?.transpose(1, 2),
            3 => self
                .tensor(&[b + 1, h + 2, s + 3, d], dtype)?
                .narrow(0, 1, b)?
                .narrow(1, 1, h)?
                .narrow(2, 2, s),
            4 => self.tensor(&[1, h, s, d], dtype)?.broadcast_as(&shape),
            5 => self.tensor(&[b, h, 1, d], dtype)?.broadcast_as(&shape),
            _ => self.tensor(&[b, h, d, s], dtype)?.transpose(2, 3),
        }
    }
}

/// The values in row-major order, widened.
pub fn values(tensor: &Tensor) -> Result<Vec<f32>> {
    tensor.to_dtype(DType::F32)?.contiguous()?.flatten_all()?.to_vec1()
}

/// The tensor as (batch, heads, length, dim), whatever its axes.
pub fn as_bhsd(tensor: &Tensor, axes: Axes) -> Result<Tensor> {
    match axes {
        Axes::Bhsd => Ok(tensor.clone()),
        Axes::Bshd => tensor.transpose(1, 2),
    }
}

/// What the f64 reference says: output and log-sum-exp, row-major (batch, heads, length, ..).
pub fn oracle(q: &Tensor, k: &Tensor, v: &Tensor, options: &Options) -> Result<(Vec<f64>, Vec<f64>)> {
    let [q, k, v] = [q, k, v].map(|x| as_bhsd(x, options.axes).unwrap());
    let dims = |x: &Tensor| -> [usize; 4] { x.dims().try_into().unwrap() };
    let (q_shape, k_shape, v_shape) = (dims(&q), dims(&k), dims(&v));
    let (q, k, v) = (values(&q)?, values(&k)?, values(&v)?);
    let full = [q_shape[0], q_shape[1], q_shape[2], k_shape[2]];
    let expanded = |x: &Tensor| values(&x.broadcast_as(&full)?);

    let mask = match &options.mask {
        Some(mask) => Some(expanded(mask)?.into_iter().map(|x| x != 0.0).collect::<Vec<bool>>()),
        None => None,
    };
    let bias = options.bias.as_ref().map(expanded).transpose()?;
    let slopes = options.alibi_slopes.as_ref().map(values).transpose()?;
    let sinks = options.sinks.as_ref().map(values).transpose()?;
    let mut spec = AttentionSpec::new();
    spec.scale = options.scale;
    spec.softcap = options.softcap;
    spec.causal = options.causal;
    spec.window = options.window;
    spec.mask = mask.as_ref().map(|mask| Broadcast::from_slice(mask, full).unwrap());
    spec.bias = bias.as_ref().map(|bias| Bias::F32(Broadcast::from_slice(bias, full).unwrap()));
    spec.alibi_slopes = slopes.as_deref();
    spec.sinks = sinks.as_deref();
    spec.key_lengths = options.kv_lengths.as_deref();
    let view = |values, shape| TensorRef::from_slice(values, shape).unwrap();
    let result = reference::oracle(view(&q, q_shape), view(&k, k_shape), view(&v, v_shape), &spec);
    Ok((result.output.into_vec(), result.lse))
}

/// How far a result may be from the f64 reference: a few units of f32 and one rounding to the type.
pub fn assert_close(given: &Tensor, expected: &[f64], what: &str) -> Result<()> {
    let rounding = match given.dtype() {
        DType::F16 => 2f64.powi(-11),
        DType::BF16 => 2f64.powi(-8),
        _ => 0.0,
    };
    let given = values(given)?;
    assert_eq!(given.len(), expected.len(), "{what}: number of values");
    for (i, (&given, &expected)) in given.iter().zip(expected).enumerate() {
        let given = f64::from(given);
        let near = (given - expected).abs() <= 1e-5 + (2e-5 + rounding) * expected.abs();
        assert!(near || given == expected, "{what}: value {i} is {given}, expected {expected}");
    }
    Ok(())
}

/// How far two results in f32 may be apart, of which the other is no more exact: scores of some tens leave 1e-5 of a weight open.
pub fn assert_same(given: &Tensor, expected: &Tensor, what: &str) -> Result<()> {
    assert_eq!(given.dims(), expected.dims(), "{what}: shape");
    assert_eq!(given.dtype(), expected.dtype(), "{what}: type");
    for (i, (a, b)) in values(given)?.into_iter().zip(values(expected)?).enumerate() {
        assert!((a - b).abs() <= 5e-5 + 5e-5 * b.abs(), "{what}: value {i} is {a}, expected {b}");
    }
    Ok(())
}
