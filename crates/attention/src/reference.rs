//! Attention by the book, to be checked by eye: three steps, nothing clever.
//!
//! ```text
//! 1. scores   S[i][j] = scale * sum over d of Q[i][d] K[j][d]        for the keys j that query i sees
//! 2. softmax  P[i][j] = exp(S[i][j] - max_j S[i][j]) / sum of the same over j
//! 3. output   O[i][d] = sum over j of P[i][j] V[j][d]
//! ```
//!
//! In f64 ([`oracle`]) it is what every kernel is tested against. In f32 ([`naive`]) it is the baseline of the
//! comparisons: it writes the whole query length x key length matrix of scores, head by head, and
//! [`score_bytes`] says how much memory that is.

use crate::{AttentionSpec, Bias, Causal, HalfKind, Tensor, TensorRef};

/// The arithmetic that the three steps need.
pub trait Real: Copy + Default + PartialOrd + Send + Sync {
    /// From an input value.
    fn from_f32(x: f32) -> Self;
    /// From a value of the f64 arithmetic.
    fn from_f64(x: f64) -> Self;
    /// To a value of the f64 arithmetic.
    fn to_f64(self) -> f64;
    /// Sum.
    fn plus(self, other: Self) -> Self;
    /// Product.
    fn times(self, other: Self) -> Self;
    /// 1 / self.
    fn reciprocal(self) -> Self;
    /// e^self.
    fn exp(self) -> Self;
    /// Natural logarithm.
    fn ln(self) -> Self;
}

macro_rules! impl_real {
    ($t:ty) => {
        impl Real for $t {
            fn from_f32(x: f32) -> Self {
                x.into()
            }
            fn from_f64(x: f64) -> Self {
                x as $t
            }
            fn to_f64(self) -> f64 {
                self.into()
            }
            fn plus(self, other: Self) -> Self {
                self + other
            }
            fn times(self, other: Self) -> Self {
                self * other
            }
            fn reciprocal(self) -> Self {
                self.recip()
            }
            fn exp(self) -> Self {
                <$t>::exp(self)
            }
            fn ln(self) -> Self {
                <$t>::ln(self)
            }
        }
    };
}
impl_real!(f32);
impl_real!(f64);

/// Where a score stands: the arguments of a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Batch.
    pub batch: usize,
    /// Query head.
    pub head: usize,
    /// Query position, from 0.
    pub query: usize,
    /// Key position, from 0.
    pub key: usize,
}

/// What the reference gives: the output, and the natural log of the sum of exponentials, (batch, heads, length).
#[derive(Clone, Debug, PartialEq)]
pub struct Reference<F> {
    /// (batch, query heads, query length, value dim).
    pub output: Tensor<F>,
    /// (batch, query heads, query length), -infinity where a query sees nothing.
    pub lse: Vec<F>,
}

/// Bytes of the score matrix that [`naive`] writes: one head's, reused for the next.
#[must_use]
pub fn score_bytes(query_len: usize, key_len: usize) -> usize {
    query_len * key_len * size_of::<f32>()
}

/// Attention in f64: the oracle.
///
/// # Panics
/// If the shapes do not fit each other; it is a reference, callers pass what the kernels have accepted.
#[must_use]
pub fn oracle(
    q: TensorRef<'_>,
    k: TensorRef<'_>,
    v: TensorRef<'_>,
    spec: &AttentionSpec<'_>,
) -> Reference<f64> {
    let rule = |place, score| final_score(spec, q.shape(), k.shape()[2], place, score);
    with_sinks(by_the_book(q, k, v, spec.scale_for(q.shape()[3]), rule), spec.sinks)
}

/// Attention in f32 with the whole score matrix written down: the naive baseline.
///
/// # Panics
/// As [`oracle`].
#[must_use]
pub fn naive(
    q: TensorRef<'_>,
    k: TensorRef<'_>,
    v: TensorRef<'_>,
    spec: &AttentionSpec<'_>,
) -> Reference<f32> {
    let rule = |place, score| final_score(spec, q.shape(), k.shape()[2], place, f64::from(score)) as f32;
    with_sinks(by_the_book(q, k, v, spec.scale_for(q.shape()[3]) as f32, rule), spec.sinks)
}

