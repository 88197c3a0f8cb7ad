//! Tasks over the caller's rayon pool.
//!
//! A computation is a list of tasks whose number follows from its shape alone. Workers take the next task from one
//! atomic counter, so uneven tasks and busy cores even out by themselves, and nothing that is computed depends on who
//! took what. The calling thread is one of the workers: `rayon::in_place_scope` stays on it, inside a pool or outside.

use core::sync::atomic::{AtomicUsize, Ordering};

/// Turns of the waiting loop before a caller whose tasks are all taken leaves the waiting to rayon.
///
/// Rayon blocks a caller from outside the pool on a condition variable, which costs a system call and a wake-up of tens
/// of microseconds; the other workers finish within one task, a few microseconds. With some 40 cycles to a turn this is
/// about 50 microseconds, after which the core is better given away.
const SPINS: usize = 4096;

/// The tasks that are left.
#[derive(Debug)]
pub(crate) struct Tasks {
    next: AtomicUsize,
    count: usize,
}

impl Tasks {
    /// The next task for the caller, if any is left.
    pub(crate) fn take(&self) -> Option<usize> {
        // Relaxed is enough: the counter orders nothing but itself; the scope's end publishes what tasks wrote.
        let task = self.next.fetch_add(1, Ordering::Relaxed);
        (task < self.count).then_some(task)
    }
}

/// Runs `worker` on up to `count` threads at once, each of which takes tasks until none is left.
///
/// With one thread or one task it runs on the caller's thread and rayon is not touched. A panic in a worker surfaces
/// here after the others have finished.
pub(crate) fn run_tasks(count: usize, worker: impl Fn(&Tasks) + Sync) {
    let tasks = Tasks { next: AtomicUsize::new(0), count };
    if count <= 1 {
        return worker(&tasks);
    }
    let workers = rayon::current_num_threads().min(count);
    if workers <= 1 {
        return worker(&tasks);
    }
    let finished = AtomicUsize::new(1);
    rayon::in_place_scope(|scope| {
        for _ in 1..workers {
            scope.spawn(|_| {
                worker(&tasks);
                finished.fetch_add(1, Ordering::Release);
            });
        }
        worker(&tasks);
        for _ in 0..SPINS {
            if finished.load(Ordering::Acquire) == workers {
                break;
            }
            core::hint::spin_loop();
        }
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
                assert!(runs.iter().all(|r| r.load(Ordering::Relaxed) == 1), "{threads} threads, {count} tasks");
                go();
                assert!(runs.iter().all(|r| r.load(Ordering::Relaxed) == 2), "outside, {count} tasks");
            }
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
