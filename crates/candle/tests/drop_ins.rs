//! The drop-ins against what they stand in for: candle-nn's flash attention, and attention written out.

mod common;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::attention::{AttnMask, flash_attn_varlen_cpu};
use common::{Random, as_bhsd, assert_close, assert_same, oracle, values};
use half::{bf16, f16};
use qkv_candle::{Axes, Causal, Options, flash_attn, flash_attn_varlen, run_flash_attn_cpu, sdpa};

/// Equal to what candle gives, as far as candle is exact: for 16 bits some of its paths round every score to the type.
fn assert_like_candle(given: &Tensor, expected: &Tensor, inputs: DType, what: &str) -> Result<()> {
    if inputs == DType::F32 {
        return assert_same(given, expected, what);
    }
    assert_eq!(given.dims(), expected.dims(), "{what}");
    assert_eq!(given.dtype(), expected.dtype(), "{what}");
    let limit = if inputs == DType::F16 { 0.01 } else { 0.08 };
    for (a, b) in values(given)?.into_iter().zip(values(expected)?) {
        assert!((a - b).abs() <= limit, "{what}: {a} and {b}");
    }
    Ok(())
}

type Flash = fn(&Tensor, &Tensor, &Tensor, f32, AttnMask, Option<f32>, Option<f32>) -> Result<Tensor>;

/// Cases that candle-nn computes.
fn flash_cases(r: &mut Random, count: usize, dtype: DType, [ours, candles]: [Flash; 2]) -> Result<()> {
    for case in 0..count {
        let several = dtype != DType::BF16 && r.one_in(3);
        let b = if several { r.between(2, 3) } else { 1 };
        let (kv_heads, group, d) = (r.between(1, 3), r.between(1, 3), r.between(1, 40));
        let (s, h) = (r.pick(&[1, 1, 2, 7, 20]), kv_heads * group);
        let t = s + r.between(0, 30);
        let bshd = |r: &mut Random, heads, length| -> Result<Tensor> {
            let x = if several {
                r.tensor(&[b, heads, length, d], dtype)?
            } else {
                // Candle's kernels for one batch read strided tensors as well, but for the last axis of q and k.
                let x = r.strided([b, heads, length, d], dtype)?;
                if x.stride()[3] == 1 { x } else { x.contiguous()? }
            };
            x.transpose(1, 2)
        };
        let (q, k, v) = (bshd(r, h, s)?, bshd(r, kv_heads, t)?, bshd(r, kv_heads, t)?);
        let mask = match r.between(0, if several { 1 } else { 2 }) {
            0 => AttnMask::None,
            1 => {
                AttnMask::causal_with_offset(if several || r.one_in(2) { t - s } else { r.between(0, t + 2) })
            }
            _ => {
                let mut mask = r.floats(s * t);
                mask.iter_mut().for_each(|x| {
                    if r.one_in(5) {
                        *x = f32::NEG_INFINITY;
                    }
                });
                let mask = Tensor::from_vec(mask, (s, t), &Device::Cpu)?.to_dtype(dtype)?;
                AttnMask::Mask(if r.one_in(2) { mask.reshape((1, 1, s, t))? } else { mask })
            }
        };
        let max_bias = r.pick(&[None, None, Some(0.0), Some(8.0), Some(1.5)]);
        let softcap = r.pick(&[None, Some(0.0), Some(2.5)]).filter(|_| !several);
        let biased = max_bias.is_some_and(|x| x > 0.0);
        // Where candle ignores an argument, or adds what was not asked for; see `flash_attn`.
        if biased && !several && matches!(mask, AttnMask::None)
            || s == 1 && !biased && softcap.is_some_and(|x| x > 0.0) && mask.is_causal()
        {
            continue;
        }
        let scale = r.float();
        let what = format!(
            "{:?} case {case}: q {:?} k {:?} scale {scale} {mask:?} max_bias {max_bias:?} softcap {softcap:?}",
            dtype,
            q.layout(),
            k.layout()
        );
        let expected = candles(&q, &k, &v, scale, mask.clone(), max_bias, softcap)?;
        let given = ours(&q, &k, &v, scale, mask, max_bias, softcap)?;
        assert_like_candle(&given, &expected, dtype, &what)?;
    }
    Ok(())
}

#[test]
fn flash_attention_is_candles() -> Result<()> {
    use candle_nn::attention::flash_attn as candles;
    flash_cases(&mut Random(1), 300, DType::F32, [flash_attn::<f32>, candles::<f32>])?;
    flash_cases(&mut Random(2), 100, DType::F16, [flash_attn::<f16>, candles::<f16>])?;
    flash_cases(&mut Random(3), 60, DType::BF16, [flash_attn::<bf16>, candles::<bf16>])
}

