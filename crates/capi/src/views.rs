//! From checked descriptors to the views that the Rust crates take.

use qkv::gemm::{BatchAxes, BatchMut, BatchRef, MatMut, MatRef};
use qkv::{Bias, Broadcast, Data, DataMut, HalfKind, Int8Ref, TensorMut, TensorRef, bf16, f16};

use crate::region::{Region, dtype_name, wrong_dtype};
use crate::status::{Failure, qkv_status::*};
use crate::types::*;

/// Copies a struct that an argument points to.
///
/// # Safety
/// `from` must be NULL, misaligned or valid for a read; any bytes must be a valid `T`.
pub(crate) unsafe fn copy<T: Copy>(argument: &str, from: *const T) -> Result<T, Failure> {
    if from.is_null() {
        return Err(Failure::null(argument));
    }
    if !from.is_aligned() {
        let what = format!("{argument}: at {:#x}, expected the address of a struct", from.addr());
        return Err(Failure::new(QKV_ERROR_MISALIGNED, what));
    }
    // SAFETY: not NULL, aligned, and the caller's promise.
    Ok(unsafe { from.read() })
}

/// Queries, keys or values, looked at.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Input {
    pub(crate) region: Region,
    scales: Option<Region>,
    zeros: Option<Region>,
}

impl Input {
    /// Looks at a descriptor.
    ///
    /// # Safety
    /// `from` must be NULL, misaligned or valid for a read, and so the descriptors that it points to.
    pub(crate) unsafe fn read(argument: &'static str, from: *const qkv_tensor) -> Result<Self, Failure> {
        // SAFETY: the caller's promise.
        let tensor = unsafe { copy(argument, from) }?;
        let region = Region::of(argument, &tensor)?;
        let (scales_name, zeros_name) = match argument {
            "query" => ("query.scales", "query.zeros"),
            "key" => ("key.scales", "key.zeros"),
            "value" => ("value.scales", "value.zeros"),
            _ => ("scales", "zeros"),
        };
        let beside = |name: &'static str, from: *const qkv_tensor| -> Result<Option<Region>, Failure> {
            if from.is_null() {
                return Ok(None);
            }
            if region.dtype != QKV_DTYPE_I8 {
                let what = format!("{name}: given for {}, expected NULL", dtype_name(region.dtype));
                return Err(Failure::new(QKV_ERROR_DTYPE, what));
            }
            // SAFETY: the caller's promise.
            let region = Region::of(name, &unsafe { copy(name, from) }?)?;
            match region.dtype {
                QKV_DTYPE_F32 => Ok(Some(region)),
                other => Err(wrong_dtype(name, other, "f32")),
            }
        };
        let (scales, zeros) = (beside(scales_name, tensor.scales)?, beside(zeros_name, tensor.zeros)?);
        match region.dtype {
            QKV_DTYPE_F32 | QKV_DTYPE_F16 | QKV_DTYPE_BF16 => {}
            QKV_DTYPE_I8 if matches!(argument, "key" | "value" | "keys" | "values") => {
                if scales.is_none() {
                    return Err(Failure::null(scales_name));
                }
            }
            other if matches!(argument, "key" | "value" | "keys" | "values") => {
                return Err(wrong_dtype(argument, other, "f32, f16, bf16 or int8"));
            }
            other => return Err(wrong_dtype(argument, other, "f32, f16 or bf16")),
        }
        Ok(Self { region, scales, zeros })
    }

    /// Sizes.
    pub(crate) fn shape(&self) -> [usize; 4] {
        self.region.shape
    }

    /// All memory that it reads.
    pub(crate) fn regions(&self) -> impl Iterator<Item = Region> {
        [Some(self.region), self.scales, self.zeros].into_iter().flatten()
    }

    /// The view.
    ///
    /// # Safety
    /// All its elements must be readable for `'a`, and not be written in that time.
    pub(crate) unsafe fn data<'a>(&self) -> Result<Data<'a>, Failure> {
        // SAFETY: the caller's promise, in each of them.
        unsafe {
            Ok(match self.region.dtype {
                QKV_DTYPE_F16 => Data::F16(tensor_ref::<f16>(&self.region)?),
                QKV_DTYPE_BF16 => Data::Bf16(tensor_ref::<bf16>(&self.region)?),
                QKV_DTYPE_I8 => {
                    let Some(scales) = &self.scales else { return Err(Failure::null("scales")) };
                    let zeros = self.zeros.as_ref().map(|zeros| tensor_ref(zeros)).transpose()?;
                    let view = Int8Ref::new(tensor_ref(&self.region)?, tensor_ref(scales)?, zeros);
                    Data::Int8(view.map_err(|error| Failure::tensor(scales.argument, &error))?)
                }
                _ => Data::F32(tensor_ref::<f32>(&self.region)?),
            })
        }
    }

    /// The view, where it is one of f32.
    ///
    /// # Safety
    /// As [`Self::data`].
    pub(crate) unsafe fn f32<'a>(&self) -> Result<TensorRef<'a>, Failure> {
        // SAFETY: the caller's promise.
        match unsafe { self.data() }? {
            Data::F32(view) => Ok(view),
            _ => Err(wrong_dtype(self.region.argument, self.region.dtype, "f32")),
        }
    }

    /// One batch of it.
    pub(crate) fn of_batch(mut self, batch: usize) -> Self {
        for region in
            [Some(&mut self.region), self.scales.as_mut(), self.zeros.as_mut()].into_iter().flatten()
        {
            region.take_batch(batch);
        }
        self
    }

    /// As if of (1, heads, batch, dim), where the length is 1: one token of each batch, in a row.
    pub(crate) fn as_packed(mut self) -> Self {
        self.region = as_packed(self.region);
        self
    }
}

