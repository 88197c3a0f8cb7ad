//! Memory: what a call takes on the heap, and what the machine has to give.
//!
//! The program's allocator counts ([`peak_during`] reads its high-water mark), because the point of attention without a
//! score matrix is a number of bytes and the program should show it, not claim it. And sizes from the command line are
//! compared with the memory that is there before anything is allocated ([`require`]): an allocation that fails ends a
//! Rust program by a signal, which is no answer to a typing error.

use peak_alloc::PeakAlloc;
use sysinfo::{CpuRefreshKind, MemoryRefreshKind, RefreshKind, System};

use crate::Failure;
use crate::args::ShapeArg;

/// The system's allocator, which counts the bytes in use and their maximum over all threads.
#[global_allocator]
static HEAP: PeakAlloc = PeakAlloc;

/// Runs `work` and answers with the most bytes that were in use on the heap during it, beyond those in use before.
///
/// Other threads count too, so nothing else may allocate meanwhile; the stacks of threads are not on the heap.
pub(crate) fn peak_during<R>(work: impl FnOnce() -> R) -> (R, usize) {
    HEAP.reset_peak_usage();
    let before = HEAP.current_usage();
    let result = work();
    (result, HEAP.peak_usage().saturating_sub(before))
}

/// Refuses work that needs more bytes than the machine can give; `what` needs them. Where the system does not say how
/// much that is, nothing is refused.
pub(crate) fn require(what: &str, bytes: f64) -> Result<(), Failure> {
    match Machine::available_memory() {
        Some(available) if bytes > available as f64 => Err(Failure::new(format!(
            "{what} needs {} of memory, but {} is available",
            bytes_text(bytes),
            bytes_text(available as f64)
        ))),
        _ => Ok(()),
    }
}

/// Bytes of one call on tensors of this shape, as `bench` makes them: inputs, output, and the scratch of each thread.
///
/// In f64, which does not overflow. Sizes of 0 count as 1: empty tensors take no memory, but loops over their other
/// sizes do take time, and a batch of 2^60 empty sequences is a typing error as well.
pub(crate) fn call_bytes(shape: ShapeArg, kv_heads: usize) -> f64 {
    let [batch, heads, kv_heads, length, dim] =
        [shape.batch, shape.heads, kv_heads, shape.length, shape.dim].map(|size| size.max(1) as f64);
    let queries = batch * heads * length * dim;
    let keys = batch * kv_heads * length * dim;
    // Scratch per thread is a few hundred rows of the head dim: nothing for a usual one, decisive for an absurd one.
    let scratch = rayon::current_num_threads() as f64 * 512.0 * dim;
    4.0 * (2.0 * queries + 2.0 * keys + scratch)
}

/// Bytes that a comparison takes beside the inputs: the naive scores (the point of the comparison), the outputs of
/// qkv, of the naive and of the exact computation, and the exact scores of a few rows per thread.
pub(crate) fn comparison_bytes(queries: [usize; 4], key_len: usize, value_dim: usize) -> f64 {
    let [batch, heads, query_len, key_dim] = queries.map(|size| size.max(1) as f64);
    let (key_len, value_dim) = (key_len.max(1) as f64, value_dim.max(1) as f64);
    let threads = rayon::current_num_threads() as f64;
    let outputs = batch * heads * query_len * value_dim * (4.0 + 4.0 + 8.0);
    let scratch =
        threads * (512.0 * 4.0 * (key_dim + value_dim) + crate::accuracy::ROWS as f64 * key_len * 8.0);
    4.0 * query_len * key_len + outputs + scratch
}

