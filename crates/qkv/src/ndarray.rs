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
fn with_contiguous_rows<'a, T: Element>(
    array: ArrayView4<'a, T>,
    argument: &'static str,
) -> Result<CowArray<'a, T, Ix4>, AttentionError> {
    if array.len_of(Axis(3)) <= 1 || array.stride_of(Axis(3)) == 1 {
        return Ok(array.into());
    }
    let with = "a last axis that is not contiguous, where memory has no room for a copy";
    let too_large = AttentionError::NotTogether { argument, with };
    let shape = array.dim();
    let Some(mut values) = room(shape.into()) else { return Err(too_large) };
    array.iter().for_each(|&value| values.push(value));
    Array4::from_shape_vec(shape, values).map(CowArray::from).map_err(|_| too_large)
}

fn view<'a, T: Element>(array: &'a CowArray<'_, T, Ix4>) -> Result<Data<'a>, AttentionError> {
    TensorRef::try_from(array.view())
        .map(T::data)
        .map_err(|_| AttentionError::TooLarge { shape: array.dim().into() })
}

/// [`crate::attention`] of arrays, into a new one of the queries' type, (batch, query heads, query length, value dim).
///
/// # Errors
/// As [`crate::attention`], and where memory has no room for the copy of an input ([`AttentionError::NotTogether`]).
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
    let q = with_contiguous_rows(q, "query")?;
    let (k, v) = (with_contiguous_rows(k, "key")?, with_contiguous_rows(v, "value")?);
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

/// Memory for an array of this shape, if it is to be had. Views that broadcast can ask for any number of values, and memory
/// that is not asked for like this ends the process.
fn room<T>(shape: [usize; 4]) -> Option<Vec<T>> {
    // An array counts the axes of no elements as one.
    let nonzero = shape.iter().filter(|&&size| size > 0);
    let most = nonzero.copied().try_fold(1usize, |count, size| count.checked_mul(size))?;
    isize::try_from(most).ok()?;
    let mut values = Vec::new();
    values.try_reserve_exact(shape.iter().product()).ok()?;
    Some(values)
}

fn filled<T: Clone>(shape: [usize; 4], value: T) -> Result<Array4<T>, AttentionError> {
    let too_large = AttentionError::TooLarge { shape };
    // Not into this: zeros of a new vector cost nothing until they are touched.
    match room::<T>(shape) {
        Some(_) => {
            let values = vec![value; shape.iter().product()];
            Array4::from_shape_vec(shape, values).map_err(|_| too_large)
        }
        None => Err(too_large),
    }
}

/// The matrix product of two arrays of f32, with any strides: (m, k) @ (k, n) gives (m, n).
///
/// # Errors
/// Where `b` has not as many rows as `a` has columns, or the memory for the result cannot be had.
pub fn matmul(a: ArrayView2<'_, f32>, b: ArrayView2<'_, f32>) -> Result<Array2<f32>, GemmError> {
    let (rows, cols) = (a.nrows(), b.ncols());
    let too_large = || GemmError::Memory { argument: "c", given: (rows, cols) };
    let c = filled([1, 1, rows, cols], 0.0).map_err(|_| too_large())?;
    let mut c = c.into_shape_with_order((rows, cols)).map_err(|_| too_large())?;
    gemm(MatRef::from(a), MatRef::from(b), &mut MatMut::from(c.view_mut()), &GemmSpec::default())?;
    Ok(c)
}
