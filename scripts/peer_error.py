#!/usr/bin/env python3
"""How far PyTorch's own f32 flash attention on the CPU is from attention in float64: max abs and RMS error.

The measure for qkv's own errors: the same inputs, the same reference, another f32 implementation.

    python scripts/peer_error.py [--json] [--threads N] [--scale-q X]

Inputs:

1. Each layer of testdata/minilm.safetensors (1, 12, 212, 32), full and causal.
2. Fixed random numbers that any program can make again. One splitmix64 stream for each of q, k and v, with the seeds
   1, 2 and 3; the elements are drawn in memory order of a row-major (b, h, s, d) tensor, afresh for each shape:

       state = seed                                     (64 bits, all arithmetic wraps)
       for each element:
           state += 0x9E3779B97F4A7C15
           z = state
           z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
           z = (z ^ (z >> 27)) * 0x94D049BB133111EB
           z =  z ^ (z >> 31)
           x = (z >> 40) as f32 / 2^23 - 1              (uniform in [-1, 1); exact in f32, so no rounding to agree on)

   First elements for seed 1: 0.13312304, 0.49156344, 0.9420054, -0.11128163 (checked at the start).

--scale-q X multiplies q by X in f32 (of both kinds of inputs), which makes the softmax more peaked. The reference takes
the scaled f32 q, so that the product's rounding is no part of the error. "causal" lets query i see the keys 0..=i.
Scale is 1/sqrt(d) throughout. The largest |out| of the reference is printed to tell absolute from relative error.
"""

import argparse
import json
import pathlib

import numpy as np
import safetensors.numpy
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

SHAPES = [(1, 2, 512, 64), (1, 1, 2048, 64), (1, 1, 2048, 128)]
TESTDATA = pathlib.Path(__file__).resolve().parent.parent / "testdata" / "minilm.safetensors"


def splitmix64(seed, n):
    """The first n outputs of splitmix64; the state after i steps is seed + i * increment."""
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def uniform(seed, shape):
    top = (splitmix64(seed, int(np.prod(shape))) >> np.uint64(40)).astype(np.float32)
    return (top / np.float32(2**23) - np.float32(1)).reshape(shape)


def reference(q, k, v, causal):
    """Attention in float64, one head at a time."""
    out = np.empty(q.shape, np.float64)
    for b, h in np.ndindex(q.shape[:2]):
        q1, k1, v1 = (x[b, h].astype(np.float64) for x in (q, k, v))
        p = q1 @ k1.T / np.sqrt(q.shape[-1])
        if causal:
            p[np.triu_indices_from(p, 1)] = -np.inf
        p = np.exp(p - p.max(-1, keepdims=True))
        out[b, h] = (p / p.sum(-1, keepdims=True)) @ v1
    return out


def flash(q, k, v, causal):
    with torch.no_grad(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = torch.nn.functional.scaled_dot_product_attention(*map(torch.from_numpy, (q, k, v)), is_causal=causal)
    return out.numpy()


def inputs():
    if TESTDATA.exists():
        t = safetensors.numpy.load_file(TESTDATA)
        for layer in sorted({name.split(".")[0] for name in t}):
            yield f"minilm {layer}", *(t[f"{layer}.{n}"] for n in "qkv")
    for shape in SHAPES:
        yield "random", *(uniform(seed, shape) for seed in (1, 2, 3))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scale-q", type=float, default=1.0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    # Published values of splitmix64 with seed 0, then those named at the top.
    assert [int(z) for z in splitmix64(0, 2)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
    assert np.array_equal(uniform(1, 4), np.float32([0.13312304, 0.49156344, 0.9420054, -0.11128163]))

    results = []
    for name, q, k, v in inputs():
        q = q * np.float32(args.scale_q)
        for causal in (False, True):
            want = reference(q, k, v, causal)
            error = flash(q, k, v, causal) - want
            results.append({
                "input": name,
                "shape": list(q.shape),
                "mask": "causal" if causal else "full",
                "max_abs_error": float(np.abs(error).max()),
                "rms_error": float(np.sqrt(np.mean(error**2))),
                "max_abs_out": float(np.abs(want).max()),
                "rms_out": float(np.sqrt(np.mean(want**2))),
            })
    about = {
        "torch": torch.__version__.split("+")[0],
        "backend": "flash",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": args.threads,
        "scale_q": args.scale_q,
    }
    if args.json:
        print(json.dumps({**about, "results": results}, indent=2))
        return
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    heads = f"{'max abs error':>13} {'rms error':>10} {'max |out|':>10} {'rms out':>9}"
    print(f"{'input':14} {'b,h,s,d':14} {'mask':6} {heads}")
    for r in results:
        print(
            f"{r['input']:14} {','.join(map(str, r['shape'])):14} {r['mask']:6} {r['max_abs_error']:13.3e} "
            f"{r['rms_error']:10.3e} {r['max_abs_out']:10.4f} {r['rms_out']:9.5f}"
        )


if __name__ == "__main__":
    main()
