//! Who does which part: block sizes and the list of tasks, plain data decided from shapes and the machine.
//!
//! A task is (batch, key/value head, range of query rows), where the rows of one key/value head are those of all query
//! heads of its group, the group running fastest: row r is position r / group of the group's head r % group. So grouped
//! heads share the keys and values that a task reads, and a causal task ends where its positions end.
//!
//! The plan does not depend on the number of threads (only tasks on the machine's cores), and the key blocks lie on a
//! grid that begins at key 0 and depends on the key length alone; a row of the result therefore has the same bits for any
//! number of threads and in any batch.

use core::fmt;
use core::ops::Range;

use qkv_gemm::parallel::cores;
use qkv_gemm::{CacheInfo, KernelShape};
use qkv_simd::Isa;

use crate::few_ahead::EAGER_L1;
use crate::few_rows::{FEW_BLOCK, MOST_ROWS};
use crate::interval::{self, Segment};
use crate::kv_rows::KvRows;
use crate::online_softmax::SUM_CHAINS;
use crate::parts::{ENOUGH_UNITS, Shared, part_keys, parts};
use crate::runs::Runs;
use crate::strip::StripRows;
use crate::{AttentionSpec, Causal};

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
    /// Query heads per key/value head; 0 where there is none.
    #[must_use]
    pub fn group(&self) -> usize {
        self.query_heads.checked_div(self.kv_heads).unwrap_or(0)
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
        let per_head = match causal.map(|causal| causal.offset(self.query_len, self.key_len) as f64) {
            None => rows * keys,
            Some(offset) => upto(rows + offset) - upto(offset),
        };
        let heads = self.batch as f64 * self.query_heads as f64;
        per_head * heads * 2.0 * (self.key_dim as f64 + self.value_dim as f64)
    }
}

/// Which rows of the tensors are sequences.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Sequences {
    /// One per batch.
    Batches {
        /// Their key lengths, where they are not all the tensor's.
        key_lengths: Option<Vec<usize>>,
    },
    /// One after the other in batch 0: the segment of each, and the number of the first task of it.
    Packed(Vec<(Segment, usize)>),
}

/// One piece of work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Task {
    pub(crate) segment: Segment,
    pub(crate) kv_head: usize,
    /// Rows of the group, see the module's text.
    pub(crate) rows: Range<usize>,
    /// Parts of the keys, see parts.rs.
    pub(crate) parts: Range<usize>,
    /// Number of the (sequence, key/value head), and of its first slot, where parts are tasks of their own.
    pub(crate) unit: usize,
    pub(crate) first_slot: usize,
}

/// Keys in a block. A block's scores, for one strip of queries, are read and written three times and should stay in L1
/// beside the strip's queries: 128 x 16 x 4 = 8 KiB, with AVX-512 16. Larger blocks rescale the output less often, smaller ones leave
/// more of L1 to the values. How to sweep: docs/TUNING.md.
pub(crate) const KEY_BLOCK: usize = tuned(option_env!("QKV_TUNE_KEY_BLOCK"), 128);

/// Most rows of a task. The task reads all keys and values once per strip, from L2 after the first strip, so more rows
/// mean less traffic from L3 and memory; their packed queries and outputs, 2 x 192 x 64 x 4 = 96 KiB at dim 64, leave
/// the rest of L2 to the block of keys and values. 96 rows: the same on a Zen 4, on a Zen 5 1 % slower at S 2048 to 4096 and S 512, 3 %
/// at batch 8, S 128, and 3 % where keys and values are widened.
const MAX_ROWS: usize = tuned(option_env!("QKV_TUNE_MAX_ROWS"), 192);

/// Scratch that the rows of one task may take (queries and outputs) before their number is cut: 512 KiB.
const MAX_ROW_VALUES: usize = 128 << 10;

/// Values of queries and outputs from which on they are asked for ahead of time: 1 MiB, the second cache of two small cores or of
/// one large one. Below it asking is in vain, and costs a call of 12 heads and S 32 a tenth of its time.
const COLD: usize = 256 << 10;

