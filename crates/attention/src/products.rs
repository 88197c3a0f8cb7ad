//! The two products of prefill.rs on the register tile, as operations on tiles of rows.

use core::ops::Range;

use qkv_gemm::RowsOp;
use qkv_gemm::tile::{Acc, Columns, Lhs, Rhs, Rows, tile, tile_in_links, tile_onto};
use qkv_simd::Simd;

use crate::AttentionSpec;
use crate::ahead::Ahead;
use crate::interval::{Visible, interval};
use crate::panels::BiasPanel;
use crate::score_ops::TileOps;
use crate::strip::{MAX_NR, StripRows};

/// The first product: tile rows are keys, lanes are queries. Rows count from the first key as `k` does.
pub(crate) struct Scores<'w, S: Simd, const NV: usize> {
    pub(crate) s: S,
    /// What happens to scores on the tile, if anything.
    pub(crate) ops: Option<&'w TileOps<'w, S, NV>>,
    /// Where the run begins that is being computed.
    pub(crate) base: usize,
    pub(crate) k: *const f32,
    pub(crate) k_stride: isize,
    pub(crate) depth: usize,
    pub(crate) vectors: Vectors,
    pub(crate) queries: &'w [f32],
    pub(crate) scores: &'w mut [f32],
    pub(crate) max: [S::F32; NV],
    pub(crate) ahead: Ahead<'w>,
    pub(crate) bias: &'w BiasPanel<'w>,
}

impl<S: Simd, const NV: usize> RowsOp for Scores<'_, S, NV> {
    #[inline(always)]
    fn run<const ROWS: usize>(&mut self, first: usize) {
        let (s, nr, first) = (self.s, NV * S::LANES, self.base + first);
        let lhs = Rows { ptr: self.k.wrapping_offset(first as isize * self.k_stride), stride: self.k_stride };
        let rhs = Rhs { ptr: self.queries.as_ptr(), stride: nr as isize };
        debug_assert_eq!(self.queries.len(), self.depth * nr);
        self.ahead.step(s, first..first + ROWS);
        // SAFETY: key rows first..first + ROWS exist and have `depth` values; the packed queries are [depth][nr].
        let mut acc = unsafe {
            match self.vectors.only::<NV>(first) {
                Some(v) => one_vector::<S, _, ROWS, NV>(s, self.depth, lhs, rhs, v),
                None => sums::<S, _, ROWS, NV>(s, self.depth, lhs, rhs),
            }
        };
        // Opaque, or the compiler would keep parts of it in registers through the product's loop, which needs them all.
        if let Some(ops) = core::hint::black_box(self.ops) {
            ops.apply(s, first, &mut acc, self.bias);
        }
        let out = &mut self.scores[first * nr..][..ROWS * nr];
        for (i, row) in acc.iter().enumerate() {
            for (v, &score) in row.iter().enumerate() {
                s.store(score, &mut out[i * nr + v * S::LANES..]);
                self.max[v] = s.max(score, self.max[v]);
            }
        }
    }
}

/// Which keys of a block all vectors of a strip's queries have to do with, counted from the block's first: along a causal
/// mask's or a window's edge, and where a sequence ends, one of them alone sees keys. At the diagonal of a causal
/// mask this halves what is computed for nothing.
#[derive(Clone, Debug)]
pub(crate) struct Vectors {
    /// Keys before these are seen by the first vector alone, keys behind them by the last.
    all: Range<usize>,
}

impl Vectors {
    /// Of `keys` of a strip, in whose block something is visible.
    #[inline(always)]
    pub(crate) fn new<S: Simd, const NV: usize>(
        spec: &AttentionSpec<'_>,
        rows: &StripRows,
        visible: &Visible,
        keys: &Range<usize>,
    ) -> Self {
        let count = keys.len();
        if NV == 1 || visible.is_whole(keys) && rows.count > S::LANES {
            return Self { all: 0..count };
        }
        if rows.count <= S::LANES {
            return Self { all: count..count };
        }
        let end = interval(spec, &rows.segment, rows.query(S::LANES - 1)).1;
        let start = interval(spec, &rows.segment, rows.query((NV - 1) * S::LANES)).0;
        let end = end.clamp(keys.start, keys.end) - keys.start;
        Self { all: start.clamp(keys.start, keys.start + end) - keys.start..end }
    }

    /// The parts of a run of keys of which each is computed with the same vectors.
    #[inline(always)]
    pub(crate) fn parts(&self, run: &Range<usize>) -> [Range<usize>; 3] {
        let (start, end) = (self.all.start.clamp(run.start, run.end), self.all.end.clamp(run.start, run.end));
        [run.start..start, start..end, end..run.end]
    }

