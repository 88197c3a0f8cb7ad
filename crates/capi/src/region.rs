//! Memory of a checked descriptor, and whether two such pieces are apart.
//!
//! C hands over addresses. Before one becomes a view, its sizes, its strides and where they lead are looked at here; what
//! cannot be seen from an address, whether there is memory behind it, the caller vouches for.

use core::ffi::c_void;

use crate::status::{Failure, qkv_status::*};
use crate::types::*;

/// A descriptor that has been looked at.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Region {
    pub(crate) argument: &'static str,
    pub(crate) dtype: qkv_dtype,
    pub(crate) shape: [usize; 4],
    /// In values.
    pub(crate) strides: [isize; 4],
    /// Element (0, 0, 0, 0); aligned and not NULL, also where there is none.
    pub(crate) data: *mut c_void,
    /// Bytes of a value.
    size: usize,
    /// First address and the one after the last; equal where it is empty.
    bounds: [usize; 2],
}

// SAFETY: a region is an address with numbers; who reads or writes there says why that is sound.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

/// Bytes of a value of a type.
fn size_of_dtype(argument: &str, dtype: qkv_dtype) -> Result<usize, Failure> {
    match dtype {
        QKV_DTYPE_F32 => Ok(4),
        QKV_DTYPE_F16 | QKV_DTYPE_BF16 => Ok(2),
        QKV_DTYPE_I8 | QKV_DTYPE_BOOL => Ok(1),
        _ => Err(Failure::new(
            QKV_ERROR_DTYPE,
            format!("{argument}: dtype {dtype}, expected a QKV_DTYPE_ number"),
        )),
    }
}

/// The name of a type in messages.
pub(crate) fn dtype_name(dtype: qkv_dtype) -> &'static str {
    match dtype {
        QKV_DTYPE_F32 => "f32",
        QKV_DTYPE_F16 => "f16",
        QKV_DTYPE_BF16 => "bf16",
        QKV_DTYPE_I8 => "int8",
        QKV_DTYPE_BOOL => "bool",
        _ => "unknown",
    }
}

impl Region {
    /// Looks at a descriptor that is read.
    pub(crate) fn of(argument: &'static str, tensor: &qkv_tensor) -> Result<Self, Failure> {
        let &qkv_tensor { data, dtype, shape, strides, buffer, buffer_size, reserved, .. } = tensor;
        Self::new(
            argument,
            qkv_tensor_mut { data: data.cast_mut(), dtype, shape, strides, buffer, buffer_size, reserved },
        )
    }

    /// Looks at a descriptor that is written.
    pub(crate) fn of_mut(argument: &'static str, tensor: &qkv_tensor_mut) -> Result<Self, Failure> {
        let region = Self::new(argument, *tensor)?;
        match region.dtype {
            QKV_DTYPE_F32 | QKV_DTYPE_F16 | QKV_DTYPE_BF16 => Ok(region),
            other => Err(wrong_dtype(argument, other, "f32, f16 or bf16")),
        }
    }

    fn new(argument: &'static str, tensor: qkv_tensor_mut) -> Result<Self, Failure> {
        let fail = |status, message: String| Err(Failure::new(status, format!("{argument}: {message}")));
        let qkv_tensor_mut { data, dtype, shape: sizes, strides: steps, buffer, buffer_size, reserved } =
            tensor;
        let size = size_of_dtype(argument, dtype)?;
        if reserved != 0 {
            return fail(QKV_ERROR_NOT_SUPPORTED, format!("reserved is {reserved}, expected 0"));
        }
        if sizes.iter().any(|&size| size < 0) {
            return fail(QKV_ERROR_VALUE, format!("shape {sizes:?}, expected no negative size"));
        }
        let too_large = format!("shape {sizes:?} with strides {steps:?} spans more than the address space");
        let (mut shape, mut strides) = ([0; 4], [0; 4]);
        // As if no size were 0, and as if nothing were repeated: numbers derived from sizes must not overflow either.
        let mut count = 1i64;
        for axis in 0..4 {
            let converted = (usize::try_from(sizes[axis]), isize::try_from(steps[axis]));
            let (Ok(size), Ok(stride), Some(all)) =
                (converted.0, converted.1, count.checked_mul(sizes[axis].max(1)))
            else {
                return fail(QKV_ERROR_TOO_LARGE, too_large);
            };
            (shape[axis], strides[axis], count) = (size, stride, all);
        }
        if count > i64::MAX / 8 {
            return fail(QKV_ERROR_TOO_LARGE, too_large);
        }
        let dangling = core::ptr::without_provenance_mut(64);
        let empty = shape.contains(&0);
        if empty {
            return Ok(Self { argument, dtype, shape, strides, data: dangling, size, bounds: [0, 0] });
        }
        if data.is_null() {
            return fail(QKV_ERROR_NULL, "data is NULL, expected an address".to_owned());
        }
        let address = data.addr();
        if !address.is_multiple_of(size) {
            let what =
                format!("data at {address:#x}, expected a multiple of {size} for {}", dtype_name(dtype));
            return fail(QKV_ERROR_MISALIGNED, what);
        }
        let reach = |sign: i128| -> i128 {
            let steps = sizes.iter().zip(steps);
            steps
                .map(|(&size, stride)| i128::from(size - 1) * i128::from(stride))
                .filter(|x| x * sign > 0)
                .sum()
        };
        // No overflow: each product is below 2^123.
        let first = address as i128 + reach(-1) * size as i128;
        let end = address as i128 + (reach(1) + 1) * size as i128;
        if first <= 0 || end > isize::MAX as i128 {
            return fail(QKV_ERROR_TOO_LARGE, too_large);
        }
        let bounds = [first as usize, end as usize];
        if !buffer.is_null() {
            let start = buffer.addr();
            if bounds[0] < start || bounds[1] > start.saturating_add(buffer_size) {
                let what = format!(
                    "shape {sizes:?} with strides {steps:?} takes bytes {} to {} of its buffer, which has {buffer_size}",
                    first - start as i128,
                    end - start as i128
                );
                return fail(QKV_ERROR_OUT_OF_BOUNDS, what);
            }
        }
        Ok(Self { argument, dtype, shape, strides, data, size, bounds })
    }

