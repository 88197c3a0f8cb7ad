//! Arrays: from Python objects to checked memory.
//!
//! [`Array::input`] and [`Array::output`] take any object: a numpy array, a torch tensor, or anything on the CPU that has
//! `__dlpack__`. From then on it is a pointer, sizes and strides in values that were checked: nothing overflows, the memory is
//! aligned, and it stays there as long as the `Array` does, also where a tensor is given other memory meanwhile. What the
//! caller's other threads write to it is the caller's business, as it is with numpy: results may then be of anything, but
//! nothing outside the memory is touched. Memory that another thread takes from under its owner (`storage.resize_(0)` of
//! torch, `ndarray.resize(refcheck=False)`) is out of reach, as it is for the libraries' own functions.
//!
//! Nothing is copied unless it must be: only values that are not aligned here, and rows in `views.rs`.

use core::any::Any;

use numpy::PyUntypedArray;
use pyo3::intern;
use pyo3::prelude::*;

use crate::copy::{Source, gather};
use crate::dlpack::{self, Managed};
use crate::error::{bad_type, bad_value};
use crate::{numpy_array, torch_tensor};

/// The types of values that are known here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DType {
    F32,
    F16,
    Bf16,
    F64,
    Bool,
    I8,
    U8,
    I32,
    I64,
}

impl DType {
    /// The types that are computed with.
    pub(crate) const FLOATS: [DType; 3] = [DType::F32, DType::Bf16, DType::F16];

    /// Bytes of a value.
    pub(crate) fn size(self) -> usize {
        match self {
            DType::Bool | DType::I8 | DType::U8 => 1,
            DType::F16 | DType::Bf16 => 2,
            DType::F32 | DType::I32 => 4,
            DType::F64 | DType::I64 => 8,
        }
    }

    /// As numpy and torch call it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            DType::F32 => "float32",
            DType::F16 => "float16",
            DType::Bf16 => "bfloat16",
            DType::F64 => "float64",
            DType::Bool => "bool",
            DType::I8 => "int8",
            DType::U8 => "uint8",
            DType::I32 => "int32",
            DType::I64 => "int64",
        }
    }
}

/// Whose array it is, which says what results are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Library {
    Numpy,
    Torch,
    /// Another one that has `__dlpack__`; results are numpy's.
    Other,
}

/// What an object says of its memory, not checked yet.
#[derive(Debug)]
pub(crate) struct Raw {
    pub(crate) data: *mut u8,
    /// None: a type that is not known here.
    pub(crate) dtype: Option<DType>,
    pub(crate) shape: Vec<usize>,
    pub(crate) byte_strides: Vec<isize>,
    pub(crate) writable: bool,
    /// What keeps the memory, beside the object.
    pub(crate) managed: Option<Managed>,
    /// The memory of a tensor, which the tensor itself may exchange for another.
    pub(crate) storage: Option<Py<PyAny>>,
}

impl Raw {
    /// That of a DLPack tensor.
    pub(crate) fn from_managed(name: &str, managed: Managed) -> PyResult<Self> {
        let dlpack::Contents { data, dtype, shape, strides, writable } = managed.contents(name)?;
        let size = dtype.map_or(1, DType::size) as isize;
        let in_bytes = |stride: isize| stride.checked_mul(size).ok_or_else(|| too_large(name, &shape));
        let byte_strides = strides.into_iter().map(in_bytes).collect::<PyResult<_>>()?;
        Ok(Self { data, dtype, shape, byte_strides, writable, managed: Some(managed), storage: None })
    }
}

/// Checked memory of a Python object.
#[derive(Debug)]
pub(crate) struct Array<'py> {
    pub(crate) name: &'static str,
    pub(crate) object: Bound<'py, PyAny>,
    pub(crate) library: Library,
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<usize>,
    /// In values. Sizes and strides together never leave the address space.
    pub(crate) strides: Vec<isize>,
    /// Element (0, .., 0). The unsafe blocks of `views.rs` rest on it: it is set here and there only.
    pub(crate) data: *mut u8,
    /// A DLPack tensor that keeps the memory, beside the object.
    _managed: Option<Managed>,
    /// What it keeps is this tensor's memory at the time of the call.
    _storage: Option<Py<PyAny>>,
    /// The memory itself, where it is a copy.
    pub(crate) copied: Option<Box<dyn Any>>,
}

