//! Scores for few query rows: dots of several keys, lane by lane, reduced across lanes at the end (few_rows.rs).

use core::marker::PhantomData;

use qkv_simd::{Simd, SimdOp};

use crate::ahead::LINE;
use crate::few_ahead::{again, ask, asks, asks_twice};
use crate::few_rows::{FewScores, load};
use crate::row_runs::{RowRun, RunCursor};
use crate::storage::Element;

/// Most query rows that read their keys one by one, of f32 and of narrower keys. Two keys in turns take of the time, a group of four,
/// Zen 5: f32 from memory 1.1 to 1.3; one thread in L2 bf16 0.90, f16 0.86, int8 0.92, with AVX2 0.93, 0.91 and 0.94; two threads
/// from memory bf16 0.99, f16 0.93, int8 0.94.
const ONE_KEY: [usize; 2] = [4, 2];

/// [`FewScores`] of a type, `R` query rows, `KEYS` keys at a time.
pub(crate) struct ScoresOf<'o, 'w, T, const R: usize, const KEYS: usize>(
    pub(crate) &'o mut FewScores<'w>,
    pub(crate) PhantomData<T>,
);

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
                let to = (&mut scores[at * *stride..], *stride);
                // SAFETY: the rows are readable for `dim` values, says the caller of `run`.
                unsafe {
                    if asks_twice::<T, R>(&run) {
                        scores_of_run::<S, T, R, KEYS, true>(s, queries, (&run, scales), to);
                    } else {
                        scores_of_run::<S, T, R, KEYS, false>(s, queries, (&run, scales), to);
                    }
                }
                at += run.count;
            }
        }
    }
}

/// A key that is read: its row, what is asked for with it, and its factor.
#[derive(Clone, Copy)]
struct Key<T, F> {
    row: *const T,
    asked: [*const T; 2],
    factor: Option<F>,
}

/// The scores of a run of keys, given with their factors, for the queries (their values, the dim), into scores (with their stride).
/// `TWICE`: see [`again`].
///
/// # Safety
/// The rows must be readable for `dim` values.
#[inline(always)]
unsafe fn scores_of_run<S: Simd, T: Element, const R: usize, const KEYS: usize, const TWICE: bool>(
    s: S,
    queries: (&[f32], usize),
    (run, scales): (&RowRun, &[f32]),
    (scores, stride): (&mut [f32], usize),
) {
    let (mut row, (mut next, next_stride), asks) = (run.first, run.ahead, asks::<T, R>(run));
    for first in (0..run.count).step_by(KEYS) {
        let (again, again_stride) = again(run, first);
        let mut acc = [[s.zero(); R]; KEYS];
        // Written out: in a loop the sums would go through the stack.
        macro_rules! dots {
            ($keys:literal: $($j:literal)*) => {$(
                if KEYS.saturating_sub($j) >= $keys && first + $j < run.count {
                    let mut keys =
                        [Key { row: row.cast::<T>(), asked: [next.cast::<T>(); 2], factor: None }; $keys];
                    for (i, key) in keys.iter_mut().enumerate() {
                        // A key past the last is the last once more, and dropped at the end.
                        let i = i.min(run.count - 1 - (first + $j));
                        key.row = row.wrapping_offset(i as isize * run.stride).cast();
                        key.asked = [
                            next.wrapping_offset(i as isize * next_stride).cast(),
                            again.wrapping_offset(($j + i) as isize * again_stride).cast(),
                        ];
                        if T::SCALED {
                            key.factor = Some(s.splat(scales[first + $j + i]));
                        }
                    }
                    // SAFETY: the caller's promise.
                    let dots: [_; $keys] = unsafe { dots::<S, T, R, $keys, TWICE>(s, queries, &keys, asks) };
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
/// to their end, and so are those asked for that are given with them, the second if `TWICE`; with their factors.
///
/// # Safety
/// The rows must be readable for `dim` values.
#[inline(always)]
unsafe fn dots<S: Simd, T: Element, const R: usize, const KEYS: usize, const TWICE: bool>(
    s: S,
    (queries, dim): (&[f32], usize),
    keys: &[Key<T, S::F32>; KEYS],
    asks: bool,
) -> [[S::F32; R]; KEYS] {
    let mut sums = [[s.zero(); R]; KEYS];
    let mut at = 0;
    macro_rules! vector {
        ($at:expr, $count:expr, $begins_line:expr) => {
            // Line by line, so that products and memory go on side by side.
            if asks && $begins_line {
                for key in keys {
                    for asked in &key.asked[..1 + usize::from(TWICE)] {
                        ask(s, asked.wrapping_add($at), S::LANES);
                    }
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
    for (sums, key) in sums.iter_mut().zip(keys) {
        if let Some(factor) = key.factor {
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
    keys: &[Key<T, S::F32>; KEYS],
    sums: &mut [[S::F32; R]; KEYS],
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut q = [s.zero(); R];
        for (i, q) in q.iter_mut().enumerate() {
            *q = load(s, queries.as_ptr().add(i * dim + at), count);
        }
        for (sums, key) in sums.iter_mut().zip(keys) {
            let k = load(s, key.row.add(at), count);
            for (sum, &q) in sums.iter_mut().zip(&q) {
                *sum = s.mul_add(k, q, *sum);
            }
        }
    }
}