#[test]
fn the_older_name() -> Result<()> {
    let mut r = Random(4);
    let [q, k, v] = [0; 3].map(|_| r.tensor(&[1, 6, 2, 8], DType::F32).unwrap());
    let mask = r.tensor(&[6, 6], DType::F32)?;
    for mask in [None, Some(&mask)] {
        #[expect(deprecated, reason = "what it stands in for")]
        let expected =
            candle_nn::cpu_flash_attention::run_flash_attn_cpu::<f32>(&q, &k, &v, mask, 0.3, None, None)?;
        assert_same(&run_flash_attn_cpu::<f32>(&q, &k, &v, mask, 0.3, None, None)?, &expected, "older name")?;
    }
    Ok(())
}

/// What candle refuses or gets wrong, against the f64 reference.
#[test]
fn what_flash_attention_does_beyond_candles() -> Result<()> {
    let mut r = Random(5);
    let (b, h, s, t, d) = (3, 4, 5, 9, 16);
    let q = r.tensor(&[b, s, h, d], DType::F32)?;
    let [k, v] = [0; 2].map(|_| r.tensor(&[b, t, 2, d], DType::F32).unwrap());
    let options = Options::new().with_axes(Axes::Bshd).with_scale(0.25);

    // A mask per head and batch, with a soft cap.
    let mask = r.tensor(&[b, h, s, t], DType::F32)?;
    let own = options.clone().with_bias(mask.clone()).with_softcap(1.5);
    let out = flash_attn::<f32>(&q, &k, &v, 0.25, AttnMask::Mask(mask.clone()), None, Some(1.5))?;
    assert_close(&out, &oracle(&q, &k, &v, &own)?.0, "mask per head")?;

    // The same with slopes: 2^(-8 (head + 1) / 4) of each head's mask.
    let slopes: Vec<f32> = (1..=4).map(|head| 2f32.powf(-8.0 * head as f32 / 4.0)).collect();
    let slopes = Tensor::from_vec(slopes, (1, h, 1, 1), &Device::Cpu)?;
    let own = options.clone().with_bias(mask.broadcast_mul(&slopes)?);
    let out = flash_attn::<f32>(&q, &k, &v, 0.25, AttnMask::Mask(mask), Some(8.0), None)?;
    assert_close(&out, &oracle(&q, &k, &v, &own)?.0, "scaled mask per head")?;

    // A single query with a soft cap.
    let (q, k, v) = (q.narrow(0, 0, 1)?.narrow(1, 0, 1)?, k.narrow(0, 0, 1)?, v.narrow(0, 0, 1)?);
    let own = options.with_softcap(1.5);
    let out = flash_attn::<f32>(&q, &k, &v, 0.25, AttnMask::causal_with_offset(t - 1), None, Some(1.5))?;
    assert_close(&out, &oracle(&q, &k, &v, &own)?.0, "a single query with a soft cap")
}

#[test]
fn packed_flash_attention_is_candles() -> Result<()> {
    let mut r = Random(6);
    for case in 0..150 {
        let dtype = r.pick(&[DType::F32, DType::F16]);
        let (sequences, kv_heads, group, d) =
            (r.between(0, 4), r.between(1, 2), r.between(1, 3), r.between(1, 40));
        let causal = r.one_in(2);
        let of_queries: Vec<u32> = (0..sequences).map(|_| r.between(0, 9) as u32).collect();
        let of_keys: Vec<u32> = of_queries
            .iter()
            .map(|&s| if causal { s + r.between(0, 9) as u32 } else { r.between(0, 15) as u32 })
            .collect();
        let (total_q, total_k) =
            (of_queries.iter().sum::<u32>() as usize, of_keys.iter().sum::<u32>() as usize);
        let h = kv_heads * group;
        // Views of nothing that begin past the end, which candle cannot read.
        if total_q == 0 || total_k == 0 {
            continue;
        }
        let q = r.tensor(&[h, total_q, d], dtype)?.transpose(0, 1)?;
        let k = r.tensor(&[total_k, kv_heads, d], dtype)?;
        let v = r.tensor(&[total_k, kv_heads, 2 * d], dtype)?.narrow(2, d, d)?;
        let slopes = if r.one_in(3) { Some(r.tensor(&[h], DType::F32)?.abs()?) } else { None };
        let (left, right) = r.pick(&[(None, None), (Some(3), None), (Some(2), Some(1)), (Some(0), Some(40))]);
        let lengths = |x: &[u32]| Tensor::from_slice(x, x.len(), &Device::Cpu);
        let (lengths_q, lengths_k) = (lengths(&of_queries)?, lengths(&of_keys)?);
        let what =
            format!("case {case}: {of_queries:?} {of_keys:?} causal {causal} {left:?} {right:?} {slopes:?}");
        macro_rules! call {
            ($f:path) => {
                $f(&q, &k, &v, slopes.as_ref(), &lengths_q, &lengths_k, 9, 20, 0.3, causal, left, right)?
            };
        }
        assert_like_candle(&call!(flash_attn_varlen), &call!(flash_attn_varlen_cpu), dtype, &what)?;
    }
    Ok(())
}

