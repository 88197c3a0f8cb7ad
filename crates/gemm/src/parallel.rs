//! Tasks over the caller's rayon pool.
//!
//! A computation is a list of tasks whose number follows from its shape alone. Workers take one after the other, each from
//! a share of its own first, so uneven tasks and busy cores even out by themselves, and nothing that is computed depends
//! on who took what. Small work stays on the calling thread, or is halved with one that is awake, where that is worth it
//! (`small_jobs.rs`). The calling thread is one of the workers, inside a pool or outside; outside, the others are helpers
//! that stay awake for a moment after a call (`helpers.rs`).

use core::cell::Cell;
use core::ops::Range;
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
pub struct Tasks<'a>(Source<'a>);

/// Where a worker's tasks come from.
#[derive(Clone, Copy, Debug)]
enum Source<'a> {
    /// From a list that no other worker has: the next one and the end.
    Own(&'a Cell<usize>, usize),
    /// From one that several have, of which this worker begins with a share.
    Shared(&'a Left, usize),
}

/// Most shares of a list of tasks: workers beyond them begin with another's.
const SHARES: usize = 8;

/// Part of a list of tasks. Alone on two lines of the cache, which are fetched in pairs: workers who have not done theirs do not
/// disturb each other.
#[derive(Debug)]
#[repr(align(128))]
struct Share {
    next: AtomicUsize,
    end: usize,
}

/// The tasks that are left.
#[derive(Debug)]
struct Left {
    shares: [Share; SHARES],
    /// Shares that the list was cut into.
    cut: usize,
    workers: usize,
    arrived: AtomicUsize,
}

impl Left {
    /// `count` tasks in as even shares as may be, of whole groups.
    fn new(count: usize, group: usize, workers: usize) -> Self {
        let group = group.max(1);
        let groups = count.div_ceil(group);
        let cut = workers.min(groups).clamp(1, SHARES);
        let (each, more) = (groups / cut, groups % cut);
        let mut begin = 0;
        let shares = core::array::from_fn(|share| {
            let next = AtomicUsize::new(begin);
            if share < cut {
                begin = count.min(begin + group * (each + usize::from(share < more)));
            }
            Share { next, end: begin }
        });
        Self { shares, cut, workers, arrived: AtomicUsize::new(0) }
    }

    /// The tasks of a worker who has just come: the calling thread first.
    fn tasks(&self) -> Tasks<'_> {
        Tasks(Source::Shared(self, self.arrived.fetch_add(1, Ordering::Relaxed) % self.cut))
    }

    fn count(&self) -> usize {
        let left = |share: &Share| share.end.saturating_sub(share.next.load(Ordering::Relaxed));
        self.shares[..self.cut].iter().map(left).sum()
    }
}

impl Tasks<'_> {
    /// [`Self::take`] for a worker that has not finished its task yet: none where so few are left that another worker might
    /// have begun it sooner.
    pub fn take_early(&self) -> Option<usize> {
        match self.0 {
            Source::Shared(left, _) if left.count() <= left.workers => None,
            _ => self.take(),
        }
    }

    /// The next task, if any is left: of the worker's own share, and then of others'.
    ///
    /// A caller that computes the same again then finds its part of the operands and of the result in its own cache.
    pub fn take(&self) -> Option<usize> {
        let (Left { shares, cut, .. }, own) = match self.0 {
            Source::Shared(left, own) => (left, own),
            // Not one locked instruction: it would wait until all that was computed before is in L1, a tenth of a
            // microsecond, twice a call.
            Source::Own(next, end) => return (next.get() < end).then(|| next.replace(next.get() + 1)),
        };
        let (before, from_own) = shares[..*cut].split_at(own);
        for share in from_own.iter().chain(before) {
            // Relaxed is enough: the counters order nothing but themselves; the scope's end publishes what tasks wrote.
            // Looked at first: shares that are done stay in every cache.
            if share.next.load(Ordering::Relaxed) < share.end {
                let task = share.next.fetch_add(1, Ordering::Relaxed);
                if task < share.end {
                    return Some(task);
                }
            }
        }
        None
    }
}

