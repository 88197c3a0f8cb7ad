//! Panels beside the scores: what is given per (query, key) in memory, brought into the scores' own layout.
//!
//! Scores lie as [keys][NR queries]; masks and biases in memory mostly as rows of keys. So for each strip and block of
//! keys, once for both: a dense bias and T5's bias are transposed or expanded into a panel of f32 [keys][NR], to be added
//! with one multiply-add per vector of scores; boolean masks, block-sparse masks on a ragged edge and dilated windows become
//! one bit per key in a word per lane, [keys / 32][NR], tested with a shift. Packing the bits of 96 x 16 scores costs about
//! 200 cycles of the 12 000 that their products take at dim 64 (AVX2).

use core::ops::Range;

use qkv_simd::Simd;

use crate::interval::position_shift;
use crate::strip::{StripRows, transpose};
use crate::{AttentionSpec, Bias, BlockMask, Broadcast, HalfKind, T5Bias};

/// Keys per word of a bit panel.
pub(crate) const WORD: usize = 32;

/// What a bit panel says as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bits {
    /// Nothing is seen: the block can be skipped.
    None,
    /// Some of it is.
    Some,
    /// All of it is: no bits need be tested.
    All,
}

/// Whether a strip's block needs bits: for a boolean mask, a dilated window, or where a block-sparse mask is `ragged`.
pub(crate) fn needs_bits(spec: &AttentionSpec<'_>, ragged: bool) -> bool {
    ragged || spec.mask.is_some() || spec.window.is_some_and(|window| window.dilation > 1)
}

/// Whether a call has biases that become a panel.
pub(crate) fn has_bias(spec: &AttentionSpec<'_>) -> bool {
    spec.bias.is_some() || spec.t5_bias.is_some()
}

/// Fills `words` with one bit per key of `keys` and lane: bit b of word w is key `keys.start + 32 w + b`.
#[inline(always)]
pub(crate) fn fill_bits<S: Simd>(
    s: S,
    spec: &AttentionSpec<'_>,
    rows: &StripRows,
    keys: &Range<usize>,
    words: &mut [f32],
) -> Bits {
    let nr = words.len() / keys.len().div_ceil(WORD);
    let (mut any, mut all) = (0u32, u32::MAX);
    let rowless = is_rowless(spec);
    if let (Some(mask), false, false) = (&spec.mask, rowless, needs_more_than_mask(spec))
        && mask.expanded()[3] == 1
        && keys.len().is_multiple_of(WORD)
    {
        return fill_mask_bits(s, mask, rows, keys, words);
    }
    // A key padding mask is the same for all queries of a head: with one head, one lane is enough.
    let filled = if rowless && rows.group == 1 { 1 } else { rows.count };
    for lane in 0..filled {
        let (head, query) = (rows.head(lane), rows.query(lane));
        let at = [rows.segment.index, head, query, keys.start];
        let mask = spec.mask.as_ref().map(|mask| (mask.at(at), mask.expanded()[3]));
        for (w, row) in words.chunks_exact_mut(nr).enumerate() {
            let start = keys.start + w * WORD;
            let count = WORD.min(keys.end - start);
            let full = u32::MAX >> (WORD - count);
            let mut word = full;
            if let Some((first, stride)) = mask {
                // SAFETY: the mask has the keys start .. start + count, expanded by its stride.
                word &= unsafe {
                    mask_word(s, first.wrapping_offset((w * WORD) as isize * stride), stride, count)
                };
            }
            if let Some(blocks) = spec.block_mask {
                word &= block_word(blocks, [at[0], head, query, start], count);
            }
            if let Some(window) = &spec.window
                && window.dilation > 1
            {
                let p = position_shift(spec, &rows.segment).saturating_add(query as i64);
                word &= dilation_word(p, window.dilation, start, count);
            }
            any |= word;
            // Bits past the last key do not count as unseen.
            all &= word | !full;
            row[lane] = f32::from_bits(word);
        }
    }
    finish_bits(filled, nr, words, (any, all))
}

/// Whether bits come from more than the boolean mask.
fn needs_more_than_mask(spec: &AttentionSpec<'_>) -> bool {
    spec.block_mask.is_some() || spec.window.is_some_and(|window| window.dilation > 1)
}