impl<'py> Array<'py> {
    /// An array that is read; `name` is the argument that it is.
    pub(crate) fn input(name: &'static str, object: &Bound<'py, PyAny>) -> PyResult<Self> {
        Self::read(name, object, false)
    }

    /// One that may be left out.
    pub(crate) fn optional(name: &'static str, object: Option<&Bound<'py, PyAny>>) -> PyResult<Option<Self>> {
        object.map(|object| Self::input(name, object)).transpose()
    }

    /// An array that is written: it must be writable, its last axis contiguous and its elements apart from each other.
    pub(crate) fn output(name: &'static str, object: &Bound<'py, PyAny>) -> PyResult<Self> {
        let array = Self::read(name, object, true)?;
        if !array.has_contiguous_rows() {
            let given = format!("a last axis of stride {}", array.strides.last().copied().unwrap_or(1));
            return Err(bad_value(name, given, "a contiguous one (stride 1)"));
        }
        if !array.is_disjoint() {
            let given =
                format!("shape {:?} with strides {:?}, which overlaps itself", array.shape, array.strides);
            return Err(bad_value(name, given, "memory of its own for each element"));
        }
        Ok(array)
    }

    /// A new array of the library of `like`, its values not set. Of f32, f16 or bf16.
    pub(crate) fn new(name: &'static str, like: &Self, dtype: DType, shape: &[usize]) -> PyResult<Self> {
        let py = like.object.py();
        if elements(shape).is_none_or(|count| isize::try_from(count.saturating_mul(dtype.size())).is_err()) {
            return Err(too_large(name, shape));
        }
        let (Library::Torch, Some(torch)) = (like.library, torch_tensor::loaded(py)?) else {
            return Self::output(name, &numpy_array::empty(py, name, dtype, shape)?.into_any());
        };
        let object = torch.new_tensor(py, name, dtype, shape)?;
        match (torch.address(&object)?, dlpack::contiguous(shape)) {
            // An ordinary new tensor: what it is is known.
            (Some(address), Some(strides)) => Ok(Self {
                name,
                object,
                library: Library::Torch,
                dtype,
                shape: shape.to_vec(),
                strides,
                data: core::ptr::with_exposed_provenance_mut(address),
                _managed: None,
                _storage: None,
                copied: None,
            }),
            _ => Self::output(name, &object),
        }
    }

    /// The array that the caller gave for a result, or a new one. Its type must be `dtype`.
    pub(crate) fn given_or_new(
        name: &'static str,
        given: Option<&Bound<'py, PyAny>>,
        like: &Self,
        dtype: DType,
        shape: &[usize],
    ) -> PyResult<Self> {
        let Some(object) = given else { return Self::new(name, like, dtype, shape) };
        let array = Self::output(name, object)?;
        array.expect_dtype(&[dtype])?;
        array.expect_shape(shape)?;
        Ok(array)
    }

