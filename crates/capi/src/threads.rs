//! The threads that compute, what the library is and what it runs on.

use core::ffi::{CStr, c_char};
use std::sync::{Arc, PoisonError, RwLock};

use qkv::gemm::CacheInfo;
use qkv::simd::Isa;
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::status::{Failure, guard, guard_value, qkv_status, qkv_status::*};
use crate::versioned::Versioned;

/// Where the number of threads was changed after rayon's own pool had started: that many, in a pool of ours.
static POOL: RwLock<Option<Arc<ThreadPool>>> = RwLock::new(None);

/// More threads than any machine has; a pool of them could not be started.
const MOST_THREADS: usize = 4096;

/// Runs `work` on the threads that the caller has asked for.
///
/// No lock may be taken in `work`: a thread of the pool that waits for others may start another call's work meanwhile.
pub(crate) fn run<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    let pool = POOL.read().unwrap_or_else(PoisonError::into_inner).clone();
    match pool {
        Some(pool) => pool.install(work),
        None => work(),
    }
}

/// Sets the number of threads that compute, for all calls that begin afterwards; 1 or more.
///
/// Without it there are RAYON_NUM_THREADS, or as many as the machine runs at once. Results do not depend on it. It costs
/// least before the first call that computes: later, work is handed to a new pool of threads.
#[unsafe(no_mangle)]
pub extern "C" fn qkv_set_num_threads(threads: usize) -> qkv_status {
    guard(|| {
        if !(1..=MOST_THREADS).contains(&threads) {
            let what = format!("threads: {threads}, expected 1 to {MOST_THREADS}");
            return Err(Failure::new(QKV_ERROR_VALUE, what));
        }
        let builder = || ThreadPoolBuilder::new().num_threads(threads);
        let mut pool = POOL.write().unwrap_or_else(PoisonError::into_inner);
        // This succeeds where nothing has used rayon's own pool yet.
        if builder().build_global().is_ok() || rayon::current_num_threads() == threads {
            *pool = None;
            return Ok(());
        }
        let new = builder().build().map_err(|error| {
            Failure::new(QKV_ERROR_MEMORY, format!("threads: {threads} cannot be started: {error}"))
        })?;
        *pool = Some(Arc::new(new));
        Ok(())
    })
}

/// The number of threads that compute; 0 where they cannot be started.
#[unsafe(no_mangle)]
pub extern "C" fn qkv_num_threads() -> usize {
    guard_value(0, || {
        let pool = POOL.read().unwrap_or_else(PoisonError::into_inner);
        Ok(pool.as_ref().map_or_else(rayon::current_num_threads, |pool| pool.current_num_threads()))
    })
}

/// The version of the library, such as "0.1.0".
#[unsafe(no_mangle)]
pub extern "C" fn qkv_version() -> *const c_char {
    const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");
    VERSION.as_ptr().cast()
}

/// What qkv runs on.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct qkv_cpu_info {
    /// sizeof(qkv_cpu_info), set before the call.
    pub struct_size: usize,
    /// The instruction set in use: "portable", "avx2", "avx512", "neon" or "simd128". It is never freed.
    pub isa: *const c_char,
    /// CPUs that the process may use.
    pub cores: usize,
    /// Bytes of the first-level data cache.
    pub l1d: usize,
    /// Bytes of the second-level cache.
    pub l2: usize,
    /// Bytes of the third-level cache; 0 where there is none.
    pub l3: usize,
}

// SAFETY: repr(C), its size first, all numbers and raw addresses.
unsafe impl Versioned for qkv_cpu_info {
    const NAME: &'static str = "info";
}

/// The name of an instruction set for C.
fn isa_name(isa: Isa) -> &'static CStr {
    match isa.kind().name() {
        "portable" => c"portable",
        "avx2" => c"avx2",
        "avx512" => c"avx512",
        "neon" => c"neon",
        "simd128" => c"simd128",
        _ => c"unknown",
    }
}

/// Tells what qkv runs on. QKV_ERROR_ISA where the environment variable QKV_ISA asks for what cannot be used.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qkv_cpu_info_get(info: *mut qkv_cpu_info) -> qkv_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let given = unsafe { crate::versioned::versioned(info.cast_const(), false) }?;
        let caches = CacheInfo::get();
        let told = qkv_cpu_info {
            struct_size: given.struct_size,
            isa: isa_name(Isa::active()?).as_ptr(),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            l1d: caches.l1d,
            l2: caches.l2,
            l3: caches.l3,
        };
        // Only as much as the caller's struct has.
        let bytes = given.struct_size.min(size_of::<qkv_cpu_info>());
        // SAFETY: the struct is there, with as many bytes as it says, and apart from `told`.
        unsafe { core::ptr::from_ref(&told).cast::<u8>().copy_to_nonoverlapping(info.cast(), bytes) };
        Ok(())
    })
}