/// Bytes as a person reads them: three digits, or less where less is exact, and a binary unit.
pub(crate) fn bytes_text(bytes: f64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut scaled = bytes;
    let mut unit = 0;
    while scaled >= 1000.0 && unit + 1 < UNITS.len() {
        scaled /= 1024.0;
        unit += 1;
    }
    match scaled {
        s if unit == 0 || (s.fract() == 0.0 && s < 1e6) => format!("{s:.0} {}", UNITS[unit]),
        s if s >= 1e6 => format!("{s:.1e} {}", UNITS[unit]),
        s if s >= 99.95 => format!("{s:.0} {}", UNITS[unit]),
        s if s >= 9.995 => format!("{s:.1} {}", UNITS[unit]),
        s => format!("{s:.2} {}", UNITS[unit]),
    }
}

/// What the system says about the machine. Any part may be unknown.
#[derive(Debug)]
pub(crate) struct Machine {
    /// The CPU's own name.
    pub(crate) cpu: Option<String>,
    /// Cores, without the second threads of each.
    pub(crate) cores: Option<usize>,
    /// CPUs that this process may use.
    pub(crate) cpus: usize,
    /// Bytes of main memory.
    pub(crate) memory: Option<u64>,
    /// Bytes that this process may still take.
    pub(crate) available: Option<u64>,
}

impl Machine {
    pub(crate) fn look() -> Self {
        let wanted = RefreshKind::nothing()
            .with_cpu(CpuRefreshKind::nothing())
            .with_memory(MemoryRefreshKind::nothing().with_ram());
        let system = System::new_with_specifics(wanted).ok();
        let cpu = system
            .as_ref()
            .and_then(|system| system.cpus().first())
            .map(|cpu| cpu.brand().trim().to_owned())
            .filter(|brand| !brand.is_empty());
        Self {
            cpu,
            cores: System::physical_core_count().ok(),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            memory: system.as_ref().map(System::total_memory).filter(|&bytes| bytes > 0),
            available: system.as_ref().and_then(free),
        }
    }

    fn available_memory() -> Option<u64> {
        let wanted = RefreshKind::nothing().with_memory(MemoryRefreshKind::nothing().with_ram());
        System::new_with_specifics(wanted).ok().as_ref().and_then(free)
    }
}

/// Bytes that this process may still take: of the machine's, and of its container's where there is a limit.
fn free(system: &System) -> Option<u64> {
    let machine = Some(system.available_memory()).filter(|&bytes| bytes > 0)?;
    // A container without a limit of its own reports the machine's memory or nothing.
    let container = system.cgroup_limits().map(|limits| limits.free_memory).filter(|&bytes| bytes > 0);
    Some(container.map_or(machine, |bytes| bytes.min(machine)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_have_three_digits_and_a_unit() {
        for (bytes, text) in [
            (0.0, "0 B"),
            (999.0, "999 B"),
            (1000.0, "0.98 KiB"),
            (1536.0, "1.50 KiB"),
            (16.0 * 1024.0 * 1024.0, "16 MiB"),
            (16.1 * 1024.0 * 1024.0, "16.1 MiB"),
            (250.0 * 1024.0, "250 KiB"),
            (1e30, "8.7e11 EiB"),
        ] {
            assert_eq!(bytes_text(bytes), text);
        }
    }

    #[test]
    fn absurd_sizes_are_refused_and_small_ones_are_not() {
        let absurd = ShapeArg { batch: 1, heads: 1, length: usize::MAX, dim: usize::MAX };
        let error = require("this", call_bytes(absurd, usize::MAX)).unwrap_err();
        assert!(error.to_string().starts_with("this needs "), "{error}");
        let small = ShapeArg { batch: 1, heads: 2, length: 16, dim: 8 };
        assert!(require("this", call_bytes(small, 2)).is_ok());
        assert!(require("this", comparison_bytes([1, 2, 16, 8], 16, 8)).is_ok());
    }

    #[test]
    fn the_machine_has_a_cpu() {
        let machine = Machine::look();
        assert!(machine.cpus >= 1);
        assert!(machine.memory.is_none_or(|memory| machine.available.is_none_or(|free| free <= memory)));
    }
}
