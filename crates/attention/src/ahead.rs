//! Rows that are needed soon, asked for while something else is computed: where the hardware does not foresee them, because
//! they lie far apart, or because a task begins with them.
//!
//! A few lines between two tiles of the first product. All at once they fill the queue of misses, and the kernel waits for
//! them there as it would have waited later: a bias cost 1.19 times a call without one, spread out 1.11 (one thread,
//! docs/TUNING.md).

use core::ops::Range;

use qkv_simd::Simd;

use crate::strip::StripRows;
use crate::{AttentionSpec, Bias, Broadcast, Data, DataMut};

const LINE: usize = 64;

/// What the tiles of a strip's first product ask for.
pub(crate) struct Ahead<'w> {
    /// For the second product, by the first strip that reads a block.
    pub(crate) values: Option<ValueRows>,
    /// For the next strip.
    pub(crate) panels: Option<PanelLines>,
    /// For the end of this strip, by its last block.
    pub(crate) outputs: Option<OutputRows<'w>>,
}

impl Ahead<'_> {
    /// What the tile of `keys`, counted from the block's first, is to ask for.
    #[inline(always)]
    pub(crate) fn step<S: Simd>(&mut self, s: S, keys: Range<usize>) {
        if let Some(panels) = &mut self.panels {
            panels.mask.ask(s);
            panels.bias.ask(s);
        }
        if let Some(values) = &self.values {
            for key in keys {
                ask_for_row(s, values.at.wrapping_offset(key as isize * values.stride).cast(), values.bytes);
            }
        }
        if let Some(outputs) = &mut self.outputs {
            outputs.ask(s);
        }
    }
}

#[inline(always)]
fn ask_for_row<S: Simd>(s: S, row: *const u8, bytes: usize) {
    for at in (0..bytes).step_by(LINE) {
        s.prefetch(row.wrapping_add(at).cast());
    }
}

/// Value rows of a block: they are read as columns, in steps of a whole row.
pub(crate) struct ValueRows {
    pub(crate) at: *const f32,
    pub(crate) stride: isize,
    pub(crate) bytes: usize,
}

/// Output rows of a strip: stores that miss would fill the store queue.
pub(crate) struct OutputRows<'w> {
    out: &'w DataMut<'w>,
    rows: StripRows,
    lane: usize,
    /// How many are asked for at a time.
    step: usize,
}

impl<'w> OutputRows<'w> {
    #[inline(always)]
    pub(crate) fn new(out: &'w DataMut<'w>, rows: &StripRows, tiles: usize) -> Self {
        Self { out, rows: *rows, lane: 0, step: if rows.count > 2 * tiles { 0 } else { rows.count.div_ceil(tiles) } }
    }

    #[inline(always)]
    fn ask<S: Simd>(&mut self, s: S) {
        let end = (self.lane + self.step).min(self.rows.count);
        for lane in self.lane..end {
            let (row, _, bytes) = self.out.row_memory(self.rows.place(lane));
            for at in (0..bytes).step_by(LINE) {
                s.prefetch_write(row.wrapping_add(at).cast());
            }
        }
        self.lane = end;
    }
}

/// Asks for the query rows of a strip, all at once: a task begins with them, and has nothing else to do.
#[inline(always)]
pub(crate) fn ask_for_queries<S: Simd>(s: S, q: &Data<'_>, rows: &StripRows) {
    for lane in 0..rows.count {
        let (row, _, bytes) = q.row_memory(rows.place(lane));
        ask_for_row(s, row, bytes);
    }
}

/// Lines of masks and biases that the next strip will read, in rows.
#[derive(Clone, Copy)]
pub(crate) struct PanelLines {
    mask: Lines,
    bias: Lines,
}

/// Lines of 64 bytes in rows.
#[derive(Clone, Copy)]
struct Lines {
    at: *const u8,
    row_stride: isize,
    rows: usize,
    per_row: usize,
    /// The line of the row that is next.
    line: usize,
    /// How many are asked for at a time.
    step: usize,
}

impl PanelLines {
    /// What `keys` keys of `rows` need, in `tiles` steps; `None` where nothing is worth it.
    #[inline(always)]
    pub(crate) fn new(
        spec: &AttentionSpec<'_>,
        rows: &StripRows,
        keys: &Range<usize>,
        tiles: usize,
    ) -> Option<Self> {
        let mask = spec.mask.as_ref().and_then(|mask| Lines::of(mask, rows, keys, tiles));
        let bias = match &spec.bias {
            Some(Bias::F32(bias)) => Lines::of(bias, rows, keys, tiles),
            Some(Bias::Half(_, bias)) => Lines::of(bias, rows, keys, tiles),
            None => None,
        };
        let none = Lines { at: core::ptr::null(), row_stride: 0, rows: 0, per_row: 0, line: 0, step: 0 };
        (mask.is_some() || bias.is_some())
            .then(|| Self { mask: mask.unwrap_or(none), bias: bias.unwrap_or(none) })
    }
}

impl Lines {
    #[inline(always)]
    fn of<T>(from: &Broadcast<'_, T>, rows: &StripRows, keys: &Range<usize>, tiles: usize) -> Option<Self> {
        let [_, _, stride, 1] = from.expanded() else { return None };
        if keys.is_empty() || rows.group != 1 || stride == 0 {
            return None;
        }
        let per_row = (keys.len() * size_of::<T>()).div_ceil(LINE);
        Some(Self {
            at: from.at([rows.segment.index, rows.head(0), rows.query(0), keys.start]).cast(),
            row_stride: stride * size_of::<T>() as isize,
            rows: rows.count,
            per_row,
            line: 0,
            step: (rows.count * per_row).div_ceil(tiles),
        })
    }

    #[inline(always)]
    fn ask<S: Simd>(&mut self, s: S) {
        for _ in 0..self.step {
            if self.rows == 0 {
                return;
            }
            s.prefetch(self.at.wrapping_add(self.line * LINE).cast());
            self.line += 1;
            if self.line == self.per_row {
                self.line = 0;
                self.rows -= 1;
                self.at = self.at.wrapping_offset(self.row_stride);
            }
        }
    }
}

