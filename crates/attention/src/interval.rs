//! Masks that leave each query one interval of keys: causal masks, windows, lengths, left padding, prefixes, documents.
//!
//! Both ends of the interval never decrease from one query to the next, so the keys of a range of queries follow from
//! its first and last one: `any` of them sees lo(first) .. hi(last), all of them (`whole`) see lo(last) .. hi(first).
//! Blocks and tiles outside `any` are skipped, inside `whole` they need no mask; the few on an edge compare lanes.

use core::ops::Range;

use qkv_gemm::tile::Acc;
use qkv_simd::Simd;

use crate::strip::{MAX_NR, StripRows};
use crate::{AttentionSpec, Causal};

/// One sequence: which rows of the tensors hold its queries and keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    /// Batch of the tensors.
    pub(crate) batch: usize,
    /// Index for what is given per sequence: the batch, or the number of a packed sequence.
    pub(crate) index: usize,
    pub(crate) first_query: usize,
    pub(crate) query_len: usize,
    pub(crate) first_key: usize,
    pub(crate) key_len: usize,
}

/// The keys of a range of queries: `whole` is seen by all of them, `any` by at least one. `whole` lies inside `any`
/// or is empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Visible {
    pub(crate) any: Range<usize>,
    pub(crate) whole: Range<usize>,
}

impl Visible {
    /// Whether all queries see all of `keys`.
    pub(crate) fn is_whole(&self, keys: &Range<usize>) -> bool {
        self.whole.start <= keys.start && keys.end <= self.whole.end
    }
}

/// Added to a query's index it gives its position among the keys.
pub(crate) fn position_shift(spec: &AttentionSpec<'_>, segment: &Segment) -> i64 {
    spec.causal.unwrap_or(Causal::BottomRight).offset(segment.query_len, segment.key_len)
}

/// The keys that query `i` of the segment sees, as far as intervals go; possibly empty, with both ends in 0..=key_len.
pub(crate) fn interval(spec: &AttentionSpec<'_>, segment: &Segment, i: usize) -> (usize, usize) {
    let key_len = segment.key_len;
    // Positions and lengths are at most 2^48; an offset or a window may saturate, and is then out of reach anyway.
    let p = position_shift(spec, segment).saturating_add(i as i64);
    let clamp = |x: i64| x.clamp(0, key_len as i64) as usize;
    let far = |x: usize| i64::try_from(x).unwrap_or(i64::MAX);
    let mut low = spec.key_starts.map_or(0, |starts| starts[segment.index].min(key_len));
    let mut high = key_len;
    if spec.causal.is_some() {
        let prefix = spec.prefix.map_or(0, |prefix| prefix[segment.index].min(key_len));
        high = clamp(p.saturating_add(1)).max(prefix);
    }
    if let Some(window) = &spec.window {
        if let Some(left) = window.left {
            low = low.max(clamp(p.saturating_sub(far(left))));
        }
        if let Some(right) = window.right {
            high = high.min(clamp(p.saturating_add(far(right)).saturating_add(1)));
        }
    }
    if let Some(ends) = spec.documents {
        let document = ends.partition_point(|&end| far(end) <= p);
        let start = if document == 0 { 0 } else { ends[document - 1] };
        // Before the first key there is no document either.
        let end = if p < 0 { 0 } else { ends.get(document).copied().unwrap_or(start) };
        low = low.max(start.min(key_len));
        high = high.min(end);
    }
    (low, high)
}

/// The keys of a range of queries (not empty) of the segment.
pub(crate) fn visible(spec: &AttentionSpec<'_>, segment: &Segment, queries: Range<usize>) -> Visible {
    let (first, last) = (interval(spec, segment, queries.start), interval(spec, segment, queries.end - 1));
    let ordered = |start: usize, end: usize| start..end.max(start);
    Visible { any: ordered(first.0, last.1), whole: ordered(last.0, first.1) }
}

/// The intervals of a strip's queries, lane by lane, counted from a block's first key.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ends<F, const NV: usize> {
    low: [F; NV],
    high: [F; NV],
}

impl<F: Copy, const NV: usize> Ends<F, NV> {
    /// For the strip `rows`, counted from `first_key` on; fewer than 2^19 keys will be asked about.
    #[inline(always)]
    pub(crate) fn new<S: Simd<F32 = F>>(
        s: S,
        spec: &AttentionSpec<'_>,
        rows: &StripRows,
        first_key: usize,
    ) -> Self {
        let segment = &rows.segment;
        // Every end is a number or the first lane's position plus one, counted from the block; clamped to the block's
        // surroundings, where it is small enough to be exact in f32. Lanes add how far they are ahead.
        const FAR: i64 = 1 << 20;
        let key = |key: i64| s.splat(key.saturating_sub(first_key as i64).clamp(-FAR, FAR) as f32);
        let p = position_shift(spec, segment).saturating_add(rows.query(0) as i64);
        let far = |x: usize| i64::try_from(x).unwrap_or(i64::MAX);
        let ahead = rows.lanes_ahead::<S, NV>(s);
        let mut low = [key(spec.key_starts.map_or(0, |starts| far(starts[segment.index]))); NV];
        let mut high = [key(segment.key_len as i64); NV];
        if spec.causal.is_some() {
            let prefix = key(spec.prefix.map_or(0, |prefix| far(prefix[segment.index])));
            let end = key(p.saturating_add(1));
            for v in 0..NV {
                high[v] = s.min(high[v], s.max(s.add(end, ahead[v]), prefix));
            }
        }
        if let Some(window) = &spec.window {
            if let Some(left) = window.left {
                let start = key(p.saturating_sub(far(left)));
                for v in 0..NV {
                    low[v] = s.max(low[v], s.add(start, ahead[v]));
                }
            }
            if let Some(right) = window.right {
                let end = key(p.saturating_add(far(right)).saturating_add(1));
                for v in 0..NV {
                    high[v] = s.min(high[v], s.add(end, ahead[v]));
                }
            }
        }
        if spec.documents.is_some() {
            let (mut starts, mut ends) = ([0.0; MAX_NR], [0.0; MAX_NR]);
            for lane in 0..NV * S::LANES {
                let (start, end) = interval(spec, segment, rows.query(lane.min(rows.count - 1)));
                starts[lane] = (start as i64 - first_key as i64).clamp(-FAR, FAR) as f32;
                ends[lane] = (end as i64 - first_key as i64).clamp(-FAR, FAR) as f32;
            }
            for v in 0..NV {
                low[v] = s.load(&starts[v * S::LANES..]);
                high[v] = s.load(&ends[v * S::LANES..]);
            }
        }
        Self { low, high }
    }

    /// Masks a tile of scores of keys `key + i`.
    #[inline(always)]
    pub(crate) fn apply<S: Simd<F32 = F>, const MR: usize>(
        &self,
        s: S,
        key: usize,
        scores: &mut Acc<S, MR, NV>,
    ) {
        for (i, row) in scores.iter_mut().enumerate() {
            let key = s.splat((key + i) as f32);
            for (v, score) in row.iter_mut().enumerate() {
                let sees = s.and(s.le(self.low[v], key), s.lt(key, self.high[v]));
                *score = s.select(sees, *score, s.splat(f32::NEG_INFINITY));
            }
        }
    }
}
