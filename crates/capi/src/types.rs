//! What the header is made of beside functions: the numbers that name types and choices, and the descriptors of tensors.
//!
//! Enumerators come from C as plain integers, which may hold anything; they are looked at before they mean something.

use core::ffi::c_void;
use core::ptr;

/// A type of values: one of the QKV_DTYPE_ numbers.
pub type qkv_dtype = u32;
/// 32-bit floats.
pub const QKV_DTYPE_F32: qkv_dtype = 0;
/// IEEE binary16.
pub const QKV_DTYPE_F16: qkv_dtype = 1;
/// bfloat16: the upper half of a 32-bit float.
pub const QKV_DTYPE_BF16: qkv_dtype = 2;
/// 8-bit integers with scales: keys and values only.
pub const QKV_DTYPE_I8: qkv_dtype = 3;
/// One byte each, 0 or 1: masks only.
pub const QKV_DTYPE_BOOL: qkv_dtype = 4;

/// How queries are aligned with keys: one of the QKV_CAUSAL_ numbers.
pub type qkv_causal = u32;
/// No causal mask.
pub const QKV_CAUSAL_NONE: qkv_causal = 0;
/// Query i sees key j where j <= i.
pub const QKV_CAUSAL_TOP_LEFT: qkv_causal = 1;
/// Query i sees key j where j <= i + key length - query length.
pub const QKV_CAUSAL_BOTTOM_RIGHT: qkv_causal = 2;
/// Query i sees key j where j <= i + causal_offset.
pub const QKV_CAUSAL_OFFSET: qkv_causal = 3;

/// A function of every result of a product: one of the QKV_ACTIVATION_ numbers.
pub type qkv_activation = u32;
/// None.
pub const QKV_ACTIVATION_NONE: qkv_activation = 0;
/// x Phi(x), Phi being the normal distribution's.
pub const QKV_ACTIVATION_GELU: qkv_activation = 1;
/// Its approximation by tanh.
pub const QKV_ACTIVATION_GELU_TANH: qkv_activation = 2;
/// max(x, 0).
pub const QKV_ACTIVATION_RELU: qkv_activation = 3;
/// x / (1 + exp(-x)).
pub const QKV_ACTIVATION_SILU: qkv_activation = 4;

/// A tensor that is read: (batch, heads, length, dim), or what else an argument says of its four axes.
///
/// Element (b, h, s, d) lies at data + (b strides[0] + h strides[1] + s strides[2] + d strides[3]) values. Strides may
/// have any sign, and 0 repeats one element along an axis; queries, keys, values and outputs need strides[3] = 1. A tensor
/// with a size of 0 is empty, and its data may be NULL.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct qkv_tensor {
    /// Where element (0, 0, 0, 0) lies, aligned to its type.
    pub data: *const c_void,
    /// Sizes.
    pub shape: [i64; 4],
    /// Values (not bytes) from one index to the next.
    pub strides: [i64; 4],
    /// If not NULL: the memory that all elements must lie in, which is checked then. If NULL, the caller vouches for it.
    pub buffer: *const c_void,
    /// Bytes of it.
    pub buffer_size: usize,
    /// For QKV_DTYPE_I8: the scales, f32 (batch, heads, length, groups), the groups dividing the dim. Else NULL.
    pub scales: *const qkv_tensor,
    /// For QKV_DTYPE_I8, or NULL: zero points of the same shape; an integer q stands for scale (q - zero).
    pub zeros: *const qkv_tensor,
    /// The type of the values.
    pub dtype: qkv_dtype,
    /// 0.
    pub reserved: u32,
}

/// A tensor that is written, as qkv_tensor says; no two elements may share their memory.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct qkv_tensor_mut {
    /// Where element (0, 0, 0, 0) lies, aligned to its type.
    pub data: *mut c_void,
    /// Sizes.
    pub shape: [i64; 4],
    /// Values (not bytes) from one index to the next.
    pub strides: [i64; 4],
    /// If not NULL: the memory that all elements must lie in, which is checked then. If NULL, the caller vouches for it.
    pub buffer: *const c_void,
    /// Bytes of it.
    pub buffer_size: usize,
    /// The type of the values: QKV_DTYPE_F32, QKV_DTYPE_F16 or QKV_DTYPE_BF16.
    pub dtype: qkv_dtype,
    /// 0.
    pub reserved: u32,
}

