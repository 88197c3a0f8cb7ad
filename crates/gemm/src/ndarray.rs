//! ndarray's views as matrices, in place, with any strides (feature `ndarray`).

use ::ndarray::{ArrayView2, ArrayViewMut2};

use crate::{MatMut, MatRef};

impl<'a> From<ArrayView2<'a, f32>> for MatRef<'a> {
    fn from(array: ArrayView2<'a, f32>) -> Self {
        let ((rows, cols), strides) = (array.dim(), [array.strides()[0], array.strides()[1]]);
        // SAFETY: the view borrows every element for 'a.
        unsafe { MatRef::from_raw_parts(array.as_ptr(), rows, cols, strides[0], strides[1]) }
    }
}

impl<'a> From<ArrayViewMut2<'a, f32>> for MatMut<'a> {
    fn from(mut array: ArrayViewMut2<'a, f32>) -> Self {
        let ((rows, cols), strides) = (array.dim(), [array.strides()[0], array.strides()[1]]);
        // SAFETY: the view borrows every element alone for 'a, each with memory of its own, and is given up here.
        unsafe { MatMut::from_raw_parts(array.as_mut_ptr(), rows, cols, strides[0], strides[1]) }
    }
}
