//! The drop-in for candle-nn's `ops::sdpa` and for attention that a model writes out as matrix products and a softmax.

use candle_core::{Result, Tensor};
use qkv::Causal;

use crate::options::Options;

/// softmax(q k^T scale + mask) v, with the arguments of `candle_nn::ops::sdpa`, which has no version for CPUs.
///
/// It replaces what models write out:
///
/// ```
/// use candle_core::{Device, Tensor};
/// # let device = Device::Cpu;
/// # let (q, scale) = (Tensor::randn(0f32, 1.0, (1, 4, 6, 8), &device)?, 8f64.powf(-0.5));
/// # let (k, v) = (q.affine(0.5, 0.1)?, q.affine(2.0, 1.0)?);
/// # let mask = Tensor::randn(0f32, 1.0, (6, 6), &device)?;
/// // before
/// let scores = (q.matmul(&k.t()?)? * scale)?.broadcast_add(&mask)?;
/// let before = candle_nn::ops::softmax_last_dim(&scores)?.matmul(&v)?;
/// // after
/// let after = qkv_candle::sdpa(&q, &k, &v, Some(&mask), false, scale as f32, 1.0)?;
/// # let difference = (before - after)?.abs()?.max_all()?.to_scalar::<f32>()?;
/// # assert!(difference < 1e-5);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// - `q`: (batch, query heads, query length, dim); `k`, `v`: (batch, kv heads, kv length, dim), not repeated for grouped heads.
/// - `mask`: added to the scores, -infinity masks; f32, f16 or bf16. Any shape that broadcasts to (batch, query heads, query
///   length, kv length), where candle-nn wants all four sizes.
/// - `do_causal`: both sequences end together, so query i sees key j where j <= i + kv length - query length; combines with
///   `mask`.
/// - `softcapping`: scores become cap tanh(score / cap); 1.0 means none, as there.
///
/// The result is (batch, query heads, query length, value dim) in `q`'s type.
///
/// # Errors
/// As [`crate::attention`]; for a u8 mask, whose meaning differs from model to model: see [`Options::mask`].
pub fn sdpa(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: Option<&Tensor>,
    do_causal: bool,
    scale: f32,
    softcapping: f32,
) -> Result<Tensor> {
    let mut options = Options::new().with_scale(scale);
    if let Some(mask) = mask {
        options = options.with_bias_named("mask", mask.clone());
    }
    if do_causal {
        options.causal = Some(Causal::BottomRight);
    }
    if softcapping != 1.0 {
        options.softcap = Some(softcapping);
    }
    crate::attention(q, k, v, &options)
}
