//! Timing: variants and the machine's peak, round by round.
//!
//! A shared or warming machine drifts by more than the differences that are to be seen, so nothing is measured for long
//! in one go. Each round measures every variant in turn, and the peak of the machine before the first, between two of
//! them and after the last; a variant's percentage is of the mean of the two peaks beside it, and the median over the
//! rounds is what counts. Work that is shorter than [`ROUND`] is repeated until it fills that time, since waking threads
//! and reading the clock would otherwise be a part of it.

use std::time::{Duration, Instant};

use qkv::probe::{ProbeOptions, fma_peak};
use qkv::{AttentionError, AttentionSpec, Outputs, Shape, Tensor, TensorError, attention_into};
use serde::Serialize;

use crate::Failure;
use crate::output::Progress;

/// Time that a variant fills in one round, at least.
const ROUND: Duration = Duration::from_millis(40);

/// Time of one probe of the peak.
const PROBE: Duration = Duration::from_millis(15);

/// Seconds of one variant in one round, at least.
pub(crate) fn round_seconds() -> f64 {
    (ROUND + PROBE).as_secs_f64()
}

/// Attention on tensors that stay in place, the output included.
#[derive(Debug)]
pub(crate) struct Variant<'a> {
    q: &'a Tensor,
    k: &'a Tensor,
    v: &'a Tensor,
    spec: AttentionSpec<'static>,
    out: Tensor,
    flops: f64,
}

impl<'a> Variant<'a> {
    /// Calls it once, so that everything that can be refused has been, and the threads are awake.
    pub(crate) fn new(
        q: &'a Tensor,
        k: &'a Tensor,
        v: &'a Tensor,
        spec: AttentionSpec<'static>,
    ) -> Result<Self, Failure> {
        let shape = shape_of(q, k, v);
        let size = [shape.batch, shape.query_heads, shape.query_len, shape.value_dim];
        let out =
            Tensor::zeros(size).map_err(|error: TensorError| Failure::new(format!("output: {error}")))?;
        let flops = shape.flops(spec.causal);
        let mut variant = Self { q, k, v, spec, out, flops };
        variant.call()?;
        Ok(variant)
    }

    pub(crate) fn call(&mut self) -> Result<(), AttentionError> {
        let outputs = Outputs::new(self.out.view_mut());
        attention_into(self.q.view(), self.k.view(), self.v.view(), &self.spec, outputs)
    }

    /// What the last call computed.
    pub(crate) fn out(&self) -> &Tensor {
        &self.out
    }
}

/// How often to make a call in a round; makes it once to find out.
pub(crate) fn repetitions<E: Into<Failure>>(call: impl FnOnce() -> Result<(), E>) -> Result<usize, Failure> {
    let start = Instant::now();
    call().map_err(Into::into)?;
    let once = start.elapsed().as_nanos().max(1);
    Ok(usize::try_from(ROUND.as_nanos().div_ceil(once)).unwrap_or(1).clamp(1, 1_000_000))
}

/// How the machine is probed beside the work.
pub(crate) fn probe_options() -> ProbeOptions {
    ProbeOptions::new().with_threads(rayon::current_num_threads()).with_rounds(1).with_round(PROBE)
}

/// The sizes of a call.
pub(crate) fn shape_of(q: &Tensor, k: &Tensor, v: &Tensor) -> Shape {
    let [batch, query_heads, query_len, key_dim] = q.shape();
    let [_, kv_heads, key_len, _] = k.shape();
    Shape { batch, query_heads, kv_heads, query_len, key_len, key_dim, value_dim: v.shape()[3] }
}

/// Medians over the rounds.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Timing {
    /// Seconds of one call.
    pub(crate) seconds: f64,
    /// Useful GFLOP/s: 2 (key dim + value dim) FLOP for each visible score, and nothing for the exponential.
    pub(crate) gflops: f64,
    /// The peak, GFLOP/s.
    pub(crate) peak_gflops: f64,
    /// The median of the rounds' percentages (not the percentage of the medians).
    pub(crate) percent_of_peak: f64,
}

