//! The two products for a few query rows (decoding): lanes run along the dims, not along the queries.
//!
//! With r query rows, r at most the number of lanes, tiles would leave most lanes empty, and the work would no longer hide
//! behind the memory that keys and values come from. Here every key row is read once for all r queries, as dots of
//! several keys at once, and every value row once, as multiply-adds onto r rows of outputs:
//!
//! ```text
//! s[j][i] = k_j . q_i        KEYS x R sums in registers, reduced across lanes at the end
//! o[i]   += p[j][i] v_j      R x DV vectors of outputs in registers over the keys of the block
//! ```
//!
//! As each vector of a key or a value is loaded once, it is widened in its register: f16, bf16 and 8-bit rows are read
//! where they lie, like f32. Queries are [rows][dk], outputs [rows][dv].
//!
//! Scores lie as everywhere, [keys][lanes] with a query per lane, so that all masks and biases are the tiles' own, and are
//! packed for the softmax update, which is the tiles' as well (packed_scores.rs). A block that is seen as a whole is packed
//! from the start.

use core::marker::PhantomData;
use core::ops::Range;

use arrayvec::ArrayVec;
use half::{bf16, f16};
use qkv_simd::{Isa, Simd, SimdOp};

use crate::ahead::LINE;
use crate::few_ahead::{AheadRows, ask};
use crate::storage::Element;

/// Keys of a block, a divisor of every part of the keys (parts.rs). From memory, f32, dim 128, two threads on Zen 3: 256 against
/// 64 keys take 0.94 of the time with 32 heads over 8 and 0.89 with 32 over 32, as the hardware follows longer streams; 1024
/// with 32 over 32 0.94.
pub(crate) const FEW_BLOCK: usize = 256;

/// Something of each row of a block.
pub(crate) type RowList<T> = ArrayVec<T, FEW_BLOCK>;

/// Most rows of queries: of a vector of scores no more is used, and more would not fit the registers.
pub(crate) const MOST_ROWS: usize = 8;

/// Rows of a block, of keys or of values.
pub(crate) struct FewRows<'w> {
    /// Where they begin.
    pub(crate) rows: &'w [*const u8],
    /// What they consist of.
    pub(crate) kind: RowKind,
    /// A factor per row, where they have any.
    pub(crate) scales: &'w [f32],
    /// Values of each.
    pub(crate) dim: usize,
}

impl FewRows<'_> {
    /// Those of a range.
    #[inline(always)]
    pub(crate) fn part(&self, range: Range<usize>) -> FewRows<'_> {
        let scales = if self.kind == RowKind::Int8 { &self.scales[range.clone()] } else { &[] };
        FewRows { rows: &self.rows[range], scales, ..*self }
    }

    /// Bytes of each.
    #[inline(always)]
    pub(crate) fn bytes(&self) -> usize {
        self.dim
            * match self.kind {
                RowKind::F32 => 4,
                RowKind::F16 | RowKind::Bf16 => 2,
                RowKind::Int8 => 1,
            }
    }
}

/// What rows consist of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RowKind {
    F32,
    F16,
    Bf16,
    /// With a scale per row.
    Int8,
}

/// Scores of few queries.
pub(crate) struct FewScores<'w> {
    /// [rows][dk], scaled; zeros from `count` on.
    pub(crate) queries: &'w [f32],
    /// Query rows.
    pub(crate) count: usize,
    /// The keys.
    pub(crate) keys: FewRows<'w>,
    /// [keys][stride]; lanes from `count` on become anything.
    pub(crate) scores: &'w mut [f32],
    /// LANES, or less where they are packed.
    pub(crate) stride: usize,
}

/// Weighted values for few queries.
pub(crate) struct FewSums<'w> {
    /// [keys][stride].
    pub(crate) weights: &'w [f32],
    /// As of the scores.
    pub(crate) stride: usize,
    /// The values.
    pub(crate) values: FewRows<'w>,
    /// Place of the first key in its block.
    pub(crate) first_key: usize,
    /// Query rows.
    pub(crate) count: usize,
    /// Per row, what the outputs so far are multiplied by; `None`: there are none.
    pub(crate) alpha: Option<&'w [f32]>,
    /// [rows][dim].
    pub(crate) outputs: &'w mut [f32],
}

