//! The register tile alone, one thread, everything in the first-level cache: the most that any kernel built on it can
//! reach, and what it costs to read the left-hand side in place rather than packed.
//!
//! - `packed`: columns of a panel, MR values per step of k (the products of `qkv-gemm`).
//! - `rows`: rows of a matrix, k along memory (attention's keys).
//! - `columns`: columns of a matrix whose rows are 64 values apart (attention's values).
//!
//! The depth is the number of steps of k: a head dim for `rows`, the keys of a block for `columns`, up to KC for
//! `packed`. The accumulators are stored to a small block after each tile, as a kernel does. `peak` is the probe that
//! percentages refer to, in criterion's hands: it must show close to 100 %.

mod gauge;

use criterion::{BenchmarkGroup, BenchmarkId};
use gauge::{Gauge, bench};
use qkv::gemm::tile::{Acc, Columns, Rhs, Rows, tile};
use qkv::gemm::{AlignedBuf, KernelShape, TileOp, with_tile};
use qkv::simd::{Isa, Simd, SimdOp};
use qkv_benches::Random;

/// Steps of k.
const DEPTHS: [usize; 5] = [32, 64, 96, 128, 256];

/// Values of the left-hand side that the tiles of a turn go through: 12 KiB. With the panel of the right-hand side (16
/// KiB at depth 256, with AVX-512 32) and the stored block they stay in a first cache of 32 KiB, with AVX-512 up to depth 128 (48 KiB:
/// 256).
const LHS_VALUES: usize = 3 << 10;

/// Values from one step of k to the next in `columns`: a head dim.
const COLUMN_STRIDE: usize = 64;

/// Tiles in one timed call, about: far more than entering the instruction set costs.
const TILES: usize = 256;

/// Where the left-hand side lies; see the module's text.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Packed,
    Rows,
    Columns,
}

/// One timed call: `TILES` tiles of one kind and depth.
struct Turn<'a> {
    kind: Kind,
    depth: usize,
    lhs: &'a [f32],
    rhs: &'a [f32],
    block: &'a mut [f32],
}

impl TileOp for Turn<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd, const MR: usize, const NV: usize>(self, s: S) {
        let Turn { kind, depth, lhs, rhs, block } = self;
        let nr = NV * S::LANES;
        // The values that one tile spans, and the distance to the next one.
        let (span, step) = match kind {
            Kind::Packed | Kind::Rows => (MR * depth, MR * depth),
            Kind::Columns => ((depth - 1) * COLUMN_STRIDE + MR, MR),
        };
        // In `columns` all tiles stay in one cache line per row, so that 256 rows are 16 KiB.
        let positions = match kind {
            Kind::Packed | Kind::Rows => (LHS_VALUES / span).max(1),
            Kind::Columns => 16 / MR,
        };
        assert!(
            lhs.len() >= (positions - 1) * step + span && rhs.len() >= depth * nr && block.len() >= MR * nr
        );
        let rhs = Rhs { ptr: rhs.as_ptr(), stride: nr as isize };
        for index in 0..TILES {
            let ptr = lhs[index % positions * step..].as_ptr();
            // SAFETY: asserted above: `span` values from `ptr` on, and `depth` rows of `nr`.
            let acc: Acc<S, MR, NV> = unsafe {
                match kind {
                    Kind::Packed => tile(s, depth, Columns { ptr, stride: MR as isize }, rhs),
                    Kind::Rows => tile(s, depth, Rows { ptr, stride: depth as isize }, rhs),
                    Kind::Columns => tile(s, depth, Columns { ptr, stride: COLUMN_STRIDE as isize }, rhs),
                }
            };
            for (row, block) in acc.iter().zip(block.chunks_exact_mut(nr)) {
                for (&sums, block) in row.iter().zip(block.chunks_exact_mut(S::LANES)) {
                    s.store(sums, block);
                }
            }
        }
    }
}

/// The probe's inner loop, written down once more, with twelve chains of multiply-adds on registers everywhere.
struct Peak {
    steps: usize,
}

/// Independent chains: more than latency times pipes, fewer than registers.
const CHAINS: usize = 12;

impl SimdOp for Peak {
    type Output = f32;

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) -> f32 {
        let (factor, summand) = (s.splat(std::hint::black_box(0.5)), s.splat(std::hint::black_box(1.0)));
        let mut chains: [S::F32; CHAINS] = std::array::from_fn(|i| s.splat(std::hint::black_box(i as f32)));
        for _ in 0..self.steps {
            for x in &mut chains {
                *x = s.mul_add(*x, factor, summand);
            }
        }
        s.reduce_add(chains.into_iter().fold(s.zero(), |sum, x| s.add(sum, x)))
    }
}

fn tiles(group: &mut BenchmarkGroup<'_, Gauge>, isa: Isa) {
    let KernelShape { mr, nr } = KernelShape::of(isa);
    let deepest = DEPTHS.into_iter().max().unwrap_or(0);
    let mut random = Random::new(3);
    let mut aligned = |count: usize| {
        let mut buffer = AlignedBuf::new();
        buffer.reserve(count).fill_with(|| random.next_f32());
        buffer
    };
    let lhs_values = (deepest * COLUMN_STRIDE).max(LHS_VALUES).max(mr * deepest);
    let (mut lhs, mut rhs) = (aligned(lhs_values), aligned(deepest * nr));
    let (lhs, rhs) = (&*lhs.reserve(lhs_values), &*rhs.reserve(deepest * nr));
    let mut block = aligned(mr * nr);
    for kind in [Kind::Packed, Kind::Rows, Kind::Columns] {
        for depth in DEPTHS {
            let flops = 2.0 * (TILES * mr * nr * depth) as f64;
            let id = BenchmarkId::new(format!("{kind:?}").to_lowercase(), depth);
            bench(group, id, 1, flops, || {
                with_tile(isa, Turn { kind, depth, lhs, rhs, block: block.reserve(mr * nr) });
            });
        }
    }
}

fn main() {
    let mut criterion = gauge::criterion();
    let isa = Isa::active().expect("QKV_ISA names an instruction set that this CPU has");
    let mut group = criterion.benchmark_group("tile");
    let steps = 10_000;
    let flops = 2.0 * (steps * CHAINS * isa.lanes()) as f64;
    bench(&mut group, BenchmarkId::from_parameter("peak"), 1, flops, || isa.dispatch(Peak { steps }));
    tiles(&mut group, isa);
    group.finish();
    criterion.final_summary();
}
