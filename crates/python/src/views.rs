//! From [`Array`]s to the views of the Rust API, without a copy: axes exchanged, added or broadcast by strides alone.
//!
//! Copies are made where a view cannot be: of rows that are not contiguous, and of 16-bit values where the Rust API wants
//! f32.

use core::ops::Range;

use half::{bf16, f16};
use pyo3::exceptions::PyMemoryError;
use pyo3::intern;
use pyo3::prelude::*;
use qkv::{Bias, Broadcast, Data, DataMut, HalfKind, TensorError, TensorMut, TensorRef};

use crate::array::{Array, DType, own};
use crate::copy::{Source, gather};
use crate::error::{bad_value, tensor_error};
use crate::numpy_array;

/// Four axes of an array: (batch, heads, length, dim), or keys in the place of the dims.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Part {
    /// Where element (0, 0, 0, 0) lies, counted in values from the array's.
    pub(crate) offset: isize,
    pub(crate) shape: [usize; 4],
    pub(crate) strides: [isize; 4],
}

impl<'py> Array<'py> {
    /// With two axes exchanged.
    pub(crate) fn swapped(mut self, a: usize, b: usize) -> Self {
        self.shape.swap(a, b);
        self.strides.swap(a, b);
        self
    }

    /// With axes of size 1 in front, so that there are `rank`.
    pub(crate) fn with_rank(mut self, rank: usize) -> Self {
        for _ in self.rank()..rank {
            self.shape.insert(0, 1);
            self.strides.insert(0, 0);
        }
        self
    }

    /// With `rank` axes, those of size 1 having stride 0: they can be repeated.
    pub(crate) fn repeatable(self, rank: usize) -> Self {
        let mut array = self.with_rank(rank);
        for (&size, stride) in array.shape.iter().zip(&mut array.strides) {
            if size == 1 {
                *stride = 0;
            }
        }
        array
    }

    /// The array, copied if its last axis is not contiguous.
    pub(crate) fn with_contiguous_rows(mut self) -> PyResult<Self> {
        if !self.has_contiguous_rows() {
            self.copy_from(&self.byte_strides())?;
        }
        Ok(self)
    }

    /// The array as f32, copied if it is of f16 or bf16.
    pub(crate) fn widened(mut self) -> PyResult<Self> {
        self.expect_dtype(&DType::FLOATS)?;
        let byte_strides = self.byte_strides();
        let source = Source { data: self.data, shape: &self.shape, byte_strides: &byte_strides };
        // SAFETY: every element lies in the memory of the array, aligned.
        let (copied, data, strides) = own(unsafe {
            match self.dtype {
                DType::F16 => gather(&source, true, |p| p.cast::<f16>().read().to_f32())?,
                DType::Bf16 => gather(&source, true, |p| p.cast::<bf16>().read().to_f32())?,
                _ => return Ok(self),
            }
        });
        (self.copied, self.data, self.strides, self.dtype) = (Some(copied), data, strides, DType::F32);
        Ok(self)
    }

    /// A copy of f32 values, row-major.
    pub(crate) fn to_floats(&self) -> PyResult<Vec<f32>> {
        self.expect_dtype(&[DType::F32])?;
        let byte_strides = self.byte_strides();
        let source = Source { data: self.data, shape: &self.shape, byte_strides: &byte_strides };
        // SAFETY: every element lies in the memory of the array, aligned, and any bits are an f32.
        Ok(unsafe { gather(&source, false, |p| p.cast::<f32>().read()) }?.0)
    }

    /// A copy of some rows of an array of two axes, in their order, widened to f32.
    pub(crate) fn rows_widened(&self, rows: &[usize]) -> PyResult<Vec<f32>> {
        self.expect_dtype(&DType::FLOATS)?;
        self.expect_rank(2, "(rows, columns)")?;
        let (count, columns) = (self.shape[0], self.shape[1]);
        let mut values = Vec::new();
        let fits = rows.len().checked_mul(columns).is_some_and(|all| values.try_reserve_exact(all).is_ok());
        if !fits {
            let given = format!("{}: no memory for {} rows of {columns} values", self.name, rows.len());
            return Err(PyMemoryError::new_err(given));
        }
        for &row in rows {
            assert!(row < count, "row {row} of {count}");
            for column in 0..columns {
                let offset = row as isize * self.strides[0] + column as isize * self.strides[1];
                // SAFETY: both indices are below their sizes, so that the element lies in the memory of the array, aligned.
                values.push(unsafe {
                    match self.dtype {
                        DType::F16 => self.at::<f16>(offset).read().to_f32(),
                        DType::Bf16 => self.at::<bf16>(offset).read().to_f32(),
                        _ => self.at::<f32>(offset).read(),
                    }
                });
            }
        }
        Ok(values)
    }

