//! A strip: up to NR query rows in the lanes of vectors. Which they are, how they are packed, how their outputs are stored.

use core::ops::Range;

use qkv_simd::Simd;

use crate::interval::Segment;
use crate::online_softmax::{self, InverseSum};
use crate::prefill::Worker;
use crate::rule::{RuleRows, ScoreRule};

/// No tile is wider than this.
pub(crate) const MAX_NR: usize = 64;

/// The queries in the lanes of a strip: row `first + lane` is query (first + lane) / group of head (first + lane) % group
/// of the key/value head's group.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StripRows {
    pub(crate) segment: Segment,
    pub(crate) kv_head: usize,
    pub(crate) group: usize,
    pub(crate) first: usize,
    pub(crate) count: usize,
}

impl StripRows {
    /// The queries that occur, all of them.
    #[inline(always)]
    pub(crate) fn queries(&self) -> Range<usize> {
        debug_assert!(self.count > 0);
        if self.group == 1 {
            return self.first..self.first + self.count;
        }
        self.first / self.group..(self.first + self.count - 1) / self.group + 1
    }

    /// The query heads that occur.
    pub(crate) fn heads(&self) -> Range<usize> {
        if self.count >= self.group {
            return self.kv_head * self.group..(self.kv_head + 1) * self.group;
        }
        let (first, last) = (self.head(0), self.head(self.count - 1));
        if first <= last {
            first..last + 1
        } else {
            self.kv_head * self.group..(self.kv_head + 1) * self.group
        }
    }

    /// Query index of a lane.
    #[inline(always)]
    pub(crate) fn query(&self, lane: usize) -> usize {
        // Divisions cost as much as dozens of other instructions, and most calls have no groups.
        if self.group == 1 { self.first + lane } else { (self.first + lane) / self.group }
    }

    /// Query head of a lane.
    #[inline(always)]
    pub(crate) fn head(&self, lane: usize) -> usize {
        if self.group == 1 {
            self.kv_head
        } else {
            self.kv_head * self.group + (self.first + lane) % self.group
        }
    }

    /// How far each lane's query is ahead of the first lane's: one more after every `group` lanes.
    #[inline(always)]
    pub(crate) fn lanes_ahead<S: Simd, const NV: usize>(&self, s: S) -> [S::F32; NV] {
        let mut ahead = [0.0; MAX_NR];
        let (mut head, mut query) = (if self.group == 1 { 0 } else { self.first % self.group }, 0.0);
        for ahead in &mut ahead[..NV * S::LANES] {
            *ahead = query;
            head += 1;
            if head == self.group {
                (head, query) = (0, query + 1.0);
            }
        }
        load_lanes(s, &ahead)
    }

    /// What a rule is told about the strip.
    pub(crate) fn for_rule(&self) -> RuleRows {
        RuleRows {
            batch: self.segment.index,
            heads: self.heads(),
            queries: self.queries(),
            query_len: self.segment.query_len,
            key_len: self.segment.key_len,
        }
    }
}

/// Vectors out of an array of lanes.
#[inline(always)]
pub(crate) fn load_lanes<S: Simd, const NV: usize>(s: S, lanes: &[f32; MAX_NR]) -> [S::F32; NV] {
    let mut vectors = [s.zero(); NV];
    for (v, vector) in vectors.iter_mut().enumerate() {
        *vector = s.load(&lanes[v * S::LANES..]);
    }
    vectors
}

impl<S: Simd, R: ScoreRule, const MR: usize, const NV: usize> Worker<'_, '_, S, R, MR, NV> {
    /// Packs a strip's queries as [dk][NR], times the scale; lanes without a row are zero.
    #[inline(always)]
    pub(crate) fn pack_queries(&mut self, strip: usize) {
        let (s, rows, dk) = (self.s, self.rows_of(strip), self.call.plan.shape.key_dim);
        let packed = &mut self.scratch.queries[strip * dk * Self::NR..][..dk * Self::NR];
        if rows.group == 1 && rows.count == Self::NR {
            let from =
                self.call.q.row_ptr(rows.segment.batch, rows.head(0), rows.segment.first_query + rows.first);
            let stride = self.call.q.position_stride();
            // SAFETY: NR rows of dk values lie `stride` apart, and `packed` has room for them.
            unsafe { transpose(s, (Self::NR, dk), from, stride, packed.as_mut_ptr(), Self::NR as isize) };
        } else {
            let staged = &mut self.scratch.rows[..Self::NR * dk];
            for lane in 0..Self::NR {
                let to = &mut staged[lane * dk..][..dk];
                if lane < rows.count {
                    let (batch, position) = (rows.segment.batch, rows.segment.first_query + rows.query(lane));
                    to.copy_from_slice(self.call.q.row(batch, rows.head(lane), position));
                } else {
                    to.fill(0.0);
                }
            }
            let from = staged.as_ptr();
            // SAFETY: NR rows of dk values lie in `staged`, and `packed` has room for them.
            unsafe {
                transpose(s, (Self::NR, dk), from, dk as isize, packed.as_mut_ptr(), Self::NR as isize)
            };
        }

        // The scale in two parts, the second what rounding took off the first: q x scale is then rounded once.
        let scale = self.call.units.query_scale;
        let high = scale as f32;
        let low = (scale - f64::from(high)) as f32;
        for q in packed.chunks_exact_mut(S::LANES) {
            let x = s.load(q);
            s.store(s.mul_add(x, s.splat(high), s.mul(x, s.splat(low))), q);
        }
    }

