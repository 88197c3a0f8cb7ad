//! Rows that are needed soon, asked for while something else is computed: where the hardware does not foresee them, because
//! they lie far apart, or because a task begins with them.
//!
//! A few lines between two tiles of the first product. All at once they fill the queue of misses, and the kernel waits for
//! them there as it would have waited later: with a bias a call took 1.19 times as long as without, spread out 1.11 (one
//! thread, docs/TUNING.md). Queries and outputs weigh most in short calls: batch 8, 12 heads, S 128 went from 80 to 86 %
//! of the peak.

use core::ops::Range;

use qkv_simd::Simd;

use crate::interval::{self, Visible};
use crate::next_task::{Begin, Taken};
use crate::prefill::Worker;
use crate::rule::ScoreRule;
use crate::spec::intersect;
use crate::strip::StripRows;
use crate::{AttentionSpec, Bias, Broadcast, Data, DataMut};

/// Bytes of a line of the cache.
pub(crate) const LINE: usize = 64;

/// A part of a block with no more keys has too few tiles to ask for a strip's outputs between them. 64 against 0: a window of 256
/// 1 %, causal calls up to 1 % quicker (Zen 5).
const FEW_KEYS: usize = 64;

/// What the tiles of a strip's first product ask for.
pub(crate) struct Ahead<'w> {
    /// For the second product, by the first strip that reads them.
    pub(crate) values: Option<ValueRows>,
    /// Keys that come next and may lie in no near cache: of the next strip, of the next block, of the next task.
    pub(crate) keys: Option<Rows>,
    /// For the next strip.
    pub(crate) panels: Option<PanelRows>,
    /// For the end of this strip, by its last block or the one before, if that one is short.
    pub(crate) outputs: Option<TensorRows<'w, DataMut<'w>>>,
    /// For the next task, by the last block of every strip.
    pub(crate) queries: Option<TensorRows<'w, Data<'w>>>,
}

impl Ahead<'_> {
    /// What the tile of `keys`, counted from the block's first, is to ask for.
    #[inline(always)]
    pub(crate) fn step<S: Simd>(&mut self, s: S, keys: Range<usize>) {
        if let Some(panels) = &mut self.panels {
            if let Some(mask) = &mut panels.mask {
                mask.ask(s);
            }
            if let Some(bias) = &mut panels.bias {
                bias.ask(s);
            }
        }
        if let Some(values) = &self.values {
            for key in keys.start..keys.end.min(values.end) {
                ask_for_row(s, values.at.wrapping_offset(key as isize * values.stride).cast(), values.bytes);
            }
        }
        if let Some(keys) = &mut self.keys {
            keys.ask(s);
        }
        if let Some(outputs) = &mut self.outputs {
            outputs.ask(s);
        }
        if let Some(queries) = &mut self.queries {
            queries.ask(s);
        }
    }
}

/// The lines of a row, the one that it ends in too: rows seldom begin with a line.
#[inline(always)]
fn lines(row: *const u8, bytes: usize) -> impl Iterator<Item = *const f32> {
    let before = row.addr() % LINE;
    (0..before + bytes).step_by(LINE).map(move |at| row.wrapping_sub(before).wrapping_add(at).cast())
}

/// Asks for a row that will be read.
#[inline(always)]
fn ask_for_row<S: Simd>(s: S, row: *const u8, bytes: usize) {
    for line in lines(row, bytes) {
        s.prefetch(line);
    }
}

/// Value rows of a block up to key `end`: they are read as columns, in steps of a whole row.
pub(crate) struct ValueRows {
    pub(crate) end: usize,
    pub(crate) at: *const f32,
    pub(crate) stride: isize,
    pub(crate) bytes: usize,
}

/// A tensor whose rows can be asked for, for what is done to them: queries are read; outputs are written, and stores that
/// miss would fill the store queue.
pub(crate) trait AskRow {
    fn ask_for<S: Simd>(&self, s: S, place: [usize; 3]);
}

impl AskRow for Data<'_> {
    #[inline(always)]
    fn ask_for<S: Simd>(&self, s: S, place: [usize; 3]) {
        let (row, _, bytes) = self.row_memory(place);
        ask_for_row(s, row, bytes);
    }
}

impl AskRow for DataMut<'_> {
    #[inline(always)]
    fn ask_for<S: Simd>(&self, s: S, place: [usize; 3]) {
        let (row, _, bytes) = self.row_memory(place);
        for line in lines(row, bytes) {
            s.prefetch_write(line);
        }
    }
}

