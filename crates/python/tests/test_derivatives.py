"""Derivatives that a result would silently lack: tangents of forward mode, and gradients of tensors given as numbers."""

import warnings

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

import qkv
import qkv.flash_attn
import qkv.onnx
import qkv.torch

Q = torch.ones(1, 1, 3, 4)
LSE = torch.ones(1, 1, 3)
B = torch.ones(4, 5)
CU = torch.tensor([0, 3], dtype=torch.int32)
COS = torch.ones(3, 2)

# A function, its arguments, each of which is made a dual in turn.
CALLS = {
    "attention": (qkv.attention, {"q": Q, "k": Q, "v": Q, "bias": torch.ones(3, 3), "sinks": torch.ones(1), "out": Q.clone()}),
    "sdpa": (qkv.scaled_dot_product_attention, {"query": Q, "key": Q, "value": Q, "attn_mask": torch.ones(3, 3)}),
    "matmul": (qkv.matmul, {"a": Q, "b": B, "bias": torch.ones(5)}),
    "merge_states": (qkv.merge_states, {"out_a": Q, "lse_a": LSE, "out_b": Q, "lse_b": LSE}),
    "flash": (qkv.flash_attn.flash_attn_func, {"q": Q, "k": Q, "v": Q}),
    "kvcache": (
        lambda **given: qkv.flash_attn.flash_attn_with_kvcache(**given, cache_seqlens=0),
        {"q": Q, "k_cache": Q.clone(), "v_cache": Q.clone(), "k": Q, "v": Q, "rotary_cos": COS, "rotary_sin": COS},
    ),
    "onnx": (qkv.onnx.attention, {"Q": Q, "K": Q, "V": Q, "attn_mask": torch.ones(3, 3)}),
    "rotary": (qkv.onnx.rotary_embedding, {"X": Q, "cos_cache": COS[None], "sin_cache": COS[None]}),
}
CASES = [(call, name) for call, (_, arguments) in CALLS.items() for name in arguments]


@pytest.mark.parametrize("call, name", CASES)
def test_a_dual_tensor_is_refused(call, name):
    function, arguments = CALLS[call]
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(arguments[name].clone(), torch.ones_like(arguments[name]))
        with pytest.raises(ValueError, match=f"^{name}: a tensor with a tangent.*qkv.torch.*detach"):
            function(**arguments | {name: dual})


def test_tensors_without_a_tangent_are_taken_within_a_dual_level():
    expected = qkv.attention(Q, Q, Q)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(Q.clone(), torch.ones_like(Q))
        assert torch.equal(qkv.attention(Q, Q, Q), expected)
        assert torch.equal(qkv.attention(dual.detach(), Q, Q), expected)
        assert torch.equal(qkv.onnx.attention(Q, Q, Q)[0], expected)


def learned():
    return torch.nn.Parameter(torch.tensor(0.5))


def dual():
    return forward_ad.make_dual(torch.tensor(0.5), torch.tensor(1.0))


NUMBERS = [
    (lambda **n: qkv.attention(Q, Q, Q, **n), "scale"),
    (lambda **n: qkv.attention(Q, Q, Q, **n), "softcap"),
    (lambda **n: qkv.scaled_dot_product_attention(Q, Q, Q, **n), "scale"),
    (lambda **n: qkv.scaled_dot_product_attention(Q, Q, Q, **n), "dropout_p"),
    (lambda **n: qkv.flash_attn.flash_attn_func(Q, Q, Q, **n), "softmax_scale"),
    (lambda **n: qkv.flash_attn.flash_attn_func(Q, Q, Q, **n), "softcap"),
    (lambda **n: qkv.flash_attn.flash_attn_varlen_func(Q[0], Q[0], Q[0], CU[:2] // 3, CU[:2] // 3, 1, 1, **n), "softmax_scale"),
    (lambda **n: qkv.flash_attn.flash_attn_with_kvcache(Q, Q, Q, **n), "softmax_scale"),
    (lambda **n: qkv.onnx.attention(Q, Q, Q, **n), "scale"),
    (lambda **n: qkv.onnx.attention(Q, Q, Q, **n), "softcap"),
    (lambda **n: qkv.torch.scaled_dot_product_attention(Q, Q, Q, **n), "scale"),
    (lambda **n: qkv.torch.attention(Q, Q, Q, **n), "softcap"),
    (lambda **n: qkv.torch.attention(Q, Q, Q, **n), "scale"),
]


@pytest.mark.parametrize("make", [learned, dual])
@pytest.mark.parametrize("call, name", NUMBERS)
def test_a_number_that_has_a_derivative_is_refused(call, name, make):
    with warnings.catch_warnings(), forward_ad.dual_level():
        # torch's own remark on such a conversion.
        warnings.simplefilter("error")
        with pytest.raises(TypeError, match=f"^{name}: a tensor (that requires a gradient|with a tangent)"):
            call(**{name: make()})


def test_a_number_as_a_tensor_without_one_is_taken():
    half, x = torch.tensor(0.5), np.asarray(Q)
    assert torch.equal(qkv.attention(Q, Q, Q, scale=half), qkv.attention(Q, Q, Q, scale=0.5))
    assert np.array_equal(qkv.onnx.attention(x, x, x, scale=half)[0], qkv.onnx.attention(x, x, x, scale=0.5)[0])


def test_a_learned_scale_is_refused_while_a_graph_is_traced():
    compiled = torch.compile(lambda q, scale: qkv.torch.attention(q, q, q, scale=scale), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="scale: a tensor that requires a gradient"):
        compiled(Q, learned())