/// The tokens of all batches, of length 1, as the positions of one.
pub(crate) fn as_packed(mut region: Region) -> Region {
    let [batch, heads, _, dim] = region.shape;
    region.shape = [1, heads, batch, dim];
    region.strides = [0, region.strides[1], region.strides[0], region.strides[3]];
    region
}

/// # Safety
/// All elements must be values of `T`, readable for `'a`, and not be written in that time.
unsafe fn tensor_ref<'a, T>(region: &Region) -> Result<TensorRef<'a, T>, Failure> {
    // SAFETY: the caller's promise.
    let view = unsafe { TensorRef::from_raw_parts(region.data.cast(), region.shape, region.strides) };
    view.map_err(|error| Failure::tensor(region.argument, &error))
}

/// An output of f32, f16 or bf16.
///
/// # Safety
/// All elements must be writable for `'a`, and nothing else access them in that time.
pub(crate) unsafe fn data_mut<'a>(region: &Region) -> Result<DataMut<'a>, Failure> {
    let &Region { data, shape, strides, .. } = region;
    // SAFETY: the caller's promise, in all of them.
    let view = unsafe {
        match region.dtype {
            QKV_DTYPE_F16 => TensorMut::from_raw_parts(data.cast::<f16>(), shape, strides).map(DataMut::F16),
            QKV_DTYPE_BF16 => {
                TensorMut::from_raw_parts(data.cast::<bf16>(), shape, strides).map(DataMut::Bf16)
            }
            _ => TensorMut::from_raw_parts(data.cast::<f32>(), shape, strides).map(DataMut::F32),
        }
    };
    view.map_err(|error| Failure::tensor(region.argument, &error))
}

/// A boolean mask. Its values are not looked at here, see [`check_bools`].
///
/// # Safety
/// All elements must be readable for `'a`, and not be written in that time; before one is read as a `bool`, it must have
/// been found to be 0 or 1.
pub(crate) unsafe fn mask<'a>(region: &Region) -> Result<Broadcast<'a, bool>, Failure> {
    // SAFETY: the caller's promise.
    let view = unsafe { Broadcast::from_raw_parts(region.data.cast(), region.shape, region.strides) };
    view.map_err(|error| Failure::tensor(region.argument, &error))
}

