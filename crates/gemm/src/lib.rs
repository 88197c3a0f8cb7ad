//! Matrix products for qkv: C = activation(alpha A B + beta C + bias) in `f32`, for any strides and any size.
//!
//! ```
//! use qkv_gemm::{GemmSpec, MatMut, MatRef, gemm};
//! let (a, b) = ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0, 0.0, 0.0, 1.0, 1.0, 1.0]);
//! let mut c = [0.0; 4];
//! gemm(
//!     MatRef::from_slice(&a, 2, 3)?,
//!     MatRef::from_slice(&b, 3, 2)?,
//!     &mut MatMut::from_slice(&mut c, 2, 2)?,
//!     &GemmSpec::default(),
//! )?;
//! assert_eq!(c, [4.0, 5.0, 10.0, 11.0]);
//! # Ok::<(), qkv_gemm::GemmError>(())
//! ```
//!
//! # What is where
//! - Doors: [`gemm`], [`gemm_packed`], [`gemm_batched`], [`gemm_with_epilogue`]; `gemm.rs`, `batched.rs`.
//! - Operands: [`MatRef`], [`MatMut`] (`matrix.rs`), [`PackedRhs`] (`packed.rs`), [`BatchRef`], [`BatchMut`].
//! - The five loops, outermost first: `driver.rs` (tasks, blocks of k and of rows), `block.rs` (panels and tiles),
//!   [`for_row_tiles`] (`row_tiles.rs`, the cut into tiles), [`tile`](mod@tile) (registers). Block sizes: `params.rs` from the caches ([`CacheInfo`]); tile shapes: `shapes.rs`.
//! - Few rows or columns: `gemv.rs` (the choice, tasks), `stream.rs`, `dots.rs`.
//! - Copies in the tile's order: [`pack_lhs`], [`pack_rhs`]; what happens to sums: `writeback.rs`, [`Epilogue`].
//! - Threads: `parallel.rs`, `helpers.rs`; memory: [`AlignedBuf`], [`with_scratch`],
//!   [`prefer_huge_pages`].
//!
//! The attention crate uses the tile and the scratch under the contract in `docs/KERNELS.md`.

mod batched;
mod block;
mod cache;
mod dots;
mod driver;
mod epilogue;
mod error;
mod gemm;
mod gemv;
mod helpers;
mod huge_pages;
mod matrix;
#[cfg(feature = "ndarray")]
mod ndarray;
mod pack;
mod packed;
pub mod parallel;
mod params;
mod row_tiles;
mod scratch;
mod shapes;
mod small_jobs;
mod stream;
pub mod tile;
mod writeback;

pub use batched::{BatchAxes, BatchMut, BatchRef, gemm_batched};
pub use cache::{CacheInfo, CacheSource};
pub use epilogue::{Activation, Epilogue, Identity, Place};
pub use error::GemmError;
pub use gemm::{GemmSpec, gemm, gemm_packed, gemm_with_epilogue};
pub use huge_pages::prefer_huge_pages;
pub use matrix::{MatMut, MatRef};
pub use pack::{pack_lhs, pack_rhs, packed_len};
pub use packed::PackedRhs;
pub use params::Blocking;
pub use row_tiles::{RowsOp, for_row_tiles};
pub use scratch::{AlignedBuf, KEPT, with_scratch};
pub use shapes::{KernelShape, TileOp, with_tile};

/// Most batch axes of [`BatchAxes`].
pub const MAX_BATCH_AXES: usize = 8;