/// Measures the variants side by side. `between` is called after each round with its number.
pub(crate) fn interleaved(
    variants: &mut [Variant<'_>],
    rounds: usize,
    progress: &mut Progress,
    mut between: impl FnMut(usize),
) -> Result<Vec<Timing>, Failure> {
    let repetitions =
        variants.iter_mut().map(|variant| repetitions(|| variant.call())).collect::<Result<Vec<_>, _>>()?;
    let mut samples: Vec<Vec<[f64; 4]>> = vec![Vec::with_capacity(rounds); variants.len()];
    let probe = probe_options();
    for round in 0..rounds {
        let mut peak_before = fma_peak(&probe)?;
        for ((variant, &repetitions), samples) in variants.iter_mut().zip(&repetitions).zip(&mut samples) {
            let start = Instant::now();
            for _ in 0..repetitions {
                variant.call()?;
            }
            let seconds = start.elapsed().as_secs_f64() / repetitions as f64;
            let peak_after = fma_peak(&probe)?;
            let peak = (peak_before + peak_after) / 2.0;
            peak_before = peak_after;
            let gflops = variant.flops / seconds.max(1e-12) / 1e9;
            samples.push([seconds, gflops, peak, 100.0 * gflops / peak]);
            progress.step();
        }
        between(round);
    }
    Ok(samples
        .into_iter()
        .map(|samples| {
            let [seconds, gflops, peak_gflops, percent_of_peak] =
                [0, 1, 2, 3].map(|column| median(samples.iter().map(|sample| sample[column]).collect()));
            Timing { seconds, gflops, peak_gflops, percent_of_peak }
        })
        .collect())
}

/// The middle one; of an even number the mean of the two in the middle; 0 of none.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => 0.0,
        n => (values[(n - 1) / 2] + values[n / 2]) / 2.0,
    }
}

#[cfg(test)]
mod tests {
    use qkv::Causal;

    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(vec![]), 0.0);
        assert_eq!(median(vec![3.0]), 3.0);
        assert_eq!(median(vec![4.0, 1.0]), 2.5);
        assert_eq!(median(vec![9.0, 1.0, 2.0]), 2.0);
    }

    #[test]
    fn each_variant_gets_its_timing_and_each_round_its_call() {
        let x = Tensor::from_fn([1, 2, 40, 8], |[_, h, s, d]| (h * 3 + s + d) as f32 * 0.01).unwrap();
        let full = AttentionSpec::new();
        let mut variants = vec![
            Variant::new(&x, &x, &x, full.clone()).unwrap(),
            Variant::new(&x, &x, &x, full.with_causal(Causal::TopLeft)).unwrap(),
        ];
        let mut seen = vec![];
        let timings =
            interleaved(&mut variants, 2, &mut Progress::new(4, 0.0), |round| seen.push(round)).unwrap();
        assert_eq!(seen, [0, 1]);
        assert_eq!(timings.len(), 2);
        for timing in timings {
            assert!(timing.seconds > 0.0 && timing.gflops > 0.0 && timing.peak_gflops > 0.0, "{timing:?}");
        }
        assert!(variants[0].out().data().iter().all(|x| x.is_finite()));
    }

    #[test]
    fn what_the_library_refuses_is_a_failure() {
        let q = Tensor::zeros([1, 3, 4, 8]).unwrap();
        let k = Tensor::zeros([1, 2, 4, 8]).unwrap();
        let error = Variant::new(&q, &k, &k, AttentionSpec::new()).unwrap_err();
        assert!(error.to_string().contains("3 heads"), "{error}");
    }

    #[test]
    fn empty_sequences_take_no_time_but_work() {
        let x = Tensor::zeros([2, 2, 0, 8]).unwrap();
        let mut variants = [Variant::new(&x, &x, &x, AttentionSpec::new()).unwrap()];
        let timing = interleaved(&mut variants, 1, &mut Progress::new(1, 0.0), |_| ()).unwrap()[0];
        assert_eq!(timing.gflops, 0.0);
    }
}
