//! The goals: which workloads are held against the limit of the machine, and how near they should come.
//!
//! The numbers were set for one machine (2 cores of AMD Zen 1, 16 f32 operations per cycle and core, all percentages
//! for two threads) from its arithmetic: a score of attention costs 4 d operations in the two products and about two
//! cycles in the exponential, so that 85 % of the peak at d = 64 and 90 % at d = 128 leave nothing to waste. Where a core
//! does 32 operations per cycle, the products take half the time and the exponential does not: there 75 % and 84 %, the
//! other rows of the same head dim in proportion. Products of matrices have no exponential and the same goal everywhere.
//!
//! Small and thin products are held against other libraries: the best of MKL, OpenBLAS and BLIS on that machine, in
//! percent of its peak. On another machine only scripts/gemm_peers.py, run there, can tell.

use qkv_benches::{AttentionShape, GemmShape, Limit, Workload};

/// How near to its limit a workload should come.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Goal {
    /// This much of the limit, in percent.
    Percent(f64),
    /// Percent of the peak with 16 operations per cycle; less with 32, as the head dim of this workload has it.
    Attention(f64),
    /// This fraction of the rate of the same shape without a mask.
    OfFull(f64),
    /// What the best of the peers reached on the reference machine, in GFLOP/s.
    Peers(f64),
}

/// Peak of the reference machine while the peers were timed, in GFLOP/s: between 88 and 92.
const REFERENCE_PEAK: f64 = 90.0;

/// Operations per cycle and core of the reference machine.
const REFERENCE_FLOPS_PER_CYCLE: u32 = 16;

/// A workload and what is expected of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Row {
    pub(crate) workload: Workload,
    pub(crate) limit: Limit,
    pub(crate) goal: Goal,
}

impl Row {
    /// The goal in percent of the limit for a core of this many operations per cycle, where there is one.
    pub(crate) fn percent(&self, flops_per_cycle: u32) -> Option<f64> {
        let reference = flops_per_cycle <= REFERENCE_FLOPS_PER_CYCLE;
        match (self.goal, self.workload) {
            (Goal::Percent(percent), _) => Some(percent),
            (Goal::Attention(percent), _) if reference => Some(percent),
            (Goal::Attention(percent), Workload::Attention(shape)) => {
                Some(percent * if shape.dim >= 128 { 84.0 / 90.0 } else { 75.0 / 85.0 })
            }
            (Goal::Peers(gflops), _) => reference.then_some(100.0 * gflops / REFERENCE_PEAK),
            (Goal::OfFull(_) | Goal::Attention(_), _) => None,
        }
    }

    /// The shape that [`Goal::OfFull`] compares with and without its mask.
    pub(crate) fn of_full(&self) -> Option<AttentionShape> {
        match (self.goal, self.workload) {
            (Goal::OfFull(_), Workload::Attention(shape)) => Some(shape),
            _ => None,
        }
    }
}

/// The whole table.
pub(crate) fn rows() -> Vec<Row> {
    let attention = |shape, goal| Row { workload: Workload::Attention(shape), limit: Limit::Peak, goal };
    let gemm = |shape, goal| Row { workload: Workload::Gemm(shape), limit: Limit::Peak, goal };
    // 60 microseconds at 2.8 GHz for 4 x 12 x 32 x 32 x 64 operations, out of 2 cores x 16 operations x 2.8 GHz.
    let one_small_call = 100.0 * (4 * 12 * 32 * 32 * 64) as f64 / 60e-6 / (2.0 * 16.0 * 2.8e9);

    let mut rows = Vec::new();
    for (heads, len) in [(4, 2048), (2, 4096)] {
        for (dim, percent) in [(64, 85.0), (128, 90.0)] {
            rows.push(attention(AttentionShape::full(1, heads, len, dim), Goal::Attention(percent)));
            rows.push(attention(AttentionShape::causal(1, heads, len, dim), Goal::OfFull(0.97)));
        }
    }
    rows.extend([
        attention(AttentionShape::full(1, 12, 512, 64), Goal::Attention(80.0)),
        attention(AttentionShape::causal(1, 12, 512, 64), Goal::Attention(72.0)),
        attention(AttentionShape::full(8, 12, 128, 64), Goal::Attention(72.0)),
        attention(AttentionShape::full(32, 12, 128, 32), Goal::Attention(55.0)),
        attention(AttentionShape::full(1, 12, 32, 64), Goal::Attention(one_small_call)),
        gemm(GemmShape::square(512), Goal::Percent(92.0)),
        gemm(GemmShape::square(1024), Goal::Percent(92.0)),
        gemm(GemmShape::square(2048), Goal::Percent(92.0)),
        gemm(GemmShape::square(64), Goal::Peers(44.0)),
        gemm(GemmShape::square(128), Goal::Peers(76.0)),
        gemm(GemmShape::square(256), Goal::Peers(70.0)),
        gemm(GemmShape::new(128, 384, 384), Goal::Peers(72.0)),
        gemm(GemmShape::new(128, 1536, 384), Goal::Peers(82.0)),
        gemm(GemmShape::new(512, 3072, 768), Goal::Peers(73.0)),
        Row {
            workload: Workload::Gemm(GemmShape::new(1, 4096, 4096)),
            limit: Limit::Bandwidth,
            goal: Goal::Percent(85.0),
        },
    ]);
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goals_follow_the_machine() {
        let percent = |name: &str, flops| {
            let rows = rows();
            let row = rows.iter().find(|row| row.workload.to_string() == name).expect(name);
            row.percent(flops).map(f64::round)
        };
        assert_eq!(percent("attention full b1 h4 s2048 d64", 16), Some(85.0));
        assert_eq!(percent("attention full b1 h4 s2048 d64", 32), Some(75.0));
        assert_eq!(percent("attention full b1 h4 s2048 d128", 32), Some(84.0));
        assert_eq!(percent("attention full b1 h12 s32 d64", 16), Some(59.0));
        assert_eq!(percent("gemm 512x512x512", 32), Some(92.0));
        assert_eq!(percent("gemm 64x64x64", 16), Some(49.0));
        assert_eq!(percent("gemm 64x64x64", 32), None);
    }
}
