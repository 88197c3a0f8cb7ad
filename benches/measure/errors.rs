//! `measure errors`: qkv against f64 on the inputs of scripts/peer_error.py, which tells the same of PyTorch's flash kernel.
//!
//! The inputs: layers of a real model (testdata/), and numbers from splitmix64 with seeds 1, 2 and 3 for queries, keys
//! and values, uniform in [-1, 1). `--scale-q` multiplies the queries, for a peaked softmax.

use std::error::Error;
use std::io::{self, Write};

use clap::Args;
use qkv::cache::{KvCache, KvCacheConfig, Storage};
use qkv::{AttentionSpec, Causal, Tensor, attention, reference};
use safetensors::SafeTensors;

/// What `measure errors` can be told.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Multiplies the queries.
    #[arg(long, default_value = "1")]
    scale_q: f32,
}

const MODEL: &[u8] = include_bytes!("../../testdata/minilm.safetensors");

/// Uniform in [-1, 1) from splitmix64 (Steele, Lea and Flood 2014): the top 24 bits, over 2^23, less 1.
fn splitmix(shape: [usize; 4], seed: u64) -> Result<Tensor, Box<dyn Error>> {
    let mut state = seed;
    Ok(Tensor::from_fn(shape, |_| {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 40) as f32 / (1 << 23) as f32 - 1.0
    })?)
}

fn stored(file: &SafeTensors<'_>, name: &str) -> Result<Tensor, Box<dyn Error>> {
    let view = file.tensor(name)?;
    let values = view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    let shape: [usize; 4] = view.shape().try_into()?;
    Ok(Tensor::from_vec(values.collect(), shape)?)
}

/// Computes and prints the table.
pub(crate) fn run(options: &Options) -> Result<(), Box<dyn Error>> {
    let file = SafeTensors::deserialize(MODEL)?;
    let mut inputs = Vec::new();
    for layer in ["layer0", "layer5"] {
        let part = |name: &str| stored(&file, &format!("{layer}.{name}"));
        inputs.push((format!("minilm {layer}"), part("q")?, part("k")?, part("v")?));
    }
    for shape in [[1, 2, 512, 64], [1, 1, 2048, 64], [1, 1, 2048, 128]] {
        let [b, h, s, d] = shape;
        let name = format!("random {b},{h},{s},{d}");
        inputs.push((name, splitmix(shape, 1)?, splitmix(shape, 2)?, splitmix(shape, 3)?));
    }
    writeln!(io::stdout(), "{:22} {:8} {:>12} {:>12}", "input", "mask", "max error", "RMS error")?;
    for (name, mut q, k, v) in inputs {
        q.data_mut().iter_mut().for_each(|x| *x *= options.scale_q);
        for causal in [None, Some(Causal::TopLeft)] {
            let mut spec = AttentionSpec::new();
            spec.causal = causal;
            let out = attention(q.view(), k.view(), v.view(), &spec)?;
            let exact = reference::oracle(q.view(), k.view(), v.view(), &spec);
            let (largest, rms) = errors(out.data(), exact.output.data());
            let mask = if causal.is_some() { "causal" } else { "full" };
            writeln!(io::stdout(), "{name:22} {mask:8} {largest:>12.3e} {rms:>12.3e}")?;
        }
    }
    stored_caches(&file)
}

/// What storing keys and values in fewer bits costs: the same layers from caches of every storage type, against f64 on the
/// values as they were.
fn stored_caches(file: &SafeTensors<'_>) -> Result<(), Box<dyn Error>> {
    let int8 = |group, zero_point| Storage::Int8 { group, zero_point };
    let storages = [
        ("f32", Storage::F32),
        ("f16", Storage::F16),
        ("bf16", Storage::Bf16),
        ("int8, a scale per row", int8(None, false)),
        ("int8 with zero point", int8(None, true)),
        ("int8, groups of 16", int8(Some(16), false)),
    ];
    writeln!(
        io::stdout(),
        "\n{:22} {:24} {:>12} {:>12}",
        "input, full",
        "keys and values",
        "max error",
        "RMS error"
    )?;
    for layer in ["layer0", "layer5"] {
        let part = |name: &str| stored(file, &format!("{layer}.{name}"));
        let (q, k, v) = (part("q")?, part("k")?, part("v")?);
        let exact = reference::oracle(q.view(), k.view(), v.view(), &AttentionSpec::new());
        let [batch, heads, length, dim] = k.shape();
        for (name, storage) in storages {
            let config = KvCacheConfig::new(batch, heads, length, dim, dim).with_storage(storage);
            let mut cache = KvCache::new(config)?;
            cache.append(k.view(), v.view())?;
            let out = attention(q.view(), cache.keys(), cache.values(), &AttentionSpec::new())?;
            let (largest, rms) = errors(out.data(), exact.output.data());
            writeln!(
                io::stdout(),
                "{:22} {name:24} {largest:>12.3e} {rms:>12.3e}",
                format!("minilm {layer}")
            )?;
        }
    }
    Ok(())
}

/// The largest and the RMS difference.
fn errors(got: &[f32], exact: &[f64]) -> (f64, f64) {
    let (mut largest, mut squares) = (0.0, 0.0);
    for (&got, &exact) in got.iter().zip(exact) {
        let error = (f64::from(got) - exact).abs();
        largest = f64::max(largest, error);
        squares += error * error;
    }
    (largest, (squares / got.len() as f64).sqrt())
}
