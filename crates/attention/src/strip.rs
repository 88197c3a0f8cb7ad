//! A strip: up to NR query rows in the lanes of vectors. Which they are, how they are packed, how their outputs are stored.

use core::ops::Range;

use qkv_simd::Simd;

use crate::factor::Factor;
use crate::interval::Segment;
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

    /// Batch, head and position of a lane's row in the tensors of queries and outputs.
    #[inline(always)]
    pub(crate) fn place(&self, lane: usize) -> [usize; 3] {
        [self.segment.batch, self.head(lane), self.segment.first_query + self.query(lane)]
    }

    /// How far each lane's query is ahead of the first lane's: one more after every `group` lanes. Lanes without a row are as the
    /// last.
    #[inline(always)]
    pub(crate) fn lanes_ahead<S: Simd, const NV: usize>(&self, s: S) -> [S::F32; NV] {
        let mut ahead = [0.0; MAX_NR];
        let (mut head, mut query) = (if self.group == 1 { 0 } else { self.first % self.group }, 0.0);
        for (lane, ahead) in ahead[..NV * S::LANES].iter_mut().enumerate() {
            *ahead = query;
            head += 1;
            if head == self.group && lane + 1 < self.count {
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

impl<S: Simd, R: ScoreRule, const MR: usize, const NV: usize, const FEW: bool>
    Worker<'_, '_, S, R, MR, NV, FEW>
{
    /// Where its queries are in the scratch: whole vectors.
    #[inline(always)]
    pub(crate) fn queries_of(&self, strip: usize) -> Range<usize> {
        let values = (self.call.plan.shape.key_dim * Self::ROWS).next_multiple_of(S::LANES);
        strip * values..(strip + 1) * values
    }

    /// Where its outputs are in the scratch.
    #[inline(always)]
    pub(crate) fn outputs_of(&self, strip: usize) -> Range<usize> {
        let values = self.call.plan.shape.value_dim * Self::ROWS;
        strip * values..(strip + 1) * values
    }

    /// Packs a strip's queries as [dk][NR], times the scale; lanes without a row are zero. Few rows: [rows][dk].
    #[inline(always)]
    pub(crate) fn pack_queries(&mut self, strip: usize) {
        let (s, rows, dk) = (self.s, self.rows_of(strip), self.call.plan.shape.key_dim);
        let packed = self.queries_of(strip);
        let packed = &mut self.scratch.queries[packed];
        if let (Some(q), None, 1, false) = (self.call.q.as_f32(), &self.call.spec.rotary, rows.group, FEW)
            && rows.count == Self::NR
        {
            let [batch, head, position] = rows.place(0);
            let from = q.row_ptr(batch, head, position);
            let stride = q.position_stride();
            // SAFETY: NR rows of dk values lie `stride` apart, and `packed` has room for them.
            unsafe { transpose(s, (Self::NR, dk), from, stride, packed.as_mut_ptr(), Self::NR as isize) };
        } else {
            let staged = if FEW { &mut *packed } else { &mut self.scratch.rows[..Self::NR * dk] };
            for lane in 0..Self::ROWS {
                let to = &mut staged[lane * dk..][..dk];
                if lane < rows.count {
                    let place = rows.place(lane);
                    self.call.q.widen_rows(s, place, 1, to, false);
                    if let Some(rotary) = &self.call.spec.rotary {
                        rotary.rotate(rows.segment.index, place[2], self.call.plan.shape.query_len, to);
                    }
                } else {
                    to.fill(0.0);
                }
            }
            if !FEW {
                let from = staged.as_ptr();
                // SAFETY: NR rows of dk values lie in `staged`, and `packed` has room for them.
                unsafe {
                    transpose(s, (Self::NR, dk), from, dk as isize, packed.as_mut_ptr(), Self::NR as isize)
                };
            }
        }

        let scale = Factor::splat(s, self.call.units.query_scale);
        for q in packed.chunks_exact_mut(S::LANES) {
            s.store(scale.times(s, s.load(q)), q);
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