/// [`fill_bits`] for nothing but a mask of whole words with its keys side by side: a loop short enough that the loads of
/// many rows, which come from far apart, are under way together.
#[inline(always)]
fn fill_mask_bits<S: Simd>(
    s: S,
    mask: &Broadcast<'_, bool>,
    rows: &StripRows,
    keys: &Range<usize>,
    words: &mut [f32],
) -> Bits {
    let count = keys.len() / WORD;
    let nr = words.len() / count;
    let [_, head_stride, query_stride, _] = mask.expanded();
    let first = mask.at([rows.segment.index, 0, 0, keys.start]);
    let (mut any, mut all) = (0u64, u64::MAX);
    for lane in 0..rows.count {
        let (head, query) = (rows.head(lane) as isize, rows.query(lane) as isize);
        let row = first.wrapping_offset(head * head_stride + query * query_stride);
        let lanes = &mut words[lane..];
        // The usual block is four words: no loop, and its loads side by side.
        if count == 4 {
            // SAFETY: the mask has these 128 keys of the query, side by side; a bool is one byte.
            let (first, last) = unsafe {
                (s.nonzero_bytes_64(row.cast()), s.nonzero_bytes_64(row.wrapping_add(2 * WORD).cast()))
            };
            (any, all) = (any | first | last, all & first & last);
            let lanes = &mut lanes[..3 * nr + 1];
            lanes[0] = f32::from_bits(first as u32);
            lanes[nr] = f32::from_bits((first >> WORD) as u32);
            lanes[2 * nr] = f32::from_bits(last as u32);
            lanes[3 * nr] = f32::from_bits((last >> WORD) as u32);
            continue;
        }
        for w in 0..count {
            // SAFETY: as above.
            let word = unsafe { s.nonzero_bytes(row.wrapping_add(w * WORD).cast()) };
            any |= u64::from(word);
            all &= u64::from(word) | u64::from(word) << WORD;
            lanes[w * nr] = f32::from_bits(word);
        }
    }
    let (any, all) = (any | any >> WORD, all & all >> WORD);
    finish_bits(rows.count, nr, words, (any as u32, all as u32))
}

/// Fills the lanes from `filled` on (without a query, or all with the same mask) with what the one before them sees, and
/// says what the bits are as a whole.
fn finish_bits(filled: usize, nr: usize, words: &mut [f32], (any, all): (u32, u32)) -> Bits {
    for row in words.chunks_exact_mut(nr) {
        let last = row[filled - 1];
        row[filled..].fill(last);
    }
    match (any, all) {
        (0, _) => Bits::None,
        (_, u32::MAX) => Bits::All,
        _ => Bits::Some,
    }
}

/// Whether the bits are the same for all queries of a head: a key padding mask.
fn is_rowless(spec: &AttentionSpec<'_>) -> bool {
    spec.block_mask.is_none()
        && spec.window.is_none_or(|w| w.dilation == 1)
        && spec.mask.is_some_and(|mask| mask.expanded()[2] == 0)
}

/// Up to 32 keys of a boolean mask as bits.
///
/// # Safety
/// `count` values, at least one, must be readable from `first` on, `stride` apart.
#[inline(always)]
unsafe fn mask_word<S: Simd>(s: S, first: *const bool, stride: isize, count: usize) -> u32 {
    if stride == 1 && count == WORD {
        // SAFETY: 32 values lie from `first` on; a bool is one byte.
        return unsafe { s.nonzero_bytes(first.cast()) };
    }
    let mut word = 0;
    for bit in 0..count {
        // As a byte, as above: a mask from another language may hold what no bool may, and all but 0 is true there.
        // SAFETY: `bit` is below `count`.
        let byte = unsafe { *first.offset(bit as isize * stride).cast::<u8>() };
        word |= u32::from(byte != 0) << bit;
    }
    word
}

/// Up to 32 keys of a block-sparse mask as bits.
fn block_word(blocks: &BlockMask, [batch, head, query, start]: [usize; 4], count: usize) -> u32 {
    let size = blocks.block()[1];
    let (mut word, mut bit) = (0u32, 0);
    while bit < count {
        let end = count.min(bit + size - (start + bit) % size);
        if blocks.sees(batch, head, query, start + bit) {
            word |= (u32::MAX >> (WORD - (end - bit))) << bit;
        }
        bit = end;
    }
    word
}

