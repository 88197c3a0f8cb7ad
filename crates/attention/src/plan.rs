//! Who does which part: block sizes and the list of tasks, plain data decided from shapes alone.
//!
//! A task is (batch, key/value head, range of query rows), where the rows of one key/value head are those of all query
//! heads of its group, the group running fastest: row r is position r / group of the group's head r % group. So grouped
//! heads share the keys and values that a task reads, and a causal task ends where its positions end.
//!
//! The plan does not depend on the number of threads, and the key blocks lie on a grid that begins at key 0 and depends
//! on the head dims alone; a row of the result therefore has the same bits for any number of threads and in any batch.

use core::fmt;
use core::ops::Range;

use qkv_gemm::KernelShape;
use qkv_simd::Isa;

use crate::Causal;
use crate::mask::Positional;

/// Sizes of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Batch.
    pub batch: usize,
    /// Query heads.
    pub query_heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Query length.
    pub query_len: usize,
    /// Key length.
    pub key_len: usize,
    /// Dim of a query and of a key.
    pub key_dim: usize,
    /// Dim of a value and of an output row.
    pub value_dim: usize,
}

impl Shape {
    /// Query heads per key/value head.
    #[must_use]
    pub fn group(&self) -> usize {
        self.query_heads / self.kv_heads
    }

    /// Useful floating-point operations: 2 (dk + dv) for each score, of all keys or of those that a causal mask leaves.
    #[must_use]
    pub fn flops(&self, causal: Option<Causal>) -> f64 {
        let (rows, keys) = (self.query_len as f64, self.key_len as f64);
        // Row i sees clamp(i + 1 + offset, 0, keys) of them; `upto(x)` is the sum of clamp(t, 0, keys) for t <= x.
        let upto = |x: f64| {
            let ramp = x.clamp(0.0, keys);
            ramp * (ramp + 1.0) / 2.0 + (x - keys).max(0.0) * keys
        };
        let per_head = match self.mask(causal).causal_offset {
            None => rows * keys,
            Some(offset) => upto(rows + offset as f64) - upto(offset as f64),
        };
        let heads = self.batch as f64 * self.query_heads as f64;
        per_head * heads * 2.0 * (self.key_dim as f64 + self.value_dim as f64)
    }

    pub(crate) fn mask(&self, causal: Option<Causal>) -> Positional {
        Positional {
            key_len: self.key_len,
            causal_offset: causal.map(|c| c.offset(self.query_len, self.key_len)),
        }
    }
}

/// One piece of work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Task {
    pub(crate) batch: usize,
    pub(crate) kv_head: usize,
    /// Rows of the group, see the module's text.
    pub(crate) rows: Range<usize>,
}

/// Keys in a block. A block's scores, for one strip of queries, are read and written three times and should stay in L1
/// beside the strip's queries: 96 x 16 x 4 = 6 KiB. Larger blocks rescale the output less often, smaller ones leave
/// more of L1 to the values. Sweep on Zen 4 in docs/TUNING.md.
const KEY_BLOCK: usize = tuned(option_env!("QKV_TUNE_KEY_BLOCK"), 128);

/// Most rows of a task. The task reads all keys and values once per strip, from L2 after the first strip, so more rows
/// mean less traffic from L3 and memory; their packed queries and outputs, 2 x 96 x 64 x 4 = 48 KiB at dim 64, leave
/// the rest of L2 to the block of keys and values.
const MAX_ROWS: usize = tuned(option_env!("QKV_TUNE_MAX_ROWS"), 96);

/// Scratch that the rows of one task may take (queries and outputs) before their number is cut: 512 KiB.
const MAX_ROW_VALUES: usize = 128 << 10;

/// Tasks that a call should have before its rows are cut finer for the threads' sake.
const ENOUGH_TASKS: usize = 32;

/// The size of the parts when `total` is cut into as few as possible of at most `most`: even shares, in whole `grain`s,
/// rather than a short last part.
fn even_share(total: usize, most: usize, grain: usize) -> usize {
    let parts = total.div_ceil(most).max(1);
    total.div_ceil(parts).next_multiple_of(grain).max(grain)
}

/// A number that a sweep (scripts/tune.py) may override when it compiles.
const fn tuned(given: Option<&str>, usual: usize) -> usize {
    match given {
        None => usual,
        Some(digits) => match usize::from_str_radix(digits, 10) {
            Ok(number) => number,
            Err(_) => panic!("a QKV_TUNE_ variable is not a number"),
        },
    }
}

/// How a call is carried out. `Display` prints it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    pub(crate) shape: Shape,
    pub(crate) kernel: KernelShape,
    pub(crate) key_block: usize,
    pub(crate) rows_per_task: usize,
    pub(crate) tasks_per_head: usize,
    longest_first: bool,
    isa: &'static str,
}

impl Plan {
    pub(crate) fn new(shape: Shape, causal: Option<Causal>, isa: Isa) -> Self {
        let kernel = KernelShape::of(isa);
        let rows = shape.group() * shape.query_len;
        let heads = shape.batch * shape.kv_heads;
        let by_memory = MAX_ROW_VALUES / (shape.key_dim + shape.value_dim).max(1);
        let by_tasks = (rows * heads).div_ceil(ENOUGH_TASKS);
        let most = MAX_ROWS.min(by_memory).min(by_tasks).next_multiple_of(kernel.nr).max(kernel.nr);
        let rows_per_task = even_share(rows, most, kernel.nr);
        Self {
            shape,
            kernel,
            key_block: even_share(shape.key_len, KEY_BLOCK, kernel.mr),
            rows_per_task,
            tasks_per_head: rows.div_ceil(rows_per_task),
            longest_first: causal.is_some(),
            isa: isa.kind().name(),
        }
    }

    /// Number of tasks.
    #[must_use]
    pub fn tasks(&self) -> usize {
        self.shape.batch * self.shape.kv_heads * self.tasks_per_head
    }

    /// Tasks of one head are neighbours, so that its keys and values are still in the shared cache; under a causal
    /// mask the last rows, which see most, come first, so that the list ends with short tasks.
    pub(crate) fn task(&self, index: usize) -> Task {
        let (head, part) = (index / self.tasks_per_head, index % self.tasks_per_head);
        let part = if self.longest_first { self.tasks_per_head - 1 - part } else { part };
        let first = part * self.rows_per_task;
        let last = (first + self.rows_per_task).min(self.shape.group() * self.shape.query_len);
        Task { batch: head / self.shape.kv_heads, kv_head: head % self.shape.kv_heads, rows: first..last }
    }

    /// Strips of NR rows in a task.
    pub(crate) fn strips(&self) -> usize {
        self.rows_per_task / self.kernel.nr
    }

    /// Bytes of scratch that each worker uses; it does not depend on the lengths.
    ///
    /// `4 (rows (dk + dv + 2) + key_block NR + key_block dv' )` with dv' the padded value dim, rows at most
    /// 96 and at most 2^17 / (dk + dv), but at least NR.
    #[must_use]
    pub fn scratch_bytes(&self) -> usize {
        crate::prefill::Layout::new(self).total * size_of::<f32>()
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "prefill on {}: tile {}x{}, {} tasks of {} rows, key blocks of {}, {} bytes of scratch per worker",
            self.isa,
            self.kernel.mr,
            self.kernel.nr,
            self.tasks(),
            self.rows_per_task,
            self.key_block,
            self.scratch_bytes()
        )
    }
}
