//! x86-64 instruction sets beyond the SSE2 that every such CPU has (that one is [`crate::Portable`]'s).

mod avx2;
mod avx512;

pub use avx2::Avx2;
pub use avx512::Avx512;