/// Rows of a tensor, of which some are asked for at a time.
pub(crate) struct TensorRows<'w, T> {
    tensor: &'w T,
    rows: StripRows,
    lanes: Range<usize>,
    step: usize,
}

impl<'w, T: AskRow> TensorRows<'w, T> {
    /// The rows in these lanes, in `tiles` steps.
    #[inline(always)]
    pub(crate) fn new(tensor: &'w T, rows: &StripRows, lanes: Range<usize>, tiles: usize) -> Self {
        let step = lanes.len().div_ceil(tiles);
        Self { tensor, rows: *rows, lanes, step }
    }

    #[inline(always)]
    fn ask<S: Simd>(&mut self, s: S) {
        let end = (self.lanes.start + self.step).min(self.lanes.end);
        for lane in self.lanes.start..end {
            self.tensor.ask_for(s, self.rows.place(lane));
        }
        self.lanes.start = end;
    }
}

/// Asks for the query rows of a strip, all at once: a worker's first task begins with them, and has nothing else to do
/// meanwhile.
#[inline(always)]
pub(crate) fn ask_for_queries<S: Simd>(s: S, q: &Data<'_>, rows: &StripRows) {
    for lane in 0..rows.count {
        q.ask_for(s, rows.place(lane));
    }
}

/// Rows of masks and biases that the next strip will read.
#[derive(Clone, Copy)]
pub(crate) struct PanelRows {
    mask: Option<Rows>,
    bias: Option<Rows>,
}

/// Rows a constant distance apart.
#[derive(Clone, Copy)]
pub(crate) struct Rows {
    at: *const u8,
    stride: isize,
    left: usize,
    /// Lines of a row.
    lines: usize,
    /// How many are asked for at a time.
    step: usize,
}

impl PanelRows {
    /// What `keys` keys of `rows` need, in `tiles` steps; `None` where nothing is worth it.
    #[inline(always)]
    pub(crate) fn new(
        spec: &AttentionSpec<'_>,
        rows: &StripRows,
        keys: &Range<usize>,
        tiles: usize,
    ) -> Option<Self> {
        let mask = spec.mask.as_ref().and_then(|mask| Rows::of(mask, rows, keys, tiles));
        let bias = match &spec.bias {
            Some(Bias::F32(bias)) => Rows::of(bias, rows, keys, tiles),
            Some(Bias::Half(_, bias)) => Rows::of(bias, rows, keys, tiles),
            None => None,
        };
        (mask.is_some() || bias.is_some()).then_some(Self { mask, bias })
    }
}

impl Rows {
    #[inline(always)]
    fn of<T>(from: &Broadcast<'_, T>, rows: &StripRows, keys: &Range<usize>, tiles: usize) -> Option<Self> {
        let [_, _, stride, 1] = from.expanded() else { return None };
        if keys.is_empty() || rows.group != 1 || stride == 0 {
            return None;
        }
        let first = from.at([rows.segment.index, rows.head(0), rows.query(0), keys.start]);
        Some(Self::new((first, stride), rows.count, keys.len(), tiles))
    }

    /// `rows` rows of `values` values, `stride` values apart, in `tiles` steps.
    #[inline(always)]
    fn new<T>((first, stride): (*const T, isize), rows: usize, values: usize, tiles: usize) -> Self {
        let (first, stride): (*const u8, _) = (first.cast(), stride * size_of::<T>() as isize);
        let before = first.addr() % LINE;
        // The same for all rows, so that asking is a few instructions: where rows do not begin at the same place in a line,
        // one may end a line later than the first.
        let shifted = usize::from(stride % LINE as isize != 0);
        Self {
            at: first.wrapping_sub(before),
            stride,
            left: rows,
            lines: (before + values * size_of::<T>()).div_ceil(LINE) + shifted,
            step: rows.div_ceil(tiles),
        }
    }

    #[inline(always)]
    fn ask<S: Simd>(&mut self, s: S) {
        let now = self.step.min(self.left);
        for _ in 0..now {
            for line in 0..self.lines {
                s.prefetch(self.at.wrapping_add(line * LINE).cast());
            }
            self.at = self.at.wrapping_offset(self.stride);
        }
        self.left -= now;
    }
}

