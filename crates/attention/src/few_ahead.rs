//! What few query rows ask for ahead: rows of keys and values, each run for the one after it.

use core::ops::Range;

use qkv_simd::Simd;

use crate::few_rows::FEW_BLOCK;
use crate::interval::Segment;
use crate::kv_rows::KvRows;
use crate::next_task::{Begin, Taken};
use crate::prefill::Worker;
use crate::row_runs::{RunList, link};
use crate::rule::ScoreRule;

impl<S: Simd, R: ScoreRule, const MR: usize, const NV: usize, const FEW: bool>
    Worker<'_, '_, S, R, MR, NV, FEW>
{
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
        match &self.next {
            Some(Taken { begin: Begin::Keys(segment, head, next), .. }) => {
                Some((segment, *head, next.clone()))
            }
            _ => None,
        }
    }
}
