//! The way in: checks, then the plan, then the tasks.

use qkv_gemm::parallel::{Tasks, Threads, run_groups_by};
use qkv_gemm::with_tile;
use qkv_simd::Isa;

use crate::check::{check_axis, check_inputs, check_per_sequence, short_enough};
use crate::kv_rows::KvRows;
use crate::next_task::Taken;
use crate::plan::{BlockCounts, Plan, Sequences};
use crate::prefill::{Call, Prefill};
use crate::rule::{NoRule, ScoreRule};
use crate::score_ops::Units;
use crate::shape::Shape;
use crate::tensor::has_room;
use crate::{Argument, AttentionError, AttentionSpec, Data, DataMut, Tensor, TensorMut};

/// Where results go.
#[derive(Debug)]
pub struct Outputs<'a> {
    /// (batch, query heads, query length, value dim), any strides.
    pub out: DataMut<'a>,
    /// The natural log of the sum of exponentials of each query's visible scores and its sink, contiguous (batch, query
    /// heads, query length); -infinity for a query that sees no key and has no sink.
    pub lse: Option<&'a mut [f32]>,
    /// The largest of each query's visible scores and its sink, in the same shape.
    pub maxima: Option<&'a mut [f32]>,
}

impl<'a> Outputs<'a> {
    /// Only the output.
    #[must_use]
    pub fn new(out: impl Into<DataMut<'a>>) -> Self {
        Self { out: out.into(), lse: None, maxima: None }
    }

    /// And the log-sum-exp.
    #[must_use]
    pub fn with_lse(self, lse: &'a mut [f32]) -> Self {
        Self { lse: Some(lse), ..self }
    }

    /// And the row maxima.
    #[must_use]
    pub fn with_maxima(self, maxima: &'a mut [f32]) -> Self {
        Self { maxima: Some(maxima), ..self }
    }
}

/// Attention: softmax(scale q k^T + mask) v, into a new tensor (batch, query heads, query length, value dim).
///
/// q is (batch, query heads, query length, key dim), k (batch, kv heads, key length, key dim), v (batch, kv heads, key
/// length, value dim); query head h reads key/value head h / (query heads / kv heads). Empty batches and sequences are
/// valid. A query that sees no key gives 0.
///
/// # Errors
/// Where shapes do not fit each other, or the spec does not fit them.
pub fn attention<'a>(
    q: impl Into<Data<'a>>,
    k: impl Into<Data<'a>>,
    v: impl Into<Data<'a>>,
    spec: &AttentionSpec<'_>,
) -> Result<Tensor, AttentionError> {
    let (q, k, v) = (q.into(), k.into(), v.into());
    let mut out = new_output(&check_inputs(q.shape(), k.shape(), v.shape(), spec)?)?;
    attention_into(q, k, v, spec, Outputs::new(out.view_mut()))?;
    Ok(out)
}

/// [`attention`] together with its log-sum-exp, contiguous (batch, query heads, query length).
///
/// # Errors
/// As [`attention`].
pub fn attention_with_lse<'a>(
    q: impl Into<Data<'a>>,
    k: impl Into<Data<'a>>,
    v: impl Into<Data<'a>>,
    spec: &AttentionSpec<'_>,
) -> Result<(Tensor, Vec<f32>), AttentionError> {
    let (q, k, v) = (q.into(), k.into(), v.into());
    let shape = check_inputs(q.shape(), k.shape(), v.shape(), spec)?;
    let mut out = new_output(&shape)?;
    let rows = lse_shape(&shape).iter().product();
    if !has_room::<f32>(rows) {
        return Err(AttentionError::TooLarge { shape: output_shape(&shape) });
    }
    let mut lse = vec![0.0; rows];
    attention_into(q, k, v, spec, Outputs::new(out.view_mut()).with_lse(&mut lse))?;
    Ok((out, lse))
}

