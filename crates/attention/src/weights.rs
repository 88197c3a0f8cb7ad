//! The attention weights themselves, for looking at: O(rows x keys), and only for the rows and heads that are asked for.
//!
//! The rows are computed twice: once for their maxima and sums, once more block by block for 2^(s - m) / l.

use core::ops::Range;

use qkv_gemm::parallel::run_tasks;
use qkv_gemm::with_tile;
use qkv_simd::math::ScaledExp2;
use qkv_simd::{Isa, Simd, SimdOp};

use crate::check::{MAX_LENGTH, check_inputs};
use crate::factor::Factor;
use crate::fold::BlockScores;
use crate::forward::batches;
use crate::kv_rows::KvRows;
use crate::online_softmax::reference;
use crate::plan::{Plan, Task};
use crate::prefill::{Call, Prefill, Worker};
use crate::rule::{NoRule, ScoreRule};
use crate::score_ops::Units;
use crate::{Argument, AttentionError, AttentionSpec, Data, DataMut, Tensor, TensorMut, TensorRef};

/// Which weights are wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selection {
    /// One batch.
    pub batch: usize,
    /// Query heads.
    pub heads: Range<usize>,
    /// Query indices.
    pub rows: Range<usize>,
}

/// Where they go: (1, selected heads, selected rows, key length).
pub(crate) struct SelectedWeights<'a> {
    selection: Selection,
    out: TensorMut<'a>,
}

/// The weights of the selected rows, (1, heads, rows, key length): what each query makes of each key, summing to 1, or
/// to less with a sink, or to 0 for a query that sees no key.
///
/// # Errors
/// Where the tensors or the spec do not fit each other, or the selection goes beyond them.
pub fn attention_weights<'a>(
    q: impl Into<Data<'a>>,
    k: impl Into<Data<'a>>,
    spec: &AttentionSpec<'_>,
    selection: Selection,
) -> Result<Tensor, AttentionError> {
    weights_of(q.into(), k.into(), spec, selection)
}

/// [`attention_weights`], not generic, so that the kernels are compiled here only.
fn weights_of(
    q: Data<'_>,
    k: Data<'_>,
    spec: &AttentionSpec<'_>,
    selection: Selection,
) -> Result<Tensor, AttentionError> {
    let [batch, kv_heads, key_len, _] = k.shape();
    // No values: the second product has nothing to do.
    let v = TensorRef::<f32>::from_slice(&[], [batch, kv_heads, key_len, 0]).map_err(|_| {
        AttentionError::TooLong { argument: Argument::Key, given: key_len, limit: MAX_LENGTH }
    })?;
    let v = Data::from(v);
    let shape = check_inputs(q.shape(), k.shape(), v.shape(), spec)?;
    for (argument, given, limit) in [
        ("selection.batch", selection.batch.saturating_add(1), shape.batch),
        ("selection.heads", selection.heads.end, shape.query_heads),
        ("selection.rows", selection.rows.end, shape.query_len),
    ] {
        if given > limit {
            return Err(AttentionError::Beyond { argument, index: 0, given, limit });
        }
    }
    let sizes = [1, selection.heads.len(), selection.rows.len(), key_len];
    let too_large = |_| AttentionError::TooLarge { shape: sizes };
    let mut weights = Tensor::zeros(sizes).map_err(too_large)?;
    let no_output = [shape.batch, shape.query_heads, shape.query_len, 0];
    let out = TensorMut::from_slice(&mut [], no_output).map_err(too_large)?;

    let isa = Isa::active()?;
    let (k, v) = (KvRows::plain(k), KvRows::plain(v));
    let plan = Plan::new(shape, spec, batches(&shape, spec)?, isa, [&k, &v]).for_inspection();
    let tasks = selected_tasks(&plan, &selection);
    let units = Units::new(spec, shape.key_dim, false);
    let selected = SelectedWeights { selection, out: weights.view_mut() };
    let call = Call {
        q,
        k,
        v,
        out: DataMut::F32(out),
        lse: None,
        maxima: None,
        weights: Some(selected),
        spec,
        rule: NoRule,
        isa,
        units,
        plan,
        shared: None,
    };
    run_tasks(tasks.len(), |numbers| {
        while let Some(index) = numbers.take() {
            with_tile(isa, Prefill { call: &call, task: tasks[index].clone(), asked: false, tasks: None });
        }
    });
    Ok(weights)
}

/// The plan's tasks with only the selected rows left in them.
fn selected_tasks(plan: &Plan, selection: &Selection) -> Vec<Task> {
    let group = plan.shape.group();
    let rows = selection.rows.start * group..selection.rows.end * group;
    (0..plan.tasks())
        .map(|index| plan.task(index))
        .filter(|task| {
            let heads = task.kv_head * group..(task.kv_head + 1) * group;
            task.segment.batch == selection.batch
                && !crate::spec::intersect(&heads, &selection.heads).is_empty()
        })
        .map(|task| Task { rows: crate::spec::intersect(&task.rows, &rows), ..task })
        .filter(|task| !task.rows.is_empty())
        .collect()
}

impl<S: Simd, R: ScoreRule, const MR: usize, const NV: usize, const FEW: bool>
    Worker<'_, '_, S, R, MR, NV, FEW>
{
    /// Stores a block's weights of the selected rows of a strip, whose state is final.
    #[inline(always)]
    pub(crate) fn store_weights(&mut self, strip: usize, block: Range<usize>) {
        let Some(BlockScores { keys, .. }) = self.s.vectorize(Again { worker: self, strip, block }) else {
            return;
        };
        let Some(SelectedWeights { selection, out }) = &self.call.weights else { return };
        let (s, rows) = (self.s, self.rows_of(strip));
        let (max, sum) = self.scratch.state[strip * 2 * Self::NR..][..2 * Self::NR].split_at(Self::NR);
        for (i, key) in keys.enumerate() {
            let weights = &mut self.scratch.scores[i * Self::NR..][..Self::NR];
            for at in (0..Self::NR).step_by(S::LANES) {
                let score = s.sub(s.load(&weights[at..]), reference(s, s.load(&max[at..])));
                let weight = ScaledExp2::new(s, self.call.units.to_log2).of(s, score);
                let inverse = Factor::inverse_sum(s, s.load(&sum[at..]));
                s.store(inverse.times(s, weight), &mut weights[at..]);
            }
            for (lane, &weight) in weights.iter().enumerate().take(rows.count) {
                let (head, query) = (rows.head(lane), rows.query(lane));
                if selection.heads.contains(&head) && selection.rows.contains(&query) {
                    let row = out.row_ptr(0, head - selection.heads.start, query - selection.rows.start);
                    // SAFETY: the row has `key_len` values and belongs to this task alone.
                    unsafe { *row.add(key) = weight };
                }
            }
        }
    }
}

/// [`Worker::block_scores`] a second time, in a function of its own: the kernel's copy is inlined where speed counts.
struct Again<'o, 'w, 'a, S, R, const MR: usize, const NV: usize, const FEW: bool> {
    worker: &'o mut Worker<'w, 'a, S, R, MR, NV, FEW>,
    strip: usize,
    block: Range<usize>,
}

impl<S: Simd, R: ScoreRule, const MR: usize, const NV: usize, const FEW: bool> SimdOp
    for Again<'_, '_, '_, S, R, MR, NV, FEW>
{
    type Output = Option<BlockScores<S::F32, NV>>;
    #[inline(always)]
    fn eval<Same: Simd>(self, _: Same) -> Self::Output {
        self.worker.block_scores(self.strip, self.block)
    }
}
