//! Fused attention for [candle](candle_core) tensors on the CPU.
//!
//! ```
//! use candle_core::{Device, Tensor};
//! use qkv_candle::{Causal, Options, attention};
//!
//! // (batch, heads, length, head dim); eight query heads share two key/value heads.
//! let q = Tensor::randn(0f32, 1.0, (1, 8, 16, 64), &Device::Cpu)?;
//! let k = Tensor::randn(0f32, 1.0, (1, 2, 16, 64), &Device::Cpu)?;
//! let v = Tensor::randn(0f32, 1.0, (1, 2, 16, 64), &Device::Cpu)?;
//! let out = attention(&q, &k, &v, &Options::new().with_causal(Causal::BottomRight))?;
//! assert_eq!(out.dims(), [1, 8, 16, 64]);
//! # Ok::<(), candle_core::Error>(())
//! ```
//!
//! # What is where
//! - [`attention`], [`attention_with_lse`] and [`Options`]: everything that the operator can do.
//! - [`flash_attn`], [`flash_attn_varlen`], [`run_flash_attn_cpu`]: candle-nn's CPU flash attention, argument by argument.
//! - [`sdpa`]: candle-nn's `ops::sdpa`, which has no CPU version there; it stands for `softmax(q k^T scale + mask) v` as models
//!   write it out.
//!
//! # Meanings
//! Tensors of f32, f16 and bf16 are read where they lie, whatever their strides on batch, heads and length (transposed, narrowed,
//! broadcast); only a head dim whose values do not lie one after the other is copied. Everything is computed in f32 and rounded
//! once to the type of the output, which is that of the queries. Query head h reads key/value head h / (q heads / kv heads), so
//! keys and values need not be repeated. A query that sees no key gives 0.
//!
//! Every refusal is a [`candle_core::Error`] that names the argument, what came and what was expected. There is no backward pass:
//! a call on tensors that need a gradient goes forward, and `backward()` through it is an error, never a gradient that is
//! missing.

mod flash;
mod op;
mod options;
mod sdpa;
mod view;

use candle_core::{DType, Result, Tensor};

pub use flash::{flash_attn, flash_attn_varlen, run_flash_attn_cpu};
pub use options::{Axes, Options};
pub use qkv::{Causal, Window};
pub use sdpa::sdpa;

use op::{Attention, Lse, LseSlot};

/// Attention: softmax(scale q k^T + what `options` says) v.
///
/// With [`Axes::Bhsd`], `query` is (batch, query heads, query length, key dim), `key` (batch, kv heads, kv length, key dim),
/// `value` (batch, kv heads, kv length, value dim) and the result (batch, query heads, query length, value dim), contiguous, in
/// `query`'s type; with [`Axes::Bshd`] heads and length change places in all four.
///
/// # Errors
/// Where shapes do not fit each other or the options do not fit them; for other types than f32, f16 and bf16; on other
/// devices.
pub fn attention(query: &Tensor, key: &Tensor, value: &Tensor, options: &Options) -> Result<Tensor> {
    let call = Call { out_axes: options.axes, ..Call::default() };
    Ok(call.run([query, key, value], options)?.0)
}

/// [`attention`] together with its log-sum-exp: the natural log of the sum of exponentials of each query's visible scores and
/// its sink, f32, (batch, query heads, query length) with either order of axes; -infinity for a query that sees nothing.
///
/// # Errors
/// As [`attention`].
pub fn attention_with_lse(
    query: &Tensor,
    key: &Tensor,
    value: &Tensor,
    options: &Options,
) -> Result<(Tensor, Tensor)> {
    let slot = LseSlot::default();
    let call = Call { out_axes: options.axes, lse: Some(slot.clone()), ..Call::default() };
    let (out, [q, k, v]) = call.run([query, key, value], options)?;
    let lse = q.apply_op3(&k, &v, Lse(slot))?;
    Ok((out, lse))
}

