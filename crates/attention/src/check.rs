//! The border: everything that a caller can get wrong is looked at here, before anything is written; inside, indices are
//! trusted.

use crate::shape::Shape;
use crate::{Argument, AttentionError, AttentionSpec, Bias};

/// Positions are counted in i64 and compared with offsets; this leaves room for their sums.
pub(crate) const MAX_LENGTH: usize = 1 << 48;

/// Up to here a position is exact in f32, which is what a caller's rule and ALiBi get to see.
const MAX_LENGTH_IN_F32: usize = 1 << 24;

/// Shapes of queries, keys and values, and the spec.
pub(crate) fn check_inputs(
    q: [usize; 4],
    k: [usize; 4],
    v: [usize; 4],
    spec: &AttentionSpec<'_>,
) -> Result<Shape, AttentionError> {
    let [batch, query_heads, query_len, key_dim] = q;
    let [_, kv_heads, key_len, value_dim] = [0, k[1], k[2], v[3]];
    let shape = Shape { batch, query_heads, kv_heads, query_len, key_len, key_dim, value_dim };

    let axes = ["batch", "heads", "length", "head dim"];
    let expected_of_key = [batch, kv_heads, key_len, key_dim];
    let expected_of_value = [batch, kv_heads, key_len, value_dim];
    for (axis, name) in axes.into_iter().enumerate() {
        check_axis(Argument::Key, name, k[axis], expected_of_key[axis], Argument::Query)?;
        let origin = if axis == 0 { Argument::Query } else { Argument::Key };
        check_axis(Argument::Value, name, v[axis], expected_of_value[axis], origin)?;
    }
    for (argument, axis, size) in [
        (Argument::Query, "heads", query_heads),
        (Argument::Key, "heads", kv_heads),
        (Argument::Query, "head dim", key_dim),
    ] {
        if size == 0 {
            return Err(AttentionError::ZeroSize { argument, axis });
        }
    }
    if query_heads % kv_heads != 0 {
        return Err(AttentionError::HeadsNotDivisible { query_heads, kv_heads });
    }
    for (argument, given) in [(Argument::Query, query_len), (Argument::Key, key_len)] {
        if given > MAX_LENGTH {
            return Err(AttentionError::TooLong { argument, given, limit: MAX_LENGTH });
        }
    }
    check_spec(&shape, spec)?;
    Ok(shape)
}

pub(crate) fn check_axis(
    argument: Argument,
    axis: &'static str,
    given: usize,
    expected: usize,
    because_of: Argument,
) -> Result<(), AttentionError> {
    if given == expected {
        Ok(())
    } else {
        Err(AttentionError::ShapeMismatch { argument, axis, given, expected, because_of })
    }
}

/// Everything in the spec that can be wrong for these sizes. Lists per batch are checked by [`check_per_sequence`].
fn check_spec(shape: &Shape, spec: &AttentionSpec<'_>) -> Result<(), AttentionError> {
    if let Some(given) = spec.scale.filter(|scale| !scale.is_finite()) {
        return Err(AttentionError::BadScale { given });
    }
    if let Some(given) = spec.softcap.filter(|cap| !(cap.is_finite() && *cap > 0.0)) {
        return Err(AttentionError::BadSoftcap { given });
    }
    if let Some(cap) = spec.softcap
        && shape.key_dim > 0
        && !((spec.scale_for(shape.key_dim) / f64::from(cap)) as f32).is_finite()
    {
        return Err(AttentionError::BadSoftcap { given: cap });
    }
    if spec.window.is_some_and(|window| window.dilation == 0) {
        return Err(AttentionError::ZeroDilation);
    }
    if spec.prefix.is_some() && spec.causal.is_none() {
        return Err(AttentionError::NotTogether { argument: "prefix", with: "no causal mask" });
    }
    let full = [shape.batch, shape.query_heads, shape.query_len, shape.key_len];
    let broadcasts = |argument, given, fits| {
        if fits { Ok(()) } else { Err(AttentionError::DoesNotBroadcast { argument, given, expected: full }) }
    };
    if let Some(mask) = &spec.mask {
        broadcasts("mask", mask.shape(), mask.fits(full))?;
    }
    match &spec.bias {
        Some(Bias::F32(bias)) => broadcasts("bias", bias.shape(), bias.fits(full))?,
        Some(Bias::Half(_, bias)) => broadcasts("bias", bias.shape(), bias.fits(full))?,
        None => {}
    }
    if let Some(blocks) = spec.block_mask {
        let [query, key] = blocks.block();
        let expected =
            [shape.batch, shape.query_heads, shape.query_len.div_ceil(query), shape.key_len.div_ceil(key)];
        let given = blocks.shape();
        let fits = (0..2).all(|axis| given[axis] == expected[axis] || given[axis] == 1)
            && given[2..] == expected[2..];
        if !fits {
            return Err(AttentionError::DoesNotBroadcast { argument: "block_mask", given, expected });
        }
    }
    if let Some(sinks) = spec.sinks {
        count("sinks", sinks.len(), shape.query_heads)?;
        entries("sinks", sinks, "a number below infinity", |x| x < f32::INFINITY)?;
    }
    if let Some(slopes) = spec.alibi_slopes {
        entries("alibi_slopes", slopes, "a finite number", f32::is_finite)?;
        short_enough(shape)?;
    }
    if let Some(rotary) = &spec.rotary {
        let (table, positions) = (rotary.table, rotary.positions);
        if table.head_dim() != shape.key_dim {
            let (given, expected) = (table.head_dim(), shape.key_dim);
            return Err(AttentionError::Count { argument: "rotary.table", given, expected });
        }
        if positions.len() != shape.query_len {
            count("rotary.positions", positions.len(), shape.batch.saturating_mul(shape.query_len))?;
        }
        if let Some(index) = positions.iter().position(|&p| p >= table.max_length()) {
            let (given, limit) = (positions[index], table.max_length().saturating_sub(1));
            return Err(AttentionError::Beyond { argument: "rotary.positions", index, given, limit });
        }
    }
    if let Some(t5) = &spec.t5_bias {
        let per_side = if t5.bidirectional { t5.buckets / 2 } else { t5.buckets };
        if t5.buckets % 2 != 0 || per_side < 2 || t5.max_distance <= per_side / 2 {
            return Err(AttentionError::BadT5Bias {
                buckets: t5.buckets,
                max_distance: t5.max_distance,
                expected: "an even number of at least 2 (bidirectional: 4), and a distance beyond the exact buckets",
            });
        }
        count("t5_bias", t5.table.len(), t5.buckets.saturating_mul(shape.query_heads))?;
    }
    Ok(())
}

