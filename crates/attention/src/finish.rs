//! The end of a strip: outputs over their sums, stored as rows, and the LSE; or, where its keys were cut into parts, what
//! a part leaves behind, and their merge.

use core::ops::Range;

use qkv_simd::Simd;

use crate::factor::Factor;
use crate::online_softmax;
use crate::prefill::{Call, Worker};
use crate::rule::ScoreRule;
use crate::strip::{StripRows, transpose};

impl<S: Simd, R: ScoreRule, const MR: usize, const NV: usize, const FEW: bool>
    Worker<'_, '_, S, R, MR, NV, FEW>
{
    /// Ends a strip.
    #[inline(always)]
    pub(crate) fn store_outputs(&mut self, strip: usize) {
        let (s, call, rows) = (self.s, self.call, self.rows_of(strip));
        let dv = call.plan.shape.value_dim;
        let sum = &self.scratch.state[strip * 2 * Self::NR..][Self::NR..2 * Self::NR];
        let outputs = self.outputs_of(strip);
        let outputs = &mut self.scratch.outputs[outputs];
        if self.started >> strip & 1 == 0 {
            outputs.fill(0.0);
        }
        let mut inverse = [Factor::splat(s, 0.0); NV];
        for (v, inverse) in inverse.iter_mut().enumerate() {
            *inverse = Factor::inverse_sum(s, s.load(&sum[v * S::LANES..]));
        }
        if FEW {
            for (lane, row) in outputs.chunks_exact_mut(dv.max(1)).enumerate().take(rows.count) {
                let inverse = Factor::inverse_sum(s, s.splat(sum[lane]));
                let mut chunks = row.chunks_exact_mut(S::LANES);
                for x in &mut chunks {
                    s.store(inverse.times(s, s.load(x)), x);
                }
                let rest = chunks.into_remainder();
                let p = rest.as_mut_ptr();
                // SAFETY: `rest` has that many values.
                unsafe {
                    let x = s.load_partial(p, rest.len());
                    s.store_partial(inverse.times(s, x), p, rest.len());
                }
            }
        } else {
            for row in outputs.chunks_exact_mut(Self::NR) {
                for (v, inverse) in inverse.iter().enumerate() {
                    let at = &mut row[v * S::LANES..];
                    s.store(inverse.times(s, s.load(at)), at);
                }
            }
        }

        let in_place =
            if FEW || rows.group != 1 || rows.count != Self::NR { None } else { self.call.out.as_f32() };
        if let Some(out) = in_place {
            let [batch, head, position] = rows.place(0);
            let to = out.row_ptr(batch, head, position);
            let (from, stride) = (outputs.as_ptr(), out.position_stride());
            // SAFETY: NR rows of dv values lie `stride` apart; they belong to this task alone, and scratch is elsewhere.
            unsafe { transpose(s, (dv, Self::NR), from, Self::NR as isize, to, stride) };
        } else {
            self.turn_outputs(strip);
            let staged = self.output_rows(strip);
            for lane in 0..rows.count {
                call.store_row(&rows, lane, &staged[lane * dv..][..dv]);
            }
        }
        if call.lse.is_some() || call.maxima.is_some() {
            let (max, sum) = self.scratch.state[strip * 2 * Self::NR..][..2 * Self::NR].split_at(Self::NR);
            for lane in 0..rows.count {
                call.store_state(&rows, lane, max[lane], sum[lane].into());
            }
        }
    }

    /// Outputs of a strip as rows, [NR][dv], in `scratch.rows`, unless they are rows already.
    #[inline(always)]
    fn turn_outputs(&mut self, strip: usize) {
        if FEW {
            return;
        }
        let dv = self.call.plan.shape.value_dim;
        let from = self.scratch.outputs[self.outputs_of(strip)].as_ptr();
        let staged = &mut self.scratch.rows[..Self::NR * dv];
        // SAFETY: `staged` has room for NR rows of dv values.
        unsafe {
            transpose(self.s, (dv, Self::NR), from, Self::NR as isize, staged.as_mut_ptr(), dv as isize)
        };
    }

    /// What [`Self::turn_outputs`] has made.
    #[inline(always)]
    fn output_rows(&self, strip: usize) -> &[f32] {
        let dv = self.call.plan.shape.value_dim;
        if FEW { &self.scratch.outputs[self.outputs_of(strip)] } else { &self.scratch.rows[..Self::NR * dv] }
    }

    /// Where a strip is in the slot of a part of its task's keys.
    #[inline(always)]
    fn in_slot(&self, strip: usize) -> Range<usize> {
        let (first, values) = (strip * Self::ROWS, self.call.plan.shape.value_dim + 2);
        first * values..(first + self.rows_of(strip).count) * values
    }

    /// Leaves what a strip has of a part of the task's keys in the part's slot: max, sum, and outputs that are not divided yet.
    #[inline(always)]
    pub(crate) fn save_part(&mut self, strip: usize, part: usize) {
        let (dv, count, slot) =
            (self.call.plan.shape.value_dim, self.rows_of(strip).count, self.call.plan.slot());
        let (outputs, place) = (self.outputs_of(strip), self.in_slot(strip));
        if self.started >> strip & 1 == 0 {
            self.scratch.outputs[outputs.clone()].fill(0.0);
        }
        self.turn_outputs(strip);
        let outputs = if FEW { &self.scratch.outputs[outputs] } else { &self.scratch.rows[..] };
        let to = match &self.call.shared {
            // SAFETY: this task has this part of its unit.
            Some(shared) => unsafe { shared.slots(self.task.first_slot + part, 1) },
            None => &mut self.scratch.slots[part * slot..][..slot],
        };
        let to = &mut to[place];
        let (max, sum) = self.scratch.state[strip * 2 * Self::NR..][..2 * Self::NR].split_at(Self::NR);
        to[..count].copy_from_slice(&max[..count]);
        to[count..2 * count].copy_from_slice(&sum[..count]);
        to[2 * count..].copy_from_slice(&outputs[..count * dv]);
    }

    /// Merges the parts of all strips and stores the results, if this task is the one that has finished the last of them.
    #[inline(always)]
    pub(crate) fn merge_parts(&mut self, strips: usize, parts: usize) {
        if let Some(shared) = &self.call.shared
            && !shared.finish(self.task.unit, self.task.parts.len(), parts)
        {
            return;
        }
        for strip in 0..strips {
            self.merge_strip(strip, parts);
        }
    }

    /// Merges the parts of a strip, which are finished, and stores the result.
    #[inline(always)]
    fn merge_strip(&mut self, strip: usize, parts: usize) {
        let (s, call, rows, place) = (self.s, self.call, self.rows_of(strip), self.in_slot(strip));
        let (dv, slot, count) = (call.plan.shape.value_dim, call.plan.slot(), rows.count);
        let slots = match &self.call.shared {
            // SAFETY: all parts of the unit are finished, says the caller.
            Some(shared) => unsafe { &*shared.slots(self.task.first_slot, parts) },
            None => &self.scratch.slots[..parts * slot],
        };
        let slots = slots.chunks_exact(slot).map(|slot| &slot[place.clone()]);
        for lane in 0..count {
            let states = slots.clone().map(|slot| (slot[lane], slot[count + lane]));
            let max = states.clone().map(|(max, _)| max).fold(f32::NEG_INFINITY, f32::max);
            let nothing = |state: (f32, f32)| state == (f32::NEG_INFINITY, 0.0);
            let share = |state: (f32, f32)| match nothing(state) {
                true => 0.0,
                false => ((f64::from(state.0) - f64::from(max)) * call.units.natural).exp(),
            };
            let sum: f64 = states.clone().map(|state| share(state) * f64::from(state.1)).sum();
            let out = &mut self.scratch.rows[..dv];
            out.fill(0.0);
            for (slot, state) in slots.clone().zip(states) {
                if nothing(state) {
                    continue;
                }
                let factor = s.splat((share(state) / sum) as f32);
                let from = &slot[2 * count + lane * dv..][..dv];
                let whole = dv / S::LANES * S::LANES;
                for at in (0..whole).step_by(S::LANES) {
                    let sum = s.mul_add(factor, s.load(&from[at..]), s.load(&out[at..]));
                    s.store(sum, &mut out[at..]);
                }
                let (from, to) = (from[whole..].as_ptr(), out[whole..].as_mut_ptr());
                // SAFETY: both have `dv - whole` values.
                unsafe {
                    let old = s.load_partial(to, dv - whole);
                    let sum = s.mul_add(factor, s.load_partial(from, dv - whole), old);
                    s.store_partial(sum, to, dv - whole);
                }
            }
            call.store_row(&rows, lane, &self.scratch.rows[..dv]);
            call.store_state(&rows, lane, max, sum);
        }
    }
}

