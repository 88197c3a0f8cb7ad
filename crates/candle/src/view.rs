//! candle's memory as qkv's views, in place, and the refusal of tensors that cannot be read.

use candle_core::{CpuStorage, DType, Error, Layout, Result, Storage, Tensor};
use half::slice::HalfFloatSliceExt;
use qkv::{Bias, Broadcast, Data, HalfKind, TensorRef};

/// An error with this text.
pub(crate) fn refuse(text: impl core::fmt::Display) -> Error {
    Error::msg(format!("qkv: {text}"))
}

/// An error about an argument.
pub(crate) fn refuse_argument(argument: &str, text: impl core::fmt::Display) -> Error {
    refuse(format_args!("{argument}: {text}"))
}

fn is_float(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::F16 | DType::BF16)
}

/// Refuses a tensor that is elsewhere.
pub(crate) fn check_on_cpu(argument: &str, tensor: &Tensor) -> Result<()> {
    if !tensor.device().is_cpu() {
        let given = tensor.device().location();
        return Err(refuse_argument(argument, format_args!("on the device {given:?}, expected the CPU")));
    }
    Ok(())
}

/// Refuses a tensor that is elsewhere, or of another type.
pub(crate) fn check_kind(argument: &str, tensor: &Tensor) -> Result<()> {
    check_on_cpu(argument, tensor)?;
    if !is_float(tensor.dtype()) {
        let given = tensor.dtype().as_str();
        return Err(refuse_argument(
            argument,
            format_args!("{given} is not supported, expected f32, f16 or bf16"),
        ));
    }
    Ok(())
}

/// Refuses queries, keys or values of another rank than `rank`, another type, or from elsewhere.
pub(crate) fn check(argument: &str, tensor: &Tensor, rank: usize) -> Result<()> {
    check_kind(argument, tensor)?;
    if tensor.rank() != rank {
        let given = tensor.dims();
        return Err(refuse_argument(argument, format_args!("shape {given:?}, expected {rank} axes")));
    }
    Ok(())
}

/// Refuses a tensor beside queries, keys and values whose gradient would be lost.
pub(crate) fn check_no_gradient(argument: &str, tensor: &Tensor) -> Result<()> {
    if tensor.track_op() {
        return Err(refuse_argument(argument, "a gradient is not supported, detach the tensor"));
    }
    Ok(())
}

/// Refuses what there is no memory for: asked for in vain here, it is an error; asked for in earnest, it would be an abort. Views
/// that broadcast can ask for any amount.
pub(crate) fn check_memory(argument: &str, shape: &[usize], size: usize) -> Result<()> {
    let bytes = shape.iter().try_fold(size, |bytes, &size| bytes.checked_mul(size));
    match bytes {
        Some(bytes) if Vec::<u8>::new().try_reserve_exact(bytes).is_ok() => Ok(()),
        _ => Err(refuse_argument(argument, format_args!("no memory for the shape {shape:?}"))),
    }
}

/// The tensor itself, or a copy where the values of a head do not lie one after the other.
pub(crate) fn with_contiguous_rows(argument: &str, tensor: Tensor) -> Result<Tensor> {
    match (tensor.stride().last(), tensor.dims().last()) {
        (Some(&stride), Some(&size)) if stride != 1 && size > 1 => {
            check_memory(argument, tensor.dims(), tensor.dtype().size_in_bytes())?;
            tensor.contiguous()
        }
        _ => Ok(tensor),
    }
}

/// Where a view begins in its buffer. An empty one may claim to begin past the end.
fn start(layout: &Layout) -> usize {
    if layout.dims().contains(&0) { 0 } else { layout.start_offset() }
}

/// Shape and strides with axes of 1 in front up to four.
fn four(argument: &str, layout: &Layout) -> Result<([usize; 4], [isize; 4])> {
    let (dims, strides) = (layout.dims(), layout.stride());
    if dims.len() > 4 || strides.len() != dims.len() {
        return Err(refuse_argument(argument, format_args!("shape {dims:?}, expected at most 4 axes")));
    }
    let (mut shape, mut steps) = ([1; 4], [0; 4]);
    let missing = 4 - dims.len();
    shape[missing..].copy_from_slice(dims);
    for (step, &stride) in steps[missing..].iter_mut().zip(strides) {
        *step = isize::try_from(stride)
            .map_err(|_| refuse_argument(argument, format_args!("stride {stride} is too large")))?;
    }
    Ok((shape, steps))
}

