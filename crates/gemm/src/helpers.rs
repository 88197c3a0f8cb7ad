//! Helpers: threads of rayon's global pool that, after a computation, stay awake for a moment in case the next one comes.
//!
//! Waking a thread that sleeps takes 5 to 50 microseconds, and rayon's threads sleep soon. Products and attention come in
//! rows, though, one after the other from one thread. So a thread that has helped a caller waits [`LINGER`] at its
//! [`Place`], looking at one word of memory, and has the next job a tenth of a microsecond after it was put there. (OpenMP's
//! threads wait in the same way, for milliseconds and more.)
//!
//! ```text
//! EMPTY    nobody             a caller that wants somebody here: -> job, rayon::spawn(helper)
//! CALLED   not yet arrived    a caller: -> job          the helper, arriving: -> HERE
//! HERE     waiting, awake     a caller: -> job          the helper, after LINGER or STAY: -> EMPTY, and it leaves
//! job      offered            its caller: -> CALLED or HERE as before          the helper: -> BUSY
//! BUSY     computing          the helper, done: -> HERE
//! ```
//!
//! A caller offers its job, computes on its own thread until no task is left, takes back what nobody has begun, and waits
//! only for helpers that are computing, so a helper that is late or never comes costs it nothing. Callers that are
//! themselves in a pool have no helpers: which pool a thread belongs to cannot be asked, and theirs need not be the global
//! one.

use core::any::Any;
use core::ptr::{null_mut, without_provenance_mut};
use core::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use core::time::Duration;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread::{self, Thread};
use std::time::Instant;

use crate::small_jobs::{self, Timing};

/// How long a helper stays without a job.
pub(crate) const LINGER: Duration = Duration::from_micros(50);

/// How long it stays in all. Then it goes back to the pool, whose other work it keeps waiting where several callers have called
/// all of its threads; one caller leaves one free. Not as short as the jobs: a thread that is called while others of the pool
/// are going to sleep may get its core milliseconds late. With 5 ms one in ten calls of 10 ms took a fifth to twice as long.
const STAY: Duration = Duration::from_millis(100);

/// How long a waiting helper only looks at its place. Then it also yields its core, which may be the caller's: some kernels wake
/// a thread there although another core is free, and move it when both have been ready to run for a moment.
const BUSY_WAIT: Duration = Duration::from_micros(5);

/// Turns of the loop of a waiting helper between two looks at the clock: a microsecond or two.
const TURNS: usize = 64;

/// What a caller may have to wait for a small job that a helper has just begun.
const LATE: Duration = Duration::from_micros(30);

/// Turns of a caller's loop, after its own tasks, of which the first only look: some 7 microseconds, longer than most tasks.
/// Then it yields its core, which a helper may need; then it sleeps.
const SPINS: usize = 256;
const YIELDS: usize = 256;

/// Most helpers at once.
const MOST: usize = 255;

/// A helper's place. Alone on two lines of the cache, which are fetched in pairs: others' changes do not disturb who looks at
/// it.
#[repr(align(128))]
struct Place {
    state: AtomicPtr<Job<'static>>,
}

static PLACES: [Place; MOST] = [const { Place { state: AtomicPtr::new(EMPTY) } }; MOST];

const EMPTY: *mut Job<'static> = null_mut();
const CALLED: *mut Job<'static> = without_provenance_mut(2);
const HERE: *mut Job<'static> = without_provenance_mut(4);
const BUSY: *mut Job<'static> = without_provenance_mut(6);

/// In the address of a job: offered to a helper that has not arrived.
const NOT_YET: usize = 1;

/// In [`Job::done`]: the caller sleeps.
const ASLEEP: usize = 1 << (usize::BITS - 1);

/// What helpers do, in its caller's frame.
#[repr(align(8))]
struct Job<'a> {
    work: &'a (dyn Fn() + Sync),
    /// Helpers that have finished, and [`ASLEEP`].
    done: AtomicUsize,
    caller: OnceLock<Thread>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

/// Who may help.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Who {
    /// Helpers that are awake, and more, who are woken.
    All,
    /// Helpers that are awake.
    Awake,
}

/// Whether a helper is here, awake.
pub(crate) fn one_is_here() -> bool {
    PLACES[0].state.load(Ordering::Relaxed) == HERE
}

