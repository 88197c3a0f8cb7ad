//! DLPack: the C structures of version 1, and taking a tensor out of a capsule.
//!
//! Both kinds of capsule are read: `dltensor_versioned` (since 1.0, with flags) and the older `dltensor`. Taking the tensor
//! renames the capsule, as the protocol asks, so that nobody takes it again; [`Managed`] gives it back when it is dropped.

use core::ffi::{CStr, c_void};

use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyCapsuleMethods};

use crate::error::bad_value;

/// The only device whose memory can be read here.
pub(crate) const CPU: i32 = 1;

/// No library has more: a greater number is not one of axes.
const MOST_AXES: usize = 64;

/// Type codes.
const INT: u8 = 0;
const UINT: u8 = 1;
const FLOAT: u8 = 2;
const BFLOAT: u8 = 4;
const BOOL: u8 = 6;

const READ_ONLY: u64 = 1;
const IS_COPIED: u64 = 2;

const OLD: &CStr = c"dltensor";
const VERSIONED: &CStr = c"dltensor_versioned";
const OLD_USED: &CStr = c"used_dltensor";
const VERSIONED_USED: &CStr = c"used_dltensor_versioned";

/// `DLDataType`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct DataType {
    code: u8,
    bits: u8,
    lanes: u16,
}

/// `DLTensor`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct DlTensor {
    data: *mut c_void,
    device_type: i32,
    device_id: i32,
    ndim: i32,
    dtype: DataType,
    shape: *const i64,
    strides: *const i64,
    byte_offset: u64,
}

/// `DLManagedTensor`.
#[repr(C)]
struct OldManaged {
    tensor: DlTensor,
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut OldManaged)>,
}

/// `DLManagedTensorVersioned`.
#[repr(C)]
struct VersionedManaged {
    major: u32,
    minor: u32,
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut VersionedManaged)>,
    flags: u64,
    tensor: DlTensor,
}

/// A tensor that was taken out of its capsule, until it is dropped (with the GIL held: its deleter may need it).
#[derive(Debug)]
pub(crate) enum Managed {
    /// Of before version 1.
    Old(*mut c_void),
    /// Of version 1.
    Versioned(*mut c_void),
}

/// What a capsule's tensor says of itself, the numbers checked against each other as far as that is possible.
#[derive(Debug)]
pub(crate) struct Contents {
    /// Element (0, .., 0).
    pub(crate) data: *mut u8,
    /// Type code and bits.
    pub(crate) dtype: Option<crate::array::DType>,
    pub(crate) shape: Vec<usize>,
    /// In values.
    pub(crate) strides: Vec<isize>,
    /// Whether the tensor says of itself that it may be written: only a versioned one can.
    pub(crate) writable: bool,
}

impl Drop for Managed {
    fn drop(&mut self) {
        // SAFETY: the pointers come from capsules of these names, were taken once, and are given back once.
        unsafe {
            match *self {
                Managed::Old(managed) => {
                    let managed: *mut OldManaged = managed.cast();
                    if let Some(deleter) = (*managed).deleter {
                        deleter(managed);
                    }
                }
                Managed::Versioned(managed) => {
                    let managed: *mut VersionedManaged = managed.cast();
                    if let Some(deleter) = (*managed).deleter {
                        deleter(managed);
                    }
                }
            }
        }
    }
}

impl Managed {
    /// Takes the tensor out of what `__dlpack__` returned.
    pub(crate) fn take(name: &str, capsule: &Bound<'_, PyAny>) -> PyResult<Self> {
        let py = capsule.py();
        let Ok(capsule) = capsule.cast::<PyCapsule>() else {
            let given = capsule.get_type().name()?;
            return Err(bad_value(name, format!("__dlpack__() returned {given}"), "a capsule"));
        };
        for (fresh, used) in [(VERSIONED, VERSIONED_USED), (OLD, OLD_USED)] {
            if !capsule.is_valid_checked(Some(fresh)) {
                continue;
            }
            let managed = capsule.pointer_checked(Some(fresh))?.as_ptr();
            // SAFETY: the object is a capsule, and the name lives as long as the program.
            if unsafe { ffi::PyCapsule_SetName(capsule.as_ptr(), used.as_ptr()) } != 0 {
                return Err(PyErr::fetch(py));
            }
            return Ok(if fresh == VERSIONED { Managed::Versioned(managed) } else { Managed::Old(managed) });
        }
        let used = [OLD_USED, VERSIONED_USED].into_iter().any(|used| capsule.is_valid_checked(Some(used)));
        let given = if used { "a capsule that was consumed before" } else { "a capsule of something else" };
        Err(bad_value(name, format!("__dlpack__() returned {given}"), "a fresh capsule \"dltensor\""))
    }

