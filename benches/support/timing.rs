//! Time: how long a call takes, without the calls that something else on the machine disturbed.
//!
//! A call is repeated for a stretch of given length. The stretch is cut into batches, each long enough that reading the
//! clock does not show (a batch of the smallest product, 64 x 64 x 64, holds a thousand calls), and the median of the
//! batches is the answer: one preempted batch does not move it.
//!
//! Two calls whose times are to be compared take turns, call by call: what the machine does to one it does to the other.

use std::time::{Duration, Instant};

/// Batches in a stretch, where calls are short enough.
const BATCHES: u32 = 11;

/// Batches in a stretch of calls that are longer than it: a median needs three.
const LEAST_BATCHES: usize = 3;

/// Part of the stretch that is spent before it, to bring threads, caches and clock back, and to learn how many calls make
/// a batch.
const WARM_UP: f64 = 0.1;

/// The middle one, or the mean of the two middle ones.
///
/// # Panics
/// If there are none, or one is NaN.
#[must_use]
pub fn median(values: &[f64]) -> f64 {
    assert!(!values.is_empty(), "the median of nothing");
    let sorted = sorted(values);
    let half = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[half] } else { (sorted[half - 1] + sorted[half]) / 2.0 }
}

/// The lower and the upper quartile: the values a quarter of the way in from both ends.
///
/// # Panics
/// As [`median`].
#[must_use]
pub fn quartiles(values: &[f64]) -> (f64, f64) {
    assert!(!values.is_empty(), "the quartiles of nothing");
    let sorted = sorted(values);
    let quarter = (sorted.len() - 1) / 4;
    (sorted[quarter], sorted[sorted.len() - 1 - quarter])
}

fn sorted(values: &[f64]) -> Vec<f64> {
    let mut sorted = values.to_vec();
    assert!(sorted.iter().all(|x| !x.is_nan()), "a measurement is not a number");
    sorted.sort_unstable_by(f64::total_cmp);
    sorted
}

/// Seconds per call: the median of the batches of one stretch of at least `stretch`, after a warm-up of a tenth of it
/// (and at least one call).
pub fn seconds_per_call(stretch: Duration, mut call: impl FnMut()) -> f64 {
    let estimate = {
        let (start, least) = (Instant::now(), stretch.mul_f64(WARM_UP));
        let mut calls = 0u32;
        loop {
            call();
            calls += 1;
            let elapsed = start.elapsed();
            if elapsed >= least {
                break elapsed.as_secs_f64() / f64::from(calls);
            }
        }
    };
    let calls = (stretch.as_secs_f64() / f64::from(BATCHES) / estimate.max(1e-9)).ceil().max(1.0) as u64;
    let mut batches = Vec::with_capacity(BATCHES as usize);
    let start = Instant::now();
    let mut before = start;
    loop {
        for _ in 0..calls {
            call();
        }
        let now = Instant::now();
        batches.push((now - before).as_secs_f64() / calls as f64);
        before = now;
        if now - start >= stretch && batches.len() >= LEAST_BATCHES {
            return median(&batches);
        }
    }
}

/// How many times as long `call(true)` takes as `call(false)`: both in turns, each right after the other, for at least
/// `stretch`; the median of the pairs' ratios, after one pair that does not count.
pub fn ratio_of_two(stretch: Duration, mut call: impl FnMut(bool)) -> f64 {
    let mut seconds = |which: bool| {
        let start = Instant::now();
        call(which);
        start.elapsed().as_secs_f64()
    };
    for which in [false, true] {
        seconds(which);
    }
    let (start, mut ratios) = (Instant::now(), Vec::new());
    while start.elapsed() < stretch || ratios.len() < LEAST_BATCHES {
        // Who is first changes, so that a drift of the clock favours neither.
        let first = ratios.len() % 2 == 1;
        let times = [seconds(first), seconds(!first)];
        let [without, with] = if first { [times[1], times[0]] } else { times };
        ratios.push(with / without.max(1e-9));
    }
    median(&ratios)
}