/// What is given per sequence: `sequences` of them, with these key lengths at most.
pub(crate) fn check_per_sequence(
    shape: &Shape,
    spec: &AttentionSpec<'_>,
    sequences: usize,
) -> Result<(), AttentionError> {
    for (argument, list) in
        [("prefix", spec.prefix), ("key_lengths", spec.key_lengths), ("key_starts", spec.key_starts)]
    {
        let Some(list) = list else { continue };
        count(argument, list.len(), sequences)?;
        for (index, &given) in list.iter().enumerate() {
            if given > shape.key_len {
                return Err(AttentionError::Beyond { argument, index, given, limit: shape.key_len });
            }
        }
    }
    if let Some(slopes) = spec.alibi_slopes
        && slopes.len() != shape.query_heads
    {
        count("alibi_slopes", slopes.len(), sequences.saturating_mul(shape.query_heads))?;
    }
    if let Some(ends) = spec.documents {
        ascending("documents", ends, shape.key_len)?;
        if ends.last().copied().unwrap_or(0) != shape.key_len {
            let given = ends.last().copied().unwrap_or(0);
            return Err(AttentionError::Count { argument: "documents", given, expected: shape.key_len });
        }
    }
    Ok(())
}

/// Refuses sequences whose positions a caller's rule could not tell apart.
pub(crate) fn short_enough(shape: &Shape) -> Result<(), AttentionError> {
    for (argument, given) in [(Argument::Query, shape.query_len), (Argument::Key, shape.key_len)] {
        if given > MAX_LENGTH_IN_F32 {
            return Err(AttentionError::TooLong { argument, given, limit: MAX_LENGTH_IN_F32 });
        }
    }
    Ok(())
}

/// Refuses a list that descends somewhere or goes beyond `limit`.
pub(crate) fn ascending(argument: &'static str, list: &[usize], limit: usize) -> Result<(), AttentionError> {
    for (index, &given) in list.iter().enumerate() {
        let before = if index == 0 { 0 } else { list[index - 1] };
        if given < before {
            return Err(AttentionError::Decreasing { argument, index, given, before });
        }
        if given > limit {
            return Err(AttentionError::Beyond { argument, index, given, limit });
        }
    }
    Ok(())
}

pub(crate) fn count(argument: &'static str, given: usize, expected: usize) -> Result<(), AttentionError> {
    if given == expected { Ok(()) } else { Err(AttentionError::Count { argument, given, expected }) }
}

fn entries(
    argument: &'static str,
    list: &[f32],
    expected: &'static str,
    good: impl Fn(f32) -> bool,
) -> Result<(), AttentionError> {
    match list.iter().position(|&x| !good(x)) {
        None => Ok(()),
        Some(index) => {
            Err(AttentionError::Entry { argument, index, given: f64::from(list[index]), expected })
        }
    }
}
