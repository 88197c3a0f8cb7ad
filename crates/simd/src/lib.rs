//! Vectors for qkv: one trait, one file per instruction set, chosen at run time.
//!
//! Everything above this crate is written once, generic over [`Simd`]. A value of a type that implements
//! [`Simd`] is a *token*: a zero-sized proof that the CPU running the program has that instruction set. Tokens come
//! from [`Isa::active`] (what this process uses) or [`Isa::available`] (all that this CPU has), and code enters the
//! world of an instruction set by [`Isa::dispatch`], which calls [`Simd::vectorize`]:
//!
//! ```
//! use qkv_simd::{Isa, Simd, SimdOp};
//!
//! /// The sum of a slice, a vector at a time.
//! struct Sum<'a>(&'a [f32]);
//!
//! impl SimdOp for Sum<'_> {
//!     type Output = f32;
//!     #[inline(always)]
//!     fn eval<S: Simd>(self, s: S) -> f32 {
//!         let mut acc = s.zero();
//!         let mut chunks = self.0.chunks_exact(S::LANES);
//!         for chunk in &mut chunks {
//!             acc = s.add(acc, s.load(chunk));
//!         }
//!         s.reduce_add(acc) + chunks.remainder().iter().sum::<f32>()
//!     }
//! }
//!
//! let values: Vec<f32> = (0..100).map(|i| i as f32).collect();
//! assert_eq!(Isa::active()?.dispatch(Sum(&values)), 4950.0);
//! # Ok::<(), qkv_simd::IsaError>(())
//! ```
//!
//! # The rule of inlining
//! A vector operation is one instruction only where it is inlined into a function that carries the instruction set's
//! `#[target_feature]`. So: every method of a token and every [`SimdOp::eval`] is `#[inline(always)]`; the only
//! function with `#[target_feature]` is the trampoline inside [`Simd::vectorize`]; and no closure crosses a
//! `vectorize` (a closure that another crate calls is compiled without the features). A task that another thread
//! runs calls `dispatch` again inside the task.
//!
//! # What is where
//! - [`Simd`], [`SimdOp`]: `simd.rs`, the contract.
//! - [`Isa`], [`IsaKind`]: `isa.rs`, detection and the `QKV_ISA` override.
//! - `portable.rs`: four lanes on the `wide` crate (SSE2, NEON or simd128 as compiled, else scalar code).
//! - `x86/avx2.rs`: eight lanes, AVX2 + FMA + F16C.
//! - `x86/avx512.rs`: sixteen lanes, AVX-512 F + BW + DQ + VL.
//! - [`math`]: exp2, exp, tanh, erf, with their maximal errors.
//!
//! # What fits later without touching a kernel
//! An instruction set is one file that implements [`Simd`] and one variant of [`Isa`]: NEON has 4 lanes and 32 registers.

mod isa;
pub mod math;
mod portable;
mod simd;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use isa::{Isa, IsaError, IsaKind};
pub use portable::Portable;
pub use simd::{Simd, SimdOp};
#[cfg(target_arch = "x86_64")]
pub use x86::{Avx2, Avx512};
