//! What few query rows ask for ahead: rows of keys and values, each run for the one after it; and when, how often and in which order
//! their kernels do.

use core::ops::Range;

use qkv_simd::Simd;

use crate::ahead::LINE;
use crate::interval::Segment;
use crate::kv_rows::KvRows;
use crate::next_task::{Begin, Taken};
use crate::prefill::Worker;
use crate::row_runs::{RowRun, RunList, link};
use crate::rule::ScoreRule;
use crate::storage::Element;

impl<S: Simd, R: ScoreRule, const MR: usize, const NV: usize, const FEW: bool>
    Worker<'_, '_, S, R, MR, NV, FEW>
{
    /// Lets runs of the `rows` of `keys` ask for what is read next, each for the one after it and the last for the first one of
    /// the values after keys, of the keys after values: see [`RowRun`]. What is copied asks for its rows itself.
    #[inline(always)]
    pub(crate) fn link_runs(&self, rows: &KvRows<'_>, keys: &Range<usize>, runs: &mut RunList) {
        let (rows, then) = if core::ptr::eq(rows, &raw const self.call.k) {
            (&self.call.v, Some((&self.task.segment, self.task.kv_head, keys.start)))
        } else {
            (&self.call.k, self.key_after(keys))
        };
        let then = then.filter(|_| rows.row_kind().is_some());
        let then = then.map(|(segment, head, key)| rows.row(segment, head, key));
        link(runs, then, self.call.plan.eager);
    }

    /// The key that is read after these: the next one, at the task's end the next task's first.
    #[inline(always)]
    fn key_after(&self, keys: &Range<usize>) -> Option<(&Segment, usize, usize)> {
        if keys.end < self.end {
            return Some((&self.task.segment, self.task.kv_head, keys.end));
        }
        match &self.next {
            Some(Taken { begin: Begin::Key(segment, head, key), .. }) => Some((segment, *head, *key)),
            _ => None,
        }
    }
}

/// Asks for the lines of `count` values from `at` on, into L1: into L2 alone, a group of four takes 1.02 to 1.06 of the time from
/// memory with two threads, 1.2 with one, and 1.15 from L2 and L3 (f32, dim 128, Zen 5).
#[inline(always)]
pub(crate) fn ask<S: Simd, T>(s: S, at: *const T, count: usize) {
    for line in (0..count).step_by(LINE / size_of::<T>()) {
        s.prefetch(at.wrapping_add(line).cast());
    }
}

/// Bytes of the first cache from which on f32 is asked for ahead in order for one and two query rows as well. Zen 5, 48 KiB, call by
/// call in turns, two threads, GB/s: with one query row from 80 to 85 in pages of 4 KiB and from 83 to 88 in huge ones where memory
/// gives that much, 1 to 3 % where it gives 45, with two from 38 to 40. Zen 4, 32 KiB, into L2: 1.2 of the time.
pub(crate) const EAGER_L1: usize = 48 << 10;

/// Whether a kernel asks for what follows a run. In f32 for one and two query rows, where a line is little work, only if it lies
/// elsewhere (the hardware's own streams are enough) or the first cache is large ([`EAGER_L1`]). Narrower rows are more work a line,
/// so that fewer lines ahead are under way by themselves.
///
/// From memory, dim 128, of the time without asking: one thread on Zen 4 f32 with one query row 1.20, with two 1.23, with
/// four within 2 %, bf16 with two 0.83; on Zen 5 f32 with four 0.63, with one query row bf16 0.82, f16 0.79, int8 0.69, and with two
/// threads that may read 83 GB/s 0.71, 0.69 and 0.67.
#[inline(always)]
pub(crate) fn asks<T: Element, const R: usize>(run: &RowRun) -> bool {
    T::NARROW || R > 2 || !run.goes_on || run.eager
}

/// Whether a kernel asks a second time for what follows a run, nearer to its use: see [`again`].
///
/// An ask that finds the queue of misses full is dropped, and then its line is waited for. Where memory goes on, the hardware's streams
/// bring it; where runs lie in no order, like pages that a pool has handed out for a while, nobody does. Of the time with one ask, f32,
/// pages of 16, dim 128, Zen 5: a group of four 0.88 (one thread) and 0.86 (two); one, two and eight query rows, and narrower rows,
/// within 3 %, or slower.
#[inline(always)]
pub(crate) fn asks_twice<T: Element, const R: usize>(run: &RowRun) -> bool {
    R == 4 && !T::NARROW && !run.goes_on
}

/// What is asked for once more with row `row` of a run, and the distance to what is with the next: rows half a run ahead.
#[inline(always)]
pub(crate) fn again(run: &RowRun, row: usize) -> (*const u8, isize) {
    let row = (row + run.count / 2) as isize;
    let left = row - run.count as isize;
    if left < 0 {
        (run.first.wrapping_offset(row * run.stride), run.stride)
    } else {
        (run.ahead.0.wrapping_offset(left * run.ahead.1), run.ahead.1)
    }
}

/// What a pass over some dims of a run's rows asks for first, and a second time (as [`again`]), and how many bytes on with each
/// further row; `whole`: it reads no other run.
///
/// A pass that asks for its own dims of the following rows leaves memory idle in turns: the first one brings more than these, as
/// the hardware adds neighbours, and the others find theirs in L2. So where the following rows lie side by side, all passes
/// together ask for them in the order of memory, each for its share. From memory, with one thread and with two, the time is
/// 0.91 and 0.92 of what it was (f32, a group of four, dim 128, Zen 5), bf16 0.96 and 0.94, f32 by AVX2 0.86 and 0.90.
#[inline(always)]
pub(crate) fn asked<T>(run: &RowRun, dim: usize, dims: Range<usize>, whole: bool) -> ([*const T; 2], isize) {
    let (next, stride) = (run.ahead.0.cast::<T>(), run.ahead.1);
    let side_by_side = stride == (dim * size_of::<T>()) as isize;
    // Of several runs that a pass reads each would ask for its share of the one after it, which is too late.
    if !(side_by_side && whole) {
        return ([next.wrapping_add(dims.start); 2], stride);
    }
    let (first, half) = (dims.start * run.count, dim * run.count / 2);
    let again = if dims.end * run.count <= half {
        run.first.cast::<T>().wrapping_add(first + half)
    } else {
        // A pass that goes on beyond the half asks for the same twice.
        next.wrapping_add(first.checked_sub(half).unwrap_or(first))
    };
    ([next.wrapping_add(first), again], (dims.len() * size_of::<T>()) as isize)
}
