//! Attention and matrix products of ndarray's arrays (feature `ndarray`).
//!
//! ```
//! use ndarray::Array4;
//! use qkv::{AttentionSpec, Causal};
//!
//! // (batch, heads, length, head dim)
//! let q = Array4::from_shape_fn((1, 2, 5, 8), |(_, h, i, d)| (h + i * d) as f32 * 0.01);
//! let k = Array4::from_shape_fn((1, 2, 5, 8), |(_, h, i, d)| (h * i + d) as f32 * 0.02);
//! let v = Array4::from_shape_fn((1, 2, 5, 8), |(_, _, i, d)| (i * 8 + d) as f32);
//!
//! let spec = AttentionSpec::new().with_causal(Causal::TopLeft);
//! let out = qkv::ndarray::attention(q.view(), k.view(), v.view(), &spec)?;
//! assert_eq!(out.dim(), (1, 2, 5, 8));
//! # Ok::<(), qkv::AttentionError>(())
//! ```
//!
//! Arrays are read where they lie, with any strides on batch, heads and length; for (batch, length, heads, dim) pass
//! `array.view().permuted_axes([0, 2, 1, 3])`. These functions copy an array whose last axis is not contiguous; the conversions
//! that they are made of refuse it: `TensorRef::try_from(array.view())`, `TensorMut::try_from(array.view_mut())`, for masks
//! `Broadcast::try_from`, for biases `Bias::try_from`, for matrices `MatRef::from`. Every other function of the crate takes those.

use ::ndarray::{Array2, Array3, Array4, ArrayView2, ArrayView4, ArrayViewMut4, Axis, CowArray, Ix4};
use half::{bf16, f16};
pub use qkv_attention::ndarray::ViewError;
use qkv_attention::{
    AttentionError, AttentionSpec, Data, DataMut, Outputs, TensorMut, TensorRef, attention_into,
};
use qkv_gemm::{GemmError, GemmSpec, MatMut, MatRef, gemm};

mod sealed {
    pub trait Sealed {}
}

