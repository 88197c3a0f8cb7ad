//! Tasks over the caller's rayon pool.
//!
//! A computation is a list of tasks whose number follows from its shape alone. Workers take the next task from one
//! atomic counter, so uneven tasks and busy cores even out by themselves, and nothing that is computed depends on who
//! took what. Small work stays on the calling thread, or is halved with one that is awake, where that is worth it
//! (`small_jobs.rs`). The calling thread is one of the workers, inside a pool or outside; outside, the others are helpers
//! that stay awake for a moment after a call (`helpers.rs`).

use core::sync::atomic::{AtomicUsize, Ordering};
use std::sync::OnceLock;

use crate::helpers::{Who, with_helpers};
use crate::small_jobs::company;

/// Cores that this process may use: what a plan may depend on, unlike the number of threads.
#[must_use]
pub fn cores() -> usize {
    static CORES: OnceLock<usize> = OnceLock::new();
    *CORES.get_or_init(|| std::thread::available_parallelism().map_or(1, usize::from))
}

/// Who computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Threads {
    /// The caller's alone.
    Caller,
    /// The caller's and one that is awake.
    Awake,
    /// All of the pool; they are woken.
    All,
}

impl Threads {
    /// For `work`, in any unit, of at most `tasks` tasks: all from `all` on, and from `shared` on who is awake anyway, unless the
    /// last hand-overs have taken too long for so little.
    ///
    /// To be asked once for each computation: who asks often is the reason for a thread to stay awake.
    pub fn of(work: f64, [shared, all]: [f64; 2], tasks: usize) -> Self {
        if tasks <= 1 {
            Self::Caller
        } else if work >= all {
            Self::All
        } else if work >= shared && company((work / shared) as f32) {
            Self::Awake
        } else {
            Self::Caller
        }
    }
}

/// The tasks that are left, as one worker sees them.
#[derive(Clone, Copy, Debug)]
pub struct Tasks<'a> {
    left: &'a Left,
    taker: Taker,
}

/// Who takes tasks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Taker {
    /// The only worker.
    Alone,
    /// One of several that takes from the start.
    Start,
    /// One of several that takes from the end.
    End,
}

/// The tasks that are left.
#[derive(Debug)]
struct Left {
    count: usize,
    workers: usize,
    taken: AtomicUsize,
    from_the_start: AtomicUsize,
    from_the_end: AtomicUsize,
}

impl Left {
    fn new(count: usize, workers: usize) -> Self {
        let zero = || AtomicUsize::new(0);
        Self { count, workers, taken: zero(), from_the_start: zero(), from_the_end: zero() }
    }
}

impl Tasks<'_> {
    /// [`Self::take`] for a worker that has not finished its task yet: none where so few are left that another worker might
    /// have begun it sooner.
    pub fn take_early(&self) -> Option<usize> {
        let left = self.left;
        let taken = left.taken.load(Ordering::Relaxed);
        (self.taker == Taker::Alone || taken + left.workers < left.count).then(|| self.take()).flatten()
    }

    /// The next task, if any is left: the caller's thread takes them from the start, the others from the end.
    ///
    /// A caller that computes the same product again then finds its part of the operands and of C in its own cache.
    pub fn take(&self) -> Option<usize> {
        let left = self.left;
        if self.taker == Taker::Alone {
            // Not one locked instruction: it would wait until all that was computed before is in L1, a tenth of a
            // microsecond, twice a call.
            let task = left.taken.load(Ordering::Relaxed);
            left.taken.store(task + 1, Ordering::Relaxed);
            return (task < left.count).then_some(task);
        }
        // Relaxed is enough: the counters order nothing but themselves; the scope's end publishes what tasks wrote.
        if left.taken.fetch_add(1, Ordering::Relaxed) >= left.count {
            return None;
        }
        // As no more than `count` get here, the two ends do not meet.
        Some(if self.taker == Taker::End {
            left.count - 1 - left.from_the_end.fetch_add(1, Ordering::Relaxed)
        } else {
            left.from_the_start.fetch_add(1, Ordering::Relaxed)
        })
    }
}