fn tensor_of<'a, T>(argument: &str, values: &'a [T], layout: &Layout) -> Result<TensorRef<'a, T>> {
    let (shape, strides) = four(argument, layout)?;
    TensorRef::from_slice_strided(values, start(layout), shape, strides)
        .map_err(|error| refuse_argument(argument, error))
}

fn broadcast_of<'a, T>(argument: &str, values: &'a [T], layout: &Layout) -> Result<Broadcast<'a, T>> {
    let (shape, strides) = four(argument, layout)?;
    Broadcast::from_slice_strided(values, start(layout), shape, strides)
        .map_err(|error| refuse_argument(argument, error))
}

/// Queries, keys or values, (batch, heads, length, dim).
pub(crate) fn data<'a>(argument: &str, storage: &'a CpuStorage, layout: &Layout) -> Result<Data<'a>> {
    match storage {
        CpuStorage::F32(values) => Ok(tensor_of(argument, values, layout)?.into()),
        CpuStorage::F16(values) => Ok(tensor_of(argument, values, layout)?.into()),
        CpuStorage::BF16(values) => Ok(tensor_of(argument, values, layout)?.into()),
        _ => Err(refuse_argument(argument, "expected f32, f16 or bf16")),
    }
}

/// The memory of a tensor on the CPU.
pub(crate) fn on_cpu<'a>(argument: &str, storage: &'a Storage) -> Result<&'a CpuStorage> {
    match storage {
        Storage::Cpu(storage) => Ok(storage),
        _ => Err(refuse_argument(argument, "expected a tensor on the CPU")),
    }
}

/// An additive bias.
pub(crate) fn bias<'a>(argument: &str, storage: &'a CpuStorage, layout: &Layout) -> Result<Bias<'a>> {
    match storage {
        CpuStorage::F32(values) => Ok(Bias::F32(broadcast_of(argument, values, layout)?)),
        CpuStorage::F16(values) => {
            Ok(Bias::Half(HalfKind::F16, broadcast_of(argument, values.reinterpret_cast(), layout)?))
        }
        CpuStorage::BF16(values) => {
            Ok(Bias::Half(HalfKind::Bf16, broadcast_of(argument, values.reinterpret_cast(), layout)?))
        }
        _ => Err(refuse_argument(argument, "expected f32, f16 or bf16")),
    }
}

/// The part of a buffer that a view reaches; None where it leaves the buffer.
fn reached<'a, T>(values: &'a [T], layout: &Layout) -> Option<&'a [T]> {
    if layout.dims().contains(&0) {
        return Some(&[]);
    }
    let mut last = layout.start_offset();
    for (&size, &stride) in layout.dims().iter().zip(layout.stride()) {
        last = last.checked_add((size - 1).checked_mul(stride)?)?;
    }
    values.get(layout.start_offset()..last.checked_add(1)?)
}

/// The bytes of a u8 mask as booleans: the bytes themselves where all that the view spans are 0 or 1, else a copy of the span in
/// `copy`. Broadcast axes are never expanded.
pub(crate) fn mask<'a>(
    argument: &str,
    storage: &'a CpuStorage,
    layout: &Layout,
    copy: &'a mut Vec<bool>,
) -> Result<Broadcast<'a, bool>> {
    let CpuStorage::U8(bytes) = storage else {
        let text = "expected u8, not 0 = takes part (a float mask that is added is a bias)";
        return Err(refuse_argument(argument, text));
    };
    let Some(bytes) = reached(bytes, layout) else {
        return Err(refuse_argument(argument, format_args!("shape {:?} leaves its buffer", layout.dims())));
    };
    let booleans = match bytemuck::checked::try_cast_slice(bytes) {
        Ok(booleans) => booleans,
        Err(_) => {
            copy.extend(bytes.iter().map(|&byte| byte != 0));
            copy
        }
    };
    let (shape, strides) = four(argument, layout)?;
    Broadcast::from_slice_strided(booleans, 0, shape, strides)
        .map_err(|error| refuse_argument(argument, error))
}