/// Runs `own` on this thread and `work` on up to `wanted` helpers, and says on how many. `own` is told how many it could not
/// even be offered to, because they are other callers' at the moment or this thread has none, and others may do it instead.
///
/// A panic in `work` surfaces here after all have finished.
pub(crate) fn with_helpers(
    wanted: usize,
    who: Who,
    work: &(dyn Fn() + Sync),
    own: impl FnOnce(usize),
) -> usize {
    if rayon::current_thread_index().is_some() {
        own(wanted);
        return 0;
    }
    let timing = (who == Who::Awake).then(small_jobs::begin);
    let job = Job { work, done: AtomicUsize::new(0), caller: OnceLock::new(), panic: Mutex::new(None) };
    let places = &PLACES[..wanted.min(MOST)];
    let mut offered = Offered { job: &job, places, helpers: 0, forked: false, waited: false };
    offered.offer(who);
    own(if offered.forked { 0 } else { wanted - offered.helpers });
    let timing = timing.map(Timing::own_half_ends);
    let helped = offered.end();
    let waited = offered.waited;
    drop(offered);
    if let Some(timing) = timing {
        timing.end(helped > 0, waited);
    }
    if let Some(panic) = job.panic.into_inner().unwrap_or_else(PoisonError::into_inner) {
        resume_unwind(panic);
    }
    helped
}

/// A job that helpers may be at. Its end, by whatever way, waits for them.
struct Offered<'a> {
    job: &'a Job<'a>,
    places: &'static [Place],
    /// Helpers that it was offered to and not taken back from.
    helpers: usize,
    /// Whether this is a child of `fork`, in which the pool has no threads.
    forked: bool,
    /// Whether one was so late that it cannot have had a core of its own.
    waited: bool,
}

impl Offered<'_> {
    fn address(&self) -> *mut Job<'static> {
        (&raw const *self.job).cast_mut().cast()
    }

    fn offer(&mut self, who: Who) {
        let job = self.address();
        let late = job.map_addr(|address| address | NOT_YET);
        for place in self.places {
            // Release: who takes the job sees all of it.
            let change = |from, to| {
                place.state.compare_exchange(from, to, Ordering::Release, Ordering::Relaxed).is_ok()
            };
            // Again where the helper comes or goes at this moment.
            self.helpers += usize::from(loop {
                match place.state.load(Ordering::Relaxed) {
                    HERE if change(HERE, job) => break true,
                    HERE => {}
                    _ if who == Who::Awake => break false,
                    _ if forked() => {
                        self.forked = true;
                        break false;
                    }
                    CALLED if change(CALLED, late) => break true,
                    EMPTY if change(EMPTY, late) => {
                        rayon::spawn(|| help(place));
                        break true;
                    }
                    CALLED | EMPTY => {}
                    _ => break false,
                }
            });
        }
    }

    /// Takes the job back from helpers that have not begun it, and waits for those that have. So many.
    fn end(&mut self) -> usize {
        if self.helpers == 0 {
            return 0;
        }
        let job = self.address();
        let late = job.map_addr(|address| address | NOT_YET);
        for place in self.places {
            for (from, to) in [(job, HERE), (late, CALLED)] {
                if place.state.load(Ordering::Relaxed) == from {
                    let back = place.state.compare_exchange(from, to, Ordering::Relaxed, Ordering::Relaxed);
                    self.helpers -= usize::from(back.is_ok());
                }
            }
        }
        // Acquire, here and below: what helpers wrote is seen by who sees them done.
        let done = &self.job.done;
        for _ in 0..SPINS {
            if done.load(Ordering::Acquire) == self.helpers {
                return core::mem::take(&mut self.helpers);
            }
            core::hint::spin_loop();
        }
        let start = Instant::now();
        self.wait();
        self.waited = start.elapsed() >= LATE;
        core::mem::take(&mut self.helpers)
    }

    /// Waits for helpers without keeping a core from them.
    #[cold]
    fn wait(&self) {
        let done = &self.job.done;
        for _ in 0..YIELDS {
            thread::yield_now();
            if done.load(Ordering::Acquire) == self.helpers {
                return;
            }
        }
        self.job.caller.get_or_init(thread::current);
        done.fetch_or(ASLEEP, Ordering::Release);
        while done.load(Ordering::Acquire) != ASLEEP | self.helpers {
            thread::park();
        }
    }
}

/// Whether this process is another than the one that asked first, a child of `fork`: no thread of the pool is in it, and who hands
/// it work waits forever. Places are as they were in the parent; what is offered there is taken back.
#[cold]
fn forked() -> bool {
    static PROCESS: OnceLock<u32> = OnceLock::new();
    let process = std::process::id();
    *PROCESS.get_or_init(|| process) != process
}

impl Drop for Offered<'_> {
    fn drop(&mut self) {
        self.end();
    }
}