    /// A copy of integers, row-major.
    pub(crate) fn to_integers(&self) -> PyResult<Vec<i64>> {
        self.expect_dtype(&[DType::I32, DType::I64])?;
        let byte_strides = self.byte_strides();
        let source = Source { data: self.data, shape: &self.shape, byte_strides: &byte_strides };
        // SAFETY: every element lies in the memory of the array, aligned, and any bits are an integer.
        let (values, _) = unsafe {
            match self.dtype {
                DType::I32 => gather(&source, false, |p| i64::from(p.cast::<i32>().read()))?,
                _ => gather(&source, false, |p| p.cast::<i64>().read())?,
            }
        };
        Ok(values)
    }

    /// A copy of integers that count something: none negative.
    pub(crate) fn to_counts(&self) -> PyResult<Vec<usize>> {
        let values = self.to_integers()?.into_iter().enumerate();
        values
            .map(|(index, value)| {
                usize::try_from(value).map_err(|_| {
                    bad_value(&format!("{}[{index}]", self.name), value.to_string(), "0 or more")
                })
            })
            .collect()
    }

    /// Some of a list of integers that count something.
    pub(crate) fn counts_of(&self, range: Range<usize>) -> PyResult<Vec<usize>> {
        let (data, stride) = (self.data, self.strides[0]);
        assert!(self.rank() == 1 && self.dtype == DType::I64 && range.end <= self.shape[0]);
        let count = |index: usize| {
            // SAFETY: the index is below the size, so that the integer lies in the memory of the array, aligned.
            let value = unsafe { data.cast::<i64>().wrapping_offset(index as isize * stride).read() };
            usize::try_from(value)
                .map_err(|_| bad_value(&format!("{}[{index}]", self.name), value.to_string(), "0 or more"))
        };
        range.map(count).collect()
    }

    /// All of an array of four axes.
    fn whole(&self) -> PyResult<Part> {
        match (<[usize; 4]>::try_from(&self.shape[..]), <[isize; 4]>::try_from(&self.strides[..])) {
            (Ok(shape), Ok(strides)) => Ok(Part { offset: 0, shape, strides }),
            _ => Err(bad_value(self.name, format!("shape {:?}", self.shape), "4 axes")),
        }
    }

    /// The address of an element.
    fn at<T>(&self, offset: isize) -> *mut T {
        self.data.cast::<T>().wrapping_offset(offset)
    }

    fn refused(&self, error: &TensorError) -> PyErr {
        tensor_error(self.name, error)
    }

