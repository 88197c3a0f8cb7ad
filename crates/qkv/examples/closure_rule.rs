//! A rule from a closure, called once per score: convenient for trying an idea.
//!
//! Here every query sees its own block of 64 keys and, of all others, only each 16th key, with the scores of those halved. A
//! rule that only masks is shorter as `qkv::rule::mask_mod(|at| ...)`.
//!
//!     cargo run --release -p qkv --example closure_rule

use qkv::rule::score_mod;
use qkv::{AttentionSpec, Outputs, Tensor, attention_with_rule};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let shape = [1, 2, 300, 32];
    let q = Tensor::from_fn(shape, |[_, h, i, d]| ((i * 7 + d * 3 + h) % 17) as f32 * 0.1 - 0.8)?;
    let k = Tensor::from_fn(shape, |[_, h, i, d]| ((i * 5 + d * 11 + h) % 19) as f32 * 0.1 - 0.9)?;
    let v = Tensor::from_fn(shape, |[_, _, i, _]| i as f32)?;
    let spec = AttentionSpec::new();

    let own_block = |at: qkv::reference::Place| at.query / 64 == at.key / 64;
    let rule = score_mod(move |at, score| match (own_block(at), at.key % 16) {
        (true, _) => score,
        (false, 0) => score / 2.0,
        _ => f32::NEG_INFINITY,
    });
    let mut out = Tensor::zeros(shape)?;
    attention_with_rule(q.view(), k.view(), v.view(), &spec, rule, Outputs::new(out.view_mut()))?;
    let mean = out.view().row(0, 0, 100)[0];
    println!("query 100 looks, on average, at key {mean:.1}");
    if !(64.0..192.0).contains(&mean) {
        return Err("it should look at its own block first".into());
    }
    Ok(())
}