/// An additive bias.
///
/// # Safety
/// All elements must be readable for `'a`, and not be written in that time.
pub(crate) unsafe fn bias<'a>(region: &Region) -> Result<Bias<'a>, Failure> {
    let &Region { data, shape, strides, .. } = region;
    // SAFETY: the caller's promise, in all of them; the 16-bit types are their bits.
    let view = unsafe {
        let half = || Broadcast::from_raw_parts(data.cast::<u16>(), shape, strides);
        match region.dtype {
            QKV_DTYPE_F32 => Broadcast::from_raw_parts(data.cast(), shape, strides).map(Bias::F32),
            QKV_DTYPE_F16 => half().map(|bits| Bias::Half(HalfKind::F16, bits)),
            QKV_DTYPE_BF16 => half().map(|bits| Bias::Half(HalfKind::Bf16, bits)),
            other => return Err(wrong_dtype(region.argument, other, "f32, f16 or bf16")),
        }
    };
    view.map_err(|error| Failure::tensor(region.argument, &error))
}

/// Refuses bytes other than 0 and 1: to Rust another one is no truth value. Axes that repeat are walked once.
///
/// # Safety
/// All elements must be readable.
pub(crate) unsafe fn check_bools(region: &Region) -> Result<(), Failure> {
    if region.is_empty() {
        return Ok(());
    }
    let first = region.data.cast::<u8>();
    let sizes: [usize; 4] =
        core::array::from_fn(|axis| if region.strides[axis] == 0 { 1 } else { region.shape[axis] });
    let [_, _, _, columns] = sizes;
    for row in 0..sizes[0] * sizes[1] * sizes[2] {
        let index = [row / (sizes[1] * sizes[2]), row / sizes[2] % sizes[1], row % sizes[2]];
        let offset: isize = (0..3).map(|axis| index[axis] as isize * region.strides[axis]).sum();
        let row = first.wrapping_offset(offset);
        let at = |column: usize| row.wrapping_offset(column as isize * region.strides[3]);
        // SAFETY: the element exists.
        let byte = |column: usize| unsafe { at(column).read() };
        let all = if region.strides[3] == 1 {
            // SAFETY: the row's elements lie side by side.
            unsafe { core::slice::from_raw_parts(row, columns) }.iter().fold(0, |all, &byte| all | byte)
        } else {
            (0..columns).fold(0, |all, column| all | byte(column))
        };
        if all > 1 {
            let column = (0..columns).find(|&column| byte(column) > 1).unwrap_or(0);
            let [batch, head, query] = index;
            let (argument, given) = (region.argument, byte(column));
            let what = format!("{argument}[{batch}][{head}][{query}][{column}]: {given}, expected 0 or 1");
            return Err(Failure::new(QKV_ERROR_VALUE, what));
        }
    }
    Ok(())
}

/// A matrix, or a batch of them, that is read: axes 2 and 3 are rows and columns.
///
/// # Safety
/// All elements must be f32, readable for `'a`, and not be written in that time.
pub(crate) unsafe fn matrices<'a>(region: &Region) -> Result<(MatRef<'a>, BatchRef<'a>), Failure> {
    let &Region { data, shape: [_, _, rows, columns], strides: [_, _, down, right], .. } = region;
    // SAFETY: the caller's promise; the region's bounds have been computed.
    let first = unsafe { MatRef::from_raw_parts(data.cast_const().cast(), rows, columns, down, right) };
    let axes = BatchAxes::new(&region.shape[..2], &region.strides[..2])?;
    // SAFETY: as above.
    Ok((first, unsafe { BatchRef::from_raw_parts(first, axes) }))
}

/// A batch of matrices that is written.
///
/// # Safety
/// All elements must be f32, writable (and readable, where beta is not 0) for `'a`, and nothing else access them in that
/// time; no two may share their memory.
pub(crate) unsafe fn matrices_mut<'a>(region: &Region) -> Result<BatchMut<'a>, Failure> {
    let axes = BatchAxes::new(&region.shape[..2], &region.strides[..2])?;
    // SAFETY: the caller's promise.
    Ok(unsafe { BatchMut::from_raw_parts(matrix_mut(region), axes) })
}

/// The first matrix of a batch, to be written.
///
/// # Safety
/// As [`matrices_mut`].
pub(crate) unsafe fn matrix_mut<'a>(region: &Region) -> MatMut<'a> {
    let &Region { data, shape: [_, _, rows, columns], strides: [_, _, down, right], .. } = region;
    // SAFETY: the caller's promise.
    unsafe { MatMut::from_raw_parts(data.cast(), rows, columns, down, right) }
}
