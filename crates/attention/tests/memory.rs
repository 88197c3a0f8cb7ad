//! The score matrix does not exist: what a call allocates, counted by the allocator, does not grow with the lengths.
//!
//! The counter sees every thread of the process, so the test that reads it is the only one here.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use qkv_attention::{AttentionSpec, Broadcast, Causal, Outputs, Tensor, TensorRef, attention_into, explain};

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
    let scratch = explain(q.view(), q.view(), q.view(), &spec).unwrap().plan.scratch_bytes();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
    pool.install(|| {
        let before = LIVE.load(Ordering::SeqCst);
        PEAK.store(before, Ordering::SeqCst);
        let outputs = Outputs::new(out.view_mut());
        attention_into(q.view(), q.view(), q.view(), &spec, outputs).unwrap();
        (PEAK.load(Ordering::SeqCst) - before, scratch)
    })
}

/// Bytes that a call with a key padding mask (B, 1, 1, S) takes beyond the scratch that its threads already have.
fn extra_bytes_of_a_mask() -> usize {
    let (batch, length) = (64, 8192);
    // The keys and values of one batch for all, by stride 0; few queries, for the test's time.
    let data: Vec<f32> = (0..length * 8).map(|i| (i % 13) as f32 * 0.1).collect();
    let strides = [0, 0, 8, 1];
    let k = TensorRef::from_slice_strided(&data, 0, [batch, 1, length, 8], strides).unwrap();
    let q = TensorRef::from_slice_strided(&data, 0, [batch, 1, 2, 8], strides).unwrap();
    let bits: Vec<bool> = (0..batch * length).map(|i| i % 7 != 0).collect();
    let mask = Broadcast::from_slice(&bits, [batch, 1, 1, length]).unwrap();
    let mut out = Tensor::zeros([batch, 1, 2, 8]).unwrap();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
    pool.install(|| {
        let mut peak = |spec: &AttentionSpec<'_>| {
            let before = LIVE.load(Ordering::SeqCst);
            PEAK.store(before, Ordering::SeqCst);
            attention_into(q, k, k, spec, Outputs::new(out.view_mut())).unwrap();
            PEAK.load(Ordering::SeqCst) - before
        };
        // Until both threads have their scratch, which they keep.
        for _ in 0..10 {
            peak(&AttentionSpec::new());
        }
        peak(&AttentionSpec::new().with_mask(mask))
    })
}

/// Bytes that a decoding step takes with many query heads over one, whose keys are cut into parts.
fn extra_bytes_of_parts() -> usize {
    let (batch, heads, length, dk, dv) = (31, 32, 32768, 16, 512);
    // One key and one value for all places, by stride 0.
    let data = vec![0.1; dv];
    let kv = |dim| TensorRef::from_slice_strided(&data, 0, [batch, 1, length, dim], [0, 0, 0, 1]).unwrap();
    let q = TensorRef::from_slice_strided(&data, 0, [batch, heads, 1, dk], [0, 0, 0, 1]).unwrap();
    let mut out = Tensor::zeros([batch, heads, 1, dv]).unwrap();
    let before = LIVE.load(Ordering::SeqCst);
    PEAK.store(before, Ordering::SeqCst);
    let outputs = Outputs::new(out.view_mut());
    attention_into(q, kv(dk), kv(dv), &AttentionSpec::new(), outputs).unwrap();
    PEAK.load(Ordering::SeqCst) - before
}

#[test]
fn scratch_is_fixed() {
    let parts = extra_bytes_of_parts();
    println!("parts of 31 x 32 heads over one, dim 512: {parts} bytes");
    assert!(parts < 64 << 20, "{parts} bytes");
    let mask = extra_bytes_of_a_mask();
    println!("with a mask of 64 x 8192: {mask} bytes beyond the scratch");
    assert!(mask <= 4096, "{mask} bytes");
    for length in [1024, 4096, 16384] {
        let (extra, scratch) = extra_bytes(length);
        // Two workers' scratch, and what a new pool's threads take for themselves (17 KiB each); the scores would be 4 MiB
        // and more.
        println!("length {length}: {extra} bytes at the peak, {scratch} of scratch per worker by the plan");
        assert!(scratch < 2 << 20);
        assert!(extra <= 2 * scratch + (64 << 10), "length {length}: {extra} bytes, scratch {scratch}");
    }
}
