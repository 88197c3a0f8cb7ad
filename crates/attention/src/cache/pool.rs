//! Memory for the rows of a cache, in huge pages where Linux has them.
//!
//! A step of decoding reads all of a cache once, which is more than a TLB holds: in pages of 4 KiB every eighth row of 512 bytes
//! waits for a page walk, in a virtual machine for one of two dimensions, and in a pool of pages of 16 tokens walks find
//! nothing of each other's in the caches. Huge pages against small ones, `measure decode`, two threads on Zen 3, f32, dim 128: 32
//! heads over 8, 8192 keys 0.86 of the time, in pages of 16 tokens 0.89; 32 over 32, 4096 keys 0.94 and 0.91.

use core::fmt;
use core::ops::{Deref, DerefMut};

use qkv_gemm::prefer_huge_pages;

/// Values whose number does not change.
pub(super) struct Pool<T>(Vec<T>);

impl<T: Copy + Default> Pool<T> {
    /// Zeros, or None where the memory cannot be had.
    pub(super) fn zeros(count: usize) -> Option<Self> {
        let mut values = Vec::new();
        values.try_reserve_exact(count).ok()?;
        prefer_huge_pages(values.spare_capacity_mut());
        values.resize(count, T::default());
        Some(Self(values))
    }
}

impl<T: Copy> Clone for Pool<T> {
    fn clone(&self) -> Self {
        let mut values = Vec::with_capacity(self.len());
        prefer_huge_pages(values.spare_capacity_mut());
        values.extend_from_slice(self);
        Self(values)
    }
}

impl<T> Deref for Pool<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        &self.0
    }
}

impl<T> DerefMut for Pool<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.0
    }
}

impl<T> fmt::Debug for Pool<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("bytes", &size_of_val::<[T]>(self)).finish()
    }
}