/// Keys and values from which on they are asked for where a head's first task reads them: 16 MiB, half of the last cache of two
/// cores, which queries and outputs share. Batch 8, 12 heads, S 128 (6 MiB) lost 1 % by asking, 64 packed sequences
/// (100 MiB) gained 3 % (Zen 5).
const FAR: usize = 4 << 20;

/// Values that all slots of parts together may take: 32 MiB, half of what a call may take in all.
const MAX_SLOT_VALUES: usize = 8 << 20;

/// Rows are cut finer, for the threads' sake, until a call has so many tasks, or four for each core.
const ENOUGH_TASKS: usize = 32;
const TASKS_PER_CORE: usize = 4;

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

/// Keys per block for a sequence of this length. The grid begins at key 0 and does not depend on anything else, so
/// that every mask cuts the sums of a row at the same keys; a sequence of up to two blocks is cut evenly.
pub(crate) fn key_block(key_len: usize) -> usize {
    if key_len <= 2 * KEY_BLOCK { even_share(key_len, KEY_BLOCK, SUM_CHAINS) } else { KEY_BLOCK }
}

/// How a call is carried out. `Display` prints it.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    pub(crate) shape: Shape,
    pub(crate) kernel: KernelShape,
    pub(crate) rows_per_task: usize,
    pub(crate) sequences: Sequences,
    tasks: usize,
    longest_first: bool,
    pub(crate) has_panels: bool,
    /// Whether queries and outputs are too large to be still in a cache.
    pub(crate) is_cold: bool,
    /// Whether keys and values are too large to be still in any cache.
    is_far: bool,
    /// Whether keys fall out of sight as queries go on, so that each strip of rows sees some that the one before did not and
    /// that may lie in no near cache; and whether that is worth asking for them.
    pub(crate) slides: bool,
    /// Whether f32 is asked for ahead in order for one and two query rows as well: [`EAGER_L1`].
    pub(crate) eager: bool,
    /// Whether blocks of keys and of values are copied: widened, or gathered from pages.
    pub(crate) copies: [bool; 2],
    /// Whether keys may be cut into parts, and whether these are tasks of their own.
    has_parts: bool,
    splits: bool,
    /// Most parts of a sequence, and parts of a task where tasks have parts.
    most_parts: usize,
    parts_per_task: usize,
    pub(crate) lanes: usize,
    /// Whether any sequence has few rows.
    pub(crate) any_few_rows: bool,
    isa: &'static str,
}