    /// `count` values of f32 side by side.
    pub(crate) fn list(argument: &'static str, data: *mut f32, count: usize) -> Result<Self, Failure> {
        let count = i64::try_from(count).unwrap_or(i64::MAX);
        let list = qkv_tensor_mut_bhsd(data.cast(), QKV_DTYPE_F32, 1, 1, 1, count);
        Self::of_mut(argument, &list)
    }

    /// Narrows it to one index of the first axis, which must be there. Its bounds stay those of the whole.
    pub(crate) fn take_batch(&mut self, batch: usize) {
        debug_assert!(batch < self.shape[0]);
        if !self.is_empty() {
            let bytes = batch as isize * self.strides[0] * self.size as isize;
            self.data = self.data.wrapping_byte_offset(bytes);
        }
        self.shape[0] = 1;
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.bounds[0] == self.bounds[1]
    }

    /// Refuses strides with which two elements share an address: sorted by stride, each axis must step over all that the
    /// smaller ones reach. Sufficient, and true of every layout that slices and permutes a contiguous buffer.
    pub(crate) fn check_disjoint(&self) -> Result<(), Failure> {
        if self.is_empty() {
            return Ok(());
        }
        let axes = self.shape.into_iter().zip(self.strides).filter(|&(size, _)| size > 1);
        let mut axes: Vec<(usize, usize)> =
            axes.map(|(size, stride)| (stride.unsigned_abs(), size)).collect();
        axes.sort_unstable();
        let mut reach = 1;
        for (stride, size) in axes {
            if stride < reach {
                let Self { argument, shape, strides, .. } = self;
                let what = format!(
                    "{argument}: shape {shape:?} with strides {strides:?} overlaps itself, but is to be written"
                );
                return Err(Failure::new(QKV_ERROR_STRIDES, what));
            }
            // No overflow: the bounds have been computed for these numbers.
            reach += stride * (size - 1);
        }
        Ok(())
    }

    /// Strides in bytes of the axes that have more than one index, with their sizes.
    fn byte_axes(&self) -> impl Iterator<Item = (usize, isize)> + '_ {
        let axes = self.shape.into_iter().zip(self.strides).filter(|&(size, _)| size > 1);
        axes.map(|(count, stride)| (count, stride * self.size as isize))
    }

    /// Whether no byte belongs to both, as far as can be told quickly: `false` where it cannot.
    ///
    /// Either their bounds are apart, or they interleave: seen modulo one of their strides, what the axes that are not its
    /// multiples span lies apart on the circle. That holds of parts of a packed projection, of heads, and of columns.
    pub(crate) fn is_apart(&self, other: &Self) -> bool {
        if self.is_empty() || other.is_empty() {
            return true;
        }
        if self.bounds[1] <= other.bounds[0] || other.bounds[1] <= self.bounds[0] {
            return true;
        }
        let mut moduli = self.byte_axes().chain(other.byte_axes()).map(|(_, stride)| stride.unsigned_abs());
        moduli.any(|modulus| {
            let (Some(a), Some(b)) = (self.span_on_circle(modulus), other.span_on_circle(modulus)) else {
                return false;
            };
            let between = |from: usize, to: usize| (to + modulus - from) % modulus;
            between(a.0, b.0) >= a.1 && between(b.0, a.0) >= b.1
        })
    }

    /// First byte and length of the region modulo `modulus`; None where that is the whole circle.
    fn span_on_circle(&self, modulus: usize) -> Option<(usize, usize)> {
        if modulus == 0 {
            return None;
        }
        let mut first = self.data.addr();
        let mut length = self.size;
        for (count, stride) in self.byte_axes().filter(|&(_, stride)| stride.unsigned_abs() % modulus != 0) {
            // No overflow: parts of the bounds, which have been computed.
            let reach = (count - 1) * stride.unsigned_abs();
            length += reach;
            if stride < 0 {
                first -= reach;
            }
        }
        (length <= modulus).then_some((first % modulus, length))
    }
}