/// What the options of a call make of one scaled score: -infinity where the query does not see the key.
///
/// Written option by option from the meanings, without the kernels' arithmetic on ranges.
fn final_score(spec: &AttentionSpec<'_>, q: [usize; 4], keys: usize, place: Place, score: f64) -> f64 {
    let Place { batch, head, query, key } = place;
    let at = [batch, head, query, key];
    let keys = spec.key_lengths.map_or(keys, |lengths| lengths[batch]);
    let position = i128::from(spec.causal.unwrap_or(Causal::BottomRight).offset(q[2], keys)) + query as i128;
    let distance = key as i128 - position;

    let mut score = score;
    if let Some(cap) = spec.softcap.map(f64::from) {
        score = cap * (score / cap).tanh();
    }
    score += match &spec.bias {
        None => 0.0,
        Some(Bias::F32(bias)) => f64::from(bias.get(at)),
        Some(Bias::Half(HalfKind::F16, bias)) => f64::from(half::f16::from_bits(bias.get(at)).to_f32()),
        Some(Bias::Half(HalfKind::Bf16, bias)) => f64::from(half::bf16::from_bits(bias.get(at)).to_f32()),
    };
    if let Some(t5) = &spec.t5_bias {
        score += f64::from(t5.table[crate::panels::t5_bucket(t5, distance as i64) * q[1] + head]);
    }
    if let Some(slopes) = spec.alibi_slopes {
        let slope = if slopes.len() == q[1] { slopes[head] } else { slopes[batch * q[1] + head] };
        score -= f64::from(slope) * distance.unsigned_abs() as f64;
    }

    let mut sees = key < keys && spec.key_starts.is_none_or(|starts| key >= starts[batch]);
    if spec.causal.is_some() {
        sees &= distance <= 0 || spec.prefix.is_some_and(|prefix| key < prefix[batch]);
    }
    if let Some(window) = &spec.window {
        sees &= window.left.is_none_or(|left| -distance <= left as i128);
        sees &= window.right.is_none_or(|right| distance <= right as i128);
        sees &= distance % window.dilation as i128 == 0;
    }
    if let Some(ends) = spec.documents {
        let document_of = |p: i128| ends.iter().filter(|&&end| end as i128 <= p).count();
        sees &= position >= 0 && document_of(position) == document_of(key as i128);
    }
    sees &= spec.mask.is_none_or(|mask| mask.get(at));
    sees &= spec.block_mask.is_none_or(|blocks| blocks.sees(batch, head, query, key));
    // A bias of -infinity hides the score, whatever it was.
    let hidden = match &spec.bias {
        Some(Bias::F32(bias)) => bias.get(at) == f32::NEG_INFINITY,
        Some(Bias::Half(HalfKind::F16, bias)) => {
            half::f16::from_bits(bias.get(at)) == half::f16::NEG_INFINITY
        }
        Some(Bias::Half(HalfKind::Bf16, bias)) => {
            half::bf16::from_bits(bias.get(at)) == half::bf16::NEG_INFINITY
        }
        None => false,
    };
    if sees && !hidden { score } else { f64::NEG_INFINITY }
}

/// Joins the heads' sinks to a result: they take part in the sum and have no value.
fn with_sinks<F: Real>(mut result: Reference<F>, sinks: Option<&[f32]>) -> Reference<F> {
    let Some(sinks) = sinks else { return result };
    let [_, heads, length, dim] = result.output.shape();
    for (row, lse) in result.lse.iter_mut().enumerate() {
        let (sink, without) = (f64::from(sinks[row / length % heads]), lse.to_f64());
        let max = without.max(sink);
        if max == f64::NEG_INFINITY {
            continue;
        }
        let joint = max + ((without - max).exp() + (sink - max).exp()).ln();
        let share = F::from_f64((without - joint).exp());
        result.output.data_mut()[row * dim..][..dim].iter_mut().for_each(|o| *o = o.times(share));
        *lse = F::from_f64(joint);
    }
    result
}

/// The three steps, with a rule that may change a score; -infinity masks it.
///
/// # Panics
/// As [`oracle`].
#[must_use]
pub fn by_the_book<F: Real>(
    q: TensorRef<'_>,
    k: TensorRef<'_>,
    v: TensorRef<'_>,
    scale: F,
    rule: impl Fn(Place, F) -> F,
) -> Reference<F> {
    let [batches, heads, query_len, _] = q.shape();
    let [_, kv_heads, key_len, _] = k.shape();
    let dim = v.shape()[3];
    let zero = F::from_f32(0.0);
    let masked = F::from_f32(f32::NEG_INFINITY);
    let mut output = Vec::with_capacity(batches * heads * query_len * dim);
    let mut lse = Vec::with_capacity(batches * heads * query_len);
    let mut scores = vec![zero; query_len * key_len];

    for batch in 0..batches {
        for head in 0..heads {
            let kv_head = head / (heads / kv_heads);

            // 1. Scores.
            for query in 0..query_len {
                for key in 0..key_len {
                    let mut dot = zero;
                    for (&a, &b) in q.row(batch, head, query).iter().zip(k.row(batch, kv_head, key)) {
                        dot = dot.plus(F::from_f32(a).times(F::from_f32(b)));
                    }
                    let place = Place { batch, head, query, key };
                    scores[query * key_len + key] = rule(place, dot.times(scale));
                }
            }

            for query in 0..query_len {
                let row = &mut scores[query * key_len..][..key_len];

                // 2. Softmax, each row less its maximum so that nothing overflows; a row without keys is all zeros.
                let minus = F::from_f32(-1.0);
                let max = row.iter().fold(masked, |max, &s| if s > max { s } else { max });
                let mut sum = zero;
                for s in row.iter_mut() {
                    *s = if *s == masked { zero } else { s.plus(max.times(minus)).exp() };
                    sum = sum.plus(*s);
                }
                lse.push(if max == masked && sum == zero { masked } else { max.plus(sum.ln()) });

                // 3. The weighted sum of the values; a masked value does not take part, whatever it is.
                let mut out = vec![zero; dim];
                for (key, &weight) in row.iter().enumerate() {
                    if weight != zero {
                        for (o, &x) in out.iter_mut().zip(v.row(batch, kv_head, key)) {
                            *o = o.plus(weight.times(F::from_f32(x)));
                        }
                    }
                }
                let inverse = if sum == zero { zero } else { F::reciprocal(sum) };
                output.extend(out.into_iter().map(|o| o.times(inverse)));
            }
        }
    }
    let shape = [batches, heads, query_len, dim];
    Reference { output: Tensor::from_vec(output, shape).expect("its own shape"), lse }
}
