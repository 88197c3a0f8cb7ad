//! Memory in huge pages, where Linux has them.

use core::mem::MaybeUninit;

/// Asks for memory that nothing has been written to yet to come in huge pages, as far as whole ones (2 MiB) lie in it: the spare
/// capacity of a fresh `Vec`, say. What is read once from end to end, like keys, values and weights, is more than a TLB holds,
/// and in pages of 4 KiB every 64th line waits for a page walk.
///
/// Where transparent huge pages are set to `madvise`, as many distributions do, nobody gets any unasked. Systems other than Linux
/// have no such advice, or need none: there this does nothing, as under a kernel that has no huge pages.
pub fn prefer_huge_pages<T>(memory: &mut [MaybeUninit<T>]) {
    advise(memory);
}

#[cfg(target_os = "linux")]
fn advise<T>(memory: &mut [MaybeUninit<T>]) {
    /// On x86-64, and on AArch64 with pages of 4 KiB; a multiple of every page.
    const HUGE: usize = 2 << 20;
    let bytes = memory.as_mut_ptr_range();
    let (start, end) = (bytes.start.cast::<u8>(), bytes.end as usize / HUGE * HUGE);
    let start = start.wrapping_add((start as usize).wrapping_neg() % HUGE);
    if end > start as usize {
        // SAFETY: the pages from `start` to `end` lie in `memory`, of which advice changes neither the contents nor what may be
        // done with it. Refusal, by a kernel without huge pages, leaves everything as it was.
        unsafe { libc::madvise(start.cast(), end - start as usize, libc::MADV_HUGEPAGE) };
    }
}

#[cfg(not(target_os = "linux"))]
fn advise<T>(_memory: &mut [MaybeUninit<T>]) {}