/// A type that queries, keys, values and outputs may have: f32, f16, bf16.
pub trait Element: sealed::Sealed + Copy + Default {
    /// The view, of this type.
    #[doc(hidden)]
    fn data(view: TensorRef<'_, Self>) -> Data<'_>;
    /// The same, to be written.
    #[doc(hidden)]
    fn data_mut(view: TensorMut<'_, Self>) -> DataMut<'_>;
}

macro_rules! elements {
    ($($t:ty),*) => {
        $(impl sealed::Sealed for $t {}
        impl Element for $t {
            fn data(view: TensorRef<'_, Self>) -> Data<'_> {
                view.into()
            }
            fn data_mut(view: TensorMut<'_, Self>) -> DataMut<'_> {
                view.into()
            }
        })*
    };
}
elements!(f32, f16, bf16);

/// The array, or a copy where its last axis is not contiguous.
fn with_contiguous_rows<T: Element>(array: ArrayView4<'_, T>) -> CowArray<'_, T, Ix4> {
    if array.len_of(Axis(3)) > 1 && array.stride_of(Axis(3)) != 1 {
        // Not `to_owned`, which keeps the order of the axes in memory.
        return array.as_standard_layout().into_owned().into();
    }
    array.into()
}

fn view<'a, T: Element>(array: &'a CowArray<'_, T, Ix4>) -> Result<Data<'a>, AttentionError> {
    TensorRef::try_from(array.view())
        .map(T::data)
        .map_err(|_| AttentionError::TooLarge { shape: array.dim().into() })
}

/// [`crate::attention`] of arrays, into a new one of the queries' type, (batch, query heads, query length, value dim).
///
/// # Errors
/// As [`crate::attention`].
pub fn attention<T: Element, K: Element>(
    q: ArrayView4<'_, T>,
    k: ArrayView4<'_, K>,
    v: ArrayView4<'_, K>,
    spec: &AttentionSpec<'_>,
) -> Result<Array4<T>, AttentionError> {
    let mut out = new_output(&q, &v)?;
    into(q, k, v, spec, out.view_mut(), None)?;
    Ok(out)
}

/// [`attention`] together with its log-sum-exp, (batch, query heads, query length).
///
/// # Errors
/// As [`attention`].
pub fn attention_with_lse<T: Element, K: Element>(
    q: ArrayView4<'_, T>,
    k: ArrayView4<'_, K>,
    v: ArrayView4<'_, K>,
    spec: &AttentionSpec<'_>,
) -> Result<(Array4<T>, Array3<f32>), AttentionError> {
    let mut out = new_output(&q, &v)?;
    let (batch, heads, length, _) = q.dim();
    let mut lse = filled([batch, heads, length, 1], 0.0f32)?;
    into(q, k, v, spec, out.view_mut(), lse.as_slice_mut())?;
    Ok((out, lse.remove_axis(Axis(3))))
}

/// [`attention`] into the caller's array, whose last axis must be contiguous.
///
/// # Errors
/// As [`attention`]; where the shape of `out` is not that of the result ([`AttentionError::ShapeMismatch`]), or its last axis
/// is not contiguous ([`AttentionError::NotTogether`]). Nothing is written then.
pub fn attention_into_array<T: Element, K: Element>(
    q: ArrayView4<'_, T>,
    k: ArrayView4<'_, K>,
    v: ArrayView4<'_, K>,
    spec: &AttentionSpec<'_>,
    out: ArrayViewMut4<'_, T>,
) -> Result<(), AttentionError> {
    into(q, k, v, spec, out, None)
}

fn into<T: Element, K: Element>(
    q: ArrayView4<'_, T>,
    k: ArrayView4<'_, K>,
    v: ArrayView4<'_, K>,
    spec: &AttentionSpec<'_>,
    out: ArrayViewMut4<'_, T>,
    lse: Option<&mut [f32]>,
) -> Result<(), AttentionError> {
    let (q, k, v) = (with_contiguous_rows(q), with_contiguous_rows(k), with_contiguous_rows(v));
    let out = TensorMut::try_from(out).map_err(|_| AttentionError::NotTogether {
        argument: "output",
        with: "a last axis that is not contiguous",
    })?;
    let mut outputs = Outputs::new(T::data_mut(out));
    outputs.lse = lse;
    attention_into(view(&q)?, view(&k)?, view(&v)?, spec, outputs)
}

/// An array for the result, or the refusal where there is no memory for it.
fn new_output<T: Element, K>(
    q: &ArrayView4<'_, T>,
    v: &ArrayView4<'_, K>,
) -> Result<Array4<T>, AttentionError> {
    let (batch, heads, length, _) = q.dim();
    filled([batch, heads, length, v.len_of(Axis(3))], T::default())
}

/// An array of this shape. Views that broadcast can ask for any number of results, so the memory is asked for in vain first:
/// what cannot be had is an error there and would be an abort below.
fn filled<T: Clone>(shape: [usize; 4], value: T) -> Result<Array4<T>, AttentionError> {
    let too_large = AttentionError::TooLarge { shape };
    let nonzero = shape.iter().filter(|&&size| size > 0);
    let fits = nonzero.copied().try_fold(1usize, |count, size| count.checked_mul(size));
    match fits {
        Some(most) if isize::try_from(most).is_ok() => {}
        _ => return Err(too_large),
    }
    let count: usize = shape.iter().product();
    match Vec::<T>::new().try_reserve_exact(count) {
        Ok(()) => Array4::from_shape_vec(shape, vec![value; count]).map_err(|_| too_large),
        Err(_) => Err(too_large),
    }
}

/// The matrix product of two arrays of f32, with any strides: (m, k) @ (k, n) gives (m, n).
///
/// # Errors
/// Where `b` has not as many rows as `a` has columns.
pub fn matmul(a: ArrayView2<'_, f32>, b: ArrayView2<'_, f32>) -> Result<Array2<f32>, GemmError> {
    let (rows, cols) = (a.nrows(), b.ncols());
    if rows.checked_mul(cols).is_none_or(|count| isize::try_from(count.saturating_mul(4)).is_err()) {
        return Err(GemmError::Overflow { argument: "c", rows, cols, row_stride: isize::MAX, col_stride: 1 });
    }
    let mut c = Array2::zeros((rows, cols));
    gemm(MatRef::from(a), MatRef::from(b), &mut MatMut::from(c.view_mut()), &GemmSpec::default())?;
    Ok(c)
}