    /// Sums over `keys` keys from the block's first on: a vector's is one chain over the keys that it has to do with, the
    /// weights of the others, all 0, are left out.
    ///
    /// # Safety
    /// As [`tile`] of depth `keys`.
    #[inline(always)]
    unsafe fn sums_over_keys<S: Simd, const ROWS: usize, const NV: usize>(
        &self,
        s: S,
        keys: usize,
        lhs: Columns,
        rhs: Rhs,
    ) -> Acc<S, ROWS, NV> {
        let [first, all, last] = self.parts(&(0..keys));
        let part = |key: usize, v: usize| {
            let ptr = rhs.ptr.wrapping_offset(key as isize * rhs.stride).wrapping_add(v * S::LANES);
            (lhs.advanced(key), Rhs { ptr, ..rhs })
        };
        let mut acc = [[s.zero(); NV]; ROWS];
        // SAFETY: the caller's promise; the parts are inside of `keys`.
        unsafe {
            if NV > 1 && !first.is_empty() {
                let (lhs, rhs) = part(first.start, 0);
                let sums = tile::<S, _, ROWS, 1>(s, first.len(), lhs, rhs);
                for (row, [sum]) in acc.iter_mut().zip(sums) {
                    row[0] = sum;
                }
            }
            if !all.is_empty() {
                let (lhs, rhs) = part(all.start, 0);
                acc = tile_onto::<S, _, ROWS, NV>(s, all.len(), lhs, rhs, acc);
            }
            if NV > 1 && !last.is_empty() {
                let (lhs, rhs) = part(last.start, NV - 1);
                let mut sums = [[s.zero(); 1]; ROWS];
                for (sum, row) in sums.iter_mut().zip(&acc) {
                    *sum = [row[NV - 1]];
                }
                sums = tile_onto::<S, _, ROWS, 1>(s, last.len(), lhs, rhs, sums);
                for (row, [sum]) in acc.iter_mut().zip(sums) {
                    row[NV - 1] = sum;
                }
            }
        }
        acc
    }

    /// The only vector, the first or the last, that the part with `key` has to do with.
    #[inline(always)]
    fn only<const NV: usize>(&self, key: usize) -> Option<usize> {
        if key < self.all.start {
            Some(0)
        } else if key >= self.all.end {
            Some(NV - 1)
        } else {
            None
        }
    }
}

/// The tile; in links, where there are registers for it.
///
/// # Safety
/// As [`tile`].
#[inline(always)]
unsafe fn sums<S: Simd, L: Lhs, const ROWS: usize, const NV: usize>(
    s: S,
    depth: usize,
    lhs: L,
    rhs: Rhs,
) -> Acc<S, ROWS, NV> {
    // SAFETY: the caller's promise, in both.
    unsafe {
        if S::REGISTERS >= 32 {
            tile_in_links::<S, L, ROWS, NV>(s, depth, lhs, rhs)
        } else {
            tile::<S, L, ROWS, NV>(s, depth, lhs, rhs)
        }
    }
}

/// [`sums`] of vector `v` alone, the others zero.
///
/// # Safety
/// As [`tile`].
#[inline(always)]
unsafe fn one_vector<S: Simd, L: Lhs, const ROWS: usize, const NV: usize>(
    s: S,
    depth: usize,
    lhs: L,
    mut rhs: Rhs,
    v: usize,
) -> Acc<S, ROWS, NV> {
    rhs.ptr = rhs.ptr.wrapping_add(v * S::LANES);
    // SAFETY: the caller's promise.
    let narrow = unsafe { sums::<S, L, ROWS, 1>(s, depth, lhs, rhs) };
    let mut acc = [[s.zero(); NV]; ROWS];
    for (row, [sum]) in acc.iter_mut().zip(narrow) {
        if v == 0 {
            row[0] = sum;
        } else {
            row[NV - 1] = sum;
        }
    }
    acc
}

/// The second product: tile rows are value dims, lanes are queries.
pub(crate) struct WeightedSum<'w, S, const NV: usize> {
    pub(crate) s: S,
    pub(crate) v: *const f32,
    pub(crate) v_stride: isize,
    pub(crate) keys: usize,
    pub(crate) vectors: Vectors,
    pub(crate) weights: &'w [f32],
    pub(crate) outputs: &'w mut [f32],
    /// In memory: as vectors they would stay in registers through the products' loop, which needs them all.
    pub(crate) alpha: Option<&'w [f32; MAX_NR]>,
}

impl<S: Simd, const NV: usize> RowsOp for WeightedSum<'_, S, NV> {
    #[inline(always)]
    fn run<const ROWS: usize>(&mut self, first: usize) {
        let (s, nr) = (self.s, NV * S::LANES);
        let lhs = Columns { ptr: self.v.wrapping_add(first), stride: self.v_stride };
        let rhs = Rhs { ptr: self.weights.as_ptr(), stride: nr as isize };
        debug_assert_eq!(self.weights.len(), self.keys * nr);
        // SAFETY: the `keys` value rows have dims first..first + ROWS; the weights are [keys][nr].
        let acc = unsafe { self.vectors.sums_over_keys::<S, ROWS, NV>(s, self.keys, lhs, rhs) };
        let out = &mut self.outputs[first * nr..][..ROWS * nr];
        // Opaque, or the compiler would load the factors before the loop after all.
        let alpha = core::hint::black_box(self.alpha);
        for (i, row) in acc.iter().enumerate() {
            for (v, &sum) in row.iter().enumerate() {
                let at = &mut out[i * nr + v * S::LANES..];
                let value = match alpha {
                    Some(alpha) => s.mul_add(s.load(at), s.load(&alpha[v * S::LANES..]), sum),
                    None => sum,
                };
                s.store(value, at);
            }
        }
    }
}
