//! numpy arrays: reading what one is, and making new ones.
//!
//! bfloat16 is not one of numpy's own types: it is the scalar type `bfloat16` of the package ml_dtypes, with a number that
//! is given out when that is imported. It is recognised by its name and module once and by its number from then on.

use core::sync::atomic::{AtomicI32, Ordering};

use numpy::npyffi::{NPY_ARRAY_WRITEABLE, NPY_TYPES, PY_ARRAY_API, PyArray_CheckExact, npy_intp};
use numpy::{PyArrayDescr, PyArrayDescrMethods, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::exceptions::PyImportError;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::{ffi, intern};

use crate::array::{DType, Raw};
use crate::error::{bad_type, bad_value};

/// The type number of ml_dtypes' bfloat16, once one was seen.
static BFLOAT16: AtomicI32 = AtomicI32::new(-1);

/// What an array is.
pub(crate) fn read(name: &str, array: &Bound<'_, PyUntypedArray>) -> PyResult<Raw> {
    let py = array.py();
    // SAFETY: it is an array.
    let exact = unsafe { PyArray_CheckExact(py, array.as_ptr()) } != 0;
    if !exact && array.hasattr(intern!(py, "mask"))? {
        return Err(bad_type(name, "a masked array", "an array without a mask of its own"));
    }
    let pointer = array.as_array_ptr();
    // SAFETY: the fields of an array are its public interface; the GIL is held, so they do not change here.
    let (data, flags) = unsafe { ((*pointer).fields.data, (*pointer).fields.flags) };
    Ok(Raw {
        data: data.cast(),
        dtype: dtype(&array.dtype())?,
        shape: array.shape().to_vec(),
        byte_strides: array.strides().to_vec(),
        writable: flags & NPY_ARRAY_WRITEABLE != 0,
        managed: None,
        storage: None,
    })
}

/// The type of an array's values, where there is one for it here. Values with swapped bytes have none.
fn dtype(descr: &Bound<'_, PyArrayDescr>) -> PyResult<Option<DType>> {
    const FLOAT: i32 = NPY_TYPES::NPY_FLOAT as i32;
    const DOUBLE: i32 = NPY_TYPES::NPY_DOUBLE as i32;
    const HALF: i32 = NPY_TYPES::NPY_HALF as i32;
    const BOOL: i32 = NPY_TYPES::NPY_BOOL as i32;
    const BYTE: i32 = NPY_TYPES::NPY_BYTE as i32;
    const UBYTE: i32 = NPY_TYPES::NPY_UBYTE as i32;
    if !matches!(descr.byteorder(), b'=' | b'|') {
        return Ok(None);
    }
    let number = descr.num();
    Ok(match number {
        FLOAT => Some(DType::F32),
        HALF => Some(DType::F16),
        DOUBLE => Some(DType::F64),
        BOOL => Some(DType::Bool),
        BYTE => Some(DType::I8),
        UBYTE => Some(DType::U8),
        // int, long and long long: which of them is which depends on the platform.
        _ if descr.kind() == b'i' && descr.itemsize() == 4 => Some(DType::I32),
        _ if descr.kind() == b'i' && descr.itemsize() == 8 => Some(DType::I64),
        _ if number == BFLOAT16.load(Ordering::Relaxed) => Some(DType::Bf16),
        _ if is_bfloat16(descr)? => {
            BFLOAT16.store(number, Ordering::Relaxed);
            Some(DType::Bf16)
        }
        _ => None,
    })
}

fn is_bfloat16(descr: &Bound<'_, PyArrayDescr>) -> PyResult<bool> {
    if descr.itemsize() != 2 {
        return Ok(false);
    }
    let scalar = descr.typeobj();
    Ok(scalar.name()? == "bfloat16" && scalar.module()? == "ml_dtypes")
}

/// The description of a type.
fn descr(py: Python<'_>, dtype: DType) -> PyResult<Bound<'_, PyArrayDescr>> {
    static CACHE: PyOnceLock<Py<PyArrayDescr>> = PyOnceLock::new();
    let number = match dtype {
        DType::F32 => NPY_TYPES::NPY_FLOAT,
        DType::F16 => NPY_TYPES::NPY_HALF,
        DType::F64 => NPY_TYPES::NPY_DOUBLE,
        DType::Bool => NPY_TYPES::NPY_BOOL,
        DType::I8 => NPY_TYPES::NPY_BYTE,
        DType::U8 => NPY_TYPES::NPY_UBYTE,
        DType::I32 => NPY_TYPES::NPY_INT,
        DType::I64 => NPY_TYPES::NPY_LONGLONG,
        DType::Bf16 => {
            let cached = CACHE.get_or_try_init(py, || -> PyResult<_> {
                let package = py.import("ml_dtypes").map_err(|cause| {
                    let error = PyImportError::new_err(
                        "a bfloat16 array of numpy as the result needs the package ml_dtypes, which cannot be imported",
                    );
                    error.set_cause(py, Some(cause));
                    error
                })?;
                Ok(PyArrayDescr::new(py, package.getattr("bfloat16")?)?.unbind())
            })?;
            return Ok(cached.bind(py).clone());
        }
    };
    // SAFETY: numpy returns a new reference, or NULL with an exception.
    unsafe {
        let descr = PY_ARRAY_API.PyArray_DescrFromType(py, number as _);
        Ok(Bound::from_owned_ptr_or_err(py, descr.cast())?.cast_into_unchecked())
    }
}

/// A new row-major array, its values not set.
pub(crate) fn empty<'py>(
    py: Python<'py>,
    name: &str,
    dtype: DType,
    shape: &[usize],
) -> PyResult<Bound<'py, PyUntypedArray>> {
    let descr = descr(py, dtype)?;
    let mut dims: Vec<npy_intp> = Vec::with_capacity(shape.len());
    for &size in shape {
        let too_large = || bad_value(name, format!("shape {shape:?}"), "one that fits the address space");
        dims.push(npy_intp::try_from(size).map_err(|_| too_large())?);
    }
    let rank = i32::try_from(dims.len()).map_err(|_| bad_value(name, "too many axes", "fewer"))?;
    // SAFETY: the sizes are `rank` many; the description's reference is handed over.
    unsafe {
        let array = PY_ARRAY_API.PyArray_Empty(py, rank, dims.as_mut_ptr(), descr.into_ptr().cast(), 0);
        Ok(Bound::from_owned_ptr_or_err(py, array)?.cast_into_unchecked())
    }
}

