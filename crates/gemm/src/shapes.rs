//! The only table of tile shapes in the program.
//!
//! A shape must keep `MR * NV` accumulators, `NV` vectors of the right-hand side and one broadcast in registers, and
//! should have `MR * NV` of at least the latency times the number of FMA pipes (4 to 5 cycles x 2 pipes = 8 to 10).
//!
//! | instruction set | registers | MR x NV | NR | accumulators | why |
//! | --- | --- | --- | --- | --- | --- |
//! | portable | 16 x 4 lanes | 4 x 2 | 8 | 8 | a product needs a register of its own where there is no FMA |
//! | avx2 | 16 x 8 lanes | 6 x 2 | 16 | 12 | 15 of 16 registers; 8 loads for 12 FMAs |
//! | avx512 | 32 x 16 lanes | 8 x 2 | 32 | 16 | 19 of 32 registers; 64 and 128 dims are whole tiles of 8 |

use qkv_simd::{Isa, Simd, SimdOp};

/// A computation generic over the instruction set and its tile shape.
pub trait TileOp {
    /// What it returns.
    type Output;
    /// Runs it. Implementations must be `#[inline(always)]`.
    fn eval<S: Simd, const MR: usize, const NV: usize>(self, s: S) -> Self::Output;
}

/// The numbers of a tile shape, for plans and reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelShape {
    /// Rows.
    pub mr: usize,
    /// Columns: vectors times lanes.
    pub nr: usize,
}

impl KernelShape {
    /// The shape that `isa` uses.
    #[must_use]
    pub fn of(isa: Isa) -> Self {
        struct Shape;
        impl TileOp for Shape {
            type Output = KernelShape;
            #[inline(always)]
            fn eval<S: Simd, const MR: usize, const NV: usize>(self, _: S) -> KernelShape {
                KernelShape { mr: MR, nr: NV * S::LANES }
            }
        }
        with_tile(isa, Shape)
    }
}

/// Runs `op` compiled for `isa` with that instruction set's tile shape.
#[inline]
pub fn with_tile<O: TileOp>(isa: Isa, op: O) -> O::Output {
    struct Shaped<O, const MR: usize, const NV: usize>(O);
    impl<O: TileOp, const MR: usize, const NV: usize> SimdOp for Shaped<O, MR, NV> {
        type Output = O::Output;
        #[inline(always)]
        fn eval<S: Simd>(self, s: S) -> O::Output {
            self.0.eval::<S, MR, NV>(s)
        }
    }
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2(s) => s.vectorize(Shaped::<O, 6, 2>(op)),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512(s) => s.vectorize(Shaped::<O, 8, 2>(op)),
        Isa::Portable(s) => s.vectorize(Shaped::<O, 4, 2>(op)),
        other => other.dispatch(Shaped::<O, 4, 2>(op)),
    }
}