impl Plan {
    pub(crate) fn new(
        shape: Shape,
        spec: &AttentionSpec<'_>,
        sequences: Sequences,
        isa: Isa,
        [k, v]: [&KvRows<'_>; 2],
    ) -> Self {
        let kernel = KernelShape::of(isa);
        let group = shape.group();
        let (rows, count) = match &sequences {
            Sequences::Batches { .. } => (group * shape.query_len, shape.batch),
            Sequences::Packed(all) => {
                (all.iter().map(|(s, _)| group * s.query_len).max().unwrap_or(0), all.len())
            }
        };
        let all_rows = match &sequences {
            Sequences::Batches { .. } => rows.saturating_mul(count),
            Sequences::Packed(_) => group * shape.query_len,
        };
        let by_memory = MAX_ROW_VALUES / (shape.key_dim + shape.value_dim).max(1);
        let by_tasks =
            all_rows.saturating_mul(shape.kv_heads).div_ceil(ENOUGH_TASKS.max(TASKS_PER_CORE * cores()));
        let most = MAX_ROWS.min(by_memory).min(by_tasks).next_multiple_of(kernel.nr).max(kernel.nr);
        let rows_per_task = even_share(rows, most, kernel.nr);
        // Only the keys of a single strip of rows are cut.
        let is_cut = |query_len: usize| group * query_len <= kernel.nr;
        let most_parts = match &sequences {
            Sequences::Batches { .. } if !is_cut(shape.query_len) => 1,
            // Not those of the longest: a longer sequence may have larger and fewer parts.
            Sequences::Batches { key_lengths: Some(lengths) } => {
                lengths.iter().map(|&length| parts(length)).max().unwrap_or(1)
            }
            Sequences::Batches { key_lengths: None } => parts(shape.key_len),
            Sequences::Packed(all) => {
                let cut = all.iter().filter(|(s, _)| is_cut(s.query_len));
                cut.map(|(s, _)| parts(s.key_len)).max().unwrap_or(1)
            }
        };
        let units = count * shape.kv_heads;
        let is_cold = all_rows.saturating_mul(shape.kv_heads * (shape.key_dim + shape.value_dim)) > COLD;
        let copies = [k.is_copied(), v.is_copied()];
        let leaves = spec.window.is_some_and(|window| window.left.is_some()) || spec.documents.is_some();
        let plan = Self {
            shape,
            kernel,
            rows_per_task,
            sequences,
            tasks: 0,
            longest_first: spec.causal.is_some(),
            has_panels: crate::panels::has_bias(spec),
            is_cold,
            slides: leaves && is_cold && copies == [false; 2],
            eager: CacheInfo::get().l1d >= EAGER_L1,
            is_far: shape.batch.saturating_mul(shape.kv_heads).saturating_mul(shape.key_len)
                > FAR / (shape.key_dim + shape.value_dim).max(1),
            copies,
            has_parts: true,
            splits: most_parts > 1 && units < ENOUGH_UNITS,
            most_parts,
            // No finer than for enough tasks: a task begins with rows that nothing has asked for.
            parts_per_task: (most_parts / ENOUGH_UNITS.div_ceil(units.max(1))).max(1),
            lanes: isa.lanes(),
            any_few_rows: true,
            isa: isa.kind().name(),
        };
        // Results of parts that are left for others to merge have a bound; past it a task takes all parts of its head.
        let slots = units.saturating_mul(most_parts).saturating_mul(plan.slot());
        let plan = Self { splits: plan.splits && slots <= MAX_SLOT_VALUES, ..plan };
        let any_few_rows = match &plan.sequences {
            Sequences::Batches { .. } => plan.has_few_rows(&plan.batch_segment(0, None)),
            Sequences::Packed(all) => all.iter().any(|(segment, _)| plan.has_few_rows(segment)),
        };
        Self { any_few_rows, ..plan }.count_tasks()
    }

    /// The plan for a second look at weights: rows are not cut by keys.
    pub(crate) fn for_inspection(self) -> Self {
        Self { has_parts: false, splits: false, ..self }.count_tasks()
    }

    /// Counts the tasks, and numbers the first of each packed sequence.
    fn count_tasks(self) -> Self {
        let mut sequences = self.sequences.clone();
        let tasks = match &mut sequences {
            Sequences::Batches { .. } => self.shape.batch * self.tasks_of(&self.batch_segment(0, None)),
            Sequences::Packed(all) => {
                let mut tasks = 0;
                for (segment, first_task) in all {
                    *first_task = tasks;
                    tasks += self.tasks_of(segment);
                }
                tasks
            }
        };
        Self { sequences, tasks, ..self }
    }

    /// Tasks of a sequence.
    fn tasks_of(&self, segment: &Segment) -> usize {
        let rows = self.shape.group() * segment.query_len;
        if rows == 0 {
            return 0;
        }
        self.shape.kv_heads * rows.div_ceil(self.rows_per_task) * self.cuts(segment)
    }

    /// Whether a sequence has so few query rows that they are not computed by tiles.
    pub(crate) fn has_few_rows(&self, segment: &Segment) -> bool {
        self.has_parts && self.shape.group() * segment.query_len <= self.lanes.min(MOST_ROWS)
    }

    /// Parts that the keys of a sequence are cut into, and keys of a part: more than one for a single strip of rows only.
    pub(crate) fn parts(&self, segment: &Segment) -> (usize, usize) {
        if self.has_parts && self.shape.group() * segment.query_len <= self.kernel.nr {
            (parts(segment.key_len), part_keys(segment.key_len))
        } else {
            (1, usize::MAX)
        }
    }

    /// Tasks per strip of a sequence, each with some parts of the keys. For all batches the same, so that tasks can be counted;
    /// those beyond a batch's own keys have nothing to do.
    fn cuts(&self, segment: &Segment) -> usize {
        if !self.splits || self.shape.group() * segment.query_len > self.kernel.nr {
            return 1;
        }
        match &self.sequences {
            Sequences::Batches { .. } => self.most_parts.div_ceil(self.parts_per_task),
            Sequences::Packed(_) => self.parts(segment).0.div_ceil(self.parts_per_task),
        }
    }

    /// Values of a part's slot: per row a maximum, a sum and an output.
    pub(crate) fn slot(&self) -> usize {
        let rows = self.shape.group() * self.shape.query_len;
        self.kernel.nr.min(rows) * (self.shape.value_dim + 2)
    }

    /// Whether workers need slots of their own.
    pub(crate) fn has_own_slots(&self) -> bool {
        self.has_parts && self.most_parts > 1 && !self.splits
    }

    /// The slots that tasks share.
    pub(crate) fn shared(&self) -> Option<Shared> {
        let sequences = match &self.sequences {
            Sequences::Batches { .. } => self.shape.batch,
            Sequences::Packed(all) => all.len(),
        };
        self.splits.then(|| Shared::new(sequences * self.shape.kv_heads, self.most_parts, self.slot()))
    }

    /// Number of tasks.
    #[must_use]
    pub fn tasks(&self) -> usize {
        self.tasks
    }

    /// Tasks that are to be begun in their order, the longest first: those of a head, where they are as many for each.
    pub(crate) fn group(&self) -> usize {
        let segment = match &self.sequences {
            Sequences::Batches { .. } => self.batch_segment(0, None),
            Sequences::Packed(all) if all.len() == 1 => all[0].0,
            Sequences::Packed(_) => return 1,
        };
        if self.longest_first { self.tasks_of(&segment) / self.shape.kv_heads.max(1) } else { 1 }
    }

    /// Tasks of one head are neighbours, so that its keys and values are still in a cache; under a causal mask the last rows,
    /// which see most, come first, so that every head, and so a worker's share of them, ends with short tasks.
    pub(crate) fn task(&self, index: usize) -> Task {
        let (shape, group) = (&self.shape, self.shape.group());
        let (segment, index) = match &self.sequences {
            Sequences::Batches { key_lengths } => {
                let per_batch = self.tasks_of(&self.batch_segment(0, None));
                let batch = index / per_batch;
                (self.batch_segment(batch, key_lengths.as_deref()), index % per_batch)
            }
            Sequences::Packed(all) => {
                // The last of those that begin here or before; empty ones share a number with their successor.
                let (segment, first) = all[all.partition_point(|&(_, first)| first <= index) - 1];
                (segment, index - first)
            }
        };
        let rows = group * segment.query_len;
        let (parts, _) = self.parts(&segment);
        let by_keys = self.cuts(&segment);
        let cuts = rows.div_ceil(self.rows_per_task) * by_keys;
        let (kv_head, cut) = (index / cuts, index % cuts);
        let unit = segment.index * shape.kv_heads + kv_head;
        let first_slot = unit * self.most_parts;
        if by_keys > 1 {
            let first = cut * self.parts_per_task;
            let parts = first.min(parts)..(first + self.parts_per_task).min(parts);
            return Task { segment, kv_head, rows: 0..rows, parts, unit, first_slot };
        }
        let cut = if self.longest_first { cuts - 1 - cut } else { cut };
        let first = cut * self.rows_per_task;
        let rows = first..(first + self.rows_per_task).min(rows);
        Task { segment, kv_head, rows, parts: 0..parts, unit, first_slot }
    }

    /// Whether keys may lie in no cache where a task reads them: they are far, it is the first in the list of its sequence and
    /// key/value head, and they are not copied. Where queries are not asked for, keys are not.
    pub(crate) fn reads_first(&self, task: &Task) -> bool {
        if !self.is_far || !self.is_cold || self.copies[0] {
            return false;
        }
        let rows = self.shape.group() * task.segment.query_len;
        if self.longest_first { task.rows.end == rows } else { task.rows.start == 0 }
    }

    fn batch_segment(&self, batch: usize, key_lengths: Option<&[usize]>) -> Segment {
        Segment {
            batch,
            index: batch,
            first_query: 0,
            query_len: self.shape.query_len,
            first_key: 0,
            key_len: key_lengths.map_or(self.shape.key_len, |lengths| lengths[batch]),
        }
    }

    /// The strips of a task.
    pub(crate) fn strips_of<'t>(&'t self, task: &'t Task) -> impl Iterator<Item = StripRows> + use<'t> {
        let nr = self.kernel.nr;
        let cut = move |first: usize| first..task.rows.end.min(first + nr);
        task.rows.clone().step_by(nr).map(move |first| self.rows_of(task, cut(first)))
    }

    /// Some rows of a task, not none.
    #[inline(always)]
    pub(crate) fn rows_of(&self, task: &Task, rows: Range<usize>) -> StripRows {
        let Task { segment, kv_head, .. } = *task;
        StripRows { segment, kv_head, group: self.shape.group(), first: rows.start, count: rows.len() }
    }

    /// Strips of NR rows in the largest task.
    pub(crate) fn strips(&self) -> usize {
        self.rows_per_task / self.kernel.nr
    }

    /// Bytes of scratch that each worker uses; not more for a longer sequence than for a long one.
    ///
    /// About `4 (rows (dk + dv + 2) + 128 NR + 128 dv + NR max(dk, dv, 128))`, `4 x 128 NR` more with a bias, and
    /// `4 x 128 (max(dk, dv) + dv)` more where keys or values are copied (16 or 8 bits, pages); rows at most 192 and at most
    /// 2^17 / (dk + dv), but at least NR. Where a sequence has few query rows, blocks have 256 keys instead of 128, and a task of
    /// several parts keeps up to 32 results. Results of parts that are tasks of their own are the call's, not a worker's.
    #[must_use]
    pub fn scratch_bytes(&self) -> usize {
        crate::layout::Layout::new(self).total * size_of::<f32>()
    }

    /// How many (strip, key block) pairs are computed whole, partly or not at all, by the masks that are arithmetic:
    /// intervals and block tables. (A boolean mask may let more be skipped when its values are read.)
    pub(crate) fn count_blocks(&self, spec: &AttentionSpec<'_>) -> BlockCounts {
        let mut counts = BlockCounts::default();
        for index in 0..self.tasks {
            let task = self.task(index);
            if task.parts.start > 0 || task.parts.is_empty() {
                continue;
            }
            let few = self.has_few_rows(&task.segment);
            let block = if few { FEW_BLOCK } else { key_block(task.segment.key_len) };
            for rows in self.strips_of(&task) {
                let visible = interval::visible(spec, &task.segment, rows.queries());
                for begin in (0..task.segment.key_len).step_by(block) {
                    let keys = begin..(begin + block).min(task.segment.key_len);
                    let inside = crate::spec::intersect(&keys, &visible.any);
                    let runs = Runs::new(spec, &rows, &inside);
                    if runs.hull().is_empty() {
                        counts.skipped += 1;
                    } else if visible.is_whole(&keys) && runs.is_whole(&keys) {
                        counts.whole += 1;
                    } else {
                        counts.partial += 1;
                    }
                }
            }
        }
        counts
    }
}

/// How much of the score matrix is touched, in pairs of a strip of NR rows and a block of keys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockCounts {
    /// Computed without a mask.
    pub whole: usize,
    /// Computed with a mask, or in part.
    pub partial: usize,
    /// Not computed.
    pub skipped: usize,
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let few = self.has_few_rows(&self.batch_segment(0, None));
        write!(
            f,
            "{} on {}: tile {}x{}, {} tasks of up to {} rows, {} parts of keys, key blocks of {}, {} bytes of scratch per \
             worker",
            if few { "decode" } else { "prefill" },
            self.isa,
            self.kernel.mr,
            self.kernel.nr,
            self.tasks,
            self.rows_per_task,
            self.parts(&self.batch_segment(0, None)).0,
            if few { FEW_BLOCK } else { key_block(self.shape.key_len) },
            self.scratch_bytes()
        )
    }
}
