//! Matrix products for qkv.
mod scratch;
mod shapes;
pub mod tile;

pub use scratch::{AlignedBuf, KEPT, with_scratch};
pub use shapes::{KernelShape, TileOp, with_tile};
