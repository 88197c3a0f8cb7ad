//! Who does which part: block sizes and the list of tasks, plain data decided from shapes and the machine.
//!
//! A task is (batch, key/value head, range of query rows), where the rows of one key/value head are those of all query
//! heads of its group, the group running fastest: row r is position r / group of the group's head r % group. So grouped
//! heads share the keys and values that a task reads, and a causal task ends where its positions end.
//!
//! The plan does not depend on the number of threads (only tasks on the machine's cores), the key blocks lie on a
//! grid that begins at key 0 and depends on the key length alone, and which kernel computes a sequence depends on its query length; a
//! row of the result therefore has the same bits for any number of threads, in any group and in any batch.

use core::fmt;
use core::ops::Range;

use qkv_gemm::parallel::cores;
use qkv_gemm::{CacheInfo, KernelShape};
use qkv_simd::Isa;

use crate::few_ahead::EAGER_L1;
use crate::few_rows::{FEW_BLOCK, most_few_rows};
use crate::interval::{self, Segment};
use crate::kv_rows::KvRows;
use crate::online_softmax::SUM_CHAINS;
use crate::parts::{ENOUGH_UNITS, Shared, part_keys, parts};
use crate::runs::Runs;
use crate::strip::StripRows;
use crate::{AttentionSpec, Shape};

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
    /// Number of the (sequence, key/value head, rows), and of its first slot, where parts are tasks of their own.
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

/// Most rows of a task whose keys are cut into several parts, of which each has a slot for all of them.
const CUT_ROWS: usize = 64;

