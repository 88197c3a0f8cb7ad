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
//! Up to four query rows, of narrower keys than f32 up to two, read a key to its end before the next: with two keys in turns memory
//! is slower. With more query rows the products are the limit, and two keys share the loads of the queries ([`ONE_KEY`]). For the
//! same reason addresses are counted up (row_runs.rs).
//!
//! As each vector of a key or a value is loaded once, it is widened in its register: f16, bf16 and 8-bit rows are read
//! where they lie, like f32; the factor of an 8-bit row is taken once, at its sums and at its weight. Queries are
//! [rows][dk], outputs [rows][dv].
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
use crate::row_runs::{FewRows, RowKind, RowRun, RunCursor};
use crate::storage::Element;

/// Keys of a block, a divisor of every part of the keys (parts.rs). From memory, f32, dim 128, two threads on Zen 3: 256 against
/// 64 keys take 0.94 of the time with 32 heads over 8 and 0.89 with 32 over 32, as the hardware follows longer streams; 1024
/// with 32 over 32 0.94.
pub(crate) const FEW_BLOCK: usize = 256;

/// Something of each row of a block.
pub(crate) type RowList<T> = ArrayVec<T, FEW_BLOCK>;

/// Most rows of queries: of a vector of scores no more is used, and more would not fit the registers.
pub(crate) const MOST_ROWS: usize = 8;

/// Scores of few queries.
pub(crate) struct FewScores<'w> {
    /// [rows][dk], scaled; zeros from `count` on.
    pub(crate) queries: &'w [f32],
    /// Query rows.
    pub(crate) count: usize,
    /// The keys of the block.
    pub(crate) keys: FewRows<'w>,
    /// Those of them whose scores are wanted, in ascending order.
    pub(crate) wanted: &'w [Range<usize>],
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
    /// How many.
    pub(crate) keys: usize,
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

/// Most keys whose sums are reduced at once. There is code for each.
const MOST_KEYS: [usize; 3] = [4; 3];

/// Most vectors of dims at a time. With 16 lanes 128 dims, so that a row of a usual head is read in one go: 64 take 10 %
/// longer for a single query row from memory.
const MOST_DIMS: [usize; 3] = [8, 8, 16];

/// Most query rows that read their keys one by one, of f32 and of narrower keys. Two keys in turns take of the time, a group of four,
/// Zen 5: f32 from memory 1.1 to 1.3; one thread in L2 bf16 0.90, f16 0.86, int8 0.92, with AVX2 0.93, 0.91 and 0.94; two threads
/// from memory bf16 0.99, f16 0.93, int8 0.94.
const ONE_KEY: [usize; 2] = [4, 2];

/// Keys whose weighted values are summed up in registers, few enough for the rounding.
const SUM_KEYS: usize = 64;

/// The same where rows are read in several passes: so few that they are still in L1 for the next one, and at most a run, which is what
/// the passes ask for.
const PASS_KEYS: usize = 16;

impl FewScores<'_> {
    /// Computes them. Not generic, so that this is compiled here alone, whatever rules a caller has.
    ///
    /// # Safety
    /// Every key's row must be readable for `dim` values of its kind.
    pub(crate) unsafe fn run(&mut self, isa: Isa) {
        isa.dispatch(Run(self));
    }
}

impl FewSums<'_> {
    /// Adds them to the outputs. Compiled here alone, like [`FewScores::run`].
    ///
    /// # Safety
    /// Every value row must be readable for `dim` values of its kind.
    pub(crate) unsafe fn run(&mut self, isa: Isa) {
        isa.dispatch(Run(self));
    }
}

/// One of the two products, to be dispatched.
struct Run<'o, P>(&'o mut P);

impl SimdOp for Run<'_, FewScores<'_>> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let Run(op) = self;
        debug_assert!(op.count <= MOST_ROWS.min(S::LANES));
        let (count, kind) = (op.count, op.keys.kind);
        dispatch!(S, s, count, kind, ScoresOf, MOST_KEYS, op);
    }
}

