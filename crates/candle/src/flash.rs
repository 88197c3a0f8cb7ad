//! Drop-ins for candle-nn's CPU flash attention (`candle_nn::attention`): the same arguments, shapes, types and meanings.
//!
//! Where candle-nn contradicts itself from one of its paths to the next, the call is refused instead of one of them chosen
//! silently; each function says where.

use candle_core::{DType, Result, Tensor, WithDType};
use candle_nn::attention::AttnMask;
use qkv::{Causal, Window};

use crate::options::{Axes, Options};
use crate::{Call, view};

/// `candle_nn::attention::flash_attn`.
///
/// - `q`: (batch, query length, query heads, dim); `k`, `v`: (batch, kv length, kv heads, dim); all of type `T`.
/// - `softmax_scale`: the factor of q . k.
/// - `attn_mask`: [`AttnMask::Causal`]: query i sees key j where j <= i + `kv_offset`; a single query sees every key, whatever
///   the offset. [`AttnMask::Mask`]: added to the scores, -infinity masks, any shape that broadcasts to (batch, heads, query
///   length, kv length).
/// - `max_bias`: ALiBi with slopes 2^(-`max_bias` (h + 1) / n), n being the number of heads rounded up to a power of two. With
///   [`AttnMask::Mask`] the slopes are factors of the mask instead, which costs one scaled copy of it at a time.
/// - `softcap`: scores become cap tanh(score / cap). 0 means none for this one and for `max_bias`.
///
/// The result is (batch, heads, query length, dim): f32 for one batch, `T` for several.
///
/// More is accepted than there: bf16, soft caps and masks with several batches, masks per head. Less: a causal `kv_offset`
/// other than kv length - query length with several batches, and `max_bias` without a mask for one batch, both of which
/// candle-nn ignores. And one result differs: for a single f32 query of one batch with a soft cap and without `max_bias`,
/// candle-nn adds the distance to the last key to the scores; here nothing is added.
///
/// # Errors
/// As [`crate::attention`], and for the above.
pub fn flash_attn<T: WithDType>(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    softmax_scale: f32,
    attn_mask: AttnMask,
    max_bias: Option<f32>,
    softcap: Option<f32>,
) -> Result<Tensor> {
    for (argument, tensor) in [("query", q), ("key", k), ("value", v)] {
        view::check(argument, tensor, 4)?;
        check_type::<T>(argument, tensor)?;
    }
    let (batch, length, heads, _) = q.dims4()?;
    let kv_length = k.dims4()?.1;
    let max_bias = max_bias.unwrap_or(0.0);
    if !(max_bias.is_finite() && max_bias >= 0.0) {
        let text = format_args!("{max_bias}, expected a finite number of at least 0");
        return Err(view::refuse_argument("max_bias", text));
    }
    let mut options = Options::new().with_axes(Axes::Bshd).with_scale(softmax_scale);
    options.softcap = softcap.filter(|&cap| cap != 0.0);
    if max_bias > 0.0 && !matches!(attn_mask, AttnMask::Mask(_)) {
        let slopes = alibi_slopes(max_bias, heads);
        options.alibi_slopes = Some(Tensor::from_vec(slopes, heads, q.device())?);
    }
    let call = Call { out_dtype: (batch == 1).then_some(DType::F32), ..Call::default() };
    match attn_mask {
        AttnMask::None if max_bias > 0.0 && batch == 1 => Err(view::refuse_argument(
            "max_bias",
            "not supported without a mask for one batch, where candle-nn ignores it; use Options::with_alibi_slopes",
        )),
        AttnMask::None => Ok(call.run([q, k, v], &options)?.0),
        AttnMask::Causal { kv_offset } => {
            options.causal = causal(kv_offset, batch, length, kv_length)?;
            Ok(call.run([q, k, v], &options)?.0)
        }
        AttnMask::Mask(mask) => {
            if max_bias > 0.0 {
                view::check_kind("attn_mask", &mask)?;
                view::check_no_gradient("attn_mask", &mask)?;
                return with_scaled_mask([q, k, v], &options, &mask, &alibi_slopes(max_bias, heads), call);
            }
            let options = options.with_bias_named("attn_mask", mask);
            Ok(call.run([q, k, v], &options)?.0)
        }
    }
}

