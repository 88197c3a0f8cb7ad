//! What is refused, by name, and that a gradient is never lost silently.

mod common;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::attention::AttnMask;
use common::Random;
use qkv_candle::{
    Axes, Causal, Options, Window, attention, attention_with_lse, flash_attn, flash_attn_varlen, sdpa,
};

/// The first line of the error, which must be one.
fn text<T>(result: Result<T>) -> String {
    match result {
        Ok(_) => panic!("accepted"),
        Err(error) => error.to_string().lines().next().unwrap_or_default().to_string(),
    }
}

fn ones(shape: &[usize], dtype: DType) -> Tensor {
    Tensor::ones(shape, dtype, &Device::Cpu).unwrap()
}

#[test]
fn tensors() {
    let q = ones(&[2, 4, 3, 8], DType::F32);
    let k = ones(&[2, 2, 5, 8], DType::F32);
    let plain = Options::new();
    let cases = [
        (ones(&[4, 3, 8], DType::F32), k.clone(), k.clone(), "qkv: query: shape [4, 3, 8], expected 4 axes"),
        (q.clone(), ones(&[], DType::F32), k.clone(), "qkv: key: shape [], expected 4 axes"),
        (
            q.clone(),
            k.clone(),
            ones(&[2, 2, 5, 8, 1], DType::F32),
            "qkv: value: shape [2, 2, 5, 8, 1], expected 4 axes",
        ),
        (
            ones(&[2, 4, 3, 8], DType::F64),
            k.clone(),
            k.clone(),
            "qkv: query: f64 is not supported, expected f32, f16 or bf16",
        ),
        (
            q.clone(),
            ones(&[2, 2, 5, 8], DType::U8),
            k.clone(),
            "qkv: key: u8 is not supported, expected f32, f16 or bf16",
        ),
        (
            q.clone(),
            k.clone(),
            ones(&[2, 2, 5, 8], DType::I64),
            "qkv: value: i64 is not supported, expected f32, f16 or bf16",
        ),
        (
            q.clone(),
            ones(&[2, 2, 5, 7], DType::F32),
            k.clone(),
            "qkv: key: head dim is 7, expected 8 to match query",
        ),
        (
            q.clone(),
            ones(&[1, 2, 5, 8], DType::F32),
            k.clone(),
            "qkv: key: batch is 1, expected 2 to match query",
        ),
        (
            q.clone(),
            k.clone(),
            ones(&[2, 2, 6, 8], DType::F32),
            "qkv: value: length is 6, expected 5 to match key",
        ),
        (
            q.clone(),
            ones(&[2, 3, 5, 8], DType::F32),
            ones(&[2, 3, 5, 8], DType::F32),
            "qkv: query: 4 heads, expected a multiple of the 3 key/value heads",
        ),
        (
            q.clone(),
            ones(&[2, 0, 5, 8], DType::F32),
            ones(&[2, 0, 5, 8], DType::F32),
            "qkv: key: heads is 0, expected at least 1",
        ),
        (
            ones(&[2, 4, 3, 0], DType::F32),
            ones(&[2, 2, 5, 0], DType::F32),
            k.clone(),
            "qkv: query: head dim is 0, expected at least 1",
        ),
    ];
    for (q, k, v, expected) in cases {
        assert_eq!(text(attention(&q, &k, &v, &plain)), expected);
        assert_eq!(text(attention_with_lse(&q, &k, &v, &plain)), expected);
    }
    // A result that no memory holds, asked for by broadcasting alone.
    let one = ones(&[1, 1, 1, 1], DType::F32);
    let huge = one.broadcast_as((1usize << 30, 1, 1 << 28, 1)).unwrap();
    let value = one.broadcast_as((1usize << 30, 1, 1, 1 << 20)).unwrap();
    let key = one.broadcast_as((1usize << 30, 1, 1, 1)).unwrap();
    // The value's dims are broadcast and would have to be copied.
    assert!(text(attention(&huge, &key, &value, &plain)).starts_with("qkv: value: no memory for the shape"));
    let value = ones(&[1, 1, 1, 64], DType::F32).broadcast_as((1usize << 30, 1, 1, 64)).unwrap();
    assert!(text(attention(&huge, &key, &value, &plain)).starts_with("qkv: output: no memory for the shape"));
}

