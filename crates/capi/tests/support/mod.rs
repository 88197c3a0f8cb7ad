//! What the tests share: numbers, tensors with layouts, structs with their sizes, messages.

#![allow(dead_code, reason = "each test file uses a part of it")]
#![allow(unreachable_pub, reason = "a module of several test programs")]

use std::ffi::CStr;

use qkv::{bf16, f16};
use qkv_capi::*;

/// A small generator, the same on every machine.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) + 1)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let x = self.0;
        (x ^ (x >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd) >> 20
    }

    /// Below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    pub fn chance(&mut self, one_in: usize) -> bool {
        self.below(one_in) == 0
    }

    pub fn float(&mut self) -> f32 {
        self.below(1 << 20) as f32 / (1 << 19) as f32 - 1.0
    }

    pub fn floats(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.float()).collect()
    }
}

/// Values of one type, (batch, heads, length, dim) in one of two orders, and the same values as f32 in the first order.
pub struct Made {
    bytes: Vec<u64>,
    pub dtype: qkv_dtype,
    pub shape: [usize; 4],
    bshd: bool,
    /// Row-major (batch, heads, length, dim).
    pub values: Vec<f32>,
}

impl Made {
    pub fn random(random: &mut Random, shape: [usize; 4], dtype: qkv_dtype, bshd: bool) -> Self {
        let [batch, heads, length, dim] = shape;
        let count = batch * heads * length * dim;
        let rounded = |x: f32| match dtype {
            QKV_DTYPE_F16 => f16::from_f32(x).to_f32(),
            QKV_DTYPE_BF16 => bf16::from_f32(x).to_f32(),
            _ => x,
        };
        let values: Vec<f32> = (0..count).map(|_| rounded(random.float())).collect();
        let mut bytes = vec![0u64; count / 2 + 1];
        let at = bytes.as_mut_ptr();
        for (index, &value) in values.iter().enumerate() {
            let (d, s) = (index % dim, index / dim % length);
            let (h, b) = (index / dim / length % heads, index / dim / length / heads);
            let to = if bshd { ((b * length + s) * heads + h) * dim + d } else { index };
            // SAFETY: `to` is below the count, and the buffer has room for as many f32.
            unsafe {
                match dtype {
                    QKV_DTYPE_F16 => at.cast::<f16>().add(to).write(f16::from_f32(value)),
                    QKV_DTYPE_BF16 => at.cast::<bf16>().add(to).write(bf16::from_f32(value)),
                    _ => at.cast::<f32>().add(to).write(value),
                }
            }
        }
        Self { bytes, dtype, shape, bshd, values }
    }

    pub fn f32(random: &mut Random, shape: [usize; 4]) -> Self {
        Self::random(random, shape, QKV_DTYPE_F32, false)
    }

    /// These values of f32.
    pub fn of(values: Vec<f32>, shape: [usize; 4]) -> Self {
        let mut bytes = vec![0u64; values.len() / 2 + 1];
        // SAFETY: the buffer has room for as many f32.
        unsafe { bytes.as_mut_ptr().cast::<f32>().copy_from_nonoverlapping(values.as_ptr(), values.len()) };
        Self { bytes, dtype: QKV_DTYPE_F32, shape, bshd: false, values }
    }

    /// The descriptor, with its buffer named.
    pub fn tensor(&self) -> qkv_tensor {
        let [batch, heads, length, dim] = self.shape.map(|size| size as i64);
        let data = self.bytes.as_ptr().cast();
        let make = if self.bshd { qkv_tensor_bshd } else { qkv_tensor_bhsd };
        let mut tensor = make(data, self.dtype, batch, heads, length, dim);
        tensor.buffer = data;
        tensor.buffer_size = 8 * self.bytes.len();
        tensor
    }

    pub fn view(&self) -> qkv::TensorRef<'_> {
        qkv::TensorRef::from_slice(&self.values, self.shape).expect("made of this shape")
    }
}

/// A contiguous output of f32.
pub fn output(to: &mut [f32], shape: [usize; 4]) -> qkv_attention_outputs {
    let [batch, heads, length, dim] = shape.map(|size| size as i64);
    let mut output = qkv_tensor_mut_bhsd(to.as_mut_ptr().cast(), QKV_DTYPE_F32, batch, heads, length, dim);
    output.buffer = to.as_ptr().cast();
    output.buffer_size = 4 * to.len();
    let none = qkv_floats_mut { data: std::ptr::null_mut(), count: 0 };
    qkv_attention_outputs { struct_size: size_of::<qkv_attention_outputs>(), output, lse: none, maxima: none }
}

pub fn list(of: &mut [f32]) -> qkv_floats_mut {
    qkv_floats_mut { data: of.as_mut_ptr(), count: of.len() }
}

pub fn floats(of: &[f32]) -> qkv_floats {
    qkv_floats { data: of.as_ptr(), count: of.len() }
}

pub fn integers(of: &[i64]) -> qkv_integers {
    qkv_integers { data: of.as_ptr(), count: of.len() }
}

/// A struct of zeros whose first field is its size, as the header's functions make it.
pub fn zeroed<T: Copy>() -> T {
    let mut new = std::mem::MaybeUninit::<T>::zeroed();
    // SAFETY: all structs of the header are numbers and raw addresses, the size first.
    unsafe {
        new.as_mut_ptr().cast::<usize>().write(size_of::<T>());
        new.assume_init()
    }
}

/// The message of the last failure.
pub fn message() -> String {
    // SAFETY: a C string, valid until the next failure of this thread.
    unsafe { CStr::from_ptr(qkv_last_error_message()) }.to_string_lossy().into_owned()
}

pub fn ok(status: qkv_status) {
    assert_eq!(status, qkv_status::QKV_OK, "{}", message());
}

/// The largest difference; infinities must agree.
pub fn difference(got: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(got.len(), expected.len());
    let each = got.iter().zip(expected).map(|(&got, &expected)| {
        if f64::from(got) == expected { 0.0 } else { (f64::from(got) - expected).abs() }
    });
    each.fold(0.0, |most, x| if x > most || x.is_nan() { x } else { most })
}