/// `candle_nn::cpu_flash_attention::run_flash_attn_cpu`, the older name: [`flash_attn`] with a mask that is added, or none.
///
/// # Errors
/// As [`flash_attn`].
pub fn run_flash_attn_cpu<T: WithDType>(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: Option<&Tensor>,
    softmax_scale: f32,
    max_bias: Option<f32>,
    softcap: Option<f32>,
) -> Result<Tensor> {
    let mask = mask.map_or(AttnMask::None, |mask| AttnMask::Mask(mask.clone()));
    flash_attn::<T>(q, k, v, softmax_scale, mask, max_bias, softcap)
}

/// `candle_nn::attention::flash_attn_varlen_cpu`: sequences of different lengths packed one after the other.
///
/// - `q`: (total query length, query heads, dim); `k`, `v`: (total kv length, kv heads, dim).
/// - `alibi_slopes`: (query heads), f32; the bias is -slope times the distance to the query's position.
/// - `seqlens_q`, `seqlens_k`: (sequences), u32, the lengths themselves (not their sums).
/// - `max_seqlen_q`, `max_seqlen_k`: not needed, and not read; there neither.
/// - `causal`: the sequences end together, and none may have fewer keys than queries.
/// - `window_left`, `window_right`: keys p - left ..= p + right of the query's position p; a left one alone is causal too.
///
/// The result is (total query length, query heads, dim) in `q`'s type, which may be bf16 as well.
///
/// # Errors
/// As [`crate::attention`]; where the lengths do not add up; for `window_right` without `window_left`, where candle-nn gives
/// zeros.
#[expect(clippy::too_many_arguments, reason = "the signature that it stands in for")]
pub fn flash_attn_varlen(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: Option<&Tensor>,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    max_seqlen_q: usize,
    max_seqlen_k: usize,
    softmax_scale: f32,
    causal: bool,
    window_left: Option<usize>,
    window_right: Option<usize>,
) -> Result<Tensor> {
    let _ = (max_seqlen_q, max_seqlen_k);
    for (argument, tensor) in [("query", q), ("key", k), ("value", v)] {
        view::check(argument, tensor, 3)?;
    }
    let (query_ends, key_ends) = (ends("seqlens_q", seqlens_q)?, ends("seqlens_k", seqlens_k)?);
    if query_ends.len() != key_ends.len() {
        let text =
            format_args!("{} lengths, expected {}, as seqlens_q", key_ends.len() - 1, query_ends.len() - 1);
        return Err(view::refuse_argument("seqlens_k", text));
    }
    for (argument, ends, tensor, of) in [("seqlens_q", &query_ends, q, "q"), ("seqlens_k", &key_ends, k, "k")]
    {
        let (given, expected) = (ends.last().copied().unwrap_or(0), tensor.dims()[0]);
        if given != expected {
            let text = format_args!("the sum is {given}, expected the first size of {of}, {expected}");
            return Err(view::refuse_argument(argument, text));
        }
    }
    let mut options = Options::new().with_scale(softmax_scale);
    if causal {
        for (index, (query, key)) in query_ends.windows(2).zip(key_ends.windows(2)).enumerate() {
            let (queries, keys) = (query[1] - query[0], key[1] - key[0]);
            if keys < queries {
                let text =
                    format_args!("{keys} keys for {queries} queries of sequence {index}, expected no fewer");
                return Err(view::refuse_argument("seqlens_k", text));
            }
        }
        options.causal = Some(Causal::BottomRight);
    }
    options.window = match (window_left, window_right) {
        (None, None) => None,
        (Some(left), None) => Some(Window::new(Some(left), Some(0))),
        (Some(left), Some(right)) => Some(Window::new(Some(left), Some(right))),
        (None, Some(_)) => {
            return Err(view::refuse_argument("window_right", "not supported without window_left"));
        }
    };
    options.alibi_slopes = alibi_slopes.cloned();
    // (total, heads, dim) is (batch 1, total, heads, dim).
    let [q, k, v] = [q.unsqueeze(0)?, k.unsqueeze(0)?, v.unsqueeze(0)?];
    options.axes = Axes::Bshd;
    let call = Call { out_axes: Axes::Bshd, packed: Some([query_ends, key_ends]), ..Call::default() };
    call.run([&q, &k, &v], &options)?.0.squeeze(0)
}

