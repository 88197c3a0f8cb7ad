//! Memory for the rows of a cache, in huge pages where Linux has them.
//!
//! A step of decoding reads all of a cache once, which is more than a TLB holds: in pages of 4 KiB every eighth row of 512 bytes
//! waits for a page walk, in a virtual machine for one of two dimensions, and in a pool of pages of 16 tokens walks find
//! nothing of each other's in the caches. Huge pages against small ones, `measure decode`, two threads on Zen 3, f32, dim 128: 32
//! heads over 8, 8192 keys 0.86 of the time, in pages of 16 tokens 0.89; 32 over 32, 4096 keys 0.94 and 0.91.

use core::fmt;
use core::ops::{Deref, DerefMut};

use qkv_gemm::prefer_huge_pages;

use crate::ahead::LINE;

/// Values whose number does not change, the first of them at the beginning of a line of the processor's cache, where an
/// allocation seldom is: every vector of AVX-512 would straddle two lines. Two threads on Zen 4, f32, dim 128, against 16 bytes
/// into a line: 64 heads over 8 from memory 0.86 of the time, 32 over 8 from L2 0.94.
pub(super) struct Pool<T> {
    memory: Vec<T>,
    /// Values before the first line.
    skip: usize,
    count: usize,
}

impl<T: Copy + Default> Pool<T> {
    /// Zeros, or None where the memory cannot be had.
    pub(super) fn zeros(count: usize) -> Option<Self> {
        let mut memory = Vec::new();
        memory.try_reserve_exact(count.checked_add(Self::SPARE)?).ok()?;
        let skip = Self::start(&mut memory);
        memory.resize(skip + count, T::default());
        Some(Self { memory, skip, count })
    }

    /// Values of a line, of which it may take all but one to get to the next.
    const SPARE: usize = LINE / size_of::<T>();

    /// Asks for huge pages for memory that nothing has been written to, and says where its first line begins.
    fn start(memory: &mut Vec<T>) -> usize {
        let spare = memory.spare_capacity_mut();
        prefer_huge_pages(spare);
        (spare.as_ptr().addr().next_multiple_of(LINE) - spare.as_ptr().addr()) / size_of::<T>()
    }
}

impl<T: Copy + Default> Clone for Pool<T> {
    fn clone(&self) -> Self {
        let mut memory = Vec::with_capacity(self.count + Self::SPARE);
        let skip = Self::start(&mut memory);
        memory.resize(skip, T::default());
        memory.extend_from_slice(self);
        Self { memory, skip, count: self.count }
    }
}

impl<T> Deref for Pool<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        &self.memory[self.skip..][..self.count]
    }
}

impl<T> DerefMut for Pool<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.memory[self.skip..][..self.count]
    }
}

impl<T> fmt::Debug for Pool<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("bytes", &size_of_val::<[T]>(self)).finish()
    }
}
