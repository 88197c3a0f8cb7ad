//! What is asked of a call beyond its tensors: scale, masks, biases, sinks. They combine freely.
//!
//! The score of query i and key j of a (batch, head) is
//!
//! ```text
//! s = softcap(scale q_i . k_j) + bias[i][j] + t5(j - p) - slope |p - j|,  then a caller's rule,  then the masks
//! ```
//!
//! where p is the query's position among the keys: i for a top-left causal mask, i + offset with an offset, and i + key
//! length - query length otherwise. softcap(x) = cap tanh(x / cap).

use core::ops::Range;

use crate::rotary::Rotary;
use crate::{BlockMask, Broadcast, HalfKind, TensorRef};

/// Which keys a query may see, counted from its own position (an alignment, not a flag).
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

/// A sliding window: the query at position p sees keys p - left ..= p + right, `None` being unbounded, and of those every
/// `dilation`-th counted from p.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Window {
    /// Keys before the query's own position.
    pub left: Option<usize>,
    /// Keys after it.
    pub right: Option<usize>,
    /// 1: all keys of the window; n: those whose distance is a multiple of n. Not 0.
    pub dilation: usize,
}

impl Window {
    /// Keys p - left ..= p + right.
    #[must_use]
    pub fn new(left: Option<usize>, right: Option<usize>) -> Self {
        Self { left, right, dilation: 1 }
    }

    /// Of those, the ones whose distance from p is a multiple of `dilation`.
    #[must_use]
    pub fn with_dilation(self, dilation: usize) -> Self {
        Self { dilation, ..self }
    }
}

/// An additive bias, broadcast to (batch, query heads, query length, key length); -infinity masks.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Bias<'a> {
    /// f32.
    F32(Broadcast<'a, f32>),
    /// 16 bits, as they lie in memory.
    Half(HalfKind, Broadcast<'a, u16>),
}

/// T5's relative position bias: a table of (buckets, query heads), indexed by the bucket of key - query position.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct T5Bias<'a> {
    /// Row-major (buckets, query heads).
    pub table: &'a [f32],
    /// Buckets; an even number of at least 2 (bidirectional: 4).
    pub buckets: usize,
    /// Distances from here on share the last bucket; more than half the buckets of one direction.
    pub max_distance: usize,
    /// Whether keys after the query have buckets of their own (encoders), or share that of distance 0 (decoders).
    pub bidirectional: bool,
}

/// Rotary positions of queries.
#[derive(Clone, Copy, Debug)]
pub struct QueryRotary<'a> {
    /// The angles.
    pub table: &'a Rotary,
    /// Per token: of (query length), the same for all batches, or of (batch, query length).
    pub positions: &'a [usize],
}

impl QueryRotary<'_> {
    /// The position of a query.
    pub(crate) fn position(&self, batch: usize, query: usize, query_len: usize) -> usize {
        self.positions[if self.positions.len() == query_len { query } else { batch * query_len + query }]
    }

    /// Rotates a query.
    pub(crate) fn rotate(&self, batch: usize, query: usize, query_len: usize, row: &mut [f32]) {
        self.table.rotate_checked(row, self.position(batch, query, query_len));
    }
}

