//! The free pages of a pool, and which of them comes next.
//!
//! Pages that follow each other are one stream of rows (see [`super::PagedCache`]), so a sequence goes on with the page
//! after its last one where that is free. One that cannot, or has none yet, begins in the largest gap, halfway between
//! the room that whoever lies before the gap may still grow into and its own: sequences that grow in turns, token by
//! token, then do not end up with pages that alternate.

use std::collections::{BTreeMap, BTreeSet};

/// Free pages, as gaps: runs of free pages that do not touch each other.
#[derive(Clone, Debug, Default)]
pub(super) struct FreePages {
    count: usize,
    /// Lengths by first page.
    gaps: BTreeMap<u32, u32>,
    /// (length, first page).
    by_length: BTreeSet<(u32, u32)>,
}

impl FreePages {
    /// Pages 0 to `count` - 1.
    pub(super) fn all(count: u32) -> Self {
        let mut free = Self { count: count as usize, ..Self::default() };
        if count > 0 {
            free.insert(0, count);
        }
        free
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// Takes `needed` pages for a sequence whose last page is `last`, or None where there are not as many.
    pub(super) fn take(&mut self, needed: usize, mut last: Option<u32>) -> Option<Taken<'_>> {
        if needed > self.count {
            return None;
        }
        let mut pages = Vec::with_capacity(needed);
        while pages.len() < needed {
            let wanted = u32::try_from(needed - pages.len()).unwrap_or(u32::MAX);
            let next = last.and_then(|last| last.checked_add(1)).filter(|next| self.gaps.contains_key(next));
            let (gap, first) = match next {
                Some(next) => (next, next),
                None => {
                    let &(length, gap) = self.by_length.last()?;
                    // Nobody lies before page 0.
                    let room = if gap == 0 { 0 } else { length.saturating_sub(wanted) / 2 };
                    (gap, gap + room)
                }
            };
            let length = self.remove(gap)?;
            let count = wanted.min(gap + length - first);
            if first > gap {
                self.insert(gap, first - gap);
            }
            if first + count < gap + length {
                self.insert(first + count, gap + length - first - count);
            }
            pages.extend(first..first + count);
            self.count -= count as usize;
            last = Some(first + count - 1);
        }
        Some(Taken { free: self, pages })
    }

    /// Gives a page back.
    pub(super) fn give(&mut self, page: u32) {
        let (mut first, mut length) = (page, 1);
        if let Some((&before, &count)) = self.gaps.range(..page).next_back()
            && before + count == page
        {
            self.remove(before);
            first = before;
            length += count;
        }
        if let Some(after) = page.checked_add(1).and_then(|next| self.remove(next)) {
            length += after;
        }
        self.insert(first, length);
        self.count += 1;
    }

    fn insert(&mut self, first: u32, length: u32) {
        self.gaps.insert(first, length);
        self.by_length.insert((length, first));
    }

    fn remove(&mut self, first: u32) -> Option<u32> {
        let length = self.gaps.remove(&first)?;
        self.by_length.remove(&(length, first));
        Some(length)
    }
}

/// Pages that were taken, and go back unless they are kept: also where the caller's own code panics on the way.
#[derive(Debug)]
pub(super) struct Taken<'a> {
    free: &'a mut FreePages,
    pages: Vec<u32>,
}

impl Taken<'_> {
    /// The pages, in order.
    pub(super) fn pages(&self) -> &[u32] {
        &self.pages
    }

    /// The pages, for good.
    pub(super) fn keep(mut self) -> Vec<u32> {
        core::mem::take(&mut self.pages)
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        for &page in &self.pages {
            self.free.give(page);
        }
    }
}