/// What a helper does from its arrival at its place to its leave.
fn help(place: &Place) {
    let change =
        |from, to| place.state.compare_exchange(from, to, Ordering::Acquire, Ordering::Relaxed).is_ok();
    let arrived = Instant::now();
    let mut last = arrived;
    // On a core, so that one that shares its core does not leave before it gets another.
    let mut idle = Duration::ZERO;
    let mut turn = 0;
    loop {
        let state = place.state.load(Ordering::Relaxed);
        if state == CALLED {
            change(CALLED, HERE);
        } else if state == HERE {
            core::hint::spin_loop();
            turn += 1;
            if turn % TURNS > 0 {
                continue;
            }
            let now = Instant::now();
            idle += (now - last).min(BUSY_WAIT);
            last = now;
            if idle >= LINGER || now - arrived >= STAY {
                if change(HERE, EMPTY) {
                    return;
                }
            } else if idle >= BUSY_WAIT {
                thread::yield_now();
            }
        } else if change(state, BUSY) {
            let job = state.map_addr(|address| address & !NOT_YET);
            {
                // SAFETY: a place holds, besides the four words, the address of a job whose caller waits, before it leaves
                // the job's frame, for all that it could not take back; this one was just taken, and is not counted as done.
                let job = unsafe { &*job };
                if let Err(panic) = catch_unwind(AssertUnwindSafe(job.work)) {
                    *job.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
                }
            }
            // Before the caller sees that it is done: its next job is to find the helper here.
            place.state.store(HERE, Ordering::Release);
            // SAFETY: this helper is not counted yet, so its caller still waits.
            unsafe { finish(job) };
            last = Instant::now();
            idle = Duration::ZERO;
            // Where jobs come so quickly that it never waits, it looks at the clock all the same.
            turn = if last - arrived >= STAY { TURNS - 1 } else { 0 };
        }
    }
}

/// One helper more has finished. The job may be gone as soon as it is counted: a pointer, not a reference.
///
/// # Safety
/// The job must have this helper, not counted yet.
unsafe fn finish(job: *const Job<'_>) {
    // A guess: reading it first would fetch its line twice.
    let mut done = 0;
    loop {
        // SAFETY: until the helper is counted, the caller waits. The thread to wake has to be known before.
        let sleeper = if done & ASLEEP > 0 { unsafe { (*job).caller.get().cloned() } } else { None };
        // SAFETY: as above; nothing is read after the count.
        let counted = unsafe {
            (*job).done.compare_exchange_weak(done, done + 1, Ordering::Release, Ordering::Acquire)
        };
        match counted {
            Ok(_) => {
                if let Some(thread) = sleeper {
                    thread.unpark();
                }
                return;
            }
            Err(now) => done = now,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Calls until a helper has run: how many have.
    fn once_helped(who: Who, work: &(dyn Fn() + Sync)) -> usize {
        for _ in 0..10_000 {
            let helped = with_helpers(1, who, work, |_| thread::sleep(Duration::from_micros(100)));
            if helped > 0 {
                return helped;
            }
        }
        0
    }

    fn threads() -> bool {
        rayon::current_num_threads() > 1
    }

    #[test]
    fn a_job_is_run_by_as_many_as_are_said_to_have_helped() {
        let callers = 3;
        thread::scope(|scope| {
            for caller in 0..callers {
                scope.spawn(move || {
                    for call in 0..2000 {
                        let (runs, own) = (AtomicUsize::new(0), AtomicUsize::new(0));
                        let who = if call % 3 == 0 { Who::Awake } else { Who::All };
                        let work = || {
                            runs.fetch_add(1, Ordering::Relaxed);
                        };
                        // Some are over before a helper comes, some long after it has finished.
                        let helped = with_helpers(1 + call % 3, who, &work, |missing| {
                            assert!(missing <= 1 + call % 3);
                            for _ in 0..(call * (caller + 1)) % 5000 {
                                core::hint::spin_loop();
                            }
                            own.fetch_add(1, Ordering::Relaxed);
                        });
                        assert_eq!(runs.into_inner(), helped, "caller {caller}, call {call}");
                        assert_eq!(own.into_inner(), 1);
                    }
                });
            }
        });
    }

    #[test]
    fn callers_wait_however_long_a_helper_takes() {
        let ended = AtomicUsize::new(0);
        let helped = once_helped(Who::All, &|| {
            thread::sleep(Duration::from_millis(20));
            ended.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(ended.into_inner(), helped);
        assert!(helped > 0 || !threads(), "no helper came");
    }

    #[test]
    fn a_helper_that_has_helped_is_awake_for_the_next_job() {
        let helped = (0..1000).any(|_| {
            once_helped(Who::All, &|| {});
            with_helpers(1, Who::Awake, &|| {}, |_| thread::sleep(Duration::from_micros(100))) > 0
        });
        assert!(helped || !threads());
    }

    #[test]
    fn panics_surface_after_all_have_finished() {
        let of_a_helper = catch_unwind(|| once_helped(Who::All, &|| panic!("in a helper")));
        assert!(of_a_helper.is_err() || !threads());
        let runs = AtomicUsize::new(0);
        let own = catch_unwind(AssertUnwindSafe(|| {
            let work = || {
                thread::sleep(Duration::from_millis(5));
                runs.fetch_add(1, Ordering::Relaxed);
            };
            with_helpers(1, Who::All, &work, |_| {
                thread::sleep(Duration::from_millis(1));
                panic!("in the caller");
            })
        }));
        let runs = runs.into_inner();
        assert!(own.is_err() && runs <= 1);
        // Both went on.
        assert!(once_helped(Who::All, &|| {}) > 0 || !threads());
    }
}
