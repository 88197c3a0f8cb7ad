//! Attention, full and causal, beside what else a Rust program can call on a CPU: candle-nn's flash attention, candle's
//! three steps (scores, softmax, weighted sum, as most models write them), and the naive reference of this crate.
//!
//! All take the same random queries, keys and values, each in the layout that it likes: candle's flash attention
//! (batch, length, heads, dim), the others (batch, heads, length, dim). A causal mask is an option of the first; candle's
//! three steps add a matrix of zeros and negative infinities, made once. Operations are useful ones, so a mask that is
//! computed and thrown away shows. Libraries that are not in Rust are timed by scripts/attention_peers.py.

mod gauge;

use std::error::Error;

use candle_core::{Device, Tensor as Candle};
use candle_nn::attention::{AttnMask, flash_attn};
use criterion::{BenchmarkId, Criterion};
use gauge::{Gauge, bench};
use qkv::{Outputs, Tensor, attention_into, reference};
use qkv_benches::{ATTENTION, AttentionInput, AttentionShape, check_close, spec_of};

/// The naive reference writes and reads every score with scalar code: above this many operations it takes seconds.
const NAIVE_FLOPS: f64 = 5e8;

/// The inputs of a call as candle has them.
struct CandleInput {
    q: Candle,
    k: Candle,
    v: Candle,
    /// Zeros, and negative infinities above the diagonal.
    mask: Option<Candle>,
    shape: AttentionShape,
}

impl CandleInput {
    fn new(shape: AttentionShape, input: &AttentionInput) -> candle_core::Result<Self> {
        let tensor = |t: &Tensor| Candle::from_slice(t.data(), &t.shape(), &Device::Cpu);
        let len = shape.len;
        let rows: Vec<f32> =
            (0..len * len).map(|at| if at % len > at / len { f32::NEG_INFINITY } else { 0.0 }).collect();
        let mask = shape.causal.then(|| Candle::from_vec(rows, (len, len), &Device::Cpu)).transpose()?;
        Ok(Self { q: tensor(&input.q)?, k: tensor(&input.k)?, v: tensor(&input.v)?, mask, shape })
    }

    fn scale(&self) -> f64 {
        1.0 / (self.shape.dim as f64).sqrt()
    }

    /// The three steps, one tensor after the other.
    fn three_steps(&self) -> candle_core::Result<Candle> {
        let scores = (self.q.matmul(&self.k.t()?)? * self.scale())?;
        let scores = match &self.mask {
            Some(mask) => scores.broadcast_add(mask)?,
            None => scores,
        };
        candle_nn::ops::softmax_last_dim(&scores)?.matmul(&self.v)
    }

    /// The same inputs for [`Self::flash`]: length before heads.
    fn length_first(&self) -> candle_core::Result<Self> {
        let swap = |t: &Candle| t.transpose(1, 2)?.contiguous();
        Ok(Self { q: swap(&self.q)?, k: swap(&self.k)?, v: swap(&self.v)?, mask: None, shape: self.shape })
    }

    /// candle-nn's flash attention, of inputs with the length first; the output has the heads first.
    fn flash(&self) -> candle_core::Result<Candle> {
        let mask = if self.shape.causal { AttnMask::causal() } else { AttnMask::None };
        flash_attn::<f32>(&self.q, &self.k, &self.v, self.scale() as f32, mask, None, None)
    }
}

/// All must agree on small calls, of one batch and of two: candle has different kernels for these.
fn check() -> Result<(), Box<dyn Error>> {
    for batch in [1, 2] {
        for shape in [AttentionShape::full(batch, 3, 70, 32), AttentionShape::causal(batch, 3, 70, 32)] {
            let input = AttentionInput::random(&shape)?;
            let (q, k, v) = (input.q.view(), input.k.view(), input.v.view());
            let spec = spec_of(&shape);
            let expected = reference::oracle(q, k, v, &spec).output;
            let candle = CandleInput::new(shape, &input)?;
            let flat = |t: Candle| t.flatten_all()?.to_vec1::<f32>();
            for (name, given) in [
                ("qkv", qkv::attention(q, k, v, &spec)?.into_vec()),
                ("naive", reference::naive(q, k, v, &spec).output.into_vec()),
                ("candle", flat(candle.three_steps()?)?),
                ("candle flash", flat(candle.length_first()?.flash()?)?),
            ] {
                check_close(name, &given, expected.data())?;
            }
        }
    }
    Ok(())
}

fn group(criterion: &mut Criterion<Gauge>, name: &str, causal: bool) -> Result<(), Box<dyn Error>> {
    let threads = rayon::current_num_threads();
    let mut group = criterion.benchmark_group(name);
    for shape in ATTENTION {
        let shape = AttentionShape { causal, ..shape };
        let flops = shape.flops();
        let input = AttentionInput::random(&shape)?;
        let (q, k, v) = (input.q.view(), input.k.view(), input.v.view());
        let spec = spec_of(&shape);
        let id = |library| BenchmarkId::new(library, shape);

        let mut out = Tensor::zeros(shape.query_shape())?;
        bench(&mut group, id("qkv"), threads, flops, || {
            attention_into(q, k, v, &spec, Outputs::new(out.view_mut()))
        });
        let candle = CandleInput::new(shape, &input)?;
        bench(&mut group, id("candle"), threads, flops, || candle.three_steps());
        let candle = candle.length_first()?;
        bench(&mut group, id("candle flash"), threads, flops, || candle.flash());
        if flops <= NAIVE_FLOPS {
            bench(&mut group, id("naive"), threads, flops, || reference::naive(q, k, v, &spec));
        }
    }
    group.finish();
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut criterion = gauge::criterion();
    check()?;
    group(&mut criterion, "attention full", false)?;
    group(&mut criterion, "attention causal", true)?;
    criterion.final_summary();
    Ok(())
}