/// [`run_tasks`] by the threads that are given.
pub fn run_by(threads: Threads, count: usize, worker: impl Fn(&Tasks<'_>) + Sync) {
    match threads {
        Threads::Caller => run_inline(count, worker),
        Threads::Awake => run_halves(count, worker),
        Threads::All => run_tasks(count, worker),
    }
}

/// Runs `worker` on the caller's thread alone.
fn run_inline(count: usize, worker: impl FnOnce(&Tasks<'_>)) {
    worker(&Tasks { left: &Left::new(count, 1), taker: Taker::Alone });
}

/// Runs `worker` on up to `count` threads at once, each of which takes tasks until none is left.
///
/// With one thread or one task it runs on the caller's thread and rayon is not touched. A panic in a worker surfaces
/// here after the others have finished.
pub fn run_tasks(count: usize, worker: impl Fn(&Tasks<'_>) + Sync) {
    run(count, Taker::End, worker);
}

/// [`run_by`] with all threads taking from the start: for a list that has its longest tasks there.
pub fn run_in_order_by(threads: Threads, count: usize, worker: impl Fn(&Tasks<'_>) + Sync) {
    match threads {
        Threads::All => run(count, Taker::Start, worker),
        few => run_by(few, count, worker),
    }
}

/// The first half of the tasks here and the second on a thread that is awake, if one still is.
fn run_halves(count: usize, worker: impl Fn(&Tasks<'_>) + Sync) {
    let half = count.div_ceil(2);
    let run = |first: usize, count: usize| {
        let left = Left::new(count, 1);
        left.taken.store(first, Ordering::Relaxed);
        worker(&Tasks { left: &left, taker: Taker::Alone });
    };
    // Whether the helper has begun is all that the two have to agree about.
    if with_helpers(1, Who::Awake, &|| run(half, count), |_| run(0, half)) == 0 {
        run(half, count);
    }
}

fn run(count: usize, others: Taker, worker: impl Fn(&Tasks<'_>) + Sync) {
    let workers = if count <= 1 { 1 } else { rayon::current_num_threads().min(count) };
    if workers <= 1 {
        return run_inline(count, worker);
    }
    let left = Left::new(count, workers);
    let work = |taker| worker(&Tasks { left: &left, taker });
    with_helpers(workers - 1, Who::All, &|| work(others), |missing| {
        if missing == 0 {
            return work(Taker::Start);
        }
        // A worker of a pool, which does itself what nobody else begins, or a caller whose helpers are others' at the moment.
        rayon::in_place_scope(|scope| {
            for _ in 0..missing {
                scope.spawn(|_| work(others));
            }
            work(Taker::Start);
        });
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_whatever_the_pool() {
        for threads in [1, 2, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a small pool");
            for count in [0, 1, 2, 7, 100] {
                let runs: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
                let go = || {
                    run_tasks(count, |tasks| {
                        while let Some(task) = tasks.take() {
                            runs[task].fetch_add(1, Ordering::Relaxed);
                        }
                    });
                };
                pool.install(go);
                assert!(
                    runs.iter().all(|r| r.load(Ordering::Relaxed) == 1),
                    "{threads} threads, {count} tasks"
                );
                go();
                assert!(runs.iter().all(|r| r.load(Ordering::Relaxed) == 2), "outside, {count} tasks");
            }
        }
    }

    #[test]
    fn early_takers_leave_the_last_tasks_to_who_is_free() {
        let left = Left::new(5, 2);
        let tasks = Tasks { left: &left, taker: Taker::Start };
        assert_eq!([tasks.take_early(), tasks.take_early(), tasks.take_early()], [Some(0), Some(1), Some(2)]);
        assert_eq!(tasks.take_early(), None);
        assert_eq!([tasks.take(), tasks.take(), tasks.take()], [Some(3), Some(4), None]);
        assert_eq!(tasks.take_early(), None);

        let left = Left::new(1, 1);
        let alone = Tasks { left: &left, taker: Taker::Alone };
        assert_eq!([alone.take_early(), alone.take_early()], [Some(0), None]);
    }

    #[test]
    fn panic_of_a_worker_reaches_the_caller() {
        let result = std::panic::catch_unwind(|| {
            run_tasks(8, |tasks| {
                while let Some(task) = tasks.take() {
                    assert!(task != 5, "task 5 fails");
                }
            });
        });
        assert!(result.is_err());
    }
}