impl SimdOp for Run<'_, FewSums<'_>> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let Run(op) = self;
        debug_assert!(op.count <= MOST_ROWS.min(S::LANES));
        let (count, kind) = (op.count, op.values.kind);
        dispatch!(S, s, count, kind, SumsOf, MOST_DIMS, op);
    }
}

/// `count` values of a row, widened; the other lanes are zero.
///
/// # Safety
/// The values must be readable.
#[inline(always)]
unsafe fn load<S: Simd, T: Element>(s: S, row: *const T, count: usize) -> S::F32 {
    // SAFETY: the caller's promise.
    unsafe { if count == S::LANES { T::load(s, row) } else { T::load_partial(s, row, count) } }
}

/// Asks for the lines of `count` values from `at` on, into L1: into L2 alone, a group of four takes 1.02 to 1.06 of the time from
/// memory with two threads, 1.2 with one, and 1.15 from L2 and L3 (f32, dim 128, Zen 5).
#[inline(always)]
fn ask<S: Simd, T>(s: S, at: *const T, count: usize) {
    for line in (0..count).step_by(LINE / size_of::<T>()) {
        s.prefetch(at.wrapping_add(line).cast());
    }
}

/// Whether a kernel asks for what follows a run. In f32 for one and two query rows, where a line is little work, only if it lies
/// elsewhere: the hardware's own streams are enough. Narrower rows are more work a line, so that fewer lines ahead are under way by
/// themselves. From memory, dim 128, of the time without asking: one thread on Zen 4 f32 with one query row 1.20, with two 1.23, with
/// four within 2 %, bf16 with two 0.83; on Zen 5 f32 with four 0.63, with one query row bf16 0.82, f16 0.79, int8 0.69, and with two
/// threads that may read 83 GB/s 0.71, 0.69 and 0.67.
#[inline(always)]
fn asks<T: Element, const R: usize>(run: &RowRun) -> bool {
    T::NARROW || R > 2 || !run.goes_on
}

/// [`FewScores`] of a type, `R` query rows, `KEYS` keys at a time.
struct ScoresOf<'o, 'w, T, const R: usize, const KEYS: usize>(&'o mut FewScores<'w>, PhantomData<T>);

impl<T: Element, const R: usize, const KEYS: usize> SimdOp for ScoresOf<'_, '_, T, R, KEYS> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let FewScores { queries, keys, wanted, scores, stride, .. } = self.0;
        let queries = (&queries[..R * keys.dim], keys.dim);
        let mut cursor = RunCursor::new(keys.runs);
        for wanted in *wanted {
            let mut at = wanted.start;
            while let Some(run) = cursor.take(at..wanted.end) {
                let scales = if T::SCALED { &keys.scales[at..at + run.count] } else { &[] };
                // SAFETY: the rows are readable for `dim` values, says the caller of `run`.
                unsafe {
                    scores_of_run::<S, T, R, KEYS>(
                        s,
                        queries,
                        (&run, scales),
                        &mut scores[at * *stride..],
                        *stride,
                    )
                };
                at += run.count;
            }
        }
    }
}