/// The product `$op` over rows of `$kind` for `$count` query rows: compiled for 1, 2, 4, 6 and 8, to which other counts are
/// rounded up, and with as many sums in registers as there are lanes, which is half of the registers and as many as are
/// reduced at once, but at most `$most` (with 16, 8 and 4 lanes) per query row.
macro_rules! dispatch {
    ($S:ty, $s:expr, $count:expr, $kind:expr, $op:ident, $most:expr, $call:expr) => {
        match $kind {
            RowKind::F32 => dispatch!(@rows $S, $s, $count, f32, $op, $most, $call),
            RowKind::F16 => dispatch!(@rows $S, $s, $count, f16, $op, $most, $call),
            RowKind::Bf16 => dispatch!(@rows $S, $s, $count, bf16, $op, $most, $call),
            RowKind::Int8 => dispatch!(@rows $S, $s, $count, i8, $op, $most, $call),
        }
    };
    (@rows $S:ty, $s:expr, $count:expr, $T:ty, $op:ident, $most:expr, $call:expr) => {
        match $count {
            0 => {}
            1 => dispatch!(@lanes $S, $s, $T, 1, $op, $most, $call),
            2 => dispatch!(@lanes $S, $s, $T, 2, $op, $most, $call),
            3 | 4 => dispatch!(@lanes $S, $s, $T, 4, $op, $most, $call),
            5 | 6 => dispatch!(@lanes $S, $s, $T, 6, $op, $most, $call),
            _ => dispatch!(@lanes $S, $s, $T, 8, $op, $most, $call),
        }
    };
    // The lanes are a constant: two of the three arms leave no machine code.
    (@lanes $S:ty, $s:expr, $T:ty, $R:literal, $op:ident, $most:expr, $call:expr) => {
        match <$S>::LANES {
            16 => $s.vectorize($op::<$T, $R, { sums_per_row(16, $R, $most[0]) }>($call, PhantomData)),
            8 => $s.vectorize($op::<$T, $R, { sums_per_row(8, $R, $most[1]) }>($call, PhantomData)),
            _ => $s.vectorize($op::<$T, $R, { sums_per_row(4, $R, $most[2]) }>($call, PhantomData)),
        }
    };
}

/// Sums per query row when all are to be `lanes` together.
const fn sums_per_row(lanes: usize, rows: usize, most: usize) -> usize {
    let sums = lanes / rows;
    if sums == 0 {
        1
    } else if sums > most {
        most
    } else {
        sums
    }
}

/// Most keys side by side, as many rows being read in turns, whatever the lanes: with 8 ungrouped heads take 38 ns a key of dim
/// 128 in f32, with 2 35.5 (both threads, from memory); with 4, as many sums in registers as there are lanes, four query rows
/// take 3 to 5 % longer than with 2.
const MOST_KEYS: [usize; 3] = [2; 3];

/// Most vectors of dims at a time. With 16 lanes 128 dims, so that a row of a usual head is read in one go: 64 take 10 %
/// longer for a single query row from memory.
const MOST_DIMS: [usize; 3] = [8, 8, 16];

/// Keys whose weighted values are summed up in registers: where rows are read in one go, few enough for the rounding; where
/// not, so few that their rows are still in L1 for the next vectors of them.
const SUM_KEYS: [usize; 2] = [64, 16];

impl FewScores<'_> {
    /// Computes them, asking for the rows `ahead` on the way. Not generic, so that this is compiled here alone, whatever
    /// rules a caller has.
    ///
    /// # Safety
    /// Every key's row must be readable for `dim` values of its kind.
    pub(crate) unsafe fn run(&mut self, isa: Isa, ahead: AheadRows<'_>) {
        isa.dispatch(Run(self, ahead));
    }
}

impl FewSums<'_> {
    /// Adds them to the outputs, asking for the rows `ahead` on the way. Compiled here alone, like [`FewScores::run`].
    ///
    /// # Safety
    /// Every value row must be readable for `dim` values of its kind.
    pub(crate) unsafe fn run(&mut self, isa: Isa, ahead: AheadRows<'_>) {
        isa.dispatch(Run(self, ahead));
    }
}

/// One of the two products, to be dispatched.
struct Run<'o, P>(&'o mut P, AheadRows<'o>);

impl SimdOp for Run<'_, FewScores<'_>> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let Run(op, ahead) = self;
        debug_assert!(op.count <= MOST_ROWS.min(S::LANES));
        let (count, kind) = (op.count, op.keys.kind);
        dispatch!(S, s, count, kind, ScoresOf, MOST_KEYS, (op, ahead));
    }
}

impl SimdOp for Run<'_, FewSums<'_>> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let Run(op, ahead) = self;
        debug_assert!(op.count <= MOST_ROWS.min(S::LANES));
        let (count, kind) = (op.count, op.values.kind);
        dispatch!(S, s, count, kind, SumsOf, MOST_DIMS, (op, ahead));
    }
}

