//! The custom operator: candle's storages and layouts in, one call of qkv, a new storage out.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp3, DType, Layout, Result, Shape, Tensor};
use half::{bf16, f16};
use qkv::{
    AttentionError, AttentionSpec, DataMut, Outputs, Packed, TensorError, TensorMut, attention_into,
    attention_packed,
};

use crate::options::{Axes, Options};
use crate::{Call, view};

type Gradients = (Option<Tensor>, Option<Tensor>, Option<Tensor>);

/// What both operators say about gradients: none, and never silently.
fn no_backward() -> Result<Gradients> {
    Err(view::refuse(
        "the backward pass of attention is not supported; detach the tensors to go forward only",
    ))
}

/// One call, checked as far as it can be without the memory of queries, keys and values.
pub(crate) struct Attention {
    pub(crate) options: Options,
    pub(crate) slopes: Option<Vec<f32>>,
    pub(crate) sinks: Option<Vec<f32>>,
    pub(crate) out_dtype: DType,
    pub(crate) call: Call,
}

/// The log-sum-exp on its way from one operator to the other.
#[derive(Clone, Debug, Default)]
pub(crate) struct LseSlot(Arc<Mutex<Option<Vec<f32>>>>);

impl LseSlot {
    fn put(&self, lse: Vec<f32>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(lse);
    }

    fn take(&self) -> Option<Vec<f32>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl Attention {
    /// With the name that the bias has for the caller.
    fn renamed(&self, error: AttentionError) -> AttentionError {
        match error {
            AttentionError::DoesNotBroadcast { argument: "bias", given, expected } => {
                AttentionError::DoesNotBroadcast { argument: self.options.bias_name.0, given, expected }
            }
            error => error,
        }
    }
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "qkv-attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let q = view::data("query", q, q_layout)?;
        let k = view::data("key", k, k_layout)?;
        let v = view::data("value", v, v_layout)?;

        let mask = self.options.mask.as_ref().map(Tensor::storage_and_layout);
        let bias = self.options.bias.as_ref().map(Tensor::storage_and_layout);
        let mut copied_mask = Vec::new();
        let mut spec = AttentionSpec::new();
        if let Some((storage, layout)) = &mask {
            let bytes = view::on_cpu("mask", storage)?;
            spec.mask = Some(view::mask("mask", bytes, layout, &mut copied_mask)?);
        }
        if let Some((storage, layout)) = &bias {
            let name = self.options.bias_name.0;
            spec.bias = Some(view::bias(name, view::on_cpu(name, storage)?, layout)?);
        }
        spec.scale = self.options.scale;
        spec.softcap = self.options.softcap;
        spec.causal = self.options.causal;
        spec.window = self.options.window;
        spec.alibi_slopes = self.slopes.as_deref();
        spec.sinks = self.sinks.as_deref();
        spec.key_lengths = self.options.kv_lengths.as_deref();

        let [batch, heads, length, _] = q.shape();
        let shape = [batch, heads, length, v.shape()[3]];
        let mut lse = match &self.call.lse {
            Some(_) => Some(zeros("lse", [batch, heads, length, 1], 0.0)?),
            None => None,
        };
        let run = |out: DataMut<'_>| {
            let outputs = Outputs::new(out);
            let outputs = match &mut lse {
                Some(lse) => outputs.with_lse(lse),
                None => outputs,
            };
            match &self.call.packed {
                None => attention_into(q, k, v, &spec, outputs),
                Some([query_ends, key_ends]) => {
                    attention_packed(q, k, v, Packed { query_ends, key_ends }, &spec, outputs)
                }
            }
            .map_err(|error| view::refuse(self.renamed(error)))
        };
        let storage = match self.out_dtype {
            DType::F16 => CpuStorage::F16(filled(shape, self.call.out_axes, f16::ZERO, run)?),
            DType::BF16 => CpuStorage::BF16(filled(shape, self.call.out_axes, bf16::ZERO, run)?),
            // The only other type that passes the checks.
            _ => CpuStorage::F32(filled(shape, self.call.out_axes, 0.0f32, run)?),
        };
        if let (Some(slot), Some(lse)) = (&self.call.lse, lse) {
            slot.put(lse);
        }
        Ok((storage, Shape::from(in_order(shape, self.call.out_axes).to_vec())))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Gradients> {
        no_backward()
    }
}

/// The sizes of (batch, heads, length, dim) in another order.
fn in_order([batch, heads, length, dim]: [usize; 4], axes: Axes) -> [usize; 4] {
    match axes {
        Axes::Bhsd => [batch, heads, length, dim],
        Axes::Bshd => [batch, length, heads, dim],
    }
}

/// Memory for `shape`, or the refusal where there is none.
fn zeros<T: Clone>(argument: &str, shape: [usize; 4], zero: T) -> Result<Vec<T>> {
    view::check_memory(argument, &shape, size_of::<T>())?;
    Ok(vec![zero; shape.iter().product()])
}

/// A new buffer, filled by `run` through a view as (batch, heads, length, dim).
fn filled<T: Clone>(
    shape: [usize; 4],
    axes: Axes,
    zero: T,
    run: impl FnOnce(DataMut<'_>) -> Result<()>,
) -> Result<Vec<T>>
where
    for<'a> DataMut<'a>: From<TensorMut<'a, T>>,
{
    let mut out = zeros("output", shape, zero)?;
    let view: core::result::Result<TensorMut<'_, T>, TensorError> = match axes {
        Axes::Bhsd => TensorMut::from_slice(&mut out, shape),
        Axes::Bshd => TensorMut::from_slice_bshd(&mut out, shape),
    };
    run(view.map_err(|error| view::refuse_argument("output", error))?.into())?;
    Ok(out)
}

/// The second output of [`Attention`]: an operator of the same three tensors, so that a gradient through it is refused too.
pub(crate) struct Lse(pub(crate) LseSlot);

impl CustomOp3 for Lse {
    fn name(&self) -> &'static str {
        "qkv-attention-lse"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        q_layout: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let lse = self.0.take().ok_or_else(|| view::refuse("lse: taken twice"))?;
        let shape = q_layout.dims()[..3].to_vec();
        Ok((CpuStorage::F32(lse), Shape::from(shape)))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Gradients> {
        no_backward()
    }
}
