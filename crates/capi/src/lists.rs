//! Lists: an address and a count.

use qkv::AttentionError;

use crate::region::Region;
use crate::status::{Failure, qkv_status::*};

/// Numbers that are read. NULL and 0: not given.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct qkv_floats {
    /// The first.
    pub data: *const f32,
    /// How many.
    pub count: usize,
}

/// Numbers that are written. NULL and 0: not given.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct qkv_floats_mut {
    /// The first.
    pub data: *mut f32,
    /// How many.
    pub count: usize,
}

/// Lengths, ends or positions. NULL and 0: not given.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct qkv_integers {
    /// The first.
    pub data: *const i64,
    /// How many.
    pub count: usize,
}

/// Looks at the address of `count` values; false where the list is not given.
pub(crate) fn is_given<T>(argument: &'static str, data: *const T, count: usize) -> Result<bool, Failure> {
    if data.is_null() {
        return if count == 0 { Ok(false) } else { Err(Failure::null(argument)) };
    }
    if !data.is_aligned() {
        let what = format!("{argument}: at {:#x}, expected a multiple of {}", data.addr(), size_of::<T>());
        return Err(Failure::new(QKV_ERROR_MISALIGNED, what));
    }
    let bytes = count.checked_mul(size_of::<T>()).and_then(|bytes| bytes.checked_add(data.addr()));
    if bytes.is_none_or(|end| isize::try_from(end).is_err()) {
        let what = format!("{argument}: {count} entries span more than the address space");
        return Err(Failure::new(QKV_ERROR_TOO_LARGE, what));
    }
    Ok(true)
}

/// Refuses another number of entries than one of `expected` before any is read.
fn check_count(argument: &'static str, given: usize, expected: &[usize]) -> Result<(), Failure> {
    match expected.first() {
        Some(&first) if !expected.contains(&given) => {
            Err(AttentionError::Count { argument, given, expected: first }.into())
        }
        _ => Ok(()),
    }
}

impl qkv_floats {
    /// A copy, where the list is given; `expected` are the counts that are allowed, any if there are none.
    ///
    /// # Safety
    /// The list must be readable.
    pub(crate) unsafe fn copied(
        self,
        argument: &'static str,
        expected: &[usize],
    ) -> Result<Option<Vec<f32>>, Failure> {
        if !is_given(argument, self.data, self.count)? {
            return Ok(None);
        }
        check_count(argument, self.count, expected)?;
        // SAFETY: aligned, not NULL, no longer than the address space, and the caller's promise.
        Ok(Some(unsafe { core::slice::from_raw_parts(self.data, self.count) }.to_vec()))
    }
}

impl qkv_integers {
    /// A copy, as [`qkv_floats::copied`]; no entry may be negative.
    ///
    /// # Safety
    /// The list must be readable.
    pub(crate) unsafe fn copied(
        self,
        argument: &'static str,
        expected: &[usize],
    ) -> Result<Option<Vec<usize>>, Failure> {
        if !is_given(argument, self.data, self.count)? {
            return Ok(None);
        }
        check_count(argument, self.count, expected)?;
        // SAFETY: aligned, not NULL, no longer than the address space, and the caller's promise.
        let list = unsafe { core::slice::from_raw_parts(self.data, self.count) };
        let converted = list.iter().enumerate().map(|(index, &given)| {
            usize::try_from(given).map_err(|_| {
                Failure::new(QKV_ERROR_VALUE, format!("{argument}[{index}]: {given}, expected 0 or more"))
            })
        });
        converted.collect::<Result<_, _>>().map(Some)
    }
}

impl qkv_floats_mut {
    /// The memory, where the list is given.
    pub(crate) fn region(self, argument: &'static str) -> Result<Option<Region>, Failure> {
        if !is_given(argument, self.data, self.count)? {
            return Ok(None);
        }
        Region::list(argument, self.data, self.count).map(Some)
    }
}

/// A size from C.
pub(crate) fn size(argument: &'static str, given: i64) -> Result<usize, Failure> {
    usize::try_from(given)
        .map_err(|_| Failure::new(QKV_ERROR_VALUE, format!("{argument}: {given}, expected 0 or more")))
}

/// A flag from C.
pub(crate) fn flag(argument: &'static str, given: u32) -> Result<bool, Failure> {
    match given {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(Failure::new(QKV_ERROR_VALUE, format!("{argument}: {given}, expected 0 or 1"))),
    }
}