/// `count` values of a row, widened; the other lanes are zero.
///
/// # Safety
/// The values must be readable.
#[inline(always)]
unsafe fn load<S: Simd, T: Element>(s: S, row: *const T, count: usize, scale: Option<S::F32>) -> S::F32 {
    // SAFETY: the caller's promise.
    let x = unsafe { if count == S::LANES { T::load(s, row) } else { T::load_partial(s, row, count) } };
    match scale {
        Some(scale) => s.mul(scale, x),
        None => x,
    }
}

/// [`FewScores`] of a type, `R` query rows, `KEYS` keys at a time.
struct ScoresOf<'o, 'w, T, const R: usize, const KEYS: usize>(
    (&'o mut FewScores<'w>, AheadRows<'o>),
    PhantomData<T>,
);

impl<T: Element, const R: usize, const KEYS: usize> SimdOp for ScoresOf<'_, '_, T, R, KEYS> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let (FewScores { queries, keys, scores, stride, .. }, ahead) = self.0;
        let FewRows { rows, scales, dim, .. } = *keys;
        let queries = (&queries[..R * dim], dim);
        let whole = dim / S::LANES * S::LANES;
        let in_line = LINE / size_of::<T>();
        for first in (0..rows.len()).step_by(KEYS) {
            // Keys past the last are the last once more, and dropped at the end.
            let last = rows.len() - 1;
            let mut group = [(core::ptr::null::<T>(), core::ptr::null::<T>(), None); KEYS];
            for (j, (row, next, factor)) in group.iter_mut().enumerate() {
                let key = (first + j).min(last);
                *row = rows[key].cast();
                *next = ahead.with(key, *row);
                if R == 1 {
                    ask(s, *next, dim);
                }
                if T::SCALED {
                    *factor = Some(s.splat(scales[key]));
                }
            }
            let mut acc = [[s.zero(); R]; KEYS];
            for line in (0..whole).step_by(in_line) {
                for (_, next, _) in group {
                    if R > 1 {
                        ask(s, next.wrapping_add(line), 1);
                    }
                }
                for at in (line..whole.min(line + in_line)).step_by(S::LANES) {
                    // SAFETY: the vector at `at` lies inside each key's row and inside each query.
                    unsafe { step(s, queries, at, S::LANES, &group, &mut acc) };
                }
            }
            if whole < dim {
                // SAFETY: as above, for the values that are left.
                unsafe { step(s, queries, whole, dim - whole, &group, &mut acc) };
            }
            let mut sums = [s.zero(); 16];
            for (j, acc) in acc.iter().enumerate() {
                for (i, &acc) in acc.iter().enumerate() {
                    sums[j * R + i] = acc;
                }
            }
            let used = match R * KEYS {
                1 => 1,
                2..=4 => 4,
                5..=8 => 8,
                _ => 16,
            };
            let sums = s.reduce_each(&sums[..used]);
            if *stride == R
                && let Some(to) = scores[first * R..].first_chunk_mut::<16>()
            {
                // Packed, side by side; what is too much is written over by the next or not used.
                s.store(sums, to);
                continue;
            }
            let mut values = [0.0; 16];
            s.store(sums, &mut values);
            for j in 0..KEYS.min(rows.len() - first) {
                // A query per lane; where there are fewer lanes than R, there are no more queries either.
                let lanes = R.min(S::LANES);
                scores[(first + j) * *stride..][..lanes].copy_from_slice(&values[j * R..][..lanes]);
            }
        }
    }
}

/// A vector of each key, with its factor, times that of each query, (their values, the dim).
///
/// # Safety
/// `count` values from `at` on must lie inside each key's row and each query.
#[inline(always)]
unsafe fn step<S: Simd, T: Element, const R: usize, const KEYS: usize>(
    s: S,
    (queries, dim): (&[f32], usize),
    at: usize,
    count: usize,
    keys: &[(*const T, *const T, Option<S::F32>); KEYS],
    acc: &mut [[S::F32; R]; KEYS],
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut q = [s.zero(); R];
        for (i, q) in q.iter_mut().enumerate() {
            *q = load(s, queries.as_ptr().add(i * dim + at), count, None);
        }
        for (acc, &(row, _, factor)) in acc.iter_mut().zip(keys) {
            let k = load(s, row.add(at), count, factor);
            for (acc, &q) in acc.iter_mut().zip(&q) {
                *acc = s.mul_add(k, q, *acc);
            }
        }
    }
}

