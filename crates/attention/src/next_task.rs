//! The task that a worker does next, taken while it ends the one before, so that what it begins with can be asked for: nothing
//! else would. For few rows its first keys, of which such a task has little else; otherwise its query rows, which are
//! packed before anything is computed, and keys that may lie in no cache.

use core::ops::Range;

use qkv_gemm::parallel::Tasks;
use qkv_simd::Simd;

use crate::interval::{Segment, visible};
use crate::plan::Task;
use crate::prefill::Worker;
use crate::rule::ScoreRule;
use crate::strip::StripRows;

/// A task that is taken.
#[derive(Clone, Debug)]
pub(crate) struct Taken {
    /// Its number.
    pub(crate) index: usize,
    /// What it begins with, where that is asked for by the task before.
    pub(crate) begin: Begin,
}

/// What a task begins with.
#[derive(Clone, Debug)]
pub(crate) enum Begin {
    /// Nobody asks for it.
    NotAsked,
    /// For few rows: sequence, key/value head, first key.
    Key(Segment, usize, usize),
    /// Otherwise: all its query rows; the rows of its first block of keys, their distance and number, where no task before
    /// has read them and they are read in place.
    Tiles { rows: StripRows, keys: Option<(*const f32, isize, usize)> },
}

impl Taken {
    /// One that nothing is asked for.
    pub(crate) fn unasked(index: usize) -> Self {
        Self { index, begin: Begin::NotAsked }
    }

    /// Whether its queries were asked for.
    pub(crate) fn has_queries(&self) -> bool {
        matches!(self.begin, Begin::Tiles { .. })
    }
}

impl<S: Simd, R: ScoreRule, const MR: usize, const NV: usize, const FEW: bool>
    Worker<'_, '_, S, R, MR, NV, FEW>
{
    /// The block of keys with which the next task is taken, by its end: the last, or the last of the strip that ends first, for
    /// every strip asks for its share in its own last block.
    #[inline(always)]
    pub(crate) fn end_of_first_strip(&self) -> usize {
        if FEW {
            return self.end;
        }
        if !self.call.plan.is_cold {
            return usize::MAX;
        }
        let rows = self.rows_of(0);
        visible(self.call.spec, &rows.segment, rows.queries()).any.end.min(self.end)
    }

    /// Takes the next task, if that has not been done.
    #[inline(never)]
    pub(crate) fn take_next(&mut self) {
        let (call, None) = (self.call, &self.next) else { return };
        // With few rows, all tasks are short.
        let take = if FEW { Tasks::take } else { Tasks::take_early };
        let Some(index) = self.tasks.and_then(take) else { return };
        let task = call.plan.task(index);
        let few = call.plan.has_few_rows(&task.segment);
        let begin = if FEW != few || task.parts.is_empty() || task.rows.is_empty() {
            Begin::NotAsked
        } else if FEW {
            let visible = call.visible(&task);
            let first = match call.plan.parts(&task.segment) {
                (1, _) => visible.start,
                (_, part_keys) => visible.start.max(task.parts.start * part_keys),
            };
            if first < visible.end { Begin::Key(task.segment, task.kv_head, first) } else { Begin::NotAsked }
        } else {
            let rows = call.plan.rows_of(&task, task.rows.clone());
            let new = self.new_keys(&task);
            let place =
                if new.is_empty() { None } else { call.k.in_place(&task.segment, task.kv_head, new.start) };
            let keys = place.map(|(first, stride)| (first, stride, new.len().min(self.key_block)));
            Begin::Tiles { rows, keys }
        };
        self.next = Some(Taken { index, begin });
    }

    /// The keys that the next task begins with and that may lie in no near cache.
    fn new_keys(&self, next: &Task) -> Range<usize> {
        let (call, all) = (self.call, self.call.visible(next));
        if call.plan.reads_first(next) {
            return all;
        }
        if !call.plan.slides {
            return 0..0;
        }
        let last = next.rows.start + (next.rows.len() - 1) / Self::NR * Self::NR;
        let rows = call.plan.rows_of(next, last..next.rows.end);
        let first = visible(call.spec, &next.segment, rows.queries()).any;
        let seen = call.visible(self.task);
        if next.segment != self.task.segment || next.kv_head != self.task.kv_head {
            first
        } else if first.start < seen.start {
            first.start..first.end.min(seen.start)
        } else {
            first.start.max(seen.end).min(first.end)..first.end
        }
    }
}