/// Refuses a tensor that is not of the type that the caller names.
fn check_type<T: WithDType>(argument: &str, tensor: &Tensor) -> Result<()> {
    let (given, expected) = (tensor.dtype(), T::DTYPE);
    if given == expected {
        return Ok(());
    }
    let text = format_args!("{}, expected {}, as the call says", given.as_str(), expected.as_str());
    Err(view::refuse_argument(argument, text))
}

/// 2^(-max_bias (h + 1) / n), n being the number of heads rounded up to a power of two.
fn alibi_slopes(max_bias: f32, heads: usize) -> Vec<f32> {
    let rounded_up = heads.next_power_of_two() as f32;
    (0..heads).map(|head| (-max_bias * (head + 1) as f32 / rounded_up).exp2()).collect()
}

/// The alignment of a causal mask, or none where every query sees every key.
fn causal(kv_offset: usize, batch: usize, length: usize, kv_length: usize) -> Result<Option<Causal>> {
    if length == 1 {
        return Ok(None);
    }
    // What several batches get there, whatever the offset says.
    if batch > 1 && Some(kv_offset) != kv_length.checked_sub(length) {
        let text = format_args!(
            "kv_offset {kv_offset} with {batch} batches, expected kv length - query length = {kv_length} - {length}"
        );
        return Err(view::refuse_argument("attn_mask", text));
    }
    let offset = i64::try_from(kv_offset).map_err(|_| {
        view::refuse_argument("attn_mask", format_args!("kv_offset {kv_offset} is too large"))
    })?;
    Ok(Some(Causal::Offset(offset)))
}

/// Each head with the mask times its slope, one scaled copy of the mask at a time.
fn with_scaled_mask(
    [q, k, v]: [&Tensor; 3],
    options: &Options,
    mask: &Tensor,
    slopes: &[f32],
    call: Call,
) -> Result<Tensor> {
    let (heads, kv_heads) = (q.dims4()?.2, k.dims4()?.2);
    if heads == 0 || kv_heads == 0 || heads % kv_heads != 0 || v.dims4()?.2 != kv_heads {
        // The operator's own refusal, for the whole.
        return Ok(call.run([q, k, v], options)?.0);
    }
    let mask = mask.to_dtype(DType::F32)?;
    let heads_of_mask = if mask.rank() >= 3 { mask.dims()[mask.rank() - 3] } else { 1 };
    let mut outputs = Vec::with_capacity(heads);
    for (head, &slope) in slopes.iter().enumerate() {
        let own = if heads_of_mask > 1 && heads_of_mask == heads {
            mask.narrow(mask.rank() - 3, head, 1)?
        } else {
            mask.clone()
        };
        let options = options.clone().with_bias_named("attn_mask", (own * f64::from(slope))?);
        let kv_head = head / (heads / kv_heads);
        let of_head = [q.narrow(2, head, 1)?, k.narrow(2, kv_head, 1)?, v.narrow(2, kv_head, 1)?];
        outputs.push(call.clone().run([&of_head[0], &of_head[1], &of_head[2]], &options)?.0);
    }
    Tensor::cat(&outputs, 1)
}

/// Sums of lengths, from 0 on.
fn ends(argument: &str, lengths: &Tensor) -> Result<Vec<usize>> {
    view::check_on_cpu(argument, lengths)?;
    if lengths.dtype() != DType::U32 || lengths.rank() != 1 {
        let text = format_args!(
            "{} of shape {:?}, expected u32 of shape (sequences)",
            lengths.dtype().as_str(),
            lengths.dims()
        );
        return Err(view::refuse_argument(argument, text));
    }
    let mut ends = vec![0usize];
    for length in lengths.to_vec1::<u32>()? {
        let end = ends.last().copied().unwrap_or(0).checked_add(length as usize);
        ends.push(end.ok_or_else(|| view::refuse_argument(argument, "the sum is too large"))?);
    }
    Ok(ends)
}
