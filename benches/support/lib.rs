//! What the benches of qkv share: sizes and their operations, random inputs, time, and the limits of the machine.
//!
//! Two kinds of program stand on it. The criterion groups (`cargo bench -p qkv-benches`) put qkv beside its peers, for
//! a look at many sizes. `measure` (`cargo run --release -p qkv-benches --bin measure -- matrix`) holds qkv against
//! the limit of the machine, measured again before every figure, for the figures that are recorded; it also answers
//! scripts/gemm_peers.py and scripts/attention_peers.py, which time libraries that are not in Rust. docs/TUNING.md says
//! how to run all of it.
//!
//! - `shapes.rs`: what is measured, and how many operations it takes.
//! - `workload.rs`: inputs, outputs, and the call between them.
//! - `timing.rs`: how long a call takes.
//! - `machine.rs`: what the machine is, and what it can do at this moment.
//! - `turn.rs`: a workload and its limit, measured together.

mod machine;
mod shapes;
mod timing;
mod turn;
mod workload;

pub use machine::{Environment, clock_hz, flops_per_cycle, fma_peak, read_bandwidth, use_threads};
pub use shapes::{ATTENTION, AttentionShape, GEMM_SKINNY, GEMM_SQUARE, GemmShape};
pub use timing::{median, quartiles, ratio_of_two, seconds_per_call};
pub use turn::{Lengths, Limit, Turn};
pub use workload::{
    AttentionInput, Call, GemmInput, Random, Workload, check_close, prepare_attention, prepare_product,
    product, spec_of,
};