/// [`FewSums`] of a type, `R` query rows, `DV` vectors of dims at a time.
struct SumsOf<'o, 'w, T, const R: usize, const DV: usize>(
    (&'o mut FewSums<'w>, AheadRows<'o>),
    PhantomData<T>,
);

impl<T: Element, const R: usize, const DV: usize> SimdOp for SumsOf<'_, '_, T, R, DV> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let (sums, ahead) = self.0;
        let (dim, step, keys) = (sums.values.dim, DV * S::LANES, sums.values.rows.len());
        let chunk = SUM_KEYS[usize::from(dim > step)];
        let mut first = 0;
        while first < keys {
            let end = keys.min((sums.first_key + first) / chunk * chunk + chunk - sums.first_key);
            let mut part = Part { keys: first..end, at: 0, last: S::LANES, ahead };
            while part.at + step <= dim {
                // SAFETY: these dims are inside the rows, which are readable, says the caller of `run`.
                unsafe { sums.dims::<S, T, R, DV>(s, &part) };
                part.at += step;
            }
            // Only where more than that are taken at a time: for many query rows their sums would not fit the registers.
            while DV > 4 && part.at + 4 * S::LANES <= dim {
                // SAFETY: as above.
                unsafe { sums.dims::<S, T, R, 4>(s, &part) };
                part.at += 4 * S::LANES;
            }
            while part.at < dim {
                part.last = (dim - part.at).min(S::LANES);
                // SAFETY: as above.
                unsafe { sums.dims::<S, T, R, 1>(s, &part) };
                part.at += S::LANES;
            }
            first = end;
        }
    }
}

/// Keys and dims that are summed up in registers.
struct Part<'o> {
    keys: Range<usize>,
    /// The first dim.
    at: usize,
    /// Dims in the last vector.
    last: usize,
    ahead: AheadRows<'o>,
}

impl FewSums<'_> {
    /// `DV` vectors of dims over some keys.
    ///
    /// # Safety
    /// As [`Self::run`]; the part's keys and dims must be inside.
    #[inline(always)]
    unsafe fn dims<S: Simd, T: Element, const R: usize, const DV: usize>(&mut self, s: S, part: &Part<'_>) {
        let &Part { ref keys, at, last, ahead } = part;
        let mut acc = [[s.zero(); DV]; R];
        let FewRows { rows, scales, dim, .. } = self.values;
        let weights = self.weights.chunks_exact(self.stride).skip(keys.start);
        for (j, (weights, &row)) in keys.clone().zip(weights.zip(&rows[keys.clone()])) {
            let next = ahead.with(j, row).cast::<T>();
            if R > 1 {
                ask(s, next.wrapping_add(at), DV * S::LANES);
            } else if at == 0 {
                ask(s, next, dim);
            }
            let factor = if T::SCALED { Some(s.splat(scales[j])) } else { None };
            let mut v = [s.zero(); DV];
            for (d, v) in v.iter_mut().enumerate() {
                // SAFETY: these dims are inside the row.
                *v = unsafe { load(s, row.cast::<T>().add(at + d * S::LANES), last, factor) };
            }
            // The stride is R rounded up.
            let Some(weights) = weights.first_chunk::<R>() else { continue };
            for (acc, &weight) in acc.iter_mut().zip(weights) {
                let weight = s.splat(weight);
                for (acc, &v) in acc.iter_mut().zip(&v) {
                    *acc = s.mul_add(weight, v, *acc);
                }
            }
        }
        let whole = last == S::LANES;
        let alpha = if keys.start == 0 { self.alpha } else { Some(&[1.0; MOST_ROWS][..]) };
        for (i, acc) in acc.iter().enumerate().take(self.count) {
            for (d, &sum) in acc.iter().enumerate() {
                let from = i * dim + at + d * S::LANES;
                let to = &mut self.outputs[from..][..last];
                let p = to.as_mut_ptr();
                // SAFETY: `to` has `last` values, a whole vector where `whole`.
                unsafe {
                    let value = match alpha {
                        None => sum,
                        Some(alpha) => {
                            let old = if whole { s.load_ptr(p) } else { s.load_partial(p, last) };
                            // Rounded twice: keys that a mask hides, in parts of their own, must not change a bit.
                            s.add(s.mul(old, s.splat(alpha[i])), sum)
                        }
                    };
                    if whole {
                        s.store_ptr(value, p)
                    } else {
                        s.store_partial(value, p, last)
                    };
                }
            }
        }
    }
}
