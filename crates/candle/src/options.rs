//! What is asked of a call beyond its three tensors.

use candle_core::Tensor;
use qkv::{Causal, Window};

/// The order of the axes of queries, keys, values and outputs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Axes {
    /// (batch, heads, length, head dim).
    #[default]
    Bhsd,
    /// (batch, length, heads, head dim), the order in which a projection leaves them.
    Bshd,
}

/// What is asked of a call beyond its tensors. `Options::new()` is plain attention; the methods add to it:
///
/// ```
/// use qkv_candle::{Causal, Options, Window};
/// let options = Options::new()
///     .with_causal(Causal::BottomRight)
///     .with_window(Window::new(Some(255), None))
///     .with_softcap(30.0);
/// ```
///
/// Scores are `s = softcap(scale q.k) + bias - slope |p - j|`, then come the masks, where p is the query's position among
/// the keys: i for [`Causal::TopLeft`], i + offset for [`Causal::Offset`], i + kv length - query length otherwise.
///
/// Tensors given here take no part in back-propagation: one that needs a gradient is refused.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Options {
    /// The order of the axes of all four tensors; masks and biases are (batch, heads, query length, kv length) with either.
    pub axes: Axes,
    /// The factor of q . k; `None` is 1 / sqrt(head dim). NaN and infinity are refused.
    pub scale: Option<f32>,
    /// Scores become cap tanh(score / cap); positive and finite.
    pub softcap: Option<f32>,
    /// The causal mask, an alignment.
    pub causal: Option<Causal>,
    /// A sliding window.
    pub window: Option<Window>,
    /// u8, not 0 = takes part (candle-transformers' masks often mean the opposite); broadcast to (batch, heads, query
    /// length, kv length), axes that are missing being added in front.
    pub mask: Option<Tensor>,
    /// Added to the scores, -infinity masks; f32, f16 or bf16, broadcast as `mask`.
    pub bias: Option<Tensor>,
    /// ALiBi's slopes, (heads) or (batch, heads), f32, f16 or bf16.
    pub alibi_slopes: Option<Tensor>,
    /// One logit per query head that joins the softmax and has no value, (heads), f32, f16 or bf16.
    pub sinks: Option<Tensor>,
    /// Per batch: keys from here on are not there (and [`Causal::BottomRight`] counts from here).
    pub kv_lengths: Option<Vec<usize>>,
    /// What the bias is called where the call was made.
    pub(crate) bias_name: BiasName,
}

/// The argument that a bias came by, for errors.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BiasName(pub(crate) &'static str);

impl Default for BiasName {
    fn default() -> Self {
        Self("bias")
    }
}

macro_rules! setters {
    ($($(#[$doc:meta])* $name:ident: $field:ident: $t:ty;)*) => {
        $($(#[$doc])* #[must_use] pub fn $name(self, $field: $t) -> Self { Self { $field: Some($field), ..self } })*
    };
}

impl Options {
    /// Plain attention: every query sees every key, scaled by 1 / sqrt(head dim), axes as [`Axes::Bhsd`].
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// With this order of axes.
    #[must_use]
    pub fn with_axes(self, axes: Axes) -> Self {
        Self { axes, ..self }
    }

    /// With a bias that errors call by another name.
    pub(crate) fn with_bias_named(self, name: &'static str, bias: Tensor) -> Self {
        Self { bias: Some(bias), bias_name: BiasName(name), ..self }
    }

    setters! {
        /// With this factor instead of 1 / sqrt(head dim).
        with_scale: scale: f32;
        /// With scores capped: cap tanh(score / cap).
        with_softcap: softcap: f32;
        /// With a causal mask.
        with_causal: causal: Causal;
        /// With a sliding window.
        with_window: window: Window;
        /// With a u8 mask, not 0 = takes part.
        with_mask: mask: Tensor;
        /// With an additive bias.
        with_bias: bias: Tensor;
        /// With ALiBi slopes, (heads) or (batch, heads).
        with_alibi_slopes: alibi_slopes: Tensor;
        /// With attention sinks, (heads).
        with_sinks: sinks: Tensor;
        /// With the number of keys of each batch.
        with_kv_lengths: kv_lengths: Vec<usize>;
    }
}
