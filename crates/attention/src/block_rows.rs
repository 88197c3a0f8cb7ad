//! The rows of the block of keys that a worker is at: in place, copied, or one by one for few query rows.

use core::ops::Range;

use qkv_simd::Simd;

use crate::few_rows::RowList;
use crate::kv_rows::KvRows;
use crate::prefill::Worker;
use crate::row_runs::{FewRows, RowKind, RowRun, RunList, add};
use crate::rule::ScoreRule;

/// The rows of a block of keys: the first one, and values from one to the next; a null pointer where they are read one by
/// one, by their addresses.
#[derive(Clone, Copy)]
pub(crate) struct BlockRows {
    pub(crate) ptr: *const f32,
    pub(crate) stride: isize,
}

impl BlockRows {
    pub(crate) const NONE: Self = Self { ptr: core::ptr::null(), stride: 0 };

    /// The `i`-th row.
    #[inline(always)]
    pub(crate) fn row(self, i: usize) -> *const f32 {
        self.ptr.wrapping_offset(i as isize * self.stride)
    }
}

impl<S: Simd, R: ScoreRule, const MR: usize, const NV: usize, const FEW: bool>
    Worker<'_, '_, S, R, MR, NV, FEW>
{
    /// Brings a block of keys and values in: widened or gathered in scratch where they cannot be read in place.
    #[inline(always)]
    pub(crate) fn bring_in(&mut self, block: &Range<usize>) {
        if self.block == *block {
            return;
        }
        self.block = block.clone();
        self.keys = self.rows_of_block(&self.call.k, false);
        self.values_f32 = None;
        // Few rows bring values in when the scores are done, where at all.
        if !FEW {
            self.bring_in_values(false);
        }
    }

    /// Brings the block's values in, if that has not been done; `all_f32`: see [`Self::rows_of_block`].
    #[inline(always)]
    pub(crate) fn bring_in_values(&mut self, all_f32: bool) {
        if self.values_f32 != Some(all_f32) {
            self.values = self.rows_of_block(&self.call.v, all_f32);
            self.values_f32 = Some(all_f32);
        }
    }

    /// The rows of the block, of keys or of values: in place, or a copy in scratch. Few rows read one by one where they lie,
    /// widened or not, unless `all_f32`.
    #[inline(always)]
    fn rows_of_block(&mut self, rows: &KvRows<'_>, all_f32: bool) -> BlockRows {
        let (s, segment, head, block) = (self.s, &self.task.segment, self.task.kv_head, &self.block);
        if let Some((ptr, stride)) = rows.in_place(segment, head, block.start) {
            return BlockRows { ptr, stride };
        }
        if FEW && rows.row_kind().is_some_and(|kind| kind == RowKind::F32 || !all_f32) {
            return BlockRows::NONE;
        }
        let dim = rows.data.shape()[3];
        let of_keys = core::ptr::eq(rows, &raw const self.call.k);
        let wide = if of_keys { &mut *self.scratch.wide_keys } else { &mut *self.scratch.wide_values };
        let wide = &mut wide[..block.len() * dim];
        rows.copy(s, segment, head, block, wide, true);
        BlockRows { ptr: wide.as_ptr(), stride: dim as isize }
    }

    /// The value row of a key of the block that is brought in.
    #[inline(always)]
    pub(crate) fn value_row(&self, key: usize) -> &[f32] {
        let dim = self.call.plan.shape.value_dim;
        if dim == 0 {
            return &[];
        }
        let mut row = self.values.row(key - self.block.start);
        if FEW && self.values.ptr.is_null() {
            debug_assert_eq!(self.call.v.row_kind(), Some(RowKind::F32));
            row = self.call.v.row(&self.task.segment, self.task.kv_head, key).0.cast();
        }
        // SAFETY: the key is in the block, whose rows have `dim` values in the tensor or in scratch: rows of other types are
        // not read here, see `fold_block`.
        unsafe { core::slice::from_raw_parts(row, dim) }
    }

    /// The rows of `keys`, of the block that is brought in.
    #[inline(always)]
    pub(crate) fn few_rows<'m>(
        &self,
        rows: &KvRows<'_>,
        block: BlockRows,
        keys: &Range<usize>,
        (runs, scales): (&'m mut RunList, &'m mut RowList<f32>),
    ) -> FewRows<'m> {
        let dim = rows.data.shape()[3];
        let kind = match rows.row_kind() {
            Some(kind) if block.ptr.is_null() => {
                rows.runs(&self.task.segment, self.task.kv_head, keys, runs);
                rows.scales(&self.task.segment, self.task.kv_head, keys, scales);
                kind
            }
            _ => {
                let first = block.row(keys.start - self.block.start).cast();
                let stride = block.stride * size_of::<f32>() as isize;
                add(runs, (first, stride), keys.len(), RowRun::most(dim * size_of::<f32>()));
                RowKind::F32
            }
        };
        self.link_runs(rows, keys, runs);
        FewRows { runs, kind, scales, dim }
    }
}
