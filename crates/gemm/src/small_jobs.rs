//! Small jobs: whether one that nobody is woken for is worth halving with a helper that is awake (`helpers.rs`).
//!
//! A thread that has had small jobs for a while and is alone with that calls a helper, and from then on finds it awake for
//! the next. What is gained is half of the job, less the hand-over: the way of the job to the other core and back, a quarter
//! of a microsecond, or a whole one between cores that share less of the caches. So some jobs are timed. Where `own` is the
//! caller's half and `wait` what it then waits for the other,
//!
//! ```text
//! alone   2 own                   shared   own + wait                  worth it where   wait < own / 2
//! ```
//!
//! and as the wait does not depend on the size, jobs are worth sharing from the size `size * 2 wait / own` on.

use core::cell::Cell;
use core::sync::atomic::{AtomicUsize, Ordering};
use core::time::Duration;
use std::time::Instant;

use crate::helpers::{LINGER, Who, one_is_here, with_helpers};

/// Small jobs of one thread in a row after which it looks around: how long they took, and whether other threads do the same.
const IN_A_ROW: u32 = 16;

/// So many looks in a row that found it busy with nothing else, and nobody else busy with the same, let it call a helper: threads
/// that compute side by side have no core for one.
const LOOKS: u32 = 8;

/// Small jobs that a thread does alone after a helper that had begun one kept it waiting, as happens where threads are more
/// than cores; four times as many each time it happens again, a sixteenth fewer for each job that goes well.
const ALONE: [u32; 2] = [64, 1 << 20];

/// Jobs that were too small to share after which one of their size is shared again: how long a hand-over takes changes, on a
/// virtual machine with the cores that it is given. Some 40 milliseconds of the smallest jobs; a trial is some five hundred of
/// them, that are shared for about what they take alone.
const DECLINED: u32 = 1 << 14;

/// A sample says only in which direction, as some are far off: of the first ones after a helper was called, most.
const STEP: f32 = 1.1;

/// What sharing has to gain: a seventh of the time, or the other core is better left to others. With `wait = own / 2` it does,
/// because a half that is shared takes a tenth longer than one that is not; `wait = own / 1.4` gains nothing.
const WORTH: f32 = 2.0;

/// Small jobs of a thread in a row.
#[derive(Clone, Copy)]
struct Row {
    /// Jobs until the next look; while there are more than [`IN_A_ROW`], no helper is used.
    left: u32,
    /// What is added to that the next time a helper keeps the thread waiting.
    alone: u32,
    /// The last look, and how many before it found this thread busy, and alone with that.
    look: Option<Instant>,
    looks: u32,
    /// The size of the last job, in sizes of the smallest that is ever shared.
    size: f32,
    /// From which size on sharing was worth it the last times.
    least: f32,
    /// Jobs that were smaller since one was tried.
    declined: u32,
}

thread_local! {
    static ROW: Cell<Row> = const { Cell::new(Row::NEW) };
}

/// The thread that looked last, as the address of its [`ROW`].
static LAST: AtomicUsize = AtomicUsize::new(0);

/// Whether a job so small that nobody is woken for it finds a helper awake, and is worth handing half of to it. A thread that
/// asks often enough is the reason for one to be woken, in time for the next.
///
/// `size` is in sizes of the smallest job that is shared where a hand-over is quick.
pub(crate) fn company(size: f32) -> bool {
    if rayon::current_thread_index().is_some() {
        return false;
    }
    let mut row = ROW.get();
    row.size = size;
    let worth = size >= row.least;
    if !worth {
        row.declined += 1;
        if row.declined == DECLINED {
            (row.declined, row.least) = (0, size / 2.0);
        }
    } else if row.left == 1 {
        row.look_around();
    } else {
        row.left -= 1;
    }
    ROW.set(row);
    worth && row.left <= IN_A_ROW && one_is_here()
}

/// A shared job, which has begun.
pub(crate) fn begin() -> Timing {
    Timing { start: ROW.get().is_sample().then(Instant::now), own: None }
}

/// How long a shared job takes, where that is a sample.
#[derive(Clone, Copy)]
pub(crate) struct Timing {
    start: Option<Instant>,
    /// What the caller's half took, and its end.
    own: Option<(Duration, Instant)>,
}

