//! Threads: which rayon pool computes, and leaving the GIL.
//!
//! Without anything asked, rayon's global pool does (its size is `RAYON_NUM_THREADS`, or the CPUs): the caller's thread is
//! then one of the workers. After `set_num_threads`, in a child of `fork`, where the global pool's threads do not exist, and
//! where its threads could not be started, a pool of this module does. For small work nobody is woken.

use std::error::Error;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pyo3::exceptions::{PyOverflowError, PyRuntimeError};
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyDict};
use qkv::gemm::CacheInfo;
use qkv::simd::Isa;
use rayon::{ThreadPool, ThreadPoolBuildError, ThreadPoolBuilder};

use crate::error::{bad_type, bad_value};
use crate::options::shown;

/// Most threads that can be asked for.
const MOST: usize = 1024;

/// Below this much work the Rust API wakes nobody (attention, see its `forward.rs`).
const SMALL: f64 = 1e6;

/// Small calls that are made before the threads of the global pool are started. After more than a hundred of them in a row the
/// Rust API asks for that pool (`small_jobs.rs` of qkv-gemm), and it panics where it cannot be started.
const SMALL_CALLS: u32 = 64;

/// The longest wait before another try to start threads.
const MOST_WAIT: Duration = Duration::from_millis(160);

/// rayon's global pool, which is started once: where that fails it is lost for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Global {
    NotStarted,
    Here,
    Lost,
}

struct State {
    /// The process that all of this is of.
    process: u32,
    /// How many threads were asked for.
    asked: Option<usize>,
    /// The pool of this module; None where the global one is used.
    own: Option<Arc<ThreadPool>>,
    /// Whether this process is a child that cannot use the global pool.
    forked: bool,
    global: Global,
    /// Calls with small work before the global pool was started.
    small: u32,
}

/// Only locked for moments in which the GIL is held, so a fork by Python never finds it locked.
static STATE: Mutex<State> = Mutex::new(State {
    process: 0,
    asked: None,
    own: None,
    forked: false,
    global: Global::NotStarted,
    small: 0,
});

impl State {
    /// Notices a fork.
    fn look_around(&mut self) {
        let process = std::process::id();
        if self.process == process {
            return;
        }
        if self.process != 0 {
            self.forked = true;
            // Its threads stayed in the parent, and its locks are as they were at that moment: not even dropping is safe.
            core::mem::forget(self.own.take());
        }
        self.process = process;
    }

    /// The pool to compute in, if not the global one.
    fn pool(&mut self) -> PyResult<Option<Arc<ThreadPool>>> {
        self.look_around();
        if self.own.is_none() && (self.forked || !self.start_global(None).unwrap_or(false)) {
            self.own = Some(build(self.asked).map_err(|error| not_started(&error))?);
        }
        Ok(self.own.clone())
    }

    /// The same for small work, for which threads are not started without need.
    fn pool_for_small(&mut self) -> PyResult<Option<Arc<ThreadPool>>> {
        if self.global == Global::NotStarted {
            self.small += 1;
            if self.small < SMALL_CALLS {
                return Ok(None);
            }
            // Its error comes again from `pool`, if no thread can be started at all.
            let _ = self.start_global(None);
        }
        if self.global == Global::Lost { self.pool() } else { Ok(None) }
    }

    /// Starts the global pool where that has not been tried, and says whether it is there. An error comes once.
    fn start_global(&mut self, threads: Option<usize>) -> Result<bool, ThreadPoolBuildError> {
        if self.global == Global::NotStarted {
            let result = builder(threads).build_global();
            // No source: it was there already.
            let lost = result.as_ref().is_err_and(|error| error.source().is_some());
            self.global = if lost { Global::Lost } else { Global::Here };
            if lost {
                result?;
            }
        }
        Ok(self.global == Global::Here)
    }
}

fn builder(threads: Option<usize>) -> ThreadPoolBuilder {
    ThreadPoolBuilder::new().num_threads(threads.unwrap_or(0)).thread_name(|i| format!("qkv-{i}"))
}

/// A pool of this module with so many threads; with None, with rayon's own number or as many as can be started.
fn build(threads: Option<usize>) -> Result<Arc<ThreadPool>, ThreadPoolBuildError> {
    let mut fewer = std::thread::available_parallelism().map_or(1, usize::from);
    let mut result = builder(threads).build();
    // Threads of a start that has failed are still on their way out, and take the room that others need.
    let mut wait = Duration::from_millis(5);
    while result.is_err() && (wait < MOST_WAIT || threads.is_none() && fewer > 1) {
        std::thread::sleep(wait);
        wait = MOST_WAIT.min(2 * wait);
        fewer = (fewer / 2).max(1);
        result = builder(Some(threads.unwrap_or(fewer))).build();
    }
    result.map(Arc::new)
}

