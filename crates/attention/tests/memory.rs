//! The score matrix does not exist: what a call allocates, counted by the allocator, does not grow with the lengths.
//!
//! One test in a binary of its own: the counter sees every thread of the process.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use qkv_attention::{AttentionSpec, Causal, Outputs, Tensor, attention_into, explain};

struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Ordering::SeqCst) + layout.size();
        PEAK.fetch_max(live, Ordering::SeqCst);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::SeqCst);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes that a call takes at its peak beyond its inputs and outputs, on threads that have not computed before.
fn extra_bytes(length: usize) -> (usize, usize) {
    let shape = [1, 1, length, 64];
    let q = Tensor::from_fn(shape, |[_, _, i, d]| ((i * 7 + d) % 13) as f32 * 0.1).unwrap();
    let mut out = Tensor::zeros(shape).unwrap();
    let spec = AttentionSpec::new().with_causal(Causal::TopLeft);
    let scratch = explain(q.view(), q.view(), q.view(), &spec).unwrap().scratch_bytes();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
    pool.install(|| {
        let before = LIVE.load(Ordering::SeqCst);
        PEAK.store(before, Ordering::SeqCst);
        let outputs = Outputs { out: out.view_mut(), lse: None };
        attention_into(q.view(), q.view(), q.view(), &spec, outputs).unwrap();
        (PEAK.load(Ordering::SeqCst) - before, scratch)
    })
}

#[test]
fn scratch_is_fixed() {
    for length in [1024, 4096, 8192] {
        let (extra, scratch) = extra_bytes(length);
        // Two workers' scratch, and a few hundred bytes of rayon's.
        println!("length {length}: {extra} bytes at the peak, {scratch} of scratch per worker by the plan");
        assert!(scratch < 2 << 20);
        assert!(extra <= 2 * scratch + 4096, "length {length}: {extra} bytes, scratch {scratch}");
    }
}
