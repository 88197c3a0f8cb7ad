//! What few query rows ask for ahead: rows of keys and values, and the next task's first.

use core::ops::Range;

use qkv_gemm::parallel::Tasks;
use qkv_simd::Simd;

use crate::few_rows::FEW_BLOCK;
use crate::interval::Segment;
use crate::kv_rows::KvRows;
use crate::prefill::Worker;
use crate::row_runs::{RunList, link};
use crate::rule::ScoreRule;

impl<S: Simd, R: ScoreRule, const MR: usize, const NV: usize, const FEW: bool>
    Worker<'_, '_, S, R, MR, NV, FEW>
{
    /// Takes the next task when this one comes to its last block of keys, so that the next one's first can be asked for: nothing
    /// else would, and a task of few rows is no more than its keys.
    #[inline(always)]
    pub(crate) fn take_next(&mut self) {
        let (call, None) = (self.call, self.next) else { return };
        self.next = self.tasks.and_then(Tasks::take);
        self.next_keys = self.next.and_then(|index| {
            let task = call.plan.task(index);
            if task.parts.is_empty() || !call.plan.has_few_rows(&task.segment) {
                return None;
            }
            let visible = call.visible(&task);
            let first = match call.plan.parts(&task.segment) {
                (1, _) => visible.start,
                (_, part_keys) => visible.start.max(task.parts.start * part_keys),
            };
            let end = (first / FEW_BLOCK + 1) * FEW_BLOCK;
            let keys = first..end.min(visible.end);
            (!keys.is_empty()).then_some((task.segment, task.kv_head, keys))
        });
    }

    /// Lets runs of the `rows` of `keys` ask for what is read next, each for the one after it and the last for the first one of
    /// the values after keys, of the keys after values: see [`RowRun`]. What is copied asks for its rows itself.
    #[inline(always)]
    pub(crate) fn link_runs(&self, rows: &KvRows<'_>, keys: &Range<usize>, runs: &mut RunList) {
        let (rows, then) = if core::ptr::eq(rows, &raw const self.call.k) {
            (&self.call.v, Some((&self.task.segment, self.task.kv_head, keys.clone())))
        } else {
            (&self.call.k, self.block_after(keys))
        };
        let then = then.filter(|_| rows.row_kind().is_some());
        link(runs, then.and_then(|(segment, head, keys)| rows.first_run(segment, head, &keys)));
    }

    /// What is read after a block of keys: the next block, at the task's end the next task's first.
    #[inline(always)]
    fn block_after(&self, keys: &Range<usize>) -> Option<(&Segment, usize, Range<usize>)> {
        let next = keys.end..(keys.end + FEW_BLOCK).min(self.end);
        if !next.is_empty() {
            return Some((&self.task.segment, self.task.kv_head, next));
        }
        self.next_keys.as_ref().map(|(segment, head, next)| (segment, *head, next.clone()))
    }
}
