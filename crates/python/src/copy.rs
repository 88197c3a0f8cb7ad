//! Copies: of arrays whose last axis is not contiguous or whose values are not aligned, widened or not.

use pyo3::exceptions::PyMemoryError;
use pyo3::prelude::*;

/// Values that lie somewhere in memory, aligned or not.
#[derive(Debug)]
pub(crate) struct Source<'a> {
    /// Element (0, .., 0).
    pub(crate) data: *const u8,
    pub(crate) shape: &'a [usize],
    pub(crate) byte_strides: &'a [isize],
}

/// All values in row-major order, and their strides in values. Where `broadcasts` are kept, an axis of stride 0 (not the
/// last one) is copied once and has stride 0 in the copy as well.
///
/// # Errors
/// `MemoryError` where there is not enough of it.
///
/// # Safety
/// `read` is called with the address of every element, which must be readable by it.
pub(crate) unsafe fn gather<T>(
    source: &Source<'_>,
    broadcasts: bool,
    read: impl Fn(*const u8) -> T,
) -> PyResult<(Vec<T>, Vec<isize>)> {
    let rank = source.shape.len();
    let is_kept = |axis: usize| broadcasts && axis + 1 < rank && source.byte_strides[axis] == 0;
    let sizes: Vec<usize> = (0..rank)
        .map(|axis| if is_kept(axis) { source.shape[axis].min(1) } else { source.shape[axis] })
        .collect();
    let memory =
        || PyMemoryError::new_err(format!("no memory for a copy of an array of shape {:?}", source.shape));
    let count = sizes.iter().try_fold(1usize, |count, &size| count.checked_mul(size)).ok_or_else(memory)?;
    let mut values = Vec::new();
    values.try_reserve_exact(count).map_err(|_| memory())?;
    let mut strides = crate::dlpack::contiguous(&sizes).ok_or_else(memory)?;
    for (axis, stride) in strides.iter_mut().enumerate() {
        if is_kept(axis) {
            *stride = 0;
        }
    }
    if count > 0 {
        let (inner, step) = match rank {
            0 => (1, 0),
            _ => (sizes[rank - 1], source.byte_strides[rank - 1]),
        };
        let outer = &sizes[..rank.saturating_sub(1)];
        let mut index = vec![0usize; outer.len()];
        loop {
            let offset: isize =
                index.iter().zip(source.byte_strides).map(|(&i, &stride)| i as isize * stride).sum();
            let row = source.data.wrapping_offset(offset);
            values.extend((0..inner).map(|i| read(row.wrapping_offset(i as isize * step))));
            // The next index, last axis fastest; done when all have turned over.
            let Some(axis) = (0..outer.len()).rev().find(|&axis| index[axis] + 1 < outer[axis]) else {
                break;
            };
            index[axis] += 1;
            index[axis + 1..].fill(0);
        }
    }
    Ok((values, strides))
}