/// The scores of a run of keys, given with their factors, for the queries (their values, the dim).
///
/// # Safety
/// The rows must be readable for `dim` values.
#[inline(always)]
unsafe fn scores_of_run<S: Simd, T: Element, const R: usize, const KEYS: usize>(
    s: S,
    queries: (&[f32], usize),
    (run, scales): (&RowRun, &[f32]),
    scores: &mut [f32],
    stride: usize,
) {
    let (mut row, (mut next, next_stride), asks) = (run.first, run.ahead, asks::<T, R>(run));
    for first in (0..run.count).step_by(KEYS) {
        let mut acc = [[s.zero(); R]; KEYS];
        // Written out: in a loop the sums would go through the stack.
        macro_rules! dots {
            ($keys:literal: $($j:literal)*) => {$(
                if KEYS.saturating_sub($j) >= $keys && first + $j < run.count {
                    let mut keys = [(row.cast::<T>(), next.cast::<T>(), None); $keys];
                    for (i, (key, ask, factor)) in keys.iter_mut().enumerate() {
                        // A key past the last is the last once more, and dropped at the end.
                        let i = i.min(run.count - 1 - (first + $j));
                        *key = row.wrapping_offset(i as isize * run.stride).cast();
                        *ask = next.wrapping_offset(i as isize * next_stride).cast();
                        if T::SCALED {
                            *factor = Some(s.splat(scales[first + $j + i]));
                        }
                    }
                    // SAFETY: the caller's promise.
                    let dots: [_; $keys] = unsafe { dots(s, queries, &keys, asks) };
                    acc[$j..$j + $keys].copy_from_slice(&dots);
                    row = row.wrapping_offset($keys * run.stride);
                    next = next.wrapping_offset($keys * next_stride);
                }
            )*};
        }
        if R <= ONE_KEY[usize::from(T::NARROW)] || KEYS == 1 {
            dots!(1: 0 1 2 3);
        } else {
            dots!(2: 0 2);
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
        if stride == R
            && let Some(to) = scores[first * R..].first_chunk_mut::<16>()
        {
            // Packed, side by side; what is too much is written over by the next or not used.
            s.store(sums, to);
            continue;
        }
        let mut values = [0.0; 16];
        s.store(sums, &mut values);
        for j in 0..KEYS.min(run.count - first) {
            // A query per lane; where there are fewer lanes than R, there are no more queries either.
            let lanes = R.min(S::LANES);
            scores[(first + j) * stride..][..lanes].copy_from_slice(&values[j * R..][..lanes]);
        }
    }
}

/// The products, lane by lane, of `KEYS` keys side by side and each query (their values, the dim). Rows are read from their start
/// to their end, and so are those asked for that are given with them; with their factors.
///
/// # Safety
/// The rows must be readable for `dim` values.
#[inline(always)]
unsafe fn dots<S: Simd, T: Element, const R: usize, const KEYS: usize>(
    s: S,
    (queries, dim): (&[f32], usize),
    keys: &[(*const T, *const T, Option<S::F32>); KEYS],
    asks: bool,
) -> [[S::F32; R]; KEYS] {
    let mut sums = [[s.zero(); R]; KEYS];
    let mut at = 0;
    macro_rules! vector {
        ($at:expr, $count:expr, $begins_line:expr) => {
            // Line by line, so that products and memory go on side by side.
            if asks && $begins_line {
                for (_, next, _) in keys {
                    ask(s, next.wrapping_add($at), S::LANES);
                }
            }
            // SAFETY: the dims from `at` on, `LANES` of them each time but the last, lie inside the rows and each query.
            unsafe { step(s, (queries, dim), $at, $count, keys, &mut sums) };
        };
    }
    while at + 4 * S::LANES <= dim {
        for i in 0..4 {
            vector!(at + i * S::LANES, S::LANES, (i * S::LANES).is_multiple_of(LINE / size_of::<T>()));
        }
        at += 4 * S::LANES;
    }
    while at < dim {
        vector!(at, S::LANES.min(dim - at), true);
        at += S::LANES;
    }
    for (sums, &(.., factor)) in sums.iter_mut().zip(keys) {
        if let Some(factor) = factor {
            for sum in sums {
                *sum = s.mul(factor, *sum);
            }
        }
    }
    sums
}

/// A vector of each key times that of each query (their values, the dim).
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
    sums: &mut [[S::F32; R]; KEYS],
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut q = [s.zero(); R];
        for (i, q) in q.iter_mut().enumerate() {
            *q = load(s, queries.as_ptr().add(i * dim + at), count);
        }
        for (sums, &(row, ..)) in sums.iter_mut().zip(keys) {
            let k = load(s, row.add(at), count);
            for (sum, &q) in sums.iter_mut().zip(&q) {
                *sum = s.mul_add(k, q, *sum);
            }
        }
    }
}

/// [`FewSums`] of a type, `R` query rows, `DV` vectors of dims at a time.
struct SumsOf<'o, 'w, T, const R: usize, const DV: usize>(&'o mut FewSums<'w>, PhantomData<T>);

