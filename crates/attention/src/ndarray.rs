//! ndarray's views as this crate's, in place (feature `ndarray`).
//!
//! | from | to | what is refused |
//! | --- | --- | --- |
//! | `ArrayView4<T>` (batch, heads, length, dim) | [`TensorRef`] | a dim that is not contiguous |
//! | `ArrayViewMut4<T>` | [`TensorMut`] | the same |
//! | `ArrayView<T, D>` of up to 4 axes | [`Broadcast`], and [`Bias`] of f32, f16, bf16 | more axes |
//! | [`Tensor`] | `Array4<T>` | nothing |
//!
//! Strides may be anything, negative and 0 among them. Masks and biases of fewer than 4 axes get axes of 1 in front, as
//! numpy does it.

use core::fmt;

use ::ndarray::{Array4, ArrayView, ArrayView4, ArrayViewMut4, Dimension};
use half::{bf16, f16};

use crate::{Bias, Broadcast, HalfKind, Tensor, TensorError, TensorMut, TensorRef};

/// Why an array was refused as a mask or bias.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ViewError {
    /// It has more than 4 axes.
    Axes {
        /// The number of axes that came.
        given: usize,
    },
    /// Its sizes or strides are too large.
    Tensor(TensorError),
}

impl fmt::Display for ViewError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ViewError::Axes { given } => write!(f, "an array of {given} axes, expected at most 4"),
            ViewError::Tensor(error) => error.fmt(f),
        }
    }
}

impl core::error::Error for ViewError {}

impl From<TensorError> for ViewError {
    fn from(error: TensorError) -> Self {
        ViewError::Tensor(error)
    }
}

/// Sizes and strides of an array. An empty one is given the strides of a contiguous one: ndarray gives it 0 everywhere.
fn geometry(shape: &[usize], strides: &[isize]) -> ([usize; 4], [isize; 4]) {
    let (mut sizes, mut steps) = ([1; 4], [0; 4]);
    let missing = 4 - shape.len();
    sizes[missing..].copy_from_slice(shape);
    steps[missing..].copy_from_slice(strides);
    if sizes.contains(&0) {
        steps = [0, 0, 0, 1];
    }
    (sizes, steps)
}

impl<'a, T> TryFrom<ArrayView4<'a, T>> for TensorRef<'a, T> {
    type Error = TensorError;

    fn try_from(array: ArrayView4<'a, T>) -> Result<Self, TensorError> {
        let (shape, strides) = geometry(array.shape(), array.strides());
        // SAFETY: the view borrows every element for 'a.
        unsafe { Self::from_raw_parts(array.as_ptr(), shape, strides) }
    }
}

impl<'a, T> TryFrom<ArrayViewMut4<'a, T>> for TensorMut<'a, T> {
    type Error = TensorError;

    fn try_from(mut array: ArrayViewMut4<'a, T>) -> Result<Self, TensorError> {
        let (shape, strides) = geometry(array.shape(), array.strides());
        // SAFETY: the view borrows every element alone for 'a, and is given up here.
        unsafe { Self::from_raw_parts(array.as_mut_ptr(), shape, strides) }
    }
}

/// The array as one of `U`, which must have the size and the bits of `T`.
fn broadcast<'a, T, U, D: Dimension>(array: &ArrayView<'a, T, D>) -> Result<Broadcast<'a, U>, ViewError> {
    const { assert!(size_of::<T>() == size_of::<U>() && align_of::<T>() == align_of::<U>()) };
    if array.ndim() > 4 {
        return Err(ViewError::Axes { given: array.ndim() });
    }
    let (shape, strides) = geometry(array.shape(), array.strides());
    // SAFETY: the view borrows every element for 'a; U is T, or the bits of a 16-bit float.
    Ok(unsafe { Broadcast::from_raw_parts(array.as_ptr().cast::<U>(), shape, strides) }?)
}

impl<'a, T, D: Dimension> TryFrom<ArrayView<'a, T, D>> for Broadcast<'a, T> {
    type Error = ViewError;

    fn try_from(array: ArrayView<'a, T, D>) -> Result<Self, ViewError> {
        broadcast(&array)
    }
}

impl<'a, D: Dimension> TryFrom<ArrayView<'a, f32, D>> for Bias<'a> {
    type Error = ViewError;

    fn try_from(array: ArrayView<'a, f32, D>) -> Result<Self, ViewError> {
        Ok(Bias::F32(broadcast(&array)?))
    }
}

impl<'a, D: Dimension> TryFrom<ArrayView<'a, f16, D>> for Bias<'a> {
    type Error = ViewError;

    fn try_from(array: ArrayView<'a, f16, D>) -> Result<Self, ViewError> {
        Ok(Bias::Half(HalfKind::F16, broadcast(&array)?))
    }
}

impl<'a, D: Dimension> TryFrom<ArrayView<'a, bf16, D>> for Bias<'a> {
    type Error = ViewError;

    fn try_from(array: ArrayView<'a, bf16, D>) -> Result<Self, ViewError> {
        Ok(Bias::Half(HalfKind::Bf16, broadcast(&array)?))
    }
}

impl<T> From<Tensor<T>> for Array4<T> {
    fn from(tensor: Tensor<T>) -> Self {
        let shape = tensor.shape();
        Array4::from_shape_vec(shape, tensor.into_vec())
            .expect("a tensor holds as many values as its shape says")
    }
}