/// An array over memory that belongs to somebody else, of values of `size` bytes, for numpy's own functions to look at.
///
/// # Safety
/// The memory must outlive the array.
pub(crate) unsafe fn over<'py>(
    py: Python<'py>,
    data: *mut u8,
    size: usize,
    shape: &[usize],
    byte_strides: &[isize],
) -> PyResult<Bound<'py, PyAny>> {
    let number = match size {
        1 => NPY_TYPES::NPY_UBYTE,
        2 => NPY_TYPES::NPY_USHORT,
        4 => NPY_TYPES::NPY_UINT,
        _ => NPY_TYPES::NPY_ULONGLONG,
    };
    let mut dims: Vec<npy_intp> = shape.iter().map(|&size| size as npy_intp).collect();
    let mut strides: Vec<npy_intp> = byte_strides.to_vec();
    // SAFETY: numpy copies sizes and strides, which are equally many, and returns a new reference or NULL.
    unsafe {
        let descr = PY_ARRAY_API.PyArray_DescrFromType(py, number as _);
        let array = PY_ARRAY_API.PyArray_NewFromDescr(
            py,
            numpy::npyffi::get_type_object(py, numpy::npyffi::NpyTypes::PyArray_Type),
            descr,
            dims.len() as i32,
            dims.as_mut_ptr(),
            strides.as_mut_ptr(),
            data.cast(),
            0,
            core::ptr::null_mut::<ffi::PyObject>(),
        );
        Bound::from_owned_ptr_or_err(py, array)
    }
}
