//! The parts of a block of keys that a block-sparse mask leaves to a strip.

use core::ops::Range;

use crate::AttentionSpec;
use crate::strip::StripRows;

/// Most runs that are kept apart; past them the last one grows over the gaps, and bits mask those.
const MAX_RUNS: usize = 8;

/// Ascending, disjoint ranges of keys.
#[derive(Clone, Debug)]
pub(crate) struct Runs {
    ranges: [Range<usize>; MAX_RUNS],
    count: usize,
    /// Whether some key of the runs is not seen by all of the strip's queries, by the block-sparse mask.
    pub(crate) ragged: bool,
}

impl Runs {
    /// Those of `keys` that any query of the strip sees: all of them without a block-sparse mask.
    pub(crate) fn new(spec: &AttentionSpec<'_>, rows: &StripRows, keys: &Range<usize>) -> Self {
        let mut runs = Self { ranges: [const { 0..0 }; MAX_RUNS], count: 0, ragged: false };
        let Some(blocks) = spec.block_mask else {
            runs.push(keys.clone());
            return runs;
        };
        let size = blocks.block()[1];
        let queries = rows.queries();
        let heads = if blocks.shape()[1] == 1 { 0..1 } else { rows.heads() };
        let mut key = keys.start;
        while key < keys.end {
            let end = keys.end.min(key - key % size + size);
            let (mut any, mut all) = (false, true);
            for head in heads.clone() {
                let sees = blocks.sees_block(rows.segment.index, head, &queries, key);
                any |= sees.0;
                all &= sees.1;
            }
            if any {
                runs.ragged |= !all;
                runs.push(key..end);
            }
            key = end;
        }
        runs
    }

    fn push(&mut self, keys: Range<usize>) {
        if keys.is_empty() {
            return;
        }
        match self.count.checked_sub(1) {
            Some(last) if self.ranges[last].end == keys.start => self.ranges[last].end = keys.end,
            Some(last) if self.count == MAX_RUNS => {
                self.ranges[last].end = keys.end;
                self.ragged = true;
            }
            _ => {
                self.ranges[self.count] = keys;
                self.count += 1;
            }
        }
    }

    #[inline(always)]
    pub(crate) fn as_slice(&self) -> &[Range<usize>] {
        &self.ranges[..self.count]
    }

    /// From the first key of the first to the last key of the last.
    pub(crate) fn hull(&self) -> Range<usize> {
        match self.as_slice() {
            [] => 0..0,
            [first, ..] => first.start..self.ranges[self.count - 1].end,
        }
    }

    /// Counts keys from here on.
    pub(crate) fn count_from(&mut self, key: usize) {
        for run in &mut self.ranges[..self.count] {
            *run = run.start - key..run.end - key;
        }
    }

    /// Whether they are all of `keys`, for every query.
    pub(crate) fn is_whole(&self, keys: &Range<usize>) -> bool {
        !self.ragged && self.as_slice() == core::slice::from_ref(keys)
    }
}
