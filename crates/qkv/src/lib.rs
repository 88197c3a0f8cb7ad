//! Attention on CPUs in one fused pass.
//!
//! ```
//! use qkv::{AttentionSpec, Causal, Tensor, attention};
//!
//! // (batch, heads, length, head dim)
//! let q = Tensor::from_fn([1, 2, 5, 8], |[_, h, i, d]| (h + i * d) as f32 * 0.01)?;
//! let k = Tensor::from_fn([1, 2, 5, 8], |[_, h, i, d]| (h * i + d) as f32 * 0.02)?;
//! let v = Tensor::from_fn([1, 2, 5, 8], |[_, _, i, d]| (i * 8 + d) as f32)?;
//!
//! let spec = AttentionSpec::new().with_causal(Causal::TopLeft);
//! let out = attention(q.view(), k.view(), v.view(), &spec)?;
//!
//! assert_eq!(out.shape(), [1, 2, 5, 8]);
//! // The first query sees the first key alone, so its output is the first value.
//! assert_eq!(out.data()[..8], v.data()[..8]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! The crate collects what the parts offer: attention and its tensors from `qkv-attention`, matrix products in [`gemm`],
//! instruction sets in [`simd`].

#[cfg(feature = "ndarray")]
pub mod ndarray;
pub mod probe;

pub use half::{bf16, f16};
pub use qkv_attention::{
    Argument, AttentionError, AttentionSpec, Bias, BlockCounts, BlockMask, Broadcast, Causal, Data, DataMut,
    Explanation, HalfKind, Int8Ref, KeysValues, Outputs, Packed, PagedRef, Plan, QueryRotary, Selection,
    Shape, T5Bias, Tensor, TensorError, TensorMut, TensorRef, Window, attention, attention_cascade,
    attention_into, attention_packed, attention_paged, attention_weights, attention_with_lse,
    attention_with_rule, cache, check_paged, explain, merge, reference, rotary, rule,
};
pub use qkv_gemm as gemm;
pub use qkv_simd as simd;

/// The programs of `docs/`, compiled and run as tests.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/RUST.md")]
struct RustPage;

#[cfg(all(doctest, feature = "ndarray"))]
#[doc = include_str!("../../../docs/NDARRAY.md")]
struct NdarrayPage;