#[test]
fn sdpa_is_what_models_write_out() -> Result<()> {
    let mut r = Random(7);
    for case in 0..100 {
        let (b, kv_heads, group) = (r.between(1, 3), r.between(1, 2), r.between(1, 3));
        let (s, t, d, dv) = (r.between(1, 20), r.between(1, 50), r.between(1, 40), r.between(1, 40));
        let h = kv_heads * group;
        let q = r.strided([b, h, s, d], DType::F32)?;
        let k = r.strided([b, kv_heads, t, d], DType::F32)?;
        let v = r.strided([b, kv_heads, t, dv], DType::F32)?;
        let cap = if r.one_in(3) { 2.0 } else { 1.0 };
        let causal = s <= t && r.one_in(2);
        let shape = r.pick(&[[b, h, s, t], [1, 1, s, t], [b, 1, 1, t], [1, h, s, 1]]);
        let mask = if r.one_in(2) { Some(r.tensor(&shape, DType::F32)?) } else { None };
        let scale = r.float();

        let repeated = |x: &Tensor, last: usize| -> Result<Tensor> {
            x.unsqueeze(2)?
                .broadcast_as((b, kv_heads, group, t, last))?
                .contiguous()?
                .reshape((b, h, t, last))
        };
        let mut scores = (q.contiguous()?.matmul(&repeated(&k, d)?.t()?)? * f64::from(scale))?;
        if cap != 1.0 {
            scores = ((scores / f64::from(cap))?.tanh()? * f64::from(cap))?;
        }
        if let Some(mask) = &mask {
            scores = scores.broadcast_add(mask)?;
        }
        if causal {
            let hidden: Vec<f32> =
                (0..s * t).map(|i| if i % t > i / t + t - s { f32::NEG_INFINITY } else { 0.0 }).collect();
            scores = scores.broadcast_add(&Tensor::from_vec(hidden, (s, t), &Device::Cpu)?)?;
        }
        let expected = candle_nn::ops::softmax_last_dim(&scores)?.matmul(&repeated(&v, dv)?)?;
        let given = sdpa(&q, &k, &v, mask.as_ref(), causal, scale, cap)?;
        assert_same(&given, &expected, &format!("case {case}"))?;
    }
    Ok(())
}

#[test]
fn packed_sequences_of_nothing() -> Result<()> {
    let mut r = Random(9);
    let (q, k) = (r.tensor(&[3, 2, 8], DType::BF16)?, r.tensor(&[0, 1, 8], DType::BF16)?);
    let lengths = |x: &[u32]| Tensor::from_slice(x, x.len(), &Device::Cpu);
    let (three, none) = (lengths(&[1, 2])?, lengths(&[0, 0])?);
    let out = flash_attn_varlen(&q, &k, &k, None, &three, &none, 2, 0, 0.3, false, None, None)?;
    assert_eq!((out.dims(), out.dtype()), (q.dims(), DType::BF16));
    assert!(values(&out)?.iter().all(|&x| x == 0.0));
    // No sequence at all.
    let (q, none) = (r.tensor(&[0, 2, 8], DType::F32)?, lengths(&[])?);
    let out = flash_attn_varlen(&q, &q, &q, None, &none, &none, 0, 0, 0.3, true, None, None)?;
    assert_eq!(out.dims(), [0, 2, 8]);
    Ok(())
}

/// The alignment of `do_causal`: both sequences end together.
#[test]
fn sdpa_with_more_queries_than_keys() -> Result<()> {
    let mut r = Random(8);
    let (q, k) = (r.tensor(&[1, 1, 5, 4], DType::F32)?, r.tensor(&[1, 1, 3, 4], DType::F32)?);
    let out = sdpa(&q, &k, &k, None, true, 0.5, 1.0)?;
    let options = Options::new().with_scale(0.5).with_causal(Causal::BottomRight);
    assert_close(&as_bhsd(&out, Axes::Bhsd)?, &oracle(&q, &k, &k, &options)?.0, "more queries")?;
    assert!(values(&out.narrow(2, 0, 2)?)?.iter().all(|&x| x == 0.0));
    Ok(())
}
