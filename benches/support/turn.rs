//! A workload's turn: a stretch of calls, and the limit of the machine measured right before and right after it.
//!
//! Only the ratio of the two is kept for judgement: the clock of a CPU and the load of a shared machine drift by more
//! than what is to be seen. The limit is the mean of the two measurements, so that a drift in the middle counts half on
//! both sides.

use std::time::Duration;

use qkv::probe::ProbeError;
use serde::Serialize;

use crate::{fma_peak, read_bandwidth, seconds_per_call};

/// What a workload is limited by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Limit {
    /// Multiply-adds of all threads.
    Peak,
    /// Reading memory.
    Bandwidth,
}

impl Limit {
    /// The unit of rates: 10^9 of something per second.
    #[must_use]
    pub fn unit(self) -> &'static str {
        match self {
            Self::Peak => "GFLOP/s",
            Self::Bandwidth => "GB/s",
        }
    }
}

/// How long things are measured.
#[derive(Clone, Copy, Debug)]
pub struct Lengths {
    /// The calls, at least.
    pub stretch: Duration,
    /// The limit, each time.
    pub probe: Duration,
}

/// What a turn found out.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Turn {
    /// The limit, in the unit of [`Limit::unit`].
    pub limit: f64,
    /// The workload, in the same unit.
    pub rate: f64,
    /// Seconds per call.
    pub seconds: f64,
}

impl Turn {
    /// Measures a call that does `amount` of what the limit is about (operations, or bytes read), on `threads` threads.
    ///
    /// # Errors
    /// Where `QKV_ISA` is wrong, or threads or memory are refused.
    pub fn take(
        limit: Limit,
        amount: f64,
        threads: usize,
        lengths: Lengths,
        call: impl FnMut(),
    ) -> Result<Self, ProbeError> {
        let probe = || match limit {
            Limit::Peak => fma_peak(threads, lengths.probe),
            // Operands of a product lie in ordinary memory.
            Limit::Bandwidth => read_bandwidth(threads, lengths.probe, amount as usize, false),
        };
        let before = probe()?;
        let seconds = seconds_per_call(lengths.stretch, call);
        let after = probe()?;
        Ok(Self { limit: (before + after) / 2.0, rate: 1e-9 * amount / seconds, seconds })
    }

    /// How much of the limit it is.
    #[must_use]
    pub fn percent(&self) -> f64 {
        100.0 * self.rate / self.limit
    }
}