#[test]
fn options() {
    let q = ones(&[2, 4, 3, 8], DType::F32);
    let k = ones(&[2, 2, 5, 8], DType::F32);
    let new = Options::new;
    let floats = |shape: &[usize]| ones(shape, DType::F32);
    let cases = [
        (new().with_scale(f32::NAN), "qkv: scale: NaN, expected a finite number"),
        (new().with_softcap(0.0), "qkv: softcap: 0, expected a positive finite number"),
        (
            new().with_mask(floats(&[3, 5])),
            "qkv: mask: expected u8, not 0 = takes part (a float mask that is added is a bias)",
        ),
        (
            new().with_mask(ones(&[2, 5], DType::U8)),
            "qkv: mask: shape [1, 1, 2, 5] does not broadcast to [2, 4, 3, 5]",
        ),
        (
            new().with_mask(ones(&[1, 1, 1, 3, 5], DType::U8)),
            "qkv: mask: shape [1, 1, 1, 3, 5], expected at most 4 axes",
        ),
        (
            new().with_bias(floats(&[3, 4])),
            "qkv: bias: shape [1, 1, 3, 4] does not broadcast to [2, 4, 3, 5]",
        ),
        (
            new().with_bias(ones(&[3, 5], DType::U32)),
            "qkv: bias: u32 is not supported, expected f32, f16 or bf16",
        ),
        (new().with_sinks(floats(&[2, 4])), "qkv: sinks: shape [2, 4], expected [4]"),
        (new().with_sinks(floats(&[3])), "qkv: sinks: shape [3], expected [4]"),
        (new().with_alibi_slopes(floats(&[4, 2])), "qkv: alibi_slopes: shape [4, 2], expected [4] or [2, 4]"),
        (
            new().with_alibi_slopes((floats(&[4]) * f64::INFINITY).unwrap()),
            "qkv: alibi_slopes[0]: inf, expected a finite number",
        ),
        (new().with_kv_lengths(vec![5]), "qkv: kv_lengths: 1 entries, expected one per batch, 2"),
        (new().with_kv_lengths(vec![5, 6]), "qkv: kv_lengths: 6, expected at most the kv length, 5"),
        (
            new().with_window(Window::new(None, None).with_dilation(0)),
            "qkv: window: dilation 0, expected at least 1",
        ),
        (new().with_axes(Axes::Bshd), "qkv: key: head dim is 8, expected 8 to match query"),
    ];
    for (options, expected) in cases {
        let given = text(attention(&q, &k, &k, &options));
        if options.axes == Axes::Bshd {
            // (batch, 4 positions, 3 heads, ..) against 5 heads.
            assert_eq!(given, "qkv: query: 3 heads, expected a multiple of the 5 key/value heads");
        } else {
            assert_eq!(given, expected);
        }
    }
}