impl<'w, S: Simd, R: ScoreRule, const MR: usize, const NV: usize, const FEW: bool>
    Worker<'w, '_, S, R, MR, NV, FEW>
{
    /// What the first product of a strip and the keys of a block is to ask for, in `tiles` tiles.
    #[inline(always)]
    pub(crate) fn ahead(
        &self,
        strip: usize,
        rows: &StripRows,
        keys: &Range<usize>,
        visible: &Visible,
        tiles: usize,
    ) -> Ahead<'w> {
        let call = self.call;
        let end = visible.any.end.min(self.end);
        let ends = call.plan.is_cold && keys.end >= end;
        // Outputs by the last block that has room for them.
        let soon = |key: usize| end.saturating_sub(key) <= FEW_KEYS;
        let ends_soon =
            call.plan.is_cold && soon(keys.end) && (keys.start <= visible.any.start || !soon(keys.start));
        let next = self.next.as_ref().filter(|_| ends && !FEW);
        Ahead {
            values: self.new_values(strip, keys),
            keys: self.next_keys(strip, next, visible, tiles),
            panels: self
                .next_strip(strip, rows, keys)
                .and_then(|(rows, keys)| PanelRows::new(call.spec, &rows, &keys, tiles)),
            outputs: ends_soon.then(|| TensorRows::new(&call.out, rows, 0..rows.count, tiles)),
            queries: next.and_then(|next| {
                let Begin::Tiles { rows, .. } = &next.begin else { return None };
                Some(TensorRows::new(&call.q, rows, self.share(strip, rows.count), tiles))
            }),
        }
    }

    /// A strip's part of what the next task begins with, in rows.
    #[inline(always)]
    fn share(&self, strip: usize, of: usize) -> Range<usize> {
        let strips = self.task.rows.len().div_ceil(Self::NR);
        of * strip / strips..of * (strip + 1) / strips
    }

    /// The values of the keys that no strip of this task has seen before this one.
    #[inline(always)]
    fn new_values(&self, strip: usize, keys: &Range<usize>) -> Option<ValueRows> {
        let end = if self.is_last(strip) {
            keys.end
        } else if self.call.plan.slides {
            self.keys_of(strip + 1).start.min(keys.end)
        } else {
            return None;
        };
        (end > keys.start).then_some(ValueRows {
            end: end - keys.start,
            at: self.values.row(keys.start - self.block.start),
            stride: self.values.stride,
            bytes: self.call.plan.shape.value_dim * size_of::<f32>(),
        })
    }

    /// The keys that a strip sees, as far as intervals go.
    #[inline(always)]
    fn keys_of(&self, strip: usize) -> Range<usize> {
        let rows = self.rows_of(strip);
        interval::visible(self.call.spec, &rows.segment, rows.queries()).any
    }

    /// Keys that come next and that no strip before has read: those that the next strip sees beside this one's, those of the next
    /// block, where no task has read that, and those of the next task, where the strip ends.
    #[inline(always)]
    fn next_keys(&self, strip: usize, next: Option<&Taken>, visible: &Visible, tiles: usize) -> Option<Rows> {
        let dim = self.call.plan.shape.key_dim;
        if let Some(Taken { begin: Begin::Tiles { keys: Some((first, stride, count)), .. }, .. }) = next {
            let share = self.share(strip, *count);
            let first = first.wrapping_offset(share.start as isize * stride);
            return Some(Rows::new((first, *stride), share.len(), dim, tiles));
        }
        let new = if self.call.plan.slides && strip > 0 {
            intersect(&(self.keys_of(strip - 1).start..visible.any.start), &self.block)
        } else if self.reads_first && self.is_last(strip) {
            self.block.end..self.end.min(self.block.end + self.key_block)
        } else {
            return None;
        };
        if new.is_empty() {
            return None;
        }
        let first = self.keys.row(new.start - self.block.start);
        Some(Rows::new((first, self.keys.stride), new.len(), dim, tiles))
    }

    /// The strip that comes next, and its keys, where a mask or a bias has to be brought in for it: the one before in this
    /// block, or the last in the next block.
    #[inline(always)]
    fn next_strip(
        &self,
        strip: usize,
        rows: &StripRows,
        keys: &Range<usize>,
    ) -> Option<(StripRows, Range<usize>)> {
        if self.call.spec.bias.is_none() && self.call.spec.mask.is_none() {
            return None;
        }
        let start = self.block_index(keys.start) * self.key_block;
        let (strip, start) = match strip.checked_sub(1) {
            Some(before) => (before, start),
            None => (self.task.rows.len().div_ceil(Self::NR) - 1, start + self.key_block),
        };
        let end = (start + self.key_block).min(rows.segment.key_len);
        Some((self.rows_of(strip), start.min(end)..end))
    }
}