impl Timing {
    /// The caller has done its half.
    pub(crate) fn own_half_ends(self) -> Self {
        let own = self.start.map(|start| {
            let end = Instant::now();
            (end - start, end)
        });
        Self { own, ..self }
    }

    /// All is done, by a helper too where `helped`, which kept the caller waiting so long that it cannot have had a core of its
    /// own where `waited`.
    pub(crate) fn end(self, helped: bool, waited: bool) {
        let mut row = ROW.get();
        let [least, most] = ALONE;
        if waited {
            row = Row { left: IN_A_ROW + row.alone, alone: (4 * row.alone).min(most), ..row };
        } else {
            row.alone = (row.alone - row.alone / 16).max(least);
        }
        // What nobody has begun says nothing about hand-overs: that helper was without a core.
        if let (Some((own, end)), true) = (self.own, helped) {
            row.learn(own, end.elapsed());
        }
        ROW.set(row);
    }
}

impl Row {
    const NEW: Self =
        Self { left: IN_A_ROW, alone: ALONE[0], look: None, looks: 0, size: 0.0, least: 1.0, declined: 0 };

    /// Whether this job's time is taken: one of some sixty, as the clock takes a hundredth of the smallest; not soon after a look,
    /// which may have disturbed the helper.
    fn is_sample(&self) -> bool {
        self.left == IN_A_ROW / 2 && self.looks.is_multiple_of(4)
    }

    /// From a job of which this thread did one half in the time `own` and then waited for the other.
    #[cold]
    fn learn(&mut self, own: Duration, wait: Duration) {
        let part = wait.as_secs_f32() / own.as_secs_f32().max(1e-9);
        let up = WORTH * part * self.size > self.least;
        self.least = if up { self.least * STEP } else { (self.least / STEP).max(1.0) };
    }

    #[cold]
    fn look_around(&mut self) {
        let now = Instant::now();
        let me = ROW.with(|row| (&raw const *row).addr());
        // Half of the time a helper would stay.
        let busy = self.look.is_some_and(|look| now - look < LINGER * IN_A_ROW / 2);
        let alone = LAST.load(Ordering::Relaxed) == me;
        if !alone {
            LAST.store(me, Ordering::Relaxed);
        }
        self.look = Some(now);
        self.looks = if busy && alone { self.looks + 1 } else { 0 };
        self.left = IN_A_ROW + u32::from(!alone) * ALONE[0];
        if self.looks >= LOOKS && rayon::current_num_threads() > 1 {
            // Only to be there.
            let _ = with_helpers(1, Who::All, &|| {}, |_| {});
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_jobs_in_a_row_get_company() {
        let busy = || {
            for _ in 0..200 {
                core::hint::spin_loop();
            }
        };
        let helped = (0..100_000).any(|_| {
            let awake = company(1.0);
            busy();
            awake && with_helpers(1, Who::Awake, &busy, |_| busy()) > 0
        });
        assert!(helped || rayon::current_num_threads() == 1, "not one of 100 000 jobs");
        let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().expect("a small pool");
        assert!(!pool.install(|| (0..1000).any(|_| company(1.0))), "a pool's thread has no helpers");
    }

    #[test]
    fn jobs_that_a_hand_over_takes_longer_than_are_not_shared_until_they_are_tried_again() {
        let (own, size) = (Duration::from_nanos(1000), 4.0);
        let mut row = Row::NEW;
        for _ in 0..40 {
            row.learn(own, Duration::from_nanos(100));
        }
        assert_eq!(row.least, 1.0, "a quick hand-over");
        row.size = size;
        while row.least <= size {
            let before = row.least;
            row.learn(own, Duration::from_nanos(1000));
            assert!(row.least > before);
        }
        ROW.set(row);
        for _ in 1..DECLINED {
            assert!(!company(size));
        }
        assert_eq!(ROW.get().left, IN_A_ROW, "what is not shared calls nobody");
        company(size);
        assert!(ROW.get().least < size);
        assert!((0..40).any(|_| {
            row.learn(own, Duration::from_nanos(100));
            row.least < 2.0
        }));
    }
}
