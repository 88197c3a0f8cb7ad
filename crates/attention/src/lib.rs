//! attention
mod error;
mod forward;
mod hidden;
mod mask;
mod online_softmax;
mod parallel;
mod plan;
mod prefill;
pub mod reference;
mod row_tiles;
mod spec;
mod strip;
mod tensor;

pub use error::{Argument, AttentionError, TensorError};
pub use forward::{Outputs, attention, attention_into, attention_with_lse, explain};
pub use plan::{Plan, Shape};
pub use spec::{AttentionSpec, Causal};
pub use tensor::{Tensor, TensorMut, TensorRef};