/// Most strips of a task: a worker remembers some things of each in the bits of a word.
const MAX_STRIPS: usize = 64;

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
    rows_per_task: usize,
    /// The same for sequences whose keys are cut into parts.
    cut_rows: usize,
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
    /// Most tasks that the rows of a key/value head are cut into, of a sequence whose keys are cut.
    most_cuts: usize,
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
        // Only the keys of short queries are cut; whether they are, is not to depend on the heads that are computed together.
        let is_cut = |query_len: usize| query_len <= kernel.nr;
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
        let cut_rows = if most_parts > 1 { CUT_ROWS } else { MAX_STRIPS * most_few_rows(isa.lanes()) };
        let cut_rows = cut_rows.min(rows_per_task);
        let most_cuts = rows.min(group.saturating_mul(kernel.nr)).div_ceil(cut_rows).max(1);
        let units = count * shape.kv_heads * most_cuts;
        let is_cold = all_rows.saturating_mul(shape.kv_heads * (shape.key_dim + shape.value_dim)) > COLD;
        let copies = [k.is_copied(), v.is_copied()];
        let leaves = spec.window.is_some_and(|window| window.left.is_some()) || spec.documents.is_some();
        let plan = Self {
            shape,
            kernel,
            rows_per_task,
            cut_rows,
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
            most_cuts,
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
    fn count_tasks(mut self) -> Self {
        // Taken out meanwhile: there may be a million of them, not to be had twice.
        let none = match &self.sequences {
            Sequences::Batches { .. } => Sequences::Batches { key_lengths: None },
            Sequences::Packed(_) => Sequences::Packed(Vec::new()),
        };
        let mut sequences = core::mem::replace(&mut self.sequences, none);
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
        self.shape.kv_heads * rows.div_ceil(self.rows_per_task(segment)) * self.cuts(segment)
    }

    /// Most rows of a sequence's tasks.
    fn rows_per_task(&self, segment: &Segment) -> usize {
        if self.is_cut(segment) { self.cut_rows } else { self.rows_per_task }
    }

    /// Whether the keys of a sequence are cut into parts, of which there may be a single one.
    fn is_cut(&self, segment: &Segment) -> bool {
        self.has_parts && segment.query_len <= self.kernel.nr
    }

    /// Whether a sequence has so few queries that its rows are not computed by tiles. Like all that decides in which order numbers
    /// are added up, this depends on the lengths of a sequence alone, not on the heads of a group.
    pub(crate) fn has_few_rows(&self, segment: &Segment) -> bool {
        self.has_parts && segment.query_len <= most_few_rows(self.lanes)
    }

    /// Parts that the keys of a sequence are cut into, and keys of a part.
    pub(crate) fn parts(&self, segment: &Segment) -> (usize, usize) {
        if self.is_cut(segment) {
            (parts(segment.key_len), part_keys(segment.key_len))
        } else {
            (1, usize::MAX)
        }
    }

    /// Tasks for the same rows of a sequence, each with some parts of the keys. For all batches the same, so that tasks can be
    /// counted; those beyond a batch's own keys have nothing to do.
    fn cuts(&self, segment: &Segment) -> usize {
        if !self.splits || !self.is_cut(segment) {
            return 1;
        }
        match &self.sequences {
            Sequences::Batches { .. } => self.most_parts.div_ceil(self.parts_per_task),
            Sequences::Packed(_) => self.parts(segment).0.div_ceil(self.parts_per_task),
        }
    }

    /// Values of a part's slot: per row of a task a maximum, a sum and an output.
    pub(crate) fn slot(&self) -> usize {
        let rows = self.shape.group() * self.shape.query_len;
        self.cut_rows.min(rows) * (self.shape.value_dim + 2)
    }

    /// The slots of all parts of a task's rows.
    pub(crate) fn slots(&self) -> usize {
        self.most_parts * self.slot()
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
        let units = sequences * self.shape.kv_heads * self.most_cuts;
        self.splits.then(|| Shared::new(units, self.most_parts, self.slot()))
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
        let (rows, rows_per_task) = (group * segment.query_len, self.rows_per_task(&segment));
        let (parts, _) = self.parts(&segment);
        let (by_rows, by_keys) = (rows.div_ceil(rows_per_task), self.cuts(&segment));
        let (kv_head, cut) = (index / (by_rows * by_keys), index % (by_rows * by_keys));
        // All rows of a part are neighbours, for the sake of its keys.
        let (first_part, cut) = (cut / by_rows * self.parts_per_task, cut % by_rows);
        let cut = if self.longest_first { by_rows - 1 - cut } else { cut };
        let unit = (segment.index * shape.kv_heads + kv_head) * self.most_cuts + cut;
        let first_slot = unit * self.most_parts;
        let first = cut * rows_per_task;
        let rows = first..(first + rows_per_task).min(rows);
        let parts = match by_keys {
            1 => 0..parts,
            _ => first_part.min(parts)..(first_part + self.parts_per_task).min(parts),
        };
        Task { segment, kv_head, rows, parts, unit, first_slot }
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
        let most = if self.has_few_rows(&task.segment) { most_few_rows(self.lanes) } else { self.kernel.nr };
        let cut = move |first: usize| first..task.rows.end.min(first + most);
        task.rows.clone().step_by(most).map(move |first| self.rows_of(task, cut(first)))
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

    /// Strips in the largest task of few queries, where there are such.
    pub(crate) fn few_strips(&self) -> usize {
        if self.any_few_rows { self.cut_rows.div_ceil(most_few_rows(self.lanes)) } else { 0 }
    }

    /// Bytes of scratch that each worker uses; not more for a longer sequence than for a long one.
    ///
    /// About `4 (rows (dk + dv + 2) + 128 NR + 128 dv + NR max(dk, dv, 128))`, `4 x 128 NR` more with a bias, and
    /// `4 x 128 (max(dk, dv) + dv)` more where keys or values are copied (16 or 8 bits, pages); rows at most 192 and at most
    /// 2^17 / (dk + dv), but at least NR. Where a sequence has few queries, blocks have 256 keys instead of 128, and a task of
    /// several parts, of at most 64 rows, keeps up to 32 results of each. Results of parts that are tasks of their own are the call's, not a worker's.
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

/// How much of the score matrix is touched, in pairs of a strip of rows (NR, or up to 8 of few queries) and a block of keys.
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
            self.rows_per_task(&self.batch_segment(0, None)),
            self.parts(&self.batch_segment(0, None)).0,
            if few { FEW_BLOCK } else { key_block(self.shape.key_len) },
            self.scratch_bytes()
        )
    }
}
