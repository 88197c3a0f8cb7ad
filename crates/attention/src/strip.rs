//! The two ends of a strip: query rows packed into lanes, output lanes stored as rows.

use qkv_simd::Simd;

use crate::mask::Mask;
use crate::online_softmax;
use crate::prefill::Worker;

impl<S: Simd, M: Mask, const MR: usize, const NV: usize> Worker<'_, '_, S, M, MR, NV> {
    /// Query head and position of a row of the group.
    #[inline(always)]
    fn head_and_position(&self, row: usize) -> (usize, usize) {
        let group = self.call.plan.shape.group();
        (self.task.kv_head * group + row % group, row / group)
    }

    /// Packs a strip's queries as [dk][NR], times the scale; lanes without a row are zero.
    #[inline(always)]
    pub(crate) fn pack_queries(&mut self, strip: usize) {
        let (s, rows, dk) = (self.s, self.rows_of(strip), self.call.plan.shape.key_dim);
        let packed = &mut self.scratch.queries[strip * dk * Self::NR..][..dk * Self::NR];
        if rows.group == 1 && rows.count == Self::NR {
            let from = self.call.q.row_ptr(self.task.batch, self.task.kv_head, rows.first);
            let stride = self.call.q.position_stride();
            // SAFETY: NR rows of dk values lie `stride` apart, and `packed` has room for them.
            unsafe { transpose(s, (Self::NR, dk), from, stride, packed.as_mut_ptr(), Self::NR as isize) };
        } else {
            let staged = &mut self.scratch.rows[..Self::NR * dk];
            for lane in 0..Self::NR {
                let to = &mut staged[lane * dk..][..dk];
                if lane < rows.count {
                    let group = rows.group;
                    let row = rows.first + lane;
                    let head = self.task.kv_head * group + row % group;
                    to.copy_from_slice(self.call.q.row(self.task.batch, head, row / group));
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
        let high = self.call.scale as f32;
        let low = (self.call.scale - f64::from(high)) as f32;
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
        let mut inverse = [s.zero(); NV];
        for (v, inverse) in inverse.iter_mut().enumerate() {
            *inverse = online_softmax::inverse_sum(s, s.load(&sum[v * S::LANES..]));
        }
        for row in outputs.chunks_exact_mut(Self::NR) {
            for (v, &inverse) in inverse.iter().enumerate() {
                let at = &mut row[v * S::LANES..];
                s.store(s.mul(s.load(at), inverse), at);
            }
        }

        let from = outputs.as_ptr();
        if rows.group == 1 && rows.count == Self::NR {
            let to = self.call.out.row_ptr(self.task.batch, self.task.kv_head, rows.first);
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
                let (head, position) = self.head_and_position(rows.first + lane);
                let to = self.call.out.row_ptr(self.task.batch, head, position);
                let from = &self.scratch.rows[lane * dv..][..dv];
                // SAFETY: the row exists and has dv values; it belongs to this task alone, and scratch is elsewhere.
                unsafe { to.copy_from_nonoverlapping(from.as_ptr(), dv) };
            }
        }
        if let Some(lse) = &self.call.lse {
            for lane in 0..rows.count {
                let (head, position) = self.head_and_position(rows.first + lane);
                // SAFETY: the row, of one value, exists and belongs to this task alone.
                unsafe {
                    *lse.row_ptr(self.task.batch, head, position) = online_softmax::lse(max[lane], sum[lane]);
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
unsafe fn transpose<S: Simd>(
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