impl<R> Call<'_, R> {
    /// Stores a row of outputs.
    #[inline(always)]
    fn store_row(&self, rows: &StripRows, lane: usize, from: &[f32]) {
        // SAFETY: the row exists and has dv values; it belongs to this task alone, and scratch is elsewhere.
        unsafe { self.out.store_row(rows.place(lane), from) };
    }

    /// Stores a row's LSE and its maximum, in natural units, where they are asked for. A sink that is all that counts is both, as it
    /// was given.
    #[inline(always)]
    fn store_state(&self, rows: &StripRows, lane: usize, max: f32, sum: f64) {
        let [batch, head, position] = rows.place(lane);
        let sink = self.spec.sinks.map(|sinks| sinks[head]).filter(|sink| sink * self.units.unit == max);
        let natural = sink.unwrap_or((f64::from(max) * self.units.natural) as f32);
        let lse = match sink {
            Some(sink) if sum == 1.0 => sink,
            _ => online_softmax::lse(max, sum, self.units.natural),
        };
        // SAFETY: the rows, of one value each, exist and belong to this task alone.
        unsafe {
            if let Some(to) = &self.lse {
                *to.row_ptr(batch, head, position) = lse;
            }
            if let Some(to) = &self.maxima {
                *to.row_ptr(batch, head, position) = natural;
            }
        }
    }
}