    /// Ends a strip: outputs over their sums, transposed back to rows, and the LSE.
    #[inline(always)]
    pub(crate) fn store_outputs(&mut self, strip: usize) {
        let (s, rows, dv) = (self.s, self.rows_of(strip), self.call.plan.shape.value_dim);
        let (max, sum) = self.scratch.state[strip * 2 * Self::NR..][..2 * Self::NR].split_at(Self::NR);
        let outputs = &mut self.scratch.outputs[strip * dv * Self::NR..][..dv * Self::NR];
        if self.started >> strip & 1 == 0 {
            outputs.fill(0.0);
        }
        let inverse: [_; NV] = core::array::from_fn(|v| InverseSum::of(s, s.load(&sum[v * S::LANES..])));
        for row in outputs.chunks_exact_mut(Self::NR) {
            for (v, inverse) in inverse.iter().enumerate() {
                let at = &mut row[v * S::LANES..];
                s.store(inverse.times(s, s.load(at)), at);
            }
        }

        let from = outputs.as_ptr();
        if rows.group == 1 && rows.count == Self::NR {
            let to = self.call.out.row_ptr(
                rows.segment.batch,
                rows.head(0),
                rows.segment.first_query + rows.first,
            );
            let stride = self.call.out.position_stride();
            // SAFETY: NR rows of dv values lie `stride` apart; they belong to this task alone, and scratch is elsewhere.
            unsafe { transpose(s, (dv, Self::NR), from, Self::NR as isize, to, stride) };
        } else {
            let staged = &mut self.scratch.rows[..Self::NR * dv];
            // SAFETY: `staged` has room for NR rows of dv values.
            unsafe {
                transpose(s, (dv, Self::NR), from, Self::NR as isize, staged.as_mut_ptr(), dv as isize)
            };
            for lane in 0..rows.count {
                let position = rows.segment.first_query + rows.query(lane);
                let to = self.call.out.row_ptr(rows.segment.batch, rows.head(lane), position);
                let from = &self.scratch.rows[lane * dv..][..dv];
                // SAFETY: the row exists and has dv values; it belongs to this task alone, and scratch is elsewhere.
                unsafe { to.copy_from_nonoverlapping(from.as_ptr(), dv) };
            }
        }
        if self.call.lse.is_none() && self.call.maxima.is_none() {
            return;
        }
        for lane in 0..rows.count {
            let (batch, head) = (rows.segment.batch, rows.head(lane));
            let position = rows.segment.first_query + rows.query(lane);
            // SAFETY: the rows, of one value each, exist and belong to this task alone.
            unsafe {
                if let Some(lse) = &self.call.lse {
                    *lse.row_ptr(batch, head, position) = online_softmax::lse(max[lane], sum[lane]);
                }
                if let Some(maxima) = &self.call.maxima {
                    *maxima.row_ptr(batch, head, position) = max[lane] * core::f32::consts::LN_2;
                }
            }
        }
    }
}

/// `to[j * to_stride + i] = from[i * from_stride + j]` for `shape` = (rows i, columns j).
///
/// # Safety
/// Each row of `from` must be readable, each of `to` writable, over its columns; the two must not overlap.
#[inline(always)]
pub(crate) unsafe fn transpose<S: Simd>(
    s: S,
    shape: (usize, usize),
    from: *const f32,
    from_stride: isize,
    to: *mut f32,
    to_stride: isize,
) {
    let (rows, columns) = shape;
    let (whole_rows, whole_columns) = (rows / S::LANES * S::LANES, columns / S::LANES * S::LANES);
    for i in (0..whole_rows).step_by(S::LANES) {
        for j in (0..whole_columns).step_by(S::LANES) {
            // SAFETY: the square of LANES rows and columns at (i, j) lies inside both.
            unsafe {
                let from = from.offset(i as isize * from_stride).add(j);
                let to = to.offset(j as isize * to_stride).add(i);
                s.transpose(from, from_stride, to, to_stride);
            }
        }
    }
    for i in 0..rows {
        let rest = if i < whole_rows { whole_columns } else { 0 };
        for j in rest..columns {
            // SAFETY: (i, j) lies inside both.
            unsafe {
                *to.offset(j as isize * to_stride).add(i) = *from.offset(i as isize * from_stride).add(j)
            };
        }
    }
}
