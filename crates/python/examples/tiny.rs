//! How long `qkv::attention` takes from Rust on the problems of benches/overhead.py: what the Python face adds is the
//! difference.

use std::hint::black_box;
use std::time::{Duration, Instant};

use qkv::{AttentionSpec, Tensor, attention};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    for [heads, length, dim] in [[1, 1, 8], [2, 8, 16], [4, 16, 64]] {
        let tensor =
            || Tensor::from_fn([1, heads, length, dim], |[_, h, i, d]| ((h + i * d) as f32 * 0.37).sin());
        let (q, k, v) = (tensor()?, tensor()?, tensor()?);
        let spec = AttentionSpec::new();
        let mut best = Duration::MAX;
        for _ in 0..20 {
            let calls = 2000;
            let start = Instant::now();
            for _ in 0..calls {
                black_box(attention(black_box(q.view()), k.view(), v.view(), &spec)?);
            }
            best = best.min(start.elapsed() / calls);
        }
        println!("{heads} {length} {dim} {:.3}", best.as_secs_f64() * 1e6);
    }
    Ok(())
}
