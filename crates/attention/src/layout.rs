//! Where a worker's scratch holds what.

use crate::few_rows::{FEW_BLOCK, most_few_rows};
use crate::online_softmax::SUM_CHAINS;
use crate::panels::WORD;
use crate::plan::{KEY_BLOCK, Plan};

/// No block of keys is larger where tiles compute it.
const TILED_BLOCK: usize = KEY_BLOCK + SUM_CHAINS;

/// No block of keys is larger.
pub(crate) const MAX_KEY_BLOCK: usize = if FEW_BLOCK > TILED_BLOCK { FEW_BLOCK } else { TILED_BLOCK };

/// The parts, in values. Every one begins on a cache line.
///
/// ```text
/// | queries: strips x [dk][NR] | outputs: strips x [dv][NR] | max, sum: strips x 2 x [NR] | scores: [block][NR] |
/// | rows: [NR][max(dk, dv, block)], the strip being packed or stored | values: [block][dv], the careful way's copy |
/// | bits: [block / 32][NR] | bias: [block][NR], where there is one | keys: [block][dk], values: [block][dv], where the
/// tensors are not f32 or in pages | slots of parts, where a task has several |
/// ```
///
/// `block` is [`TILED_BLOCK`]; where a sequence has few queries at least [`FEW_BLOCK`], with LANES for NR, and strips of [rows][dk] and
/// [rows][dv].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    outputs: usize,
    state: usize,
    scores: usize,
    rows: usize,
    values: usize,
    bits: usize,
    bias: usize,
    wide_keys: usize,
    wide_values: usize,
    slots: usize,
    pub(crate) total: usize,
}

impl Layout {
    pub(crate) fn new(plan: &Plan) -> Self {
        let nr = plan.kernel.nr;
        // Blocks of few query rows have more keys and a single vector of queries.
        let few = if plan.any_few_rows { FEW_BLOCK } else { 0 };
        let (block, lanes) = (TILED_BLOCK.max(few), (TILED_BLOCK * nr).max(few * plan.lanes));
        let (dk, dv) = (plan.shape.key_dim, plan.shape.value_dim);
        let mut end = 0;
        let mut part = |values: usize| {
            let start = end;
            end += values.next_multiple_of(16);
            start
        };
        let (strips, few_strips, few_rows) = (plan.strips(), plan.few_strips(), most_few_rows(plan.lanes));
        let few_queries = few_strips * (dk * few_rows).next_multiple_of(plan.lanes);
        part((strips * dk * nr).max(few_queries));
        let outputs = part((strips * dv * nr).max(few_strips * dv * few_rows));
        let state = part((strips * 2 * nr).max(few_strips * 2 * plan.lanes));
        let scores = part(lanes);
        let rows = part((nr * dk.max(dv)).max(lanes));
        let values = part(block * dv);
        let bits = part((TILED_BLOCK.div_ceil(WORD) * nr).max(few.div_ceil(WORD) * plan.lanes));
        let bias = part(if plan.has_panels { lanes } else { 0 });
        let wide_keys = part(if plan.copies != [false; 2] { block * dk.max(dv) } else { 0 });
        let wide_values = part(if plan.copies[1] { block * dv } else { 0 });
        let slots = part(if plan.has_own_slots() { plan.slots() } else { 0 });
        Self { outputs, state, scores, rows, values, bits, bias, wide_keys, wide_values, slots, total: end }
    }
}

/// A worker's scratch, cut into its parts.
pub(crate) struct Scratch<'s> {
    pub(crate) queries: &'s mut [f32],
    pub(crate) outputs: &'s mut [f32],
    pub(crate) state: &'s mut [f32],
    pub(crate) scores: &'s mut [f32],
    pub(crate) rows: &'s mut [f32],
    pub(crate) values: &'s mut [f32],
    pub(crate) bits: &'s mut [f32],
    pub(crate) bias: &'s mut [f32],
    pub(crate) wide_keys: &'s mut [f32],
    pub(crate) wide_values: &'s mut [f32],
    pub(crate) slots: &'s mut [f32],
}

impl<'s> Scratch<'s> {
    pub(crate) fn cut(layout: &Layout, memory: &'s mut [f32]) -> Self {
        let (memory, slots) = memory.split_at_mut(layout.slots);
        let (memory, wide_values) = memory.split_at_mut(layout.wide_values);
        let (memory, wide_keys) = memory.split_at_mut(layout.wide_keys);
        let (memory, bias) = memory.split_at_mut(layout.bias);
        let (memory, bits) = memory.split_at_mut(layout.bits);
        let (memory, values) = memory.split_at_mut(layout.values);
        let (memory, rows) = memory.split_at_mut(layout.rows);
        let (memory, scores) = memory.split_at_mut(layout.scores);
        let (memory, state) = memory.split_at_mut(layout.state);
        let (queries, outputs) = memory.split_at_mut(layout.outputs);
        Self { queries, outputs, state, scores, rows, values, bits, bias, wide_keys, wide_values, slots }
    }
}
