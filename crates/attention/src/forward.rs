//! The way in: checks, then the plan, then the tasks.

use qkv_gemm::with_tile;
use qkv_simd::Isa;

use crate::parallel::for_each_task;
use crate::plan::{Plan, Shape};
use crate::prefill::{Call, Prefill};
use crate::{Argument, AttentionError, AttentionSpec, Tensor, TensorMut, TensorRef};

/// Where results go.
#[derive(Debug)]
pub struct Outputs<'a> {
    /// (batch, query heads, query length, value dim), any strides.
    pub out: TensorMut<'a>,
    /// The natural log of the sum of exponentials of each query's visible scores, contiguous (batch, query heads,
    /// query length); -infinity for a query that sees no key.
    pub lse: Option<&'a mut [f32]>,
}

/// Attention: softmax(scale q k^T + mask) v, into a new tensor (batch, query heads, query length, value dim).
///
/// q is (batch, query heads, query length, key dim), k (batch, kv heads, key length, key dim), v (batch, kv heads, key
/// length, value dim); query head h reads key/value head h / (query heads / kv heads). Empty batches and sequences are
/// valid. A query that sees no key gives 0.
///
/// # Errors
/// Where shapes do not fit each other or the scale is not finite.
pub fn attention(
    q: TensorRef<'_>,
    k: TensorRef<'_>,
    v: TensorRef<'_>,
    spec: &AttentionSpec,
) -> Result<Tensor, AttentionError> {
    let mut out = new_output(&check_inputs(q, k, v, spec)?)?;
    attention_into(q, k, v, spec, Outputs { out: out.view_mut(), lse: None })?;
    Ok(out)
}

/// [`attention`] together with its log-sum-exp, contiguous (batch, query heads, query length).
///
/// # Errors
/// As [`attention`].
pub fn attention_with_lse(
    q: TensorRef<'_>,
    k: TensorRef<'_>,
    v: TensorRef<'_>,
    spec: &AttentionSpec,
) -> Result<(Tensor, Vec<f32>), AttentionError> {
    let shape = check_inputs(q, k, v, spec)?;
    let mut out = new_output(&shape)?;
    let mut lse = vec![0.0; lse_shape(&shape).iter().product()];
    attention_into(q, k, v, spec, Outputs { out: out.view_mut(), lse: Some(&mut lse) })?;
    Ok((out, lse))
}

/// [`attention`] into the caller's memory.
///
/// Runs on the current rayon pool, small work on the calling thread alone; the result does not depend on it.
///
/// # Errors
/// As [`attention`], and where an output's shape is not that of the result. Nothing is written then.
pub fn attention_into(
    q: TensorRef<'_>,
    k: TensorRef<'_>,
    v: TensorRef<'_>,
    spec: &AttentionSpec,
    outputs: Outputs<'_>,
) -> Result<(), AttentionError> {
    let shape = check_inputs(q, k, v, spec)?;
    let Outputs { out, lse } = outputs;
    check_output(&shape, &out)?;
    let lse = lse.map(|lse| lse_view(&shape, lse)).transpose()?;
    let isa = Isa::active()?;
    let plan = Plan::new(shape, spec.causal, isa);
    let call = Call {
        q,
        k,
        v,
        out,
        lse,
        mask: shape.mask(spec.causal),
        scale: spec.scale_for(shape.key_dim) * core::f64::consts::LOG2_E,
        plan,
    };
    let inline = shape.flops(spec.causal) < INLINE_FLOPS;
    for_each_task(call.plan.tasks(), inline, |index| {
        with_tile(isa, Prefill { call: &call, task: call.plan.task(index) });
    });
    Ok(())
}

/// What [`attention`] would do for these tensors, without doing it.
///
/// # Errors
/// As [`attention`].
pub fn explain(
    q: TensorRef<'_>,
    k: TensorRef<'_>,
    v: TensorRef<'_>,
    spec: &AttentionSpec,
) -> Result<Plan, AttentionError> {
    Ok(Plan::new(check_inputs(q, k, v, spec)?, spec.causal, Isa::active()?))
}

/// Below this much work another thread is not worth waking: about 15 microseconds of one core, a few times the cost of
/// a wake-up.
const INLINE_FLOPS: f64 = 1e6;

/// Positions are counted in i64 and compared with offsets; this leaves room for their sums.
const MAX_LENGTH: usize = 1 << 48;

fn check_inputs(
    q: TensorRef<'_>,
    k: TensorRef<'_>,
    v: TensorRef<'_>,
    spec: &AttentionSpec,
) -> Result<Shape, AttentionError> {
    let [batch, query_heads, query_len, key_dim] = q.shape();
    let [_, kv_heads, key_len, value_dim] = [0, k.shape()[1], k.shape()[2], v.shape()[3]];
    let shape = Shape { batch, query_heads, kv_heads, query_len, key_len, key_dim, value_dim };

    let axes = ["batch", "heads", "length", "head dim"];
    let expected_of_key = [batch, kv_heads, key_len, key_dim];
    let expected_of_value = [batch, kv_heads, key_len, value_dim];
    for (axis, name) in axes.into_iter().enumerate() {
        check_axis(Argument::Key, name, k.shape()[axis], expected_of_key[axis], Argument::Query)?;
        let origin = if axis == 0 { Argument::Query } else { Argument::Key };
        check_axis(Argument::Value, name, v.shape()[axis], expected_of_value[axis], origin)?;
    }
    for (argument, axis, size) in [
        (Argument::Query, "heads", query_heads),
        (Argument::Key, "heads", kv_heads),
        (Argument::Query, "head dim", key_dim),
    ] {
        if size == 0 {
            return Err(AttentionError::ZeroSize { argument, axis });
        }
    }
    if query_heads % kv_heads != 0 {
        return Err(AttentionError::HeadsNotDivisible { query_heads, kv_heads });
    }
    for (argument, given) in [(Argument::Query, query_len), (Argument::Key, key_len)] {
        if given > MAX_LENGTH {
            return Err(AttentionError::TooLong { argument, given });
        }
    }
    match spec.scale {
        Some(given) if !given.is_finite() => Err(AttentionError::BadScale { given }),
        _ => Ok(shape),
    }
}

fn check_axis(
    argument: Argument,
    axis: &'static str,
    given: usize,
    expected: usize,
    because_of: Argument,
) -> Result<(), AttentionError> {
    if given == expected {
        Ok(())
    } else {
        Err(AttentionError::ShapeMismatch { argument, axis, given, expected, because_of })
    }
}

fn output_shape(shape: &Shape) -> [usize; 4] {
    [shape.batch, shape.query_heads, shape.query_len, shape.value_dim]
}

fn lse_shape(shape: &Shape) -> [usize; 3] {
    [shape.batch, shape.query_heads, shape.query_len]
}

fn check_output(shape: &Shape, out: &TensorMut<'_>) -> Result<(), AttentionError> {
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

fn lse_view<'a>(shape: &Shape, lse: &'a mut [f32]) -> Result<TensorMut<'a>, AttentionError> {
    let [batch, heads, length] = lse_shape(shape);
    // The output of this shape exists, or is empty because of its dim, so the product of the first two fits.
    let expected = batch.saturating_mul(heads).saturating_mul(length);
    let given = lse.len();
    if given != expected {
        return Err(AttentionError::LseLength { given, expected });
    }
    TensorMut::from_slice(lse, [batch, heads, length, 1])
        .map_err(|_| AttentionError::LseLength { given, expected })
}
