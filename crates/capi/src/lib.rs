//! libqkv: attention on CPUs for C and every language that calls C.
//!
//! The header `include/qkv.h` is made from this crate by cbindgen; `docs/C.md` has a complete program. The crate translates
//! and computes nothing: descriptors become views (`region.rs`, `views.rs`), structs that grow are read field by field
//! (`versioned.rs`, `options.rs`), handles are looked up (`handles.rs`), errors become codes with a message per thread, and
//! no panic crosses the border (`status.rs`).
//!
//! # Safety of every function
//! A pointer may be NULL, misaligned, or a handle of the wrong kind, and sizes and strides may be anything: that is refused
//! with a status. What cannot be told from an address the caller vouches for: that the memory behind a pointer that is not
//! NULL is there, has the described extent, is initialised where it is read, and is not written by others during the call.

#![allow(non_camel_case_types, reason = "types are named as in the header")]
#![allow(rustdoc::broken_intra_doc_links, reason = "comments are the header's, where brackets are indices")]
#![allow(clippy::missing_safety_doc, reason = "said once above, for all functions and in the header")]

mod attention;
mod cache;
mod gemm;
mod handles;
mod lists;
mod options;
mod paged;
mod paged_decode;
mod plan;
mod region;
mod rotary;
mod status;
mod threads;
mod types;
mod versioned;
mod views;

pub use attention::*;
pub use cache::*;
pub use gemm::*;
pub use lists::*;
pub use options::*;
pub use paged::*;
pub use paged_decode::*;
pub use plan::*;
pub use rotary::*;
pub use status::*;
pub use threads::*;
pub use types::*;
