//! Scratch memory: cache-line aligned storage for panels, kept by each thread from one call to the next.
//!
//! A product of 64 x 64 matrices takes a few microseconds, and asking the system allocator for its panels (with the
//! page faults of fresh memory) would be a visible part of that. So a thread keeps one buffer of at most
//! [`KEPT`] values and grows it on demand; what is larger is allocated for the one call and given back after it. A
//! nested call finds the thread's buffer taken and gets a fresh one, so the two never share memory.

use core::cell::RefCell;
use core::fmt;

/// Most `f32` that a thread keeps between calls: 2 Mi values, 8 MiB.
///
/// Large enough for the driver's block of A and panel of B at the same time (1.3 MiB with the largest
/// `MC`, `KC` and `NC` per thread, see `params.rs`), small enough that idle threads cost next to nothing.
pub const KEPT: usize = 2 << 20;

/// Values in a cache line.
const LINE: usize = 16;

/// One cache line: the unit of storage, which gives the buffer its alignment.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; LINE]);

// SAFETY: a `Line` is 64 bytes of `f32`, all of which may be zero.
unsafe impl bytemuck::Zeroable for Line {}
// SAFETY: `repr(C)`, 16 x 4 bytes in a type aligned to 64: no padding, and every bit pattern is a value.
unsafe impl bytemuck::Pod for Line {}

/// Storage of `f32` that starts on a cache line (64 bytes) and only grows.
///
/// Alignment matters twice: a vector that straddles two lines costs two accesses to L1, and on AVX-512 every unaligned
/// vector does.
#[derive(Clone, Default)]
pub struct AlignedBuf {
    lines: Vec<Line>,
}

impl AlignedBuf {
    /// An empty buffer; allocates nothing.
    #[must_use]
    pub const fn new() -> Self {
        Self { lines: Vec::new() }
    }

    /// Exactly `len` values, aligned to 64 bytes. Their contents are unspecified (what was there before, or zero) but
    /// initialised. Allocates only where the buffer has never been this long.
    ///
    /// Aborts as `Vec` does where memory is exhausted.
    pub fn reserve(&mut self, len: usize) -> &mut [f32] {
        let lines = len.div_ceil(LINE);
        if lines > self.lines.len() {
            // Nothing is worth copying, so the old storage goes first; zeroed memory comes from the system for free.
            self.lines = Vec::new();
            self.lines = bytemuck::zeroed_vec(lines);
        }
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..len]
    }

    /// As [`Self::reserve`], but None where the memory cannot be had; what was there before is then gone.
    pub fn try_reserve(&mut self, len: usize) -> Option<&mut [f32]> {
        let lines = len.div_ceil(LINE);
        if lines > self.lines.len() {
            self.lines = Vec::new();
            self.lines = bytemuck::allocation::try_zeroed_vec(lines).ok()?;
        }
        Some(&mut bytemuck::cast_slice_mut(&mut self.lines)[..len])
    }

    /// The first value; dangling where nothing is reserved.
    #[must_use]
    pub fn as_ptr(&self) -> *const f32 {
        self.lines.as_ptr().cast()
    }

    /// Values that [`Self::reserve`] gives without allocating.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.lines.len() * LINE
    }
}

impl fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AlignedBuf").field("capacity", &self.capacity()).finish()
    }
}

thread_local! {
    static SCRATCH: RefCell<AlignedBuf> = const { RefCell::new(AlignedBuf::new()) };
}

/// Calls `f` with `len` values of scratch, aligned to 64 bytes and with unspecified contents.
///
/// The memory is the thread's own and is used again by its next call. Calls may nest: an inner one gets memory of its
/// own. A buffer of more than [`KEPT`] values is given back when `f` returns.
pub fn with_scratch<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    if len > KEPT {
        return f(AlignedBuf::new().reserve(len));
    }
    // The buffer may be in use by a call further up the stack, and it is gone while a thread is being torn down; both
    // are rare, and a fresh buffer serves as well.
    let mut f = Some(f);
    let reused = SCRATCH.try_with(|scratch| {
        let mut scratch = scratch.try_borrow_mut().ok()?;
        f.take().map(|f| f(scratch.reserve(len)))
    });
    match (reused, f) {
        (Ok(Some(result)), _) => result,
        (_, Some(f)) => f(AlignedBuf::new().reserve(len)),
        // `f` was taken only on the way to a result, or its panic is unwinding through here.
        (_, None) => unreachable!("scratch: the callback was consumed without a result"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffer_is_aligned_exact_and_grows_only() {
        let mut buf = AlignedBuf::new();
        assert_eq!(buf.reserve(0).len(), 0);
        assert_eq!(buf.capacity(), 0);
        for len in [1, 15, 16, 17, 1000, 3] {
            let before = buf.capacity();
            let slice = buf.reserve(len);
            assert_eq!(slice.len(), len);
            assert_eq!(slice.as_ptr().align_offset(64), 0);
            assert!(buf.capacity() >= before.max(len));
        }
        let start = buf.reserve(1000).as_ptr();
        assert_eq!(start, buf.reserve(500).as_ptr());
    }

    #[test]
    fn nested_calls_do_not_share_memory() {
        with_scratch(100, |outer| {
            outer.fill(1.0);
            with_scratch(100, |inner| inner.fill(2.0));
            with_scratch(KEPT + 1, |inner| inner.fill(3.0));
            assert!(outer.iter().all(|&x| x == 1.0));
        });
    }

    #[test]
    fn thread_reuses_its_buffer_but_keeps_no_large_one() {
        let first = with_scratch(64, |s| s.as_ptr() as usize);
        assert_eq!(first, with_scratch(64, |s| s.as_ptr() as usize));
        with_scratch(KEPT + 1, |_| ());
        SCRATCH.with_borrow(|s| assert!(s.capacity() <= KEPT));
    }
}
