//! Structs that grow: the first field says how much of one the caller knows.
//!
//! A caller that was compiled with an older header passes a smaller struct, and what it does not know is 0, which means
//! "not asked for" in every field. One that was compiled with a newer header passes a larger struct, and is understood
//! where what this library does not know is 0.

use core::mem::MaybeUninit;

use crate::status::{Failure, qkv_status::*};

/// A struct whose first field is its size.
///
/// # Safety
/// It is `repr(C)`, its first field is a `usize` with its size, and any bytes are a valid value of it.
pub(crate) unsafe trait Versioned: Copy {
    /// What it is called in messages.
    const NAME: &'static str;
    /// The size that it had in version 0.1, the first.
    const FIRST: usize = size_of::<Self>();
}

/// Sizes beyond this are no sizes of structs.
const LARGEST: usize = 1 << 16;

/// A copy of a versioned struct; all 0 where `from` is NULL and may be.
///
/// # Safety
/// `from` must be NULL, misaligned, or valid for reads of a size, and of as many bytes as that says.
pub(crate) unsafe fn versioned<T: Versioned>(from: *const T, may_be_null: bool) -> Result<T, Failure> {
    let mut copy = MaybeUninit::<T>::zeroed();
    if from.is_null() && !may_be_null {
        return Err(Failure::null(T::NAME));
    }
    if !from.is_null() {
        if !from.is_aligned() {
            let what = format!("{}: at {:#x}, expected the address of a struct", T::NAME, from.addr());
            return Err(Failure::new(QKV_ERROR_MISALIGNED, what));
        }
        // SAFETY: aligned, and the caller's promise: at least the first field can be read.
        let given = unsafe { from.cast::<usize>().read() };
        if given < T::FIRST || given > LARGEST {
            let what = format!("{}: struct_size is {given}, expected {}", T::NAME, size_of::<T>());
            return Err(Failure::new(QKV_ERROR_STRUCT_SIZE, what));
        }
        let known = given.min(size_of::<T>());
        // SAFETY: the caller's promise for the source, and `known` is at most the size of the copy.
        unsafe { copy.as_mut_ptr().cast::<u8>().copy_from_nonoverlapping(from.cast(), known) };
        for at in known..given {
            // SAFETY: the caller's promise.
            if unsafe { from.cast::<u8>().add(at).read() } != 0 {
                let what = format!(
                    "{}: byte {at} is set, which this version (of {} bytes) does not know: not supported",
                    T::NAME,
                    size_of::<T>()
                );
                return Err(Failure::new(QKV_ERROR_NOT_SUPPORTED, what));
            }
        }
    }
    // SAFETY: any bytes are a valid value of a versioned struct.
    Ok(unsafe { copy.assume_init() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[repr(C)]
    #[derive(Clone, Copy)]
    struct Two {
        struct_size: usize,
        a: u64,
        b: u64,
    }

    // SAFETY: as the trait asks.
    unsafe impl Versioned for Two {
        const NAME: &'static str = "two";
        const FIRST: usize = 16;
    }

    fn look(bytes: &[u64]) -> Result<(u64, u64), qkv_status> {
        // SAFETY: the sizes in the tests are no larger than the slices, unless they are refused.
        unsafe { versioned(bytes.as_ptr().cast::<Two>(), false) }
            .map(|two| (two.a, two.b))
            .map_err(|failure| failure.status)
    }
    use crate::status::qkv_status;

    #[test]
    fn older_and_newer_structs() {
        assert_eq!(look(&[24, 1, 2]), Ok((1, 2)));
        assert_eq!(look(&[16, 1, 2]), Ok((1, 0)));
        assert_eq!(look(&[32, 1, 2, 0]), Ok((1, 2)));
        assert_eq!(look(&[32, 1, 2, 1 << 63]), Err(QKV_ERROR_NOT_SUPPORTED));
        assert_eq!(look(&[15, 1, 2]), Err(QKV_ERROR_STRUCT_SIZE));
        assert_eq!(look(&[0, 1, 2]), Err(QKV_ERROR_STRUCT_SIZE));
        assert_eq!(look(&[u64::MAX, 1, 2]), Err(QKV_ERROR_STRUCT_SIZE));
        let null = |may| {
            // SAFETY: NULL is refused, or all 0.
            let two = unsafe { versioned(core::ptr::null::<Two>(), may) };
            two.map(|two| two.struct_size + two.a as usize)
        };
        assert_eq!(null(false).map_err(|failure| failure.status), Err(QKV_ERROR_NULL));
        assert_eq!(null(true).ok(), Some(0));
    }
}
