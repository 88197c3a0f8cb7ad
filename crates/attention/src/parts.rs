//! The keys of short queries, cut into parts that several threads can take.
//!
//! The number of parts is a function of the key length alone, so a row has the same bits for any number of threads and in
//! any batch. Each part leaves (m, l, o) of its rows in a slot, and the thread that finishes the last part of a unit (sequence,
//! key/value head, rows of a task) merges them in order: with M the largest of the maxima m_p, in natural units,
//!
//! ```text
//! l = sum over p of exp(m_p - M) l_p        out = sum over p of exp(m_p - M) o_p / l        see finish.rs
//! ```
//!
//! and not from log-sum-exps, in which l_p is lost where m_p is large. Where there are enough heads for all threads, one task takes all parts in
//! turn, with slots of its own.

use core::sync::atomic::{AtomicU32, Ordering};
use std::cell::UnsafeCell;

use crate::few_rows::FEW_BLOCK;

/// Keys of a part. A part is read in some 50 microseconds (dim 128, f32), many times the cost of taking a task.
const PART: usize = 1024;

/// No sequence has more parts: what their slots take is bounded then.
const MAX_PARTS: usize = 32;

/// With fewer units than these, the parts of each are tasks of their own.
pub(crate) const ENOUGH_UNITS: usize = 32;

/// Keys per part of a sequence, whole key blocks.
pub(crate) fn part_keys(key_len: usize) -> usize {
    key_len.div_ceil(MAX_PARTS).max(PART).next_multiple_of(FEW_BLOCK)
}

/// Parts of a sequence; one where it has no keys.
pub(crate) fn parts(key_len: usize) -> usize {
    key_len.div_ceil(part_keys(key_len)).max(1)
}

/// The slots that the tasks of a unit share.
#[derive(Debug)]
pub(crate) struct Shared {
    slots: Vec<UnsafeCell<f32>>,
    /// Per unit: its parts that are finished.
    finished: Vec<AtomicU32>,
    slot: usize,
}

// SAFETY: a slot is written by the one task that has its part, and read only after all parts of its unit are finished, by
// the one task that counted the last; the counter orders the two.
unsafe impl Sync for Shared {}

impl Shared {
    /// For `units`, `parts` of each, with `slot` values per part.
    pub(crate) fn new(units: usize, parts: usize, slot: usize) -> Self {
        Self {
            slots: (0..units * parts * slot).map(|_| UnsafeCell::new(0.0)).collect(),
            finished: (0..units).map(|_| AtomicU32::new(0)).collect(),
            slot,
        }
    }

    /// The slots of a unit, `parts` of them from number `first` on.
    ///
    /// # Safety
    /// The task must be the one that has these parts, or have been told by [`Self::finish`] that all are finished.
    #[expect(clippy::mut_from_ref, reason = "the slots of different parts do not overlap")]
    pub(crate) unsafe fn slots(&self, first: usize, parts: usize) -> &mut [f32] {
        let cells = &self.slots[first * self.slot..][..parts * self.slot];
        // SAFETY: the cells may be written through a shared reference, and no other task has these, says the caller.
        unsafe { core::slice::from_raw_parts_mut(UnsafeCell::raw_get(cells.as_ptr()), cells.len()) }
    }

    /// Counts `done` parts of `unit` as finished; true if these are the last of `parts`.
    pub(crate) fn finish(&self, unit: usize, done: usize, parts: usize) -> bool {
        self.finished[unit].fetch_add(done as u32, Ordering::AcqRel) as usize + done == parts
    }
}
