//! Times candle-nn's flash attention on the CPU, for a column of `scripts/python_peers.py`.
//!
//! ```text
//! candle_flash --batch 1 --heads 4 --seq 2048 --dim 64 [--causal] [--seconds 0.2]
//! ```
//!
//! prints one line whose last word is GFLOP/s, useful ones as everywhere here. Inputs are f32, (batch, length, heads, dim) and
//! contiguous, which is what candle's function takes; threads are `RAYON_NUM_THREADS`. The output is compared with qkv's
//! before the clock starts. An example rather than a program of this package, so that candle stays out of `measure`.

use std::error::Error;
use std::time::Duration;

use candle_core::{Device, Tensor as Candle};
use candle_nn::attention::{AttnMask, flash_attn};
use clap::Parser;
use qkv::Tensor;
use qkv_benches::{AttentionInput, AttentionShape, check_close, seconds_per_call, spec_of};

#[derive(Parser)]
struct Options {
    #[arg(long)]
    batch: usize,
    #[arg(long)]
    heads: usize,
    #[arg(long)]
    seq: usize,
    #[arg(long)]
    dim: usize,
    #[arg(long)]
    causal: bool,
    /// Least length of the timed stretch, in seconds.
    #[arg(long, default_value_t = 0.2)]
    seconds: f64,
}

fn main() -> Result<(), Box<dyn Error>> {
    let Options { batch, heads, seq, dim, causal, seconds } = Options::parse();
    let seconds = Duration::try_from_secs_f64(seconds)?;
    let shape = AttentionShape { causal, ..AttentionShape::full(batch, heads, seq, dim) };
    let input = AttentionInput::random(&shape)?;
    let length_first = |t: &Tensor| -> candle_core::Result<Candle> {
        Candle::from_slice(t.data(), &t.shape(), &Device::Cpu)?.transpose(1, 2)?.contiguous()
    };
    let (q, k, v) = (length_first(&input.q)?, length_first(&input.k)?, length_first(&input.v)?);
    let scale = 1.0 / (dim as f32).sqrt();
    let mask = || if causal { AttnMask::causal() } else { AttnMask::None };
    // The output has the heads first again.
    let attend = || flash_attn::<f32>(&q, &k, &v, scale, mask(), None, None);

    let expected = qkv::attention(input.q.view(), input.k.view(), input.v.view(), &spec_of(&shape))?;
    let expected: Vec<f64> = expected.data().iter().map(|&x| f64::from(x)).collect();
    check_close("candle flash", &attend()?.flatten_all()?.to_vec1::<f32>()?, &expected)?;
    let each = seconds_per_call(seconds, || {
        attend().expect("it has run before");
    });
    println!("{shape}: {:.4} ms, GFLOP/s: {:.3}", 1e3 * each, 1e-9 * shape.flops() / each);
    Ok(())
}
