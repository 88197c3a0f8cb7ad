//! Fused attention: one streaming pass over tiles of scores, no score matrix.
//!
//! [`attention`] is the way in; [`AttentionSpec`] says what is asked beyond the tensors, [`rule`] is for a caller's own
//! rule for scores, [`merge`] joins results over different keys, and [`mod@reference`] computes the same by the book.
//! docs/ARCHITECTURE.md follows one call through the files.

mod ahead;
mod block_mask;
mod block_rows;
pub mod cache;
mod cascade;
mod check;
mod error;
mod factor;
mod few_ahead;
mod few_rows;
mod few_scores;
mod few_sums;
mod finish;
mod fold;
mod forward;
mod hidden;
mod interval;
mod kv_rows;
mod layout;
pub mod merge;
#[cfg(feature = "ndarray")]
pub mod ndarray;
mod next_task;
mod online_softmax;
mod packed;
mod packed_scores;
mod panels;
mod parts;
mod plan;
mod prefill;
mod products;
pub mod reference;
pub mod rotary;
mod row_runs;
pub mod rule;
mod runs;
mod score_ops;
mod shape;
mod spec;
mod storage;
mod strip;
mod tensor;
mod weights;

pub use block_mask::BlockMask;
pub use cascade::{KeysValues, attention_cascade};
pub use error::{Argument, AttentionError, TensorError};
pub use forward::{
    Explanation, Outputs, attention, attention_into, attention_with_lse, attention_with_rule, explain,
};
pub use packed::{Packed, attention_packed, attention_paged, check_paged};
pub use plan::{BlockCounts, Plan};
pub use shape::Shape;
pub use spec::{AttentionSpec, Bias, Causal, QueryRotary, T5Bias, Window};
pub use storage::{Data, DataMut, Int8Ref, PagedRef};
pub use tensor::{Broadcast, HalfKind, Tensor, TensorMut, TensorRef};
pub use weights::{Selection, attention_weights};
