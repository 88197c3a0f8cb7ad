#!/usr/bin/env python3
"""Makes testdata/rotary.txt: rotary embeddings as transformers computes them.

crates/attention/tests/rotary.rs reads it. GPT-NeoX's module computes inverse frequencies, cosines and sines for
every kind of scaling and for partial rotation; its `apply_rotary_pos_emb` rotates halves, GLM's interleaved pairs.
No model weights are needed.

    python -m venv .venv && .venv/bin/pip install -r scripts/requirements-testdata.txt
    .venv/bin/python scripts/make_rotary_testdata.py

The file is lines of a key and numbers, so that a test can read it without a parser for JSON. Each `case` begins
with its configuration (under transformers' names) and goes on with

    inverse_frequencies   rotary_dim / 2
    query                 head_dim: the row that is rotated
    cos, sin              after `position`: rotary_dim / 2, attention factor included
    halves, interleaved   after `position`: the query rotated to it, head_dim

Numbers have nine digits, which is an f32 exactly. Cosines and sines may differ in the last bits on another
processor. transformers' warnings about lengths that no model has are of no account.
"""

import os
import pathlib

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as rotate_interleaved
from transformers.models.gpt_neox.configuration_gpt_neox import GPTNeoXConfig
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb as rotate_halves

TARGET = pathlib.Path(__file__).resolve().parent.parent / "testdata" / "rotary.txt"
POSITIONS = (0, 1, 2, 7, 63, 511, 4095)
DYNAMIC = {"max_position_embeddings": 1024}

# name, head_dim, rotary_dim, base, rope_type, parameters, positions. "max_position_embeddings" goes to the config
# itself.
CASES = [
    ("default", 64, 64, 10000.0, "default", {}, POSITIONS),
    ("default_base", 32, 32, 1000000.0, "default", {}, POSITIONS),
    ("default_partial", 64, 16, 10000.0, "default", {}, POSITIONS),
    ("linear", 32, 32, 10000.0, "linear", {"factor": 4.0}, POSITIONS),
    ("linear_partial", 24, 12, 10000.0, "linear", {"factor": 2.5}, POSITIONS),
    ("dynamic", 32, 32, 10000.0, "dynamic", dict(DYNAMIC, factor=2.0), POSITIONS),
    ("dynamic_short", 32, 32, 10000.0, "dynamic", dict(DYNAMIC, factor=2.0), POSITIONS[:-1]),
    ("dynamic_partial", 32, 8, 10000.0, "dynamic", dict(DYNAMIC, factor=8.0), POSITIONS),
    ("yarn", 64, 64, 1000000.0, "yarn", dict(factor=4.0, original_max_position_embeddings=32768), POSITIONS),
    (
        "yarn_deepseek",
        64,
        64,
        10000.0,
        "yarn",
        {
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 0.707,
        },
        POSITIONS,
    ),
    (
        "yarn_gpt_oss",
        32,
        32,
        150000.0,
        "yarn",
        {"factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False},
        POSITIONS,
    ),
    (
        "yarn_given_partial",
        32,
        16,
        10000.0,
        "yarn",
        {
            "factor": 8.0,
            "original_max_position_embeddings": 512,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "attention_factor": 1.25,
            "mscale": 3.0,
            "mscale_all_dim": 2.0,
        },
        POSITIONS,
    ),
    # Both ends of the ramp are dim 0: it has no width.
    ("yarn_narrow", 16, 16, 10000.0, "yarn", dict(factor=2.0, original_max_position_embeddings=6), POSITIONS),
    # The ramp's upper end lies beyond the last dim.
    (
        "yarn_long",
        16,
        16,
        100.0,
        "yarn",
        {"factor": 2.0, "original_max_position_embeddings": 131072, "beta_fast": 4096.0},
        POSITIONS,
    ),
    (
        "llama3",
        64,
        64,
        500000.0,
        "llama3",
        {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        POSITIONS,
    ),
    (
        "llama3_partial",
        48,
        24,
        10000.0,
        "llama3",
        {
            "factor": 32.0,
            "low_freq_factor": 2.0,
            "high_freq_factor": 8.0,
            "original_max_position_embeddings": 2048,
        },
        POSITIONS,
    ),
]


def line(key, numbers):
    return key + "".join(f" {float(x):.9g}" for x in numbers)


def case(name, head_dim, rotary_dim, base, rope_type, parameters, positions, seed):
    parameters = dict(parameters)
    lines = [f"case {name}", f"scaling {rope_type}"]
    lines += [line("head_dim", [head_dim]), line("rotary_dim", [rotary_dim]), line("base", [base])]
    lines += [line(key, [value]) for key, value in parameters.items()]
    max_position = parameters.pop("max_position_embeddings", 8192)
    config = GPTNeoXConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        max_position_embeddings=max_position,
        rope_parameters={
            "rope_type": rope_type,
            "rope_theta": base,
            "partial_rotary_factor": rotary_dim / head_dim,
            **parameters,
        },
    )
    module = GPTNeoXRotaryEmbedding(config)
    query = torch.rand(1, 1, 1, head_dim, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    ids = torch.tensor([positions])
    cos, sin = module(query, ids)
    assert cos.shape == (1, len(positions), rotary_dim) and cos.dtype == torch.float32
    # The dynamic kind chooses its base in the call: frequencies are read after it.
    lines.append(line("inverse_frequencies", module.inv_freq))
    lines.append(line("query", query.flatten()))
    rows = query.expand(1, 1, len(positions), head_dim)
    halves, _ = rotate_halves(rows, rows, cos, sin)
    interleaved, _ = rotate_interleaved(rows, rows, cos, sin)
    for i, position in enumerate(positions):
        lines.append(line("position", [position]))
        lines.append(line("cos", cos[0, i, : rotary_dim // 2]))
        lines.append(line("sin", sin[0, i, : rotary_dim // 2]))
        lines.append(line("halves", halves[0, 0, i]))
        lines.append(line("interleaved", interleaved[0, 0, i]))
    return lines


def main():
    torch.set_num_threads(1)
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    lines = [f"# scripts/make_rotary_testdata.py, {versions}"]
    for seed, arguments in enumerate(CASES):
        lines += case(*arguments, seed)
    TARGET.write_text("\n".join(lines) + "\n")
    print(f"{TARGET}: {TARGET.stat().st_size} bytes")


if __name__ == "__main__":
    main()
