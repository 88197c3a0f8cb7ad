//! `qkv.matmul`: matrix products in f32 with bias and activation.

use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use qkv::gemm::{
    Activation, BatchAxes, BatchMut, BatchRef, GemmSpec, MAX_BATCH_AXES, MatMut, MatRef, gemm_batched,
};

use crate::array::{Array, DType};
use crate::error::{bad_value, gemm_error, not_supported};
use crate::{options, pool};

/// The matrix product `activation(a @ b + bias)`.
///
/// a is (..., m, k), b (k, n) or (..., k, n); the axes in front broadcast as numpy's do. float32, bfloat16 or float16, any strides:
/// float32 is read in place, 16-bit operands are widened to float32 copies, all sums are in float32 and rounded once.
///
/// bias
///     (n,), of a's type or float32.
/// activation
///     "gelu" (with erf), "gelu_tanh", "relu" or "silu".
/// out
///     An array for the result (..., m, n), of a's type; any strides but the last axis contiguous.
///
/// Returns (..., m, n) of a's type: a torch tensor where a is one, else a numpy array.
///
/// >>> import numpy as np, qkv
/// >>> a = np.array([[1, 2], [3, 4]], np.float32)
/// >>> qkv.matmul(a, a, bias=np.array([-8, 0], np.float32), activation="relu").tolist()
/// [[0.0, 10.0], [7.0, 22.0]]
#[pyfunction]
#[pyo3(signature = (a, b, *, bias=None, activation=None, out=None))]
pub(crate) fn matmul<'py>(
    py: Python<'py>,
    a: &Bound<'py, PyAny>,
    b: &Bound<'py, PyAny>,
    bias: Option<&Bound<'py, PyAny>>,
    activation: Option<&Bound<'py, PyAny>>,
    out: Option<&Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyAny>> {
    let operand = |name, object| -> PyResult<Array<'py>> {
        let array = Array::input(name, object)?;
        array.expect_dtype(&DType::FLOATS)?;
        match array.rank() {
            0 | 1 => Err(bad_value(
                name,
                format!("shape {:?}", array.shape),
                "at least 2 axes (..., rows, columns)",
            )),
            rank if rank > MAX_BATCH_AXES + 2 => Err(not_supported(
                name,
                format!("an array of {rank} axes (at most {} are)", MAX_BATCH_AXES + 2),
            )),
            _ => Ok(array),
        }
    };
    let (a, b) = (operand("a", a)?, operand("b", b)?);
    let (a_rank, b_rank) = (a.rank(), b.rank());
    let [m, k] = [a.shape[a_rank - 2], a.shape[a_rank - 1]];
    let n = b.shape[b_rank - 1];
    if b.shape[b_rank - 2] != k {
        let given = format!("shape {:?}", b.shape);
        return Err(bad_value("b", given, format!("{k} rows, as many as a has columns ({:?})", a.shape)));
    }
    let mut shape = broadcast_batches(&a, &b)?;
    shape.extend([m, n]);

    let bias = Array::optional("bias", bias)?;
    if let Some(bias) = &bias {
        bias.expect_dtype(&[DType::F32, a.dtype])?;
        bias.expect_shape(&[n])?;
    }
    let activation = activation.map(|name| {
        const EXPECTED: &str = "None, \"gelu\", \"gelu_tanh\", \"relu\" or \"silu\"";
        let text: PyBackedStr = options::plain("activation", name, EXPECTED)?;
        let activation = text.parse::<Activation>();
        activation.map_err(|_| bad_value("activation", options::shown(name), EXPECTED))
    });
    let activation = activation.transpose()?;
    let mut result = Array::given_or_new("out", out, &a, a.dtype, &shape)?;
    if out.is_some() {
        result.expect_apart_from([&a, &b].into_iter().chain(&bias))?;
    }

    // 16 bits go through copies in f32, the result as well.
    let (a, b) = (a.widened()?, b.widened()?);
    let bias = bias.map(|bias| bias.widened()?.to_floats()).transpose()?;
    let spec = GemmSpec { bias: bias.as_deref(), activation, ..GemmSpec::default() };
    let count = crate::array::elements(&shape).unwrap_or(usize::MAX);
    let flops = 16.0 * count as f64 * k as f64;
    let (a, b) = (batch_ref(&a)?, batch_ref(&b)?);
    if result.dtype == DType::F32 {
        // SAFETY: a checked output, which is there until the end of the function.
        let mut c = unsafe { batch_mut(&result.shape, &result.strides, result.data.cast()) }?;
        pool::run(py, flops, || gemm_batched(a, b, &mut c, &spec))?.map_err(|error| gemm_error(&error))?;
    } else {
        let mut wide = result.scratch()?;
        let strides = crate::dlpack::contiguous(&shape).unwrap_or_default();
        // SAFETY: a contiguous buffer of this shape.
        let mut c = unsafe { batch_mut(&shape, &strides, wide.as_mut_ptr()) }?;
        pool::run(py, flops, || gemm_batched(a, b, &mut c, &spec))?.map_err(|error| gemm_error(&error))?;
        result.round_from(&wide);
    }
    result.into_result(out.is_some())
}

/// The axes in front of both matrices' own, broadcast.
fn broadcast_batches(a: &Array<'_>, b: &Array<'_>) -> PyResult<Vec<usize>> {
    let (a_batch, b_batch) = (&a.shape[..a.rank() - 2], &b.shape[..b.rank() - 2]);
    let rank = a_batch.len().max(b_batch.len());
    let at = |shape: &[usize], axis: usize| match (axis + shape.len()).checked_sub(rank) {
        Some(axis) => shape[axis],
        None => 1,
    };
    (0..rank)
        .map(|axis| match (at(a_batch, axis), at(b_batch, axis)) {
            (x, y) if x == y || y == 1 => Ok(x),
            (1, y) => Ok(y),
            _ => {
                let given = format!("shape {:?}", b.shape);
                Err(bad_value("b", given, format!("axes that broadcast with those of a ({:?})", a.shape)))
            }
        })
        .collect()
}

/// An f32 array as a batch of matrices.
fn batch_ref<'a>(array: &'a Array<'_>) -> PyResult<BatchRef<'a>> {
    let rank = array.rank();
    let (shape, strides) = (&array.shape, &array.strides);
    let batch =
        BatchAxes::new(&shape[..rank - 2], &strides[..rank - 2]).map_err(|error| gemm_error(&error))?;
    array.expect_dtype(&[DType::F32])?;
    // SAFETY: every element lies in the memory of the array, which is there as long as it is; any bits are a float.
    Ok(unsafe {
        let first = MatRef::from_raw_parts(
            array.data.cast_const().cast(),
            shape[rank - 2],
            shape[rank - 1],
            strides[rank - 2],
            strides[rank - 1],
        );
        BatchRef::from_raw_parts(first, batch)
    })
}

/// Memory as a batch of matrices that is written.
///
/// # Safety
/// It must be that of a checked output, or of a contiguous buffer of that shape, and be there for `'a`.
unsafe fn batch_mut<'a>(shape: &[usize], strides: &[isize], data: *mut f32) -> PyResult<BatchMut<'a>> {
    let rank = shape.len();
    let batch =
        BatchAxes::new(&shape[..rank - 2], &strides[..rank - 2]).map_err(|error| gemm_error(&error))?;
    // SAFETY: every element lies in the output or buffer, with memory of its own.
    Ok(unsafe {
        let first = MatMut::from_raw_parts(
            data,
            shape[rank - 2],
            shape[rank - 1],
            strides[rank - 2],
            strides[rank - 1],
        );
        BatchMut::from_raw_parts(first, batch)
    })
}
