//! Rows of keys or of values where they lie, as runs of rows at one distance from each other.
//!
//! Runs and not addresses, so that a kernel counts its addresses up instead of loading them: of loads whose addresses are
//! loaded too, the hardware makes no stream (docs/TUNING.md, what was tried).
//!
//! Each run says what is to be asked for while it is read: the run that follows it. Runs are short, [`RowRun::most`], so that
//! this is not too far ahead.

use core::ops::Range;

use arrayvec::ArrayVec;

use crate::few_rows::FEW_BLOCK;

/// Bytes of a run, about, and so how far ahead is asked. Two threads on Zen 4, from memory, against 4, 16 and 32 KiB: f32 within
/// the noise; bf16, 32 heads over 32, 4096 keys takes 1.3 of the time with 32.
const RUN_BYTES: usize = 8 << 10;

/// Rows of a block, of keys or of values.
pub(crate) struct FewRows<'w> {
    /// Where they are.
    pub(crate) runs: &'w [RowRun],
    /// What they consist of.
    pub(crate) kind: RowKind,
    /// A factor per row, where they have any.
    pub(crate) scales: &'w [f32],
    /// Values of each.
    pub(crate) dim: usize,
}

/// What rows consist of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RowKind {
    F32,
    F16,
    Bf16,
    /// With a scale per row.
    Int8,
}

/// Rows at one distance from each other.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowRun {
    /// Where the first begins.
    pub(crate) first: *const u8,
    /// Bytes from one to the next.
    pub(crate) stride: isize,
    /// How many.
    pub(crate) count: usize,
    /// What is asked for with the first, and the distance for the others.
    pub(crate) ahead: (*const u8, isize),
    /// Whether that continues the run in memory.
    pub(crate) goes_on: bool,
    /// Whether what continues it is to be asked for where a line is little work, too.
    pub(crate) eager: bool,
}

/// Runs of the rows of a block.
pub(crate) type RunList = ArrayVec<RowRun, FEW_BLOCK>;

impl RowRun {
    /// A run that asks for nothing but itself.
    #[inline(always)]
    pub(crate) fn new(first: *const u8, stride: isize, count: usize) -> Self {
        Self { first, stride, count, ahead: (first, stride), goes_on: true, eager: false }
    }

    /// The most rows of a run, for rows of `bytes`: a multiple of the keys that a kernel takes at a time.
    #[inline(always)]
    pub(crate) fn most(bytes: usize) -> usize {
        RUN_BYTES.div_ceil(bytes.max(1)).next_multiple_of(4).min(FEW_BLOCK)
    }

    /// `count` rows from the `skip`-th on.
    #[inline(always)]
    fn part(&self, skip: usize, count: usize) -> Self {
        let skip = skip as isize;
        let (ahead, ahead_stride) = self.ahead;
        Self {
            first: self.first.wrapping_offset(skip * self.stride),
            count,
            ahead: (ahead.wrapping_offset(skip * ahead_stride), ahead_stride),
            ..*self
        }
    }
}

/// Adds `count` rows from `first` on, by at most `most`: to the last run where they continue it, as pages side by side do.
#[inline(always)]
pub(crate) fn add(
    runs: &mut RunList,
    (mut first, stride): (*const u8, isize),
    mut count: usize,
    most: usize,
) {
    if let Some(last) = runs.last_mut()
        && (first, stride) == (last.first.wrapping_offset(last.count as isize * last.stride), last.stride)
    {
        let more = count.min(most.saturating_sub(last.count));
        last.count += more;
        (first, count) = (first.wrapping_offset(more as isize * stride), count - more);
    }
    while count > 0 {
        let rows = count.min(most);
        runs.push(RowRun::new(first, stride, rows));
        (first, count) = (first.wrapping_offset(rows as isize * stride), count - rows);
    }
}

/// Lets each run ask for the next one, and the last for the rows that begin at `then`; `eager`: see [`RowRun`].
#[inline(always)]
pub(crate) fn link(runs: &mut [RowRun], then: Option<(*const u8, isize)>, eager: bool) {
    let mut next = then;
    for run in runs.iter_mut().rev() {
        if let Some(next) = next {
            run.ahead = next;
            run.eager = eager;
            run.goes_on = next == (run.first.wrapping_offset(run.count as isize * run.stride), run.stride);
        }
        next = Some((run.first, run.stride));
    }
}

/// A way through runs, forward only.
#[derive(Clone, Copy)]
pub(crate) struct RunCursor<'a> {
    runs: &'a [RowRun],
    /// Rows before them.
    start: usize,
}

impl<'a> RunCursor<'a> {
    #[inline(always)]
    pub(crate) fn new(runs: &'a [RowRun]) -> Self {
        Self { runs, start: 0 }
    }

    /// Leaves the runs behind that end at row `to` or before.
    #[inline(always)]
    pub(crate) fn advance(&mut self, to: usize) {
        while let Some((run, rest)) = self.runs.split_first()
            && self.start + run.count <= to
        {
            self.start += run.count;
            self.runs = rest;
        }
    }

    /// The rows of a range as far as they lie in one run, at least one of them; None where the range or the runs end. It must not
    /// begin before what has been left behind.
    #[inline(always)]
    pub(crate) fn take(&mut self, range: Range<usize>) -> Option<RowRun> {
        self.advance(range.start);
        let run = self.runs.first()?;
        let skip = range.start - self.start;
        let count = (run.count - skip).min(range.len());
        (count > 0).then(|| run.part(skip, count))
    }
}