/// Strides of a contiguous tensor with its axes in this order; a product that does not fit is refused where it is used.
fn strides(shape: [i64; 4], inner_to_outer: [usize; 4]) -> [i64; 4] {
    let mut strides = [0; 4];
    let mut step = 1i64;
    for axis in inner_to_outer {
        strides[axis] = step;
        step = step.saturating_mul(shape[axis].max(1));
    }
    strides
}

fn tensor(data: *const c_void, dtype: qkv_dtype, shape: [i64; 4], order: [usize; 4]) -> qkv_tensor {
    qkv_tensor {
        data,
        shape,
        strides: strides(shape, order),
        buffer: ptr::null(),
        buffer_size: 0,
        scales: ptr::null(),
        zeros: ptr::null(),
        dtype,
        reserved: 0,
    }
}

/// The same description of memory that is written.
fn written(data: *mut c_void, dtype: qkv_dtype, shape: [i64; 4], order: [usize; 4]) -> qkv_tensor_mut {
    let (strides, buffer) = (strides(shape, order), ptr::null());
    qkv_tensor_mut { data, shape, strides, buffer, buffer_size: 0, dtype, reserved: 0 }
}

/// (batch, heads, length, dim), row-major without gaps.
#[unsafe(no_mangle)]
pub extern "C" fn qkv_tensor_bhsd(
    data: *const c_void,
    dtype: qkv_dtype,
    batch: i64,
    heads: i64,
    length: i64,
    dim: i64,
) -> qkv_tensor {
    tensor(data, dtype, [batch, heads, length, dim], [3, 2, 1, 0])
}

/// (batch, length, heads, dim) in memory, row-major without gaps. The sizes are given, and kept, as (batch, heads, length,
/// dim).
#[unsafe(no_mangle)]
pub extern "C" fn qkv_tensor_bshd(
    data: *const c_void,
    dtype: qkv_dtype,
    batch: i64,
    heads: i64,
    length: i64,
    dim: i64,
) -> qkv_tensor {
    tensor(data, dtype, [batch, heads, length, dim], [3, 1, 2, 0])
}

/// As qkv_tensor_bhsd, to be written.
#[unsafe(no_mangle)]
pub extern "C" fn qkv_tensor_mut_bhsd(
    data: *mut c_void,
    dtype: qkv_dtype,
    batch: i64,
    heads: i64,
    length: i64,
    dim: i64,
) -> qkv_tensor_mut {
    written(data, dtype, [batch, heads, length, dim], [3, 2, 1, 0])
}

/// As qkv_tensor_bshd, to be written.
#[unsafe(no_mangle)]
pub extern "C" fn qkv_tensor_mut_bshd(
    data: *mut c_void,
    dtype: qkv_dtype,
    batch: i64,
    heads: i64,
    length: i64,
    dim: i64,
) -> qkv_tensor_mut {
    written(data, dtype, [batch, heads, length, dim], [3, 1, 2, 0])
}

/// A matrix of f32, row-major without gaps: sizes (1, 1, rows, columns).
#[unsafe(no_mangle)]
pub extern "C" fn qkv_matrix(data: *const f32, rows: i64, columns: i64) -> qkv_tensor {
    tensor(data.cast(), QKV_DTYPE_F32, [1, 1, rows, columns], [3, 2, 1, 0])
}

/// As qkv_matrix, to be written.
#[unsafe(no_mangle)]
pub extern "C" fn qkv_matrix_mut(data: *mut f32, rows: i64, columns: i64) -> qkv_tensor_mut {
    written(data.cast(), QKV_DTYPE_F32, [1, 1, rows, columns], [3, 2, 1, 0])
}

/// The transpose of a matrix, or of each matrix of a batch: the last two axes swapped.
#[unsafe(no_mangle)]
pub extern "C" fn qkv_transposed(mut matrix: qkv_tensor) -> qkv_tensor {
    matrix.shape.swap(2, 3);
    matrix.strides.swap(2, 3);
    matrix
}