    /// What the tensor says of itself.
    pub(crate) fn contents(&self, name: &str) -> PyResult<Contents> {
        // SAFETY: a managed tensor lies there until it is given back; of a version that is not 1 only the first fields are
        // read, which all versions share.
        let (tensor, flags) = unsafe {
            match *self {
                Managed::Old(managed) => ((*managed.cast::<OldManaged>()).tensor, None),
                Managed::Versioned(managed) => {
                    let managed: *const VersionedManaged = managed.cast();
                    let (major, minor) = ((*managed).major, (*managed).minor);
                    if major != 1 {
                        let given = format!("a DLPack tensor of version {major}.{minor}");
                        return Err(bad_value(name, given, "version 1"));
                    }
                    ((*managed).tensor, Some((*managed).flags))
                }
            }
        };
        if tensor.device_type != CPU {
            let given = format!("a tensor on DLPack device {}:{}", tensor.device_type, tensor.device_id);
            return Err(bad_value(name, given, "one on the CPU"));
        }
        let broken = |what: &str| bad_value(name, format!("a DLPack tensor with {what}"), "a valid one");
        let rank = usize::try_from(tensor.ndim).map_err(|_| broken("a negative number of axes"))?;
        if rank > MOST_AXES {
            return Err(broken(&format!("{rank} axes")));
        }
        if rank > 0 && tensor.shape.is_null() {
            return Err(broken("no shape"));
        }
        let mut shape = Vec::with_capacity(rank);
        for axis in 0..rank {
            // SAFETY: the tensor says that it has `ndim` sizes.
            let size = unsafe { *tensor.shape.add(axis) };
            shape.push(usize::try_from(size).map_err(|_| broken("a negative size"))?);
        }
        let strides = if tensor.strides.is_null() {
            contiguous(&shape).ok_or_else(|| broken("a size beyond the address space"))?
        } else {
            // SAFETY: the tensor says that it has `ndim` strides.
            (0..rank).map(|axis| unsafe { *tensor.strides.add(axis) } as isize).collect()
        };
        let empty = shape.contains(&0);
        if tensor.data.is_null() && !empty {
            return Err(broken("no data"));
        }
        let offset = usize::try_from(tensor.byte_offset).map_err(|_| broken("an offset out of range"))?;
        Ok(Contents {
            data: tensor.data.cast::<u8>().wrapping_add(offset),
            dtype: tensor.dtype.known(),
            shape,
            strides,
            writable: flags.is_some_and(|flags| flags & (READ_ONLY | IS_COPIED) == 0),
        })
    }
}

impl DataType {
    /// The type, where there is one for it here.
    fn known(self) -> Option<crate::array::DType> {
        use crate::array::DType;
        match (self.code, self.bits, self.lanes) {
            (FLOAT, 32, 1) => Some(DType::F32),
            (FLOAT, 16, 1) => Some(DType::F16),
            (FLOAT, 64, 1) => Some(DType::F64),
            (BFLOAT, 16, 1) => Some(DType::Bf16),
            (BOOL, 8, 1) => Some(DType::Bool),
            (INT, 32, 1) => Some(DType::I32),
            (INT, 64, 1) => Some(DType::I64),
            (INT, 8, 1) => Some(DType::I8),
            (UINT, 8, 1) => Some(DType::U8),
            _ => None,
        }
    }
}

/// Row-major strides; None where they do not fit.
pub(crate) fn contiguous(shape: &[usize]) -> Option<Vec<isize>> {
    let mut strides = vec![0; shape.len()];
    let mut step = 1isize;
    for (stride, &size) in strides.iter_mut().zip(shape).rev() {
        *stride = step;
        // A size of 0 makes all of it empty; its strides do not matter then.
        step = step.checked_mul(isize::try_from(size.max(1)).ok()?)?;
    }
    Some(strides)
}