/// Up to 32 keys of which those count whose distance from `p` is a multiple of the dilation.
fn dilation_word(p: i64, dilation: usize, start: usize, count: usize) -> u32 {
    let dilation = i64::try_from(dilation).unwrap_or(i64::MAX);
    let first = p.saturating_sub(start as i64).rem_euclid(dilation);
    let mut word = 0;
    let mut bit = first;
    while bit < count as i64 {
        word |= 1 << bit;
        bit = bit.saturating_add(dilation);
    }
    word
}

/// The biases of a strip and a block: [keys][NR] in natural units.
pub(crate) struct BiasPanel<'w> {
    pub(crate) values: &'w mut [f32],
    /// Whether -infinity in it replaces the score, which may be NaN, instead of being added.
    pub(crate) masks: bool,
    /// Whether any of it may be -infinity.
    pub(crate) may_mask: bool,
}

impl<'w> BiasPanel<'w> {
    /// The sum of the call's biases, in `values`, which has room for [keys][nr]; `staged` has room for [nr][keys].
    /// Whether any is -infinity is looked for if `careful`: on the second way through the keys (hidden.rs), and for a rule.
    #[inline(always)]
    pub(crate) fn new<S: Simd>(
        s: S,
        spec: &AttentionSpec<'_>,
        rows: &StripRows,
        keys: &Range<usize>,
        (values, staged): (&'w mut [f32], &mut [f32]),
        careful: bool,
    ) -> Self {
        if !has_bias(spec) {
            return Self { values, masks: false, may_mask: false };
        }
        let nr = values.len() / keys.len();
        match &spec.bias {
            Some(Bias::F32(bias)) if bias.expanded()[3] == 1 && rows.group == 1 && rows.count == nr => {
                let from = bias.at([rows.segment.index, rows.head(0), rows.query(0), keys.start]);
                let (stride, to) = (bias.expanded()[2], values.as_mut_ptr());
                // SAFETY: NR rows of keys lie `stride` apart (0: one row for all), and the panel has room for them.
                unsafe { transpose(s, (nr, keys.len()), from, stride, to, nr as isize) };
            }
            Some(bias) => {
                for lane in 0..nr {
                    let lane_row = lane.min(rows.count - 1);
                    let at = [rows.segment.index, rows.head(lane_row), rows.query(lane_row), keys.start];
                    let row = &mut staged[lane * keys.len()..][..keys.len()];
                    match bias {
                        Bias::F32(bias) => stage_row(bias, at, row, |x| x),
                        Bias::Half(HalfKind::F16, bias) => stage_row(bias, at, row, widen_f16),
                        Bias::Half(HalfKind::Bf16, bias) => stage_row(bias, at, row, widen_bf16),
                    }
                }
                let (from, to) = (staged.as_ptr(), values.as_mut_ptr());
                // SAFETY: NR rows of keys lie in `staged`, and the panel has room for them.
                unsafe { transpose(s, (nr, keys.len()), from, keys.len() as isize, to, nr as isize) };
            }
            None => {}
        }
        if let Some(t5) = &spec.t5_bias {
            if spec.bias.is_some() {
                t5_panel::<S, true>(s, spec, t5, rows, keys, (&mut *values, staged));
            } else {
                t5_panel::<S, false>(s, spec, t5, rows, keys, (&mut *values, staged));
            }
        }
        let masks = careful && has_negative_infinity(s, values);
        Self { values, masks, may_mask: masks || !careful }
    }
}

/// Whether any of whole vectors of biases is -infinity.
#[inline(always)]
fn has_negative_infinity<S: Simd>(s: S, panel: &[f32]) -> bool {
    // `min` keeps its second operand where the first is NaN, so a NaN hides nothing. Four minima, for one alone would wait
    // for each of its comparisons.
    let mut least = [s.zero(); 4];
    let mut chunks = panel.chunks_exact(4 * S::LANES);
    for chunk in &mut chunks {
        for (i, least) in least.iter_mut().enumerate() {
            *least = s.min(s.load(&chunk[i * S::LANES..]), *least);
        }
    }
    for x in chunks.remainder().chunks_exact(S::LANES) {
        least[0] = s.min(s.load(x), least[0]);
    }
    let least = s.min(s.min(least[0], least[1]), s.min(least[2], least[3]));
    s.bits(s.eq(least, s.splat(f32::NEG_INFINITY))) != 0
}

/// One query's biases, widened.
fn stage_row<T: Copy>(bias: &Broadcast<'_, T>, at: [usize; 4], row: &mut [f32], widen: impl Fn(T) -> f32) {
    let (first, stride) = (bias.at(at), bias.expanded()[3]);
    for (i, x) in row.iter_mut().enumerate() {
        // SAFETY: the bias has this key, expanded by its stride.
        *x = widen(unsafe { *first.offset(i as isize * stride) });
    }
}

/// f32 from the bits of a bfloat16.
pub(crate) fn widen_bf16(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// f32 from the bits of an IEEE binary16.
pub(crate) fn widen_f16(bits: u16) -> f32 {
    half::f16::from_bits(bits).to_f32()
}

/// T5's bucket of the distance key - query.
pub(crate) fn t5_bucket(t5: &T5Bias<'_>, distance: i64) -> usize {
    let (buckets, offset, distance) = if t5.bidirectional {
        let half = t5.buckets / 2;
        (half, if distance > 0 { half } else { 0 }, distance.unsigned_abs())
    } else {
        (t5.buckets, 0, distance.min(0).unsigned_abs())
    };
    let exact = buckets / 2;
    if (distance as usize) < exact {
        return offset + distance as usize;
    }
    // In f32, as the models are trained with it.
    let ratio = (distance as f32 / exact as f32).ln() / (t5.max_distance as f64 / exact as f64).ln() as f32;
    let bucket = exact + (ratio * (buckets - exact) as f32) as usize;
    offset + bucket.min(buckets - 1)
}

/// T5's bias into the panel, or added to what is there if `ADD`: constant along diagonals, so one row of values over the distances that occur serves all lanes of a
/// head. It is filled bucket by bucket, from the few distances where the bucket changes.
#[inline(always)]
fn t5_panel<S: Simd, const ADD: bool>(
    s: S,
    spec: &AttentionSpec<'_>,
    t5: &T5Bias<'_>,
    rows: &StripRows,
    keys: &Range<usize>,
    (panel, staged): (&mut [f32], &mut [f32]),
) {
    let nr = panel.len() / keys.len();
    let heads = t5.table.len() / t5.buckets;
    let shift = position_shift(spec, &rows.segment);
    let p = shift.saturating_add(rows.query(0) as i64);
    if rows.group == 1 {
        // diagonal[x] is the bias of query position - key = x - (keys.len() - 1) + p - keys.start.
        let head = rows.head(0);
        let diagonal = &mut staged[..keys.len() + nr - 1];
        let least = p - (keys.end as i64 - 1);
        let mut filled = 0;
        while filled < diagonal.len() {
            let bucket = t5_bucket(t5, -(least + filled as i64));
            let mut end = filled + 1;
            // Far from the diagonal all distances share a bucket: double the step while it does not change.
            let mut step = 1;
            while end < diagonal.len() {
                let next = (end + step).min(diagonal.len()) - 1;
                let same = t5_bucket(t5, -(least + next as i64)) == bucket;
                match (same, step) {
                    (true, _) => (end, step) = (next + 1, step * 2),
                    (false, 1) => break,
                    (false, _) => step = 1,
                }
            }
            diagonal[filled..end].fill(t5.table[bucket * heads + head]);
            filled = end;
        }
        for (i, row) in panel.chunks_exact_mut(nr).enumerate() {
            let values = &diagonal[keys.len() - 1 - i..][..nr];
            for at in (0..nr).step_by(S::LANES) {
                let value = s.load(&values[at..]);
                let value = if ADD { s.add(s.load(&row[at..]), value) } else { value };
                s.store(value, &mut row[at..]);
            }
        }
    } else {
        for (key, row) in keys.clone().zip(panel.chunks_exact_mut(nr)) {
            for (lane, x) in row.iter_mut().enumerate() {
                let lane = lane.min(rows.count - 1);
                let p = shift.saturating_add(rows.query(lane) as i64);
                let value = t5.table[t5_bucket(t5, key as i64 - p) * heads + rows.head(lane)];
                *x = if ADD { *x + value } else { value };
            }
        }
    }
}