    fn read(name: &'static str, object: &Bound<'py, PyAny>, written: bool) -> PyResult<Self> {
        let (raw, library) = raw(name, object, written)?;
        let Some(dtype) = raw.dtype else {
            let given = object.getattr(intern!(object.py(), "dtype"));
            let given = given.and_then(|dtype| Ok(dtype.str()?.to_string()));
            let given = format!("an array of {}", given.unwrap_or_else(|_| "an unknown type".to_owned()));
            return Err(bad_type(
                name,
                given,
                "float32, bfloat16, float16 (masks bool, lengths int32 or int64)",
            ));
        };
        if written && !raw.writable {
            let given = "an array that is read-only, or whose library does not say that it can be written";
            return Err(bad_value(name, given, "a writable one"));
        }
        let size = dtype.size();
        if !is_addressable(&raw.shape, &raw.byte_strides, size) {
            return Err(too_large(name, &raw.shape));
        }
        let empty = raw.shape.contains(&0);
        let is_aligned = |x: isize| x % size as isize == 0;
        let aligned =
            empty || raw.data.align_offset(size) == 0 && raw.byte_strides.iter().copied().all(is_aligned);
        let mut array = Self {
            name,
            object: object.clone(),
            library,
            dtype,
            // Where there is nothing, nothing is read through it, and strides may be anything.
            data: if empty { core::ptr::without_provenance_mut(size) } else { raw.data },
            strides: raw
                .byte_strides
                .iter()
                .map(|stride| if empty { 1 } else { stride / size as isize })
                .collect(),
            shape: raw.shape,
            _managed: raw.managed,
            _storage: raw.storage,
            copied: None,
        };
        if !aligned {
            if written {
                return Err(bad_value(name, "values that are not aligned", "an array whose values are"));
            }
            array.copy_from(&raw.byte_strides)?;
        }
        Ok(array)
    }

    /// Puts a copy in the place of the memory, which has these strides in bytes: row-major but for axes of stride 0.
    pub(crate) fn copy_from(&mut self, byte_strides: &[isize]) -> PyResult<()> {
        let source = Source { data: self.data, shape: &self.shape, byte_strides };
        // SAFETY: every element lies in the memory of the object, and is read unaligned; an integer has no invalid bits.
        let (copied, data, strides): (Box<dyn Any>, *mut u8, _) = unsafe {
            match self.dtype.size() {
                1 => own(gather(&source, true, |p| p.read())?),
                2 => own(gather(&source, true, |p| p.cast::<u16>().read_unaligned())?),
                4 => own(gather(&source, true, |p| p.cast::<u32>().read_unaligned())?),
                _ => own(gather(&source, true, |p| p.cast::<u64>().read_unaligned())?),
            }
        };
        (self.copied, self.data, self.strides) = (Some(copied), data, strides);
        Ok(())
    }

    /// The number of axes.
    pub(crate) fn rank(&self) -> usize {
        self.shape.len()
    }

    /// Whether the last axis has stride 1 (or nothing to step over).
    pub(crate) fn has_contiguous_rows(&self) -> bool {
        match (self.shape.last(), self.strides.last()) {
            (Some(&size), Some(&stride)) => size <= 1 || stride == 1 || self.shape.contains(&0),
            _ => true,
        }
    }

    /// Whether no two elements share memory: sorted by stride, each axis steps over all that the smaller ones reach, as in
    /// every slice or permutation of a contiguous array.
    fn is_disjoint(&self) -> bool {
        if self.shape.contains(&0) {
            return true;
        }
        let axes = self.shape.iter().zip(&self.strides).filter(|&(&size, _)| size > 1);
        let mut axes: Vec<(usize, usize)> =
            axes.map(|(&size, stride)| (stride.unsigned_abs(), size)).collect();
        axes.sort_unstable();
        let mut reach = 1;
        axes.into_iter().all(|(stride, size)| {
            let apart = stride >= reach;
            // No overflow: the array lies in the address space.
            reach += stride * (size - 1);
            apart
        })
    }

    /// Refuses all types but these.
    pub(crate) fn expect_dtype(&self, expected: &[DType]) -> PyResult<()> {
        if expected.contains(&self.dtype) {
            return Ok(());
        }
        let mut names: Vec<&str> = expected.iter().map(|dtype| dtype.name()).collect();
        // "q's type or float32" may be one type.
        names.dedup();
        let names = match names.split_last() {
            Some((last, others)) if !others.is_empty() => format!("{} or {last}", others.join(", ")),
            _ => names.concat(),
        };
        Err(bad_type(self.name, format!("an array of {}", self.dtype.name()), names))
    }

    /// Refuses another number of axes; `axes` says what they are.
    pub(crate) fn expect_rank(&self, rank: usize, axes: &str) -> PyResult<()> {
        if self.rank() == rank {
            return Ok(());
        }
        Err(bad_value(self.name, format!("shape {:?}", self.shape), format!("{rank} axes {axes}")))
    }