/// [`run_tasks`] by the threads that are given.
pub fn run_by(threads: Threads, count: usize, worker: impl Fn(&Tasks<'_>) + Sync) {
    run_groups_by(threads, count, 1, worker);
}

/// [`run_by`] for a list of groups of `group` tasks, of which each begins with its longest: no share begins inside a group, so
/// that the last tasks to be done are short ones.
pub fn run_groups_by(threads: Threads, count: usize, group: usize, worker: impl Fn(&Tasks<'_>) + Sync) {
    match threads {
        Threads::Caller => run_inline(0..count, worker),
        Threads::Awake => run_halves(count, worker),
        Threads::All => run_all(count, group, worker),
    }
}

/// Runs `worker` on this thread alone.
fn run_inline(tasks: Range<usize>, worker: impl FnOnce(&Tasks<'_>)) {
    worker(&Tasks(Source::Own(&Cell::new(tasks.start), tasks.end)));
}

/// Runs `worker` on up to `count` threads at once, each of which takes tasks until none is left.
///
/// With one thread or one task it runs on the caller's thread and rayon is not touched. A panic in a worker surfaces
/// here after the others have finished.
pub fn run_tasks(count: usize, worker: impl Fn(&Tasks<'_>) + Sync) {
    run_all(count, 1, worker);
}

fn run_all(count: usize, group: usize, worker: impl Fn(&Tasks<'_>) + Sync) {
    let workers = if count <= 1 { 1 } else { rayon::current_num_threads().min(count) };
    if workers <= 1 {
        return run_inline(0..count, worker);
    }
    let left = Left::new(count, group, workers);
    // First: this thread's share is the same every time.
    let own = left.tasks();
    let help = || worker(&left.tasks());
    with_helpers(workers - 1, Who::All, &help, |missing| {
        if missing == 0 {
            return worker(&own);
        }
        // A worker of a pool, which does itself what nobody else begins, or a caller whose helpers are others' at the moment.
        rayon::in_place_scope(|scope| {
            for _ in 0..missing {
                scope.spawn(|_| help());
            }
            worker(&own);
        });
    });
}

/// The first half of the tasks here and the second on a thread that is awake, if one still is.
fn run_halves(count: usize, worker: impl Fn(&Tasks<'_>) + Sync) {
    let half = count.div_ceil(2);
    let run = |tasks| run_inline(tasks, &worker);
    // Whether the helper has begun is all that the two have to agree about.
    if with_helpers(1, Who::Awake, &|| run(half..count), |_| run(0..half)) == 0 {
        run(half..count);
    }
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
        let left = Left::new(5, 1, 2);
        let tasks = left.tasks();
        assert_eq!([tasks.take_early(), tasks.take_early(), tasks.take_early()], [Some(0), Some(1), Some(2)]);
        assert_eq!(tasks.take_early(), None);
        assert_eq!([tasks.take(), tasks.take(), tasks.take()], [Some(3), Some(4), None]);
        assert_eq!(tasks.take_early(), None);

        let next = Cell::new(0);
        let alone = Tasks(Source::Own(&next, 1));
        assert_eq!([alone.take_early(), alone.take_early()], [Some(0), None]);
    }

    #[test]
    fn workers_do_their_own_share_and_then_others() {
        let left = Left::new(7, 1, 3);
        let workers = [(); 3].map(|()| left.tasks());
        assert_eq!(workers.map(|worker| worker.take()), [Some(0), Some(3), Some(5)]);
        let rest: Vec<_> = core::iter::from_fn(|| workers[1].take()).collect();
        assert_eq!(rest, [4, 6, 1, 2]);
        assert_eq!(workers.map(|worker| worker.take()), [None; 3]);
        assert_eq!(left.count(), 0);

        for (count, group, first) in [
            (7, 3, [Some(0), Some(3), Some(6)]),
            (12, 4, [Some(0), Some(4), Some(8)]),
            (9, 4, [Some(0), Some(4), Some(8)]),
            (8, 4, [Some(0), Some(4), Some(1)]),
            (2, 5, [Some(0), Some(1), None]),
            (0, 1, [None; 3]),
        ] {
            let left = Left::new(count, group, 3);
            let taken = [(); 3].map(|()| left.tasks().take());
            assert_eq!(taken, first, "{count} tasks by {group}");
        }
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
