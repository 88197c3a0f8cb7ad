//! What is asked of a call: scale, causality.

/// Which keys a query may see, counted from its own position (api: an alignment, not a flag).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Causal {
    /// Query i sees key j where j <= i: both sequences begin together.
    TopLeft,
    /// Query i sees key j where j <= i + key length - query length: both sequences end together.
    BottomRight,
    /// Query i sees key j where j <= i + offset.
    Offset(i64),
}

impl Causal {
    /// The offset o of "key j <= query i + o".
    #[must_use]
    pub fn offset(self, query_len: usize, key_len: usize) -> i64 {
        match self {
            Causal::TopLeft => 0,
            Causal::BottomRight => key_len as i64 - query_len as i64,
            Causal::Offset(offset) => offset,
        }
    }
}

/// What is asked of a call beyond its tensors. `AttentionSpec::new()` is plain attention; the methods add to it:
///
/// ```
/// use qkv_attention::{AttentionSpec, Causal};
/// let spec = AttentionSpec::new().with_causal(Causal::TopLeft).with_scale(0.1);
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct AttentionSpec {
    /// The factor of q . k; `None` is 1 / sqrt(key dim). NaN and infinity are refused.
    pub scale: Option<f32>,
    /// The causal mask, if any.
    pub causal: Option<Causal>,
}

impl AttentionSpec {
    /// Plain attention: every query sees every key, scaled by 1 / sqrt(key dim).
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// With this factor instead of 1 / sqrt(key dim).
    #[must_use]
    pub fn with_scale(self, scale: f32) -> Self {
        Self { scale: Some(scale), ..self }
    }

    /// With a causal mask.
    #[must_use]
    pub fn with_causal(self, causal: Causal) -> Self {
        Self { causal: Some(causal), ..self }
    }

    /// The factor of q . k for this key dim, unrounded.
    #[must_use]
    pub fn scale_for(&self, key_dim: usize) -> f64 {
        self.scale.map_or_else(|| 1.0 / (key_dim as f64).sqrt(), f64::from)
    }
}
