//! Nothing is copied: a call on strided tensors takes the memory of its output and a fixed scratch.

use candle_core::{DType, Device, Result, Tensor};
use peak_alloc::PeakAlloc;
use qkv_candle::{Axes, Causal, Options, attention, flash_attn, sdpa};

#[global_allocator]
static HEAP: PeakAlloc = PeakAlloc;

const MIB: usize = 1 << 20;

/// The most that a call takes at one time, in bytes.
fn taken<T>(call: impl FnOnce() -> Result<T>) -> Result<usize> {
    let before = HEAP.current_usage();
    HEAP.reset_peak_usage();
    call()?;
    Ok(HEAP.peak_usage() - before)
}

// One test, so that nothing else allocates at the same time.
#[test]
fn strided_inputs_are_read_in_place() -> Result<()> {
    let device = &Device::Cpu;
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        // Four queries and very many keys: a copy of keys or values is the largest thing by far.
        let (heads, keys, dim) = (8, 16384, 64);
        let q = Tensor::ones((1, 4, heads, dim), dtype, device)?;
        let packed = Tensor::ones((1, keys, heads, 2 * dim), dtype, device)?;
        let (k, v) = (packed.narrow(3, 0, dim)?, packed.narrow(3, dim, dim)?);
        let one = heads * keys * dim * dtype.size_in_bytes();
        assert!(one >= 16 * MIB);

        let options = Options::new().with_axes(Axes::Bshd).with_causal(Causal::BottomRight);
        let [qt, kt, vt] = [q.transpose(1, 2)?, k.transpose(1, 2)?, v.transpose(1, 2)?];
        // Broadcast over heads and queries; in full it would be 2 MiB of bytes, or 8 MiB of floats.
        let mask = Tensor::ones((1, 1, 1, keys), DType::U8, device)?.broadcast_as((1, heads, 4, keys))?;
        let bias = Tensor::ones((1, 1, 1, keys), dtype, device)?;
        let masked = Options::new().with_mask(mask).with_bias(bias.clone());
        let calls: [(&str, usize); 4] = [
            ("attention", taken(|| attention(&q, &k, &v, &options))?),
            ("masked", taken(|| attention(&qt, &kt, &vt, &masked))?),
            ("sdpa", taken(|| sdpa(&qt, &kt, &vt, Some(&bias), true, 0.1, 1.0))?),
            ("flash_attn", {
                let mask = candle_nn::attention::AttnMask::causal_with_offset(keys - 4);
                match dtype {
                    DType::F16 => taken(|| flash_attn::<half::f16>(&q, &k, &v, 0.1, mask, None, None))?,
                    DType::BF16 => taken(|| flash_attn::<half::bf16>(&q, &k, &v, 0.1, mask, None, None))?,
                    _ => taken(|| flash_attn::<f32>(&q, &k, &v, 0.1, mask, None, None))?,
                }
            }),
        ];
        for (call, taken) in calls {
            assert!(taken < one / 2, "{call} of {dtype:?} took {taken} bytes, keys are {one}");
        }
    }
    Ok(())
}