/// A type that an argument does not take.
pub(crate) fn wrong_dtype(argument: &str, given: qkv_dtype, expected: &str) -> Failure {
    Failure::new(QKV_ERROR_DTYPE, format!("{argument}: {}, expected {expected}", dtype_name(given)))
}

/// Refuses outputs that may share memory with an input or with each other.
pub(crate) fn check_apart(outputs: &[Region], inputs: &[Region]) -> Result<(), Failure> {
    for (i, output) in outputs.iter().enumerate() {
        for other in inputs.iter().chain(&outputs[..i]) {
            if !output.is_apart(other) {
                let (output, other) = (output.argument, other.argument);
                let what = format!("{output}: shares memory with {other}, expected memory of its own");
                return Err(Failure::new(QKV_ERROR_OVERLAP, what));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(at: usize, shape: [i64; 4], strides: [i64; 4]) -> Result<Region, Failure> {
        let mut tensor = qkv_tensor_bhsd(core::ptr::without_provenance(at), QKV_DTYPE_F32, 0, 0, 0, 0);
        (tensor.shape, tensor.strides) = (shape, strides);
        Region::of("x", &tensor)
    }

    /// Addresses of all values.
    fn addresses(region: &Region) -> std::collections::BTreeSet<isize> {
        let mut all = std::collections::BTreeSet::new();
        let [a, b, c, d] = region.shape;
        for index in 0..a * b * c * d {
            let index = [index / (b * c * d), index / (c * d) % b, index / d % c, index % d];
            let offset: isize =
                index.iter().zip(region.strides).map(|(&i, stride)| i as isize * stride).sum();
            all.insert(region.data.addr() as isize + 4 * offset);
        }
        all
    }

    #[test]
    fn apart_is_never_said_of_what_overlaps() {
        let mut state = 1u64;
        let mut random = |n: u64| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) % n
        };
        let (mut apart, mut really) = (0, 0);
        for _ in 0..20_000 {
            let mut one = || {
                let shape = core::array::from_fn(|_| random(4) as i64);
                let strides = core::array::from_fn(|_| random(49) as i64 - 24);
                region(4000 + 4 * random(60) as usize, shape, strides).ok()
            };
            let (Some(a), Some(b)) = (one(), one()) else { unreachable!("small regions are fine") };
            let disjoint = addresses(&a).is_disjoint(&addresses(&b));
            let said = a.is_apart(&b);
            assert!(disjoint || !said, "{a:?} {b:?}");
            assert_eq!(said, b.is_apart(&a));
            apart += u32::from(said);
            really += u32::from(disjoint);
        }
        assert!(apart > 1000 && really >= apart, "{apart} of {really}");
    }

    #[test]
    fn interleaved_layouts_are_apart() -> Result<(), Failure> {
        // [token][q, k, v, out][head][dim], seen as (1, heads, tokens, dim).
        let part = |i: usize| region(4096 + 4 * i * 3 * 8, [1, 3, 5, 8], [0, 8, 4 * 3 * 8, 1]);
        assert!(part(0)?.is_apart(&part(3)?) && part(2)?.is_apart(&part(1)?));
        // Columns 0..4 and 4..8 of one matrix, rows backwards.
        let (left, right) =
            (region(4096, [1, 1, 9, 4], [0, 0, 8, 1])?, region(4112, [1, 1, 9, 4], [0, 0, 8, 1])?);
        assert!(left.is_apart(&right) && !left.is_apart(&left));
        // One value too wide.
        let wide = region(4096, [1, 1, 9, 5], [0, 0, 8, 1])?;
        assert!(!wide.is_apart(&right));
        Ok(())
    }

    #[test]
    fn what_is_refused() {
        let status =
            |at, shape, strides| region(at, shape, strides).map_or_else(|failure| failure.status, |_| QKV_OK);
        assert_eq!(status(4096, [1, 1, 1, 1], [0; 4]), QKV_OK);
        assert_eq!(status(0, [1, 1, 1, 1], [0; 4]), QKV_ERROR_NULL);
        assert_eq!(status(0, [1, 0, 1, 1], [9; 4]), QKV_OK);
        assert_eq!(status(4097, [1, 1, 1, 1], [0; 4]), QKV_ERROR_MISALIGNED);
        assert_eq!(status(4096, [1, -1, 1, 1], [0; 4]), QKV_ERROR_VALUE);
        assert_eq!(status(4096, [1 << 31, 1 << 31, 1, 1], [0; 4]), QKV_ERROR_TOO_LARGE);
        assert_eq!(status(4096, [i64::MAX; 4], [i64::MIN; 4]), QKV_ERROR_TOO_LARGE);
        assert_eq!(status(4096, [2, 1, 1, 1], [i64::MAX, 0, 0, 0]), QKV_ERROR_TOO_LARGE);
        assert_eq!(status(4096, [2, 1, 1, 1], [i64::MIN, 0, 0, 0]), QKV_ERROR_TOO_LARGE);
        assert_eq!(status(4096, [2, 1, 1, 1], [-1024, 0, 0, 0]), QKV_ERROR_TOO_LARGE);
        assert_eq!(status(4096, [2, 1, 1, 1], [-1023, 0, 0, 0]), QKV_OK);
    }
}