#[test]
fn drop_ins() {
    let q = ones(&[2, 3, 4, 8], DType::F32);
    let k = ones(&[2, 5, 2, 8], DType::F32);
    let flash =
        |q: &Tensor, k: &Tensor, mask, max_bias| flash_attn::<f32>(q, k, k, 0.3, mask, max_bias, None);
    assert_eq!(
        text(flash(&q, &k, AttnMask::causal_with_offset(1), None)),
        "qkv: attn_mask: kv_offset 1 with 2 batches, expected kv length - query length = 5 - 3"
    );
    assert_eq!(
        text(flash(&q, &k, AttnMask::None, Some(-1.0))),
        "qkv: max_bias: -1, expected a finite number of at least 0"
    );
    let (q1, k1) = (q.narrow(0, 0, 1).unwrap(), k.narrow(0, 0, 1).unwrap());
    assert!(text(flash(&q1, &k1, AttnMask::None, Some(8.0))).starts_with("qkv: max_bias: not supported"));
    let wrong = AttnMask::Mask(ones(&[3, 6], DType::F32));
    assert_eq!(
        text(flash(&q, &k, wrong, None)),
        "qkv: attn_mask: shape [1, 1, 3, 6] does not broadcast to [2, 4, 3, 5]"
    );
    let bytes = AttnMask::Mask(ones(&[3, 5], DType::U8));
    assert_eq!(
        text(flash(&q, &k, bytes, Some(1.0))),
        "qkv: attn_mask: u8 is not supported, expected f32, f16 or bf16"
    );
    assert_eq!(
        text(flash_attn::<half::f16>(&q, &k, &k, 0.3, AttnMask::None, None, None)),
        "qkv: query: f32, expected f16, as the call says"
    );
    let scaled = AttnMask::Mask(ones(&[3, 5], DType::F32));
    let three = ones(&[2, 5, 3, 8], DType::F32);
    assert_eq!(
        text(flash(&q, &three, scaled, Some(1.0))),
        "qkv: query: 4 heads, expected a multiple of the 3 key/value heads"
    );

    let (q, k) = (q.transpose(1, 2).unwrap(), k.transpose(1, 2).unwrap());
    assert_eq!(
        text(sdpa(&q, &k, &k, Some(&ones(&[3, 5], DType::U8)), false, 0.3, 1.0)),
        "qkv: mask: u8 is not supported, expected f32, f16 or bf16"
    );
    assert_eq!(
        text(sdpa(&q, &k, &k, Some(&ones(&[4, 5], DType::F32)), false, 0.3, 1.0)),
        "qkv: mask: shape [1, 1, 4, 5] does not broadcast to [2, 4, 3, 5]"
    );

    let (q, k) = (ones(&[5, 2, 8], DType::F32), ones(&[6, 1, 8], DType::F32));
    let packed = |lengths_q: &[u32], lengths_k: &[u32], causal, left, right| {
        let [a, b] = [lengths_q, lengths_k].map(|x| Tensor::from_slice(x, x.len(), &Device::Cpu).unwrap());
        flash_attn_varlen(&q, &k, &k, None, &a, &b, 5, 6, 0.3, causal, left, right)
    };
    assert!(packed(&[2, 3], &[3, 3], true, Some(1), None).is_ok());
    for (result, expected) in [
        (
            packed(&[2, 2], &[3, 3], false, None, None),
            "qkv: seqlens_q: the sum is 4, expected the first size of q, 5",
        ),
        (
            packed(&[2, 3], &[3, 4], false, None, None),
            "qkv: seqlens_k: the sum is 7, expected the first size of k, 6",
        ),
        (packed(&[2, 3], &[6], false, None, None), "qkv: seqlens_k: 1 lengths, expected 2, as seqlens_q"),
        (
            packed(&[2, 3], &[4, 2], true, None, None),
            "qkv: seqlens_k: 2 keys for 3 queries of sequence 1, expected no fewer",
        ),
        (
            packed(&[2, 3], &[3, 3], false, None, Some(1)),
            "qkv: window_right: not supported without window_left",
        ),
    ] {
        assert_eq!(text(result), expected);
    }
    let signed = Tensor::from_slice(&[2i64, 3], 2, &Device::Cpu).unwrap();
    let result = flash_attn_varlen(&q, &k, &k, None, &signed, &signed, 5, 6, 0.3, false, None, None);
    assert_eq!(text(result), "qkv: seqlens_q: i64 of shape [2], expected u32 of shape (sequences)");
}

