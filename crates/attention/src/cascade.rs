//! A prefix that all sequences of a batch share (a system prompt, beams of one search), and the keys of each: cascade
//! attention (Juravsky et al. 2024, arXiv:2402.05099).
//!
//! The prefix is stored once, and read once per query position for all sequences together: their queries are rows of one
//! problem. Each sequence's own keys are a second one, and the two results are merged by their log-sum-exps (merge.rs).

use crate::check::{check_axis, check_inputs};
use crate::merge::{self, Part};
use crate::tensor::has_room;
use crate::{
    Argument, AttentionError, AttentionSpec, Data, Outputs, QueryRotary, Tensor, TensorMut, attention_into,
};

/// Keys and values.
#[derive(Clone, Copy, Debug)]
pub struct KeysValues<'a> {
    /// (batch, key/value heads, key length, key dim).
    pub keys: Data<'a>,
    /// (batch, key/value heads, key length, value dim).
    pub values: Data<'a>,
}

impl<'a> KeysValues<'a> {
    /// The two together.
    pub fn new(keys: impl Into<Data<'a>>, values: impl Into<Data<'a>>) -> Self {
        Self { keys: keys.into(), values: values.into() }
    }
}

/// Attention of q (batch, query heads, query length, key dim) over the keys of `shared`, whose batch is 1, and then over
/// each batch's own.
///
/// Every query sees all of the prefix. The spec is about a batch's own keys: `causal` aligns queries with them, and
/// `key_lengths` counts them; sinks are counted once. Beside inputs and outputs this takes two buffers of the output's size, in f32.
///
/// # Errors
/// As [`attention_into`]; where the prefix's batch is not 1, or its heads or dims are not those of the own keys; and for
/// masks, biases, windows and all else that would have to know where in the prefix a key is.
pub fn attention_cascade<'a>(
    q: impl Into<Data<'a>>,
    shared: KeysValues<'_>,
    own: KeysValues<'_>,
    spec: &AttentionSpec<'_>,
    outputs: Outputs<'_>,
) -> Result<(), AttentionError> {
    let q = q.into();
    for (argument, given) in [
        ("window", spec.window.is_some()),
        ("prefix", spec.prefix.is_some()),
        ("mask", spec.mask.is_some()),
        ("bias", spec.bias.is_some()),
        ("alibi_slopes", spec.alibi_slopes.is_some()),
        ("t5_bias", spec.t5_bias.is_some()),
        ("key_starts", spec.key_starts.is_some()),
        ("documents", spec.documents.is_some()),
        ("block_mask", spec.block_mask.is_some()),
        ("maxima", outputs.maxima.is_some()),
    ] {
        if given {
            return Err(AttentionError::NotTogether { argument, with: "a shared prefix" });
        }
    }
    let shape = check_inputs(q.shape(), own.keys.shape(), own.values.shape(), spec)?;
    let expected_keys = [1, shape.kv_heads, shared.keys.shape()[2], shape.key_dim];
    let expected_values = [1, shape.kv_heads, shared.keys.shape()[2], shape.value_dim];
    for (axis, name) in ["batch", "heads", "length", "head dim"].into_iter().enumerate() {
        let given = [shared.keys.shape()[axis], shared.values.shape()[axis]];
        check_axis(Argument::Key, name, given[0], expected_keys[axis], Argument::Query)?;
        check_axis(Argument::Value, name, given[1], expected_values[axis], Argument::Key)?;
    }
    let (batch, heads, length, dim) = (shape.batch, shape.query_heads, shape.query_len, shape.value_dim);
    let sizes = [batch, heads, length, dim];
    crate::forward::check_output(&shape, &outputs.out)?;
    let rows = batch.saturating_mul(heads).saturating_mul(length);
    if let Some(lse) = &outputs.lse
        && lse.len() != rows
    {
        let (given, argument) = (lse.len(), Argument::Lse);
        return Err(AttentionError::LseLength { argument, given, expected: rows });
    }
    if rows == 0 {
        return Ok(());
    }
    // Of rows without dims there may be more than there is memory for their LSEs.
    if !has_room::<f32>(rows.saturating_mul(3)) {
        return Err(AttentionError::TooLarge { shape: sizes });
    }
    let new = || Tensor::zeros(sizes).map_err(|_| AttentionError::TooLarge { shape: sizes });
    let (mut of_own, mut of_shared) = (new()?, new()?);
    let (mut own_lse, mut shared_lse) = (vec![0.0; rows], vec![0.0; rows]);
    let to = Outputs::new(of_own.view_mut()).with_lse(&mut own_lse);
    attention_into(q, own.keys, own.values, spec, to)?;

    let mut lse_of_position = vec![0.0; heads * batch];
    for position in 0..length {
        let positions: Vec<usize> = match &spec.rotary {
            Some(rotary) => (0..batch).map(|batch| rotary.position(batch, position, length)).collect(),
            None => Vec::new(),
        };
        let rotary = spec.rotary.map(|rotary| QueryRotary { positions: &positions, ..rotary });
        let spec = AttentionSpec { scale: spec.scale, softcap: spec.softcap, rotary, ..AttentionSpec::new() };
        let strides = [0, (length * dim) as isize, (heads * length * dim) as isize, 1];
        let out = TensorMut::from_slice_strided(
            of_shared.data_mut(),
            if rows * dim == 0 { 0 } else { position * dim },
            [1, heads, batch, dim],
            strides,
        )
        .map_err(|_| AttentionError::TooLarge { shape: sizes })?;
        let to = Outputs::new(out).with_lse(&mut lse_of_position);
        attention_into(q.across_batches(position), shared.keys, shared.values, &spec, to)?;
        for (i, &lse) in lse_of_position.iter().enumerate() {
            let (head, batch) = (i / batch, i % batch);
            shared_lse[(batch * heads + head) * length + position] = lse;
        }
    }

    let (a, b) =
        (Part { out: of_shared.view(), lse: &shared_lse }, Part { out: of_own.view(), lse: &own_lse });
    let mut joint = Vec::new();
    let lse = match outputs.lse {
        Some(lse) => lse,
        None => {
            joint.resize(rows, 0.0);
            &mut joint
        }
    };
    merge::merge(a, b, outputs.out, lse)
}