/// [`attention`] into the caller's memory.
///
/// Runs on the current rayon pool, small work on the calling thread, with what else of the pool is awake; the result does not
/// depend on it.
///
/// # Errors
/// As [`attention`], and where an output's shape is not that of the result. Nothing is written then.
pub fn attention_into<'a>(
    q: impl Into<Data<'a>>,
    k: impl Into<Data<'a>>,
    v: impl Into<Data<'a>>,
    spec: &AttentionSpec<'_>,
    outputs: Outputs<'_>,
) -> Result<(), AttentionError> {
    into_plain([q.into(), k.into(), v.into()], spec, outputs)
}

/// [`attention_into`], not generic, so that the kernels are compiled here and not again in every crate that calls it.
fn into_plain(
    [q, k, v]: [Data<'_>; 3],
    spec: &AttentionSpec<'_>,
    outputs: Outputs<'_>,
) -> Result<(), AttentionError> {
    let shape = check_inputs(q.shape(), k.shape(), v.shape(), spec)?;
    let sequences = batches(&shape, spec)?;
    run_plain(q, [KvRows::plain(k), KvRows::plain(v)], spec, outputs, (shape, sequences))
}

/// [`run`] without a rule, likewise.
pub(crate) fn run_plain(
    q: Data<'_>,
    rows: [KvRows<'_>; 2],
    spec: &AttentionSpec<'_>,
    outputs: Outputs<'_>,
    checked: (Shape, Sequences),
) -> Result<(), AttentionError> {
    run(q, rows, spec, NoRule, outputs, checked)
}

/// [`attention_into`] with a caller's own rule for scores; see [`crate::rule`].
///
/// # Errors
/// As [`attention_into`], and where a sequence is longer than 2^24.
pub fn attention_with_rule<'a, R: ScoreRule>(
    q: impl Into<Data<'a>>,
    k: impl Into<Data<'a>>,
    v: impl Into<Data<'a>>,
    spec: &AttentionSpec<'_>,
    rule: R,
    outputs: Outputs<'_>,
) -> Result<(), AttentionError> {
    let (q, k, v) = (q.into(), k.into(), v.into());
    let shape = check_inputs(q.shape(), k.shape(), v.shape(), spec)?;
    let sequences = batches(&shape, spec)?;
    run(q, [KvRows::plain(k), KvRows::plain(v)], spec, rule, outputs, (shape, sequences))
}

pub(crate) fn run<R: ScoreRule>(
    q: Data<'_>,
    [k, v]: [KvRows<'_>; 2],
    spec: &AttentionSpec<'_>,
    rule: R,
    outputs: Outputs<'_>,
    (shape, sequences): (Shape, Sequences),
) -> Result<(), AttentionError> {
    let (out, lse, maxima) = check_outputs(&shape, outputs)?;
    if R::ACTIVE {
        short_enough(&shape)?;
    }
    let isa = Isa::active()?;
    // Nothing to write: there may be any number of rows without dims.
    if out.shape().contains(&0) && lse.is_none() && maxima.is_none() {
        return Ok(());
    }
    let plan = Plan::new(shape, spec, sequences, isa, [&k, &v]);
    let shared = plan.shared();
    let units = Units::new(spec, shape.key_dim, R::ACTIVE);
    let call = Call { q, k, v, out, lse, maxima, weights: None, spec, rule, isa, units, plan, shared };
    let work = |tasks: &Tasks<'_>| {
        let take = || tasks.take().map(Taken::unasked);
        let mut next = take();
        while let Some(taken) = next {
            let task = call.plan.task(taken.index);
            let prefill = Prefill { call: &call, task, asked: taken.has_queries(), tasks: Some(tasks) };
            next = with_tile(isa, prefill).or_else(take);
        }
    };
    let tasks = call.plan.tasks();
    let threads = Threads::of(shape.flops(spec.causal), [SHARED_FLOPS, INLINE_FLOPS], tasks);
    run_groups_by(threads, tasks, call.plan.group(), work);
    Ok(())
}

/// What [`attention`] would do for these tensors, without doing it: the plan, and how much of the score matrix is
/// computed.
///
/// # Errors
/// As [`attention`].
pub fn explain<'a>(
    q: impl Into<Data<'a>>,
    k: impl Into<Data<'a>>,
    v: impl Into<Data<'a>>,
    spec: &AttentionSpec<'_>,
) -> Result<Explanation, AttentionError> {
    let (q, k, v) = (q.into(), k.into(), v.into());
    let shape = check_inputs(q.shape(), k.shape(), v.shape(), spec)?;
    let (k, v) = (KvRows::plain(k), KvRows::plain(v));
    let plan = Plan::new(shape, spec, batches(&shape, spec)?, Isa::active()?, [&k, &v]);
    let blocks = plan.count_blocks(spec);
    Ok(Explanation { plan, blocks })
}