/// A shape that claims more than its buffer holds, which candle lets through, is not read past its end.
#[test]
fn claims_beyond_the_buffer() -> Result<()> {
    let short = Tensor::from_slice(&[1f32; 32], (2, 2, 4, 8), &Device::Cpu);
    let bytes = Tensor::from_slice(&[1u8; 5], (4, 4), &Device::Cpu);
    let whole = ones(&[2, 2, 4, 8], DType::F32);
    if let Ok(short) = short {
        assert!(text(attention(&short, &whole, &whole, &Options::new())).starts_with("qkv: query: "));
        assert!(text(attention(&whole, &whole, &short, &Options::new())).starts_with("qkv: value: "));
    }
    if let Ok(bytes) = bytes {
        let options = Options::new().with_mask(bytes);
        assert!(text(attention(&whole, &whole, &whole, &options)).starts_with("qkv: mask: "));
    }
    Ok(())
}

#[test]
fn gradients() -> Result<()> {
    let mut r = Random(1);
    let [a, b, c] = [0; 3].map(|_| r.tensor(&[1, 2, 3, 8], DType::F32).unwrap());
    let variable = Var::from_tensor(&a)?;
    let x = variable.as_tensor();
    let refusal =
        "qkv: the backward pass of attention is not supported; detach the tensors to go forward only";
    let options = Options::new().with_causal(Causal::TopLeft);

    // Whichever of the three needs one, through either output, and in either order of axes.
    for [q, k, v] in [[x, &b, &c], [&b, x, &c], [&b, &c, x]] {
        for options in [options.clone(), options.clone().with_axes(Axes::Bshd)] {
            let (out, lse) = attention_with_lse(q, k, v, &options)?;
            assert_eq!(text(out.sum_all()?.backward()), refusal);
            assert_eq!(text(lse.sum_all()?.backward()), refusal);
        }
        // Together with a gradient that is there: still an error, not half a gradient.
        let loss = (attention(q, k, v, &options)?.sum_all()? + x.sqr()?.sum_all()?)?;
        assert_eq!(text(loss.backward()), refusal);
        assert_eq!(text(sdpa(q, k, v, None, true, 0.3, 1.0)?.sum_all()?.backward()), refusal);
        let flash = flash_attn::<f32>(q, k, v, 0.3, AttnMask::causal(), None, None)?;
        assert_eq!(text(flash.sum_all()?.backward()), refusal);
    }
    // A copied last axis and a type change keep the way back, to the refusal.
    let turned = x.transpose(2, 3)?.contiguous()?.transpose(2, 3)?.to_dtype(DType::BF16)?;
    assert_eq!(text(attention(&turned, &b, &c, &options)?.sum_all()?.backward()), refusal);

    // What is no input of the operator would lose its gradient, and is refused at once.
    let lost = |name: &str| format!("qkv: {name}: a gradient is not supported, detach the tensor");
    let bias = Var::from_tensor(&ones(&[3, 3], DType::F32))?;
    let heads = Var::from_tensor(&ones(&[2], DType::F32))?;
    let derived = (bias.as_tensor() * 2.0)?;
    let result = attention(&a, &b, &c, &Options::new().with_bias(derived.clone()));
    assert_eq!(text(result), lost("bias"));
    let result = attention(&a, &b, &c, &Options::new().with_sinks(heads.as_tensor().clone()));
    assert_eq!(text(result), lost("sinks"));
    let result = attention(&a, &b, &c, &Options::new().with_alibi_slopes(heads.as_tensor().clone()));
    assert_eq!(text(result), lost("alibi_slopes"));
    assert_eq!(text(sdpa(&a, &b, &c, Some(&derived), false, 0.3, 1.0)), lost("mask"));
    let [q, k, v] = [&a, &b, &c].map(|x| x.transpose(1, 2).unwrap());
    for max_bias in [None, Some(8.0)] {
        let mask = AttnMask::Mask(derived.clone());
        assert_eq!(text(flash_attn::<f32>(&q, &k, &v, 0.3, mask, max_bias, None)), lost("attn_mask"));
    }
    assert!(attention(&a, &b, &c, &Options::new().with_bias(derived.detach())).is_ok());

    // Without a variable nothing is kept for the way back.
    assert!(!attention(&a, &b, &c, &options)?.track_op());
    Ok(())
}