/// A call of the operator beyond its tensors and options.
#[derive(Clone, Default)]
pub(crate) struct Call {
    /// The order of the output's axes.
    pub(crate) out_axes: Axes,
    /// The type of the output, that of the queries if it is not said.
    pub(crate) out_dtype: Option<DType>,
    /// Where packed sequences begin and end: sums of query and of key lengths.
    pub(crate) packed: Option<[Vec<usize>; 2]>,
    /// Where the log-sum-exp is left, if it is asked for.
    pub(crate) lse: Option<LseSlot>,
}

impl Call {
    /// Checks the tensors, brings their axes into the order (batch, heads, length, dim), and applies the operator; also gives
    /// back its three inputs.
    pub(crate) fn run(self, inputs: [&Tensor; 3], options: &Options) -> Result<(Tensor, [Tensor; 3])> {
        for (argument, tensor) in ["query", "key", "value"].into_iter().zip(inputs) {
            view::check(argument, tensor, 4)?;
        }
        let ordered = |argument: &str, tensor: &Tensor| {
            let tensor = match options.axes {
                Axes::Bhsd => tensor.clone(),
                Axes::Bshd => tensor.transpose(1, 2)?,
            };
            view::with_contiguous_rows(argument, tensor)
        };
        let [q, k, v] = inputs;
        let [q, k, v] = [ordered("query", q)?, ordered("key", k)?, ordered("value", v)?];
        let (batch, heads) = (q.dims()[0], q.dims()[1]);
        check_masks(options)?;
        check_kv_lengths(options, batch, k.dims()[2])?;
        let op = Attention {
            slopes: list("alibi_slopes", options.alibi_slopes.as_ref(), &[&[heads], &[batch, heads]])?,
            sinks: list("sinks", options.sinks.as_ref(), &[&[heads]])?,
            options: options.clone(),
            out_dtype: self.out_dtype.unwrap_or(q.dtype()),
            call: self,
        };
        let out = q.apply_op3(&k, &v, op)?;
        Ok((out, [q, k, v]))
    }
}

/// Refuses a mask and a bias that cannot be used.
fn check_masks(options: &Options) -> Result<()> {
    if let Some(mask) = &options.mask {
        view::check_on_cpu("mask", mask)?;
        view::check_no_gradient("mask", mask)?;
    }
    if let Some(bias) = &options.bias {
        view::check_kind(options.bias_name.0, bias)?;
        view::check_no_gradient(options.bias_name.0, bias)?;
    }
    Ok(())
}

/// Refuses key lengths that do not fit, by the name that they have here.
fn check_kv_lengths(options: &Options, batch: usize, kv_length: usize) -> Result<()> {
    if let Some(lengths) = &options.kv_lengths {
        if lengths.len() != batch {
            let given = lengths.len();
            let text = format_args!("{given} entries, expected one per batch, {batch}");
            return Err(view::refuse_argument("kv_lengths", text));
        }
        if let Some(given) = lengths.iter().find(|&&length| length > kv_length) {
            let text = format_args!("{given}, expected at most the kv length, {kv_length}");
            return Err(view::refuse_argument("kv_lengths", text));
        }
    }
    Ok(())
}

/// The values of a tensor that has one of these shapes.
fn list(argument: &str, tensor: Option<&Tensor>, shapes: &[&[usize]]) -> Result<Option<Vec<f32>>> {
    let Some(tensor) = tensor else { return Ok(None) };
    view::check_kind(argument, tensor)?;
    view::check_no_gradient(argument, tensor)?;
    let given = tensor.dims();
    if !shapes.contains(&given) {
        let expected: Vec<String> = shapes.iter().map(|shape| format!("{shape:?}")).collect();
        let text = format_args!("shape {given:?}, expected {}", expected.join(" or "));
        return Err(view::refuse_argument(argument, text));
    }
    Ok(Some(tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?))
}

/// The program of `docs/CANDLE.md`, compiled and run as a test.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/CANDLE.md")]
struct Page;