impl<T: Element, const R: usize, const DV: usize> SimdOp for SumsOf<'_, '_, T, R, DV> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let sums = self.0;
        let (dim, step, keys) = (sums.values.dim, DV * S::LANES, sums.keys);
        let mut cursor = RunCursor::new(sums.values.runs);
        let chunk = if dim > step { PASS_KEYS.min(RowRun::most(dim * size_of::<T>())) } else { SUM_KEYS };
        let mut first = 0;
        while first < keys {
            let end = keys.min((sums.first_key + first) / chunk * chunk + chunk - sums.first_key);
            cursor.advance(first);
            let mut part = Part { keys: first..end, cursor, at: 0, last: S::LANES };
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

/// What a pass over some dims of a run's rows asks for first, and how many bytes on with each further row.
///
/// A pass that asks for its own dims of the following rows leaves memory idle in turns: the first one brings more than these, as
/// the hardware adds neighbours, and the others find theirs in L2. So where the following rows lie side by side, all passes
/// together ask for them in the order of memory, each for its share. From memory, with one thread and with two, the time is
/// 0.91 and 0.92 of what it was (f32, a group of four, dim 128, Zen 5), bf16 0.96 and 0.94, f32 by AVX2 0.86 and 0.90.
#[inline(always)]
fn asked<T>(run: &RowRun, dim: usize, dims: Range<usize>, keys: usize) -> (*const T, isize) {
    let (next, stride) = (run.ahead.0.cast::<T>(), run.ahead.1);
    let side_by_side = stride == (dim * size_of::<T>()) as isize;
    // Of several runs that a pass reads each would ask for its share of the one after it, which is too late.
    if side_by_side && run.count == keys {
        (next.wrapping_add(dims.start * run.count), (dims.len() * size_of::<T>()) as isize)
    } else {
        (next.wrapping_add(dims.start), stride)
    }
}

/// Keys and dims that are summed up in registers.
struct Part<'o> {
    keys: Range<usize>,
    /// At the first of them.
    cursor: RunCursor<'o>,
    /// The first dim.
    at: usize,
    /// Dims in the last vector.
    last: usize,
}

impl FewSums<'_> {
    /// `DV` vectors of dims over some keys.
    ///
    /// # Safety
    /// As [`Self::run`]; the part's keys and dims must be inside.
    #[inline(always)]
    unsafe fn dims<S: Simd, T: Element, const R: usize, const DV: usize>(&mut self, s: S, part: &Part<'_>) {
        let &Part { ref keys, mut cursor, at, last } = part;
        let mut acc = [[s.zero(); DV]; R];
        let FewRows { scales, dim, .. } = self.values;
        let mut first = keys.start;
        while let Some(run) = cursor.take(first..keys.end) {
            let weights = self.weights[first * self.stride..].chunks_exact(self.stride);
            let (mut row, asks) = (run.first, asks::<T, R>(&run));
            let (mut next, next_step) = asked::<T>(&run, dim, at..at + DV * S::LANES, keys.len());
            for (j, weights) in (first..first + run.count).zip(weights) {
                let here = row.cast::<T>();
                if asks {
                    ask(s, next, DV * S::LANES);
                }
                let mut v = [s.zero(); DV];
                for (d, v) in v.iter_mut().enumerate() {
                    // SAFETY: these dims are inside the row.
                    *v = unsafe { load(s, here.add(at + d * S::LANES), last) };
                }
                // The stride is R rounded up.
                let Some(weights) = weights.first_chunk::<R>() else { continue };
                for (acc, &weight) in acc.iter_mut().zip(weights) {
                    let weight = s.splat(if T::SCALED { weight * scales[j] } else { weight });
                    for (acc, &v) in acc.iter_mut().zip(&v) {
                        *acc = s.mul_add(weight, v, *acc);
                    }
                }
                row = row.wrapping_offset(run.stride);
                next = next.wrapping_byte_offset(next_step);
            }
            first += run.count;
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
