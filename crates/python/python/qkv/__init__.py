"""Attention on CPUs in one fused pass.

The functions here take numpy arrays, torch tensors and whatever else on the CPU has ``__dlpack__``, in float32, bfloat16 or
float16. Doors to other libraries are modules of their own, imported when they are first used:

- ``qkv.torch``: an operator for torch, for ``torch.compile`` and ``torch.export`` (the backward pass is not there yet),
- ``qkv.transformers``: an attention implementation for Hugging Face models,
- ``qkv.flash_attn``: flash-attention's functions,
- ``qkv.onnx``: ONNX's Attention and RotaryEmbedding operators.

>>> import numpy as np, qkv
>>> q, k, v = (np.ones((1, 2, 5, 8), np.float32) for _ in range(3))
>>> qkv.attention(q, k, v, causal="bottom_right").shape
(1, 2, 5, 8)
"""

import importlib as _importlib

from ._qkv import (
    __version__,
    attention,
    cpu_info,
    matmul,
    merge_states,
    num_threads,
    scaled_dot_product_attention,
    set_num_threads,
)

_DOORS = ("flash_attn", "onnx", "torch", "transformers")

__all__ = [
    "__version__",
    "attention",
    "cpu_info",
    "matmul",
    "merge_states",
    "num_threads",
    "scaled_dot_product_attention",
    "set_num_threads",
]


def __getattr__(name):
    # The libraries behind these are large, and not everybody has them.
    if name in _DOORS:
        return _importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_DOORS])