/// What [`explain`] answers; `Display` prints it.
#[derive(Clone, Debug, PartialEq)]
pub struct Explanation {
    /// Kernel, block sizes, tasks, scratch.
    pub plan: Plan,
    /// Whole, partial and skipped blocks.
    pub blocks: BlockCounts,
}

impl core::fmt::Display for Explanation {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let BlockCounts { whole, partial, skipped } = self.blocks;
        write!(f, "{}; blocks: {whole} whole, {partial} partial, {skipped} skipped", self.plan)
    }
}

/// Below this much work another thread is not worth waking: about 15 microseconds of one core, a few times the cost of
/// a wake-up.
const INLINE_FLOPS: f64 = 1e6;

/// Below that, but not below this, a thread that is awake anyway is welcome: 2 microseconds of one core.
const SHARED_FLOPS: f64 = 1.25e5;

/// One sequence per batch.
pub(crate) fn batches(shape: &Shape, spec: &AttentionSpec<'_>) -> Result<Sequences, AttentionError> {
    check_per_sequence(shape, spec, shape.batch)?;
    Ok(Sequences::Batches { key_lengths: spec.key_lengths.map(<[usize]>::to_vec) })
}

fn output_shape(shape: &Shape) -> [usize; 4] {
    [shape.batch, shape.query_heads, shape.query_len, shape.value_dim]
}

fn lse_shape(shape: &Shape) -> [usize; 3] {
    [shape.batch, shape.query_heads, shape.query_len]
}

/// The output, LSE and maxima, if their shapes are those of the results.
pub(crate) fn check_outputs<'a>(
    shape: &Shape,
    outputs: Outputs<'a>,
) -> Result<(DataMut<'a>, Option<TensorMut<'a>>, Option<TensorMut<'a>>), AttentionError> {
    let Outputs { out, lse, maxima } = outputs;
    check_output(shape, &out)?;
    let lse = lse.map(|lse| per_row_view(shape, Argument::Lse, lse)).transpose()?;
    let maxima = maxima.map(|maxima| per_row_view(shape, Argument::Maxima, maxima)).transpose()?;
    Ok((out, lse, maxima))
}

pub(crate) fn check_output(shape: &Shape, out: &DataMut<'_>) -> Result<(), AttentionError> {
    let expected = output_shape(shape);
    let given = out.shape();
    let origins = [Argument::Query, Argument::Query, Argument::Query, Argument::Value];
    for (axis, name) in ["batch", "heads", "length", "head dim"].into_iter().enumerate() {
        check_axis(Argument::Output, name, given[axis], expected[axis], origins[axis])?;
    }
    Ok(())
}

fn new_output(shape: &Shape) -> Result<Tensor, AttentionError> {
    let shape = output_shape(shape);
    Tensor::zeros(shape).map_err(|_| AttentionError::TooLarge { shape })
}

fn per_row_view<'a>(
    shape: &Shape,
    argument: Argument,
    values: &'a mut [f32],
) -> Result<TensorMut<'a>, AttentionError> {
    let [batch, heads, length] = lse_shape(shape);
    // The output of this shape exists, or is empty because of its dim, so the product of the first two fits.
    let expected = batch.saturating_mul(heads).saturating_mul(length);
    let given = values.len();
    if given != expected {
        return Err(AttentionError::LseLength { argument, given, expected });
    }
    TensorMut::from_slice(values, [batch, heads, length, 1]).map_err(|_| AttentionError::LseLength {
        argument,
        given,
        expected,
    })
}
