//! A rule of one's own, compiled into the kernel: ALiBi with a slope that grows with the head, as a vector rule.
//!
//! The rule is generic over the instruction set, so it runs at the kernel's speed wherever the kernel runs.
//!
//!     cargo run --release -p qkv --example vector_rule

use qkv::rule::{RuleLanes, ScoreRule};
use qkv::simd::Simd;
use qkv::{AttentionSpec, Causal, Outputs, Tensor, attention, attention_with_rule};

/// score - 2^-(head + 1) |position - key|
#[derive(Clone, Copy)]
struct HeadAlibi;

impl ScoreRule for HeadAlibi {
    #[inline(always)]
    fn apply<S: Simd>(&self, s: S, lanes: &RuleLanes<S>, key: usize, scores: S::F32) -> S::F32 {
        let distance = s.abs(s.sub(lanes.position, s.splat(key as f32)));
        // Heads differ between lanes when grouped heads share a strip, so the slope is computed per lane.
        let slope = qkv::simd::math::exp2_nonpositive(s, s.sub(s.splat(-1.0), lanes.head));
        s.sub(scores, s.mul(slope, distance))
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let shape = [1, 4, 512, 64];
    let q = Tensor::from_fn(shape, |[_, h, i, d]| ((i * 7 + d * 3 + h) % 17) as f32 * 0.1 - 0.8)?;
    let k = Tensor::from_fn(shape, |[_, h, i, d]| ((i * 5 + d * 11 + h) % 19) as f32 * 0.1 - 0.9)?;
    let v = Tensor::from_fn(shape, |[_, h, i, d]| ((i * 3 + d + h) % 23) as f32 * 0.1 - 1.1)?;
    let spec = AttentionSpec::new().with_causal(Causal::TopLeft);

    let mut own = Tensor::zeros(shape)?;
    attention_with_rule(q.view(), k.view(), v.view(), &spec, HeadAlibi, Outputs::new(own.view_mut()))?;

    // The same with what is built in.
    let slopes: Vec<f32> = (1..=4).map(|h| 0.5f32.powi(h)).collect();
    let built_in = attention(q.view(), k.view(), v.view(), &spec.with_alibi_slopes(&slopes))?;

    let difference = own.data().iter().zip(built_in.data()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    println!("largest difference from the built-in ALiBi: {difference:e}");
    if difference > 1e-5 {
        return Err("the rule and the built-in bias disagree".into());
    }
    Ok(())
}