    /// A float tensor (batch, heads, length, dim) with contiguous rows, as it is.
    pub(crate) fn data(&self) -> PyResult<Data<'_>> {
        let whole = self.whole()?;
        // SAFETY: all of the array lies in it.
        unsafe { self.data_part(&whole) }
    }

    /// Part of it.
    ///
    /// # Safety
    /// The part must lie in the array.
    pub(crate) unsafe fn data_part(&self, part: &Part) -> PyResult<Data<'_>> {
        let &Part { offset, shape, strides } = part;
        self.expect_dtype(&DType::FLOATS)?;
        // SAFETY: the elements lie in memory that is there as long as `self` (the caller's promise); any bits are a float.
        let tensor = unsafe {
            match self.dtype {
                DType::F32 => {
                    TensorRef::from_raw_parts(self.at::<f32>(offset), shape, strides).map(Data::F32)
                }
                DType::F16 => {
                    TensorRef::from_raw_parts(self.at::<f16>(offset), shape, strides).map(Data::F16)
                }
                _ => TensorRef::from_raw_parts(self.at::<bf16>(offset), shape, strides).map(Data::Bf16),
            }
        };
        tensor.map_err(|error| self.refused(&error))
    }

    /// An f32 tensor (batch, heads, length, dim) with contiguous rows.
    pub(crate) fn tensor(&self) -> PyResult<TensorRef<'_, f32>> {
        self.expect_dtype(&[DType::F32])?;
        match self.data()? {
            Data::F32(tensor) => Ok(tensor),
            _ => Err(bad_value(self.name, "another type", "float32")),
        }
    }

    /// An output (batch, heads, length, dim). The array must have come from [`Array::output`] or [`Array::new`].
    pub(crate) fn data_mut(&mut self) -> PyResult<DataMut<'_>> {
        let whole = self.whole()?;
        // SAFETY: all of the array lies in it.
        unsafe { self.data_mut_part(&whole) }
    }

    /// Part of it.
    ///
    /// # Safety
    /// The part must lie in the array.
    pub(crate) unsafe fn data_mut_part(&mut self, part: &Part) -> PyResult<DataMut<'_>> {
        let &Part { offset, shape, strides } = part;
        self.expect_dtype(&DType::FLOATS)?;
        // SAFETY: the elements lie in writable memory that is there as long as `self` (the caller's promise). Python's other
        // threads may touch it, as they may with numpy: so the documentation says.
        let tensor = unsafe {
            match self.dtype {
                DType::F32 => {
                    TensorMut::from_raw_parts(self.at::<f32>(offset), shape, strides).map(DataMut::F32)
                }
                DType::F16 => {
                    TensorMut::from_raw_parts(self.at::<f16>(offset), shape, strides).map(DataMut::F16)
                }
                _ => TensorMut::from_raw_parts(self.at::<bf16>(offset), shape, strides).map(DataMut::Bf16),
            }
        };
        tensor.map_err(|error| self.refused(&error))
    }

    /// All values of a contiguous f32 output, such as an LSE.
    pub(crate) fn floats_mut(&mut self) -> PyResult<&mut [f32]> {
        self.expect_dtype(&[DType::F32])?;
        let expected = crate::dlpack::contiguous(&self.shape);
        let fits = |(size, (given, expected)): (&usize, (&isize, &isize))| *size <= 1 || given == expected;
        let count = crate::array::elements(&self.shape).unwrap_or(0);
        let contiguous = expected
            .is_some_and(|expected| self.shape.iter().zip(self.strides.iter().zip(&expected)).all(fits));
        if count == 0 {
            return Ok(&mut []);
        }
        if !contiguous {
            let given = format!("shape {:?} with strides {:?}", self.shape, self.strides);
            return Err(bad_value(self.name, given, "a contiguous array"));
        }
        // SAFETY: as in `data_mut`, and the values lie side by side.
        Ok(unsafe { core::slice::from_raw_parts_mut(self.data.cast(), count) })
    }

    /// An f32 buffer for as many values as the array has.
    pub(crate) fn scratch(&self) -> PyResult<Vec<f32>> {
        let count = crate::array::elements(&self.shape).unwrap_or(usize::MAX);
        let mut values = Vec::new();
        let memory =
            || PyMemoryError::new_err(format!("{}: no memory for {count} values of float32", self.name));
        values.try_reserve_exact(count).map_err(|_| memory())?;
        values.resize(count, 0.0);
        Ok(values)
    }

    /// Sets the elements of an output to row-major values, rounded to its type.
    pub(crate) fn round_from(&mut self, values: &[f32]) {
        let width = self.shape.last().copied().unwrap_or(1).max(1);
        for (index, row) in values.chunks_exact(width).enumerate() {
            let mut offset = 0;
            let mut left = index;
            for (&size, &stride) in self.shape.iter().zip(&self.strides).rev().skip(1) {
                offset += (left % size) as isize * stride;
                left /= size;
            }
            for (i, &value) in row.iter().enumerate() {
                // SAFETY: the element exists, in aligned memory that may be written; rows are contiguous.
                unsafe {
                    match self.dtype {
                        DType::F32 => self.data.cast::<f32>().offset(offset).add(i).write(value),
                        DType::F16 => {
                            self.data.cast::<f16>().offset(offset).add(i).write(f16::from_f32(value))
                        }
                        _ => self.data.cast::<bf16>().offset(offset).add(i).write(bf16::from_f32(value)),
                    }
                }
            }
        }
    }

    /// A boolean mask of four axes.
    pub(crate) fn mask(&self) -> PyResult<Broadcast<'_, bool>> {
        let whole = self.whole()?;
        // SAFETY: all of the array lies in it.
        unsafe { self.mask_part(&whole) }
    }

    /// Part of it.
    ///
    /// # Safety
    /// The part must lie in the array.
    pub(crate) unsafe fn mask_part(&self, part: &Part) -> PyResult<Broadcast<'_, bool>> {
        self.expect_dtype(&[DType::Bool])?;
        // SAFETY: as in `data_part`; a bool may be any byte here, and is only computed with.
        unsafe { self.broadcast_part::<bool>(part) }
    }

    /// A float bias of four axes.
    pub(crate) fn bias(&self) -> PyResult<Bias<'_>> {
        let whole = self.whole()?;
        // SAFETY: all of the array lies in it.
        unsafe { self.bias_part(&whole) }
    }

    /// Part of it.
    ///
    /// # Safety
    /// The part must lie in the array.
    pub(crate) unsafe fn bias_part(&self, part: &Part) -> PyResult<Bias<'_>> {
        self.expect_dtype(&DType::FLOATS)?;
        // SAFETY: as in `data_part`.
        unsafe {
            Ok(match self.dtype {
                DType::F32 => Bias::F32(self.broadcast_part(part)?),
                DType::F16 => Bias::Half(HalfKind::F16, self.broadcast_part(part)?),
                _ => Bias::Half(HalfKind::Bf16, self.broadcast_part(part)?),
            })
        }
    }

    /// # Safety
    /// The part must lie in the array, and its values be of the type.
    unsafe fn broadcast_part<T>(&self, part: &Part) -> PyResult<Broadcast<'_, T>> {
        // SAFETY: the caller's promise.
        let view = unsafe { Broadcast::from_raw_parts(self.at::<T>(part.offset), part.shape, part.strides) };
        view.map_err(|error| self.refused(&error))
    }

    /// Strides in bytes.
    pub(crate) fn byte_strides(&self) -> Vec<isize> {
        let size = self.dtype.size() as isize;
        // No overflow where a stride matters; elsewhere any number will do.
        self.strides.iter().map(|stride| stride.wrapping_mul(size)).collect()
    }

    /// The addresses from the first byte to behind the last; None where there is nothing.
    fn span(&self) -> Option<(usize, usize)> {
        if self.shape.contains(&0) {
            return None;
        }
        let (mut low, mut high) = (0isize, self.dtype.size() as isize);
        for (&size, stride) in self.shape.iter().zip(self.byte_strides()) {
            let reach = (size - 1) as isize * stride;
            if reach < 0 { low += reach } else { high += reach }
        }
        let start = self.data.addr();
        Some((start.wrapping_add_signed(low), start.wrapping_add_signed(high)))
    }

    /// Refuses an output that shares memory with an input.
    pub(crate) fn expect_apart_from<'a>(&self, inputs: impl IntoIterator<Item = &'a Self>) -> PyResult<()>
    where
        'py: 'a,
    {
        let Some((start, end)) = self.span() else { return Ok(()) };
        for input in inputs {
            let Some((first, last)) = input.span() else { continue };
            if first < end && start < last && self.shares_memory(input)? {
                let given = format!("memory that {} lies in as well", input.name);
                return Err(bad_value(self.name, given, "memory of its own"));
            }
        }
        Ok(())
    }

    /// Whether an element is one of another array's too; where that is too hard to tell, yes.
    fn shares_memory(&self, other: &Self) -> PyResult<bool> {
        let py = self.object.py();
        // SAFETY: both arrays are there until the end of this function, as is what numpy makes of them.
        let (a, b) = unsafe {
            (
                numpy_array::over(py, self.data, self.dtype.size(), &self.shape, &self.byte_strides())?,
                numpy_array::over(py, other.data, other.dtype.size(), &other.shape, &other.byte_strides())?,
            )
        };
        // Interleaved slices of one array take a few steps; the general problem is hard.
        const MOST_STEPS: usize = 100_000;
        let shares = py.import(intern!(py, "numpy"))?.getattr(intern!(py, "shares_memory"))?;
        match shares.call1((a, b, MOST_STEPS)) {
            Ok(shares) => shares.is_truthy(),
            Err(error) if error.is_instance_of::<pyo3::exceptions::PyException>(py) => Ok(true),
            Err(error) => Err(error),
        }
    }
}