/// What is asked of a call beyond its tensors. `AttentionSpec::new()` is plain attention; the methods add to it:
///
/// ```
/// use qkv_attention::{AttentionSpec, Causal, Window};
/// let spec = AttentionSpec::new()
///     .with_causal(Causal::BottomRight)
///     .with_window(Window::new(Some(255), None))
///     .with_softcap(30.0);
/// ```
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct AttentionSpec<'a> {
    /// The factor of q . k; `None` is 1 / sqrt(key dim). NaN and infinity are refused.
    pub scale: Option<f32>,
    /// Scores become cap tanh(score / cap); positive and finite.
    pub softcap: Option<f32>,
    /// The causal mask, if any.
    pub causal: Option<Causal>,
    /// A sliding window.
    pub window: Option<Window>,
    /// Per batch: keys below are seen by every query, whatever `causal` says (prefix-LM). Needs `causal`.
    pub prefix: Option<&'a [usize]>,
    /// true = takes part; broadcast to (batch, query heads, query length, key length).
    pub mask: Option<Broadcast<'a, bool>>,
    /// Added to the scores.
    pub bias: Option<Bias<'a>>,
    /// -slope |p - j| is added: slopes of (query heads) or (batch, query heads).
    pub alibi_slopes: Option<&'a [f32]>,
    /// T5's bucketed relative position bias.
    pub t5_bias: Option<T5Bias<'a>>,
    /// Per batch: keys from here on are not there (and bottom-right alignment counts from here).
    pub key_lengths: Option<&'a [usize]>,
    /// Per batch: keys below are not there (left padding). Positions are not shifted.
    pub key_starts: Option<&'a [usize]>,
    /// Packed documents: their ends, in key positions, ascending, the last the key length. A query sees the keys of the
    /// document that its position is in.
    pub documents: Option<&'a [usize]>,
    /// Key blocks that blocks of queries see.
    pub block_mask: Option<&'a BlockMask>,
    /// One logit per query head: joins the maximum and the sum, has no value.
    pub sinks: Option<&'a [f32]>,
    /// Queries are rotated when they are loaded.
    pub rotary: Option<QueryRotary<'a>>,
}

macro_rules! setters {
    ($($(#[$doc:meta])* $name:ident: $field:ident: $t:ty;)*) => {
        $($(#[$doc])* #[must_use] pub fn $name(self, $field: $t) -> Self { Self { $field: Some($field), ..self } })*
    };
}

impl<'a> AttentionSpec<'a> {
    /// Plain attention: every query sees every key, scaled by 1 / sqrt(key dim).
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    setters! {
        /// With this factor instead of 1 / sqrt(key dim).
        with_scale: scale: f32;
        /// With scores capped: cap tanh(score / cap).
        with_softcap: softcap: f32;
        /// With a causal mask.
        with_causal: causal: Causal;
        /// With a sliding window.
        with_window: window: Window;
        /// With prefixes, per batch, that every query sees.
        with_prefix: prefix: &'a [usize];
        /// With a boolean mask, true = takes part.
        with_mask: mask: Broadcast<'a, bool>;
        /// With an additive bias.
        with_bias: bias: Bias<'a>;
        /// With ALiBi slopes, (query heads) or (batch, query heads).
        with_alibi_slopes: alibi_slopes: &'a [f32];
        /// With T5's relative position bias.
        with_t5_bias: t5_bias: T5Bias<'a>;
        /// With key lengths per batch.
        with_key_lengths: key_lengths: &'a [usize];
        /// With left padding: the first key per batch.
        with_key_starts: key_starts: &'a [usize];
        /// With packed documents, given by their ends.
        with_documents: documents: &'a [usize];
        /// With a block-sparse mask.
        with_block_mask: block_mask: &'a BlockMask;
        /// With attention sinks, one logit per query head.
        with_sinks: sinks: &'a [f32];
        /// With queries rotated to their positions when they are loaded; keys are rotated when they are appended to a cache.
        with_rotary: rotary: QueryRotary<'a>;
    }

    /// The factor of q . k for this key dim, unrounded.
    #[must_use]
    pub fn scale_for(&self, key_dim: usize) -> f64 {
        self.scale.map_or_else(|| 1.0 / (key_dim as f64).sqrt(), f64::from)
    }
}

impl<'a> From<TensorRef<'a, f32>> for Bias<'a> {
    fn from(bias: TensorRef<'a, f32>) -> Self {
        Bias::F32(bias.into())
    }
}

/// The part of a range that lies in another.
pub(crate) fn intersect(a: &Range<usize>, b: &Range<usize>) -> Range<usize> {
    let start = a.start.max(b.start);
    start..a.end.min(b.end).max(start)
}
