//! Tasks over threads: one shared counter, the calling thread works too.

use core::sync::atomic::{AtomicUsize, Ordering};

/// Calls `run` once for each index below `tasks`, on at most the current rayon pool's number of threads; on the calling
/// thread alone where `inline` says that the work is not worth waking another.
pub(crate) fn for_each_task(tasks: usize, inline: bool, run: impl Fn(usize) + Sync) {
    let workers = if inline || tasks <= 1 { 1 } else { rayon::current_num_threads().min(tasks) };
    if workers == 1 {
        (0..tasks).for_each(run);
        return;
    }
    let next = AtomicUsize::new(0);
    let work = || {
        loop {
            // Relaxed: the counter hands out indices and orders nothing else; the scope's end orders the results.
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= tasks {
                break;
            }
            run(index);
        }
    };
    rayon::in_place_scope(|scope| {
        for _ in 1..workers {
            scope.spawn(|_| work());
        }
        work();
    });
}
