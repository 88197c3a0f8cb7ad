//! The two products for a few queries (decoding): lanes run along the dims, not along the queries.
//!
//! With few query rows tiles would leave most lanes empty, and the work would no longer hide behind the memory that keys and
//! values come from. Here every key row is read once for r of them, at most 8, as dots of several keys at once, and every value row
//! once, as multiply-adds onto r rows of outputs:
//!
//! ```text
//! s[j][i] = k_j . q_i        KEYS x R sums in registers, reduced across lanes at the end
//! o[i]   += p[j][i] v_j      R x DV vectors of outputs in registers over the keys of the block
//! ```
//!
//! Up to four query rows, of narrower keys than f32 up to two, read a key to its end before the next: with two keys in turns memory
//! is slower. With more query rows the products are the limit, and two keys share the loads of the queries (few_scores.rs). For the
//! same reason addresses are counted up (row_runs.rs).
//!
//! As each vector of a key or a value is loaded once, it is widened in its register: f16, bf16 and 8-bit rows are read
//! where they lie, like f32; the factor of an 8-bit row is taken once, at its sums and at its weight. Queries are
//! [rows][dk], outputs [rows][dv].
//!
//! Scores lie as everywhere, [keys][lanes] with a query per lane, so that all masks and biases are the tiles' own, and are
//! packed for the softmax update, which is the tiles' as well (packed_scores.rs). A block that is seen as a whole is packed
//! from the start.
//!
//! The scores are in few_scores.rs, the weighted values in few_sums.rs, what both ask for ahead in few_ahead.rs.

use core::marker::PhantomData;
use core::ops::Range;

use arrayvec::ArrayVec;
use half::{bf16, f16};
use qkv_simd::{Isa, Simd, SimdOp};

use crate::few_scores::ScoresOf;
use crate::few_sums::SumsOf;
use crate::row_runs::{FewRows, RowKind};
use crate::storage::Element;

/// Keys of a block, a divisor of every part of the keys (parts.rs). From memory, f32, dim 128, two threads on Zen 3: 256 against
/// 64 keys take 0.94 of the time with 32 heads over 8 and 0.89 with 32 over 32, as the hardware follows longer streams; 1024
/// with 32 over 32 0.94.
pub(crate) const FEW_BLOCK: usize = 256;

/// Something of each row of a block.
pub(crate) type RowList<T> = ArrayVec<T, FEW_BLOCK>;

/// Most rows of queries at a time: more would not fit the registers.
pub(crate) const MOST_ROWS: usize = 8;

/// The same with vectors of so many lanes, of which each has a query. Longer sequences are computed by tiles.
pub(crate) const fn most_few_rows(lanes: usize) -> usize {
    if lanes < MOST_ROWS { lanes } else { MOST_ROWS }
}

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
/// rounded up, and with as many sums in registers as there are lanes, which is at most half of the registers and as many as are
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
pub(crate) unsafe fn load<S: Simd, T: Element>(s: S, row: *const T, count: usize) -> S::F32 {
    // SAFETY: the caller's promise.
    unsafe { if count == S::LANES { T::load(s, row) } else { T::load_partial(s, row, count) } }
}
