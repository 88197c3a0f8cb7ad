//! What a mask answers: which keys a range of queries can see at all, and what happens to a tile of scores.
//!
//! The first question is arithmetic ([`Mask::visible`]) and decides which key blocks, and which register tiles inside
//! a block, are computed: keys outside are skipped, keys that every query of the range sees need no second question.
//! Only the few tiles on an edge are asked the second one ([`Mask::apply`]), with the scores still in registers.

use core::ops::Range;

use qkv_gemm::tile::Acc;
use qkv_simd::Simd;

/// The keys of a range of queries: `whole` is seen by all of them, `any` by at least one. `whole` lies inside `any`
/// (or is empty).
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

/// The queries in the lanes of a strip: row `first + lane` is query position `row / group` of head `row % group` of
/// the key/value head's group.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StripRows {
    pub(crate) first: usize,
    pub(crate) count: usize,
    pub(crate) group: usize,
}

impl StripRows {
    /// The query positions that occur, all of them.
    pub(crate) fn positions(&self) -> Range<usize> {
        debug_assert!(self.count > 0);
        self.first / self.group..(self.first + self.count - 1) / self.group + 1
    }

    /// Query position of a lane.
    pub(crate) fn position(&self, lane: usize) -> usize {
        (self.first + lane) / self.group
    }
}

/// A rule for which scores count.
pub(crate) trait Mask: Copy + Sync {
    /// What [`Self::apply`] needs to know of a strip, lane by lane.
    type Lanes<S: Simd, const NV: usize>: Copy;

    /// The keys that queries at `positions` (not empty) can see.
    fn visible(&self, positions: Range<usize>) -> Visible;

    /// Prepares [`Self::apply`] for a strip; keys are then counted from `first_key` on, of which it will be asked
    /// about fewer than 2^20.
    fn lanes<S: Simd, const NV: usize>(&self, s: S, rows: StripRows, first_key: usize) -> Self::Lanes<S, NV>;

    /// Gives scores of keys `key + i` (rows of the tile, counted from `first_key`) and the strip's queries (lanes)
    /// their final value; -infinity where a query does not see a key. Called only for tiles that are not whole.
    fn apply<S: Simd, const MR: usize, const NV: usize>(
        &self,
        s: S,
        lanes: &Self::Lanes<S, NV>,
        key: usize,
        scores: &mut Acc<S, MR, NV>,
    );
}

/// No tile is wider than this.
pub(crate) const MAX_NR: usize = 64;

/// The masks that are arithmetic on positions: none, and causal.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Positional {
    pub(crate) key_len: usize,
    /// Query i sees keys j <= i + offset; `None`: all.
    pub(crate) causal_offset: Option<i64>,
}

impl Positional {
    /// The number of keys that the query at `position` sees: a prefix of them.
    fn prefix(&self, position: usize) -> usize {
        match self.causal_offset {
            None => self.key_len,
            // Positions and lengths are at most 2^48, so only the offset can saturate, and then it stays out of range.
            Some(offset) => offset.saturating_add(position as i64 + 1).clamp(0, self.key_len as i64) as usize,
        }
    }
}

impl Mask for Positional {
    /// How many of the keys from `first_key` on each query sees.
    type Lanes<S: Simd, const NV: usize> = [S::F32; NV];

    fn visible(&self, positions: Range<usize>) -> Visible {
        Visible { any: 0..self.prefix(positions.end - 1), whole: 0..self.prefix(positions.start) }
    }

    #[inline(always)]
    fn lanes<S: Simd, const NV: usize>(&self, s: S, rows: StripRows, first_key: usize) -> [S::F32; NV] {
        // Counted from the block and clamped to it, where numbers are small enough to be exact in f32.
        const FAR: i64 = 1 << 20;
        let seen_by_first = match self.causal_offset {
            None => FAR,
            Some(offset) => offset
                .saturating_add(rows.position(0) as i64 + 1)
                .saturating_sub(first_key as i64)
                .clamp(-FAR, FAR),
        };
        // Positions advance once in `group` lanes, from where the first row stands in its group.
        let mut ahead = [0.0; MAX_NR];
        let (mut head, mut position) = (rows.first % rows.group, 0.0);
        for ahead in &mut ahead[..NV * S::LANES] {
            *ahead = position;
            head += 1;
            if head == rows.group {
                (head, position) = (0, position + 1.0);
            }
        }
        let mut seen = [s.splat(seen_by_first as f32); NV];
        for (v, seen) in seen.iter_mut().enumerate() {
            *seen = s.add(*seen, s.load(&ahead[v * S::LANES..]));
        }
        seen
    }

    #[inline(always)]
    fn apply<S: Simd, const MR: usize, const NV: usize>(
        &self,
        s: S,
        seen: &[S::F32; NV],
        key: usize,
        scores: &mut Acc<S, MR, NV>,
    ) {
        for (i, row) in scores.iter_mut().enumerate() {
            let key = s.splat((key + i) as f32);
            for (score, &seen) in row.iter_mut().zip(seen) {
                *score = s.select(s.lt(key, seen), *score, s.splat(f32::NEG_INFINITY));
            }
        }
    }
}