fn not_started(error: &ThreadPoolBuildError) -> PyErr {
    PyRuntimeError::new_err(format!("threads could not be started: {error}"))
}

fn state() -> std::sync::MutexGuard<'static, State> {
    // Nothing panics while it is locked.
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Remembers which process this is.
pub(crate) fn start() {
    state().look_around();
}

/// Runs `work`, of about `flops` floating-point operations (or more: never fewer), without the GIL and with the threads that
/// were asked for.
///
/// # Errors
/// Where threads cannot be started, and a panic, which is a bug, as `RuntimeError`.
pub(crate) fn run<R: Send>(py: Python<'_>, flops: f64, work: impl FnOnce() -> R + Send) -> PyResult<R> {
    let pool = if flops < SMALL { state().pool_for_small()? } else { state().pool()? };
    let result = py.detach(|| {
        catch_unwind(AssertUnwindSafe(|| match pool {
            Some(pool) => pool.install(work),
            None => work(),
        }))
    });
    result.map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("unknown");
        PyRuntimeError::new_err(format!("qkv has failed, which is a bug of it: {text}"))
    })
}

/// The number of threads that compute: what `set_num_threads` was given, else `RAYON_NUM_THREADS`, else the CPUs.
///
/// >>> import qkv
/// >>> qkv.num_threads() >= 1
/// True
#[pyfunction]
pub(crate) fn num_threads() -> PyResult<usize> {
    Ok(match state().pool()? {
        Some(pool) => pool.current_num_threads(),
        None => rayon::current_num_threads(),
    })
}

/// Computes with `n` threads from now on, 1 <= n <= 1024. Results do not depend on it.
///
/// >>> import qkv
/// >>> before = qkv.num_threads()
/// >>> qkv.set_num_threads(1)
/// >>> qkv.num_threads()
/// 1
/// >>> qkv.set_num_threads(before)
#[pyfunction]
pub(crate) fn set_num_threads(n: &Bound<'_, PyAny>) -> PyResult<()> {
    let expected = format!("1 to {MOST} threads");
    let number = match n.extract::<i64>() {
        // Larger than the machine counts.
        Err(error) if error.is_instance_of::<PyOverflowError>(n.py()) => Ok(0),
        Ok(_) if n.is_instance_of::<PyBool>() => Err(()),
        number => number.map_err(|_| ()),
    };
    let number = number.map_err(|()| bad_type("n", shown(n), &expected))?;
    let threads = usize::try_from(number).ok().filter(|n| (1..=MOST).contains(n));
    let threads = threads.ok_or_else(|| bad_value("n", shown(n), expected))?;
    let mut state = state();
    state.look_around();
    // The first to say how many threads the global pool has is obeyed; after that it is there.
    let result = if state.forked { Ok(false) } else { state.start_global(Some(threads)) };
    let is_here = result.map_err(|error| not_started(&error))?;
    state.own = if is_here && rayon::current_num_threads() == threads {
        None
    } else {
        Some(build(Some(threads)).map_err(|error| not_started(&error))?)
    };
    state.asked = Some(threads);
    Ok(())
}

/// What qkv sees of the CPU: `isa`, the instruction set that is used (`QKV_ISA` forces one), `cores`, the CPUs that this process
/// may use, and the data caches that a core sees, `l1d`, `l2` and `l3`, in bytes (0 where there is none).
///
/// >>> import qkv
/// >>> sorted(qkv.cpu_info())
/// ['cores', 'isa', 'l1d', 'l2', 'l3']
#[pyfunction]
pub(crate) fn cpu_info(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let isa = Isa::active().map_err(|error| PyRuntimeError::new_err(format!("QKV_ISA: {error}")))?;
    let caches = CacheInfo::get();
    let info = PyDict::new(py);
    info.set_item("isa", isa.kind().name())?;
    info.set_item("cores", std::thread::available_parallelism().map_or(1, usize::from))?;
    info.set_item("l1d", caches.l1d)?;
    info.set_item("l2", caches.l2)?;
    info.set_item("l3", caches.l3)?;
    Ok(info)
}
