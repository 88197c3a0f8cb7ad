//! What few query rows ask for ahead: rows of keys and values, and the next task's first.

use core::ops::Range;

use qkv_gemm::parallel::Tasks;
use qkv_simd::Simd;

use crate::ahead::LINE;
use crate::few_rows::{FEW_BLOCK, FewRows, RowList};
use crate::interval::Segment;
use crate::kv_rows::KvRows;
use crate::prefill::Worker;
use crate::rule::ScoreRule;

/// The rows that are asked for while others are read, the `i`-th with the `i`-th, since the hardware follows neither rows that
/// are far apart nor the change from keys to values: rows of the same block further on, towards its end the first rows of
/// what is read next. For several query rows line by line, so that products and memory go on side by side; a single query
/// row has next to no products to do and asks for whole rows. Both into L2: on the way there more lines can be under way
/// than on that to L1 (32 heads over 8, 8192 keys of f32, dim 128, two threads on Zen 4, whole rows: 24 GB/s, into L1 16, without
/// asking 12).
#[derive(Clone, Copy)]
pub(crate) struct AheadRows<'w>(pub(crate) &'w [*const u8]);

/// How many bytes further on: for several query rows, and for a single one. On Zen 3, 32 heads over 8, 8192 keys of f32: 2 to 32 KiB
/// within the noise, L1 as L2; whole rows 32 KiB ahead 5 % slower, with 64 heads over 8 28 %; ungrouped heads 4 % quicker so.
const AHEAD: [usize; 2] = [8 << 10, 32 << 10];

impl AheadRows<'_> {
    /// How many rows further on than `now` is asked.
    #[inline(always)]
    fn distance(now: &FewRows<'_>, is_single: bool) -> usize {
        AHEAD[usize::from(is_single)].div_ceil(now.bytes().max(1)).min(FEW_BLOCK)
    }

    /// Those that belong to a range.
    #[inline(always)]
    pub(crate) fn part(&self, range: &Range<usize>) -> Self {
        Self(&self.0[range.start.min(self.0.len())..range.end.min(self.0.len())])
    }

    /// What is asked for with the `i`-th row.
    #[inline(always)]
    pub(crate) fn with<T>(&self, i: usize, row: *const T) -> *const T {
        self.0.get(i).map_or(row, |ahead| ahead.cast())
    }
}

/// Asks for `count` values from `at` on.
#[inline(always)]
pub(crate) fn ask<S: Simd, T>(s: S, at: *const T, count: usize) {
    for line in (0..count).step_by(LINE / size_of::<T>()) {
        s.prefetch_l2(at.wrapping_add(line).cast());
    }
}

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

    /// The rows to be asked for while `now` is read, which are the `rows` of `keys`: see [`AheadRows`]. What is copied asks for its
    /// rows itself.
    #[inline(always)]
    pub(crate) fn rows_ahead<'m>(
        &self,
        now: &FewRows<'_>,
        rows: &KvRows<'_>,
        keys: &Range<usize>,
        to: &'m mut RowList<*const u8>,
    ) -> AheadRows<'m> {
        let (distance, count) = (AheadRows::distance(now, self.task.rows.len() == 1), now.rows.len());
        to.extend(now.rows[distance.min(count)..].iter().copied());
        let (rows, then) = if core::ptr::eq(rows, &raw const self.call.k) {
            (&self.call.v, Some((&self.task.segment, self.task.kv_head, keys.clone())))
        } else {
            (&self.call.k, self.block_after(keys))
        };
        if let Some((segment, head, keys)) = then.filter(|_| rows.row_kind().is_some()) {
            // After a block shorter than the distance too, less far ahead: nobody else asks for them.
            let keys = keys.start..keys.end.min(keys.start + distance);
            rows.memory(segment, head, &keys, to);
        }
        AheadRows(to)
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
