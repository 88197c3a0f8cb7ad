//! Where the rows of keys and values lie, and how a block of them is brought in.
//!
//! | given as | the kernels read |
//! | --- | --- |
//! | f32 with one stride | in place |
//! | 16 or 8 bits | a copy in scratch, widened once per block for all rows of the task |
//! | pages | a copy (tiles want one stride) |
//!
//! Few query rows read row by row what can be widened in registers ([`RowKind`]), wherever the rows lie.

use core::ops::Range;

use qkv_simd::Simd;

use crate::Data;
use crate::few_rows::RowList;
use crate::interval::Segment;
use crate::row_runs::{RowKind, RowRun, RunList, add};

/// The keys or the values of a call.
#[derive(Clone, Copy, Debug)]
pub(crate) struct KvRows<'a> {
    pub(crate) data: Data<'a>,
    /// The pages of each sequence; `None` where rows are counted by batch and position.
    pub(crate) tables: Option<&'a [&'a [u32]]>,
}

impl<'a> KvRows<'a> {
    /// Rows counted by batch and position.
    pub(crate) fn plain(data: Data<'a>) -> Self {
        Self { data, tables: None }
    }

    /// Whether a block of rows has to be copied for the tiles.
    pub(crate) fn is_copied(&self) -> bool {
        self.tables.is_some() || self.data.as_f32().is_none()
    }

    /// What single rows consist of where few query rows read them in place.
    pub(crate) fn row_kind(&self) -> Option<RowKind> {
        self.data.row_kind()
    }

    /// (batch or page, head, position) of a key's row, and how many rows from there on are one stride apart.
    #[inline(always)]
    fn place(&self, segment: &Segment, head: usize, key: usize) -> ([usize; 3], usize) {
        match self.tables {
            None => ([segment.batch, head, segment.first_key + key], usize::MAX),
            Some(tables) => {
                let size = self.data.shape()[2];
                let page = tables[segment.index][key / size] as usize;
                ([page, head, key % size], size - key % size)
            }
        }
    }

    /// The rows from `key` on where they lie, if they are f32 and one stride apart: the first, and the stride.
    #[inline(always)]
    pub(crate) fn in_place(&self, segment: &Segment, head: usize, key: usize) -> Option<(*const f32, isize)> {
        if self.tables.is_some() {
            return None;
        }
        let tensor = self.data.as_f32()?;
        let row = tensor.row_ptr(segment.batch, head, segment.first_key + key);
        Some((row, tensor.position_stride()))
    }

    /// Widens the rows of `keys` into `to`, [keys][dim]; `asks_ahead`: and asks for those that follow.
    #[inline(always)]
    pub(crate) fn copy<S: Simd>(
        &self,
        s: S,
        segment: &Segment,
        head: usize,
        keys: &Range<usize>,
        to: &mut [f32],
        asks_ahead: bool,
    ) {
        let dim = self.data.shape()[3];
        if dim == 0 {
            return;
        }
        let mut key = keys.start;
        while key < keys.end {
            let (place, run) = self.place(segment, head, key);
            let count = run.min(keys.end - key);
            let to = &mut to[(key - keys.start) * dim..][..count * dim];
            self.data.widen_rows(s, place, count, to, asks_ahead);
            key += count;
        }
    }

    /// Where the row of a key begins, whatever it consists of, and the bytes to the next one of its run.
    #[inline(always)]
    pub(crate) fn row(&self, segment: &Segment, head: usize, key: usize) -> (*const u8, isize) {
        let (place, _) = self.place(segment, head, key);
        let (first, stride, _) = self.data.row_memory(place);
        (first, stride)
    }

    /// Adds the rows of `keys` in runs.
    #[inline(always)]
    pub(crate) fn runs(&self, segment: &Segment, head: usize, keys: &Range<usize>, to: &mut RunList) {
        if keys.is_empty() {
            return;
        }
        // The first place by a division, the others from page to page.
        let (mut place, mut rows) = self.place(segment, head, keys.start);
        let (_, stride, bytes) = self.data.row_memory(place);
        let most = RowRun::most(bytes);
        let mut pages = match self.tables {
            Some(tables) => &tables[segment.index][keys.start / self.data.shape()[2] + 1..],
            None => &[],
        };
        let mut key = keys.start;
        loop {
            let count = rows.min(keys.end - key);
            add(to, (self.data.row_memory(place).0, stride), count, most);
            key += count;
            let Some((&page, rest)) = pages.split_first().filter(|_| key < keys.end) else { break };
            ((place, rows), pages) = (([page as usize, head, 0], self.data.shape()[2]), rest);
        }
    }

    /// Adds the scale of each row of `keys`, where rows have one.
    #[inline(always)]
    pub(crate) fn scales(&self, segment: &Segment, head: usize, keys: &Range<usize>, to: &mut RowList<f32>) {
        let Data::Int8(int8) = &self.data else { return };
        let scales = int8.scales();
        let mut key = keys.start;
        while key < keys.end {
            let ([batch, head, position], run) = self.place(segment, head, key);
            let count = run.min(keys.end - key);
            let (first, stride, _) = scales.row_memory(batch, head, position);
            to.extend((0..count as isize).map(|i| {
                // SAFETY: the scales of the positions of a run are one stride apart, and there is at least one each.
                unsafe { first.wrapping_offset(i * stride).cast::<f32>().read() }
            }));
            key += count;
        }
    }
}