    /// Refuses another shape.
    pub(crate) fn expect_shape(&self, expected: &[usize]) -> PyResult<()> {
        if self.shape == expected {
            return Ok(());
        }
        Err(bad_value(self.name, format!("shape {:?}", self.shape), format!("{expected:?}")))
    }

    /// The object, for the caller; autograd is told that a tensor was written.
    pub(crate) fn into_result(self, was_given: bool) -> PyResult<Bound<'py, PyAny>> {
        if was_given
            && self.library == Library::Torch
            && let Some(torch) = torch_tensor::loaded(self.object.py())?
        {
            torch.was_written(&self.object)?;
        }
        Ok(self.object)
    }
}

/// Takes over a copy.
pub(crate) fn own<T: 'static>(
    (mut values, strides): (Vec<T>, Vec<isize>),
) -> (Box<dyn Any>, *mut u8, Vec<isize>) {
    let data = values.as_mut_ptr().cast();
    (Box::new(values), data, strides)
}

/// What an object says of its memory.
fn raw(name: &'static str, object: &Bound<'_, PyAny>, written: bool) -> PyResult<(Raw, Library)> {
    let py = object.py();
    if let Ok(array) = object.cast::<PyUntypedArray>() {
        return Ok((numpy_array::read(name, array)?, Library::Numpy));
    }
    if let Some(torch) = torch_tensor::loaded(py)?
        && torch.is_tensor(object)
    {
        return Ok((torch.read(name, object, written)?, Library::Torch));
    }
    let export = intern!(py, "__dlpack__");
    let failed = |error| torch_tensor::not_exported(py, name, error);
    // Classes have the method too, without an array.
    if object.is_instance_of::<pyo3::types::PyType>() || !object.hasattr(export).map_err(failed)? {
        let given = object.get_type().name()?.to_string();
        return Err(bad_type(
            name,
            given,
            "an array (numpy, torch, or another one on the CPU that has __dlpack__)",
        ));
    }
    let device = intern!(py, "__dlpack_device__");
    if object.hasattr(device).map_err(failed)? {
        let (kind, index): (i64, i64) =
            object.call_method0(device).and_then(|device| device.extract()).map_err(failed)?;
        if kind != i64::from(dlpack::CPU) {
            return Err(bad_value(
                name,
                format!("an array on DLPack device {kind}:{index}"),
                "one on the CPU",
            ));
        }
    }
    let options = pyo3::types::PyDict::new(py);
    options.set_item(intern!(py, "max_version"), (1, 0))?;
    let capsule = match object.call_method(export, (), Some(&options)) {
        // Libraries of before version 1 do not know the argument.
        Err(error) if error.is_instance_of::<pyo3::exceptions::PyTypeError>(py) => {
            object.call_method0(export)
        }
        other => other,
    };
    let managed = Managed::take(name, &capsule.map_err(failed)?)?;
    Ok((Raw::from_managed(name, managed)?, Library::Other))
}

/// The number of elements, where it can be counted.
pub(crate) fn elements(shape: &[usize]) -> Option<usize> {
    if shape.contains(&0) {
        return Some(0);
    }
    shape.iter().try_fold(1usize, |count, &size| count.checked_mul(size))
}

/// Whether all elements lie in an address space, and can be counted.
fn is_addressable(shape: &[usize], byte_strides: &[isize], size: usize) -> bool {
    let reach = || -> Option<isize> {
        let mut reach = size as isize;
        for (&size, stride) in shape.iter().zip(byte_strides) {
            let steps = isize::try_from(size.saturating_sub(1)).ok()?;
            reach = reach.checked_add(steps.checked_mul(stride.checked_abs()?)?)?;
        }
        isize::try_from(elements(shape)?).ok()
    };
    shape.contains(&0) && shape.iter().all(|&size| isize::try_from(size).is_ok()) || reach().is_some()
}

fn too_large(name: &str, shape: &[usize]) -> PyErr {
    bad_value(name, format!("shape {shape:?}, which is larger than the address space"), "a smaller one")
}
