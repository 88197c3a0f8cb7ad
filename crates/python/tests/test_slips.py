"""Arguments that are nearly right: what is refused by name, and what is taken for what it is."""

import numpy as np
import onnx
import pytest
import torch

import qkv
import qkv.onnx
import qkv.torch
from exporters import Exporter
from qkv._mask import CompactMask
from qkv.flash_attn import flash_attn_func, flash_attn_with_kvcache

X = np.random.default_rng(3).standard_normal((1, 2, 5, 8)).astype(np.float32)
T = torch.from_numpy(X)


@pytest.mark.parametrize("offset", [2**48, -(2**48), 2**48 - 1, 0])
@pytest.mark.parametrize("beyond", [2**62, 2**63 - 1, 2**52])
def test_a_window_beyond_all_keys_is_none(offset, beyond):
    expected = qkv.attention(X, X, X, causal=offset, window=(None, 0))
    np.testing.assert_array_equal(qkv.attention(X, X, X, causal=offset, window=(beyond, 0)), expected)
    np.testing.assert_array_equal(qkv.attention(X, X, X, causal=offset, window=(beyond, beyond)), expected)
    np.testing.assert_array_equal(qkv.attention(X, X, X, causal=offset, window=(beyond, None)), expected)


def test_a_window_that_ends_among_the_keys_however_far():
    got = qkv.attention(X, X, X, causal=2**48, window=(2**48 + 3, None))
    # Query i sees keys from i - 3 on.
    mask = np.arange(5) >= np.arange(5)[:, None] - 3
    np.testing.assert_allclose(got, qkv.attention(X, X, X, mask=mask), atol=1e-6)
    assert not np.array_equal(got[:, :, 4], qkv.attention(X, X, X)[:, :, 4])


def test_a_flash_window_beyond_all_keys_is_none():
    expected = flash_attn_func(X, X, X)
    np.testing.assert_array_equal(flash_attn_func(X, X, X, window_size=(2**62, 2**63 - 1)), expected)


@pytest.mark.parametrize("true", [True, np.True_, np.array(True), torch.tensor(True)], ids=str)
@pytest.mark.parametrize("attention, x", [(qkv.attention, X), (qkv.torch.attention, T)], ids=["native", "torch"])
def test_a_bool_is_no_offset(attention, x, true):
    with pytest.raises(TypeError, match="^causal: "):
        attention(x, x, x, causal=true)
    with pytest.raises(TypeError, match="^window: "):
        attention(x, x, x, window=(true, 0))


def test_an_offset_may_be_an_array_of_one():
    expected = qkv.attention(X, X, X, causal=1)
    for one in (np.int64(1), np.array(1), torch.tensor(1)):
        np.testing.assert_array_equal(qkv.attention(X, X, X, causal=one), expected)


@pytest.mark.parametrize("op", [torch.ops.qkv.attention, torch.ops.qkv.attention_with_lse])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_alignment_and_an_offset_are_too_much(op, device):
    q = T.to(device)
    with pytest.raises(ValueError, match="^causal_offset: given with causal"):
        op(q, q, q, causal="top_left", causal_offset=2)
    op(q, q, q, causal_offset=2)


@pytest.mark.parametrize("cap", [1e-46, -1e-46])
def test_a_soft_cap_that_is_zero_as_float32_only(cap):
    for call in (lambda: flash_attn_func(X, X, X, softcap=cap), lambda: qkv.attention(X, X, X, softcap=cap)):
        with pytest.raises(ValueError, match=f"^softcap: {cap}, expected"):
            call()
    flash_attn_func(X, X, X, softcap=0.0)


def test_a_bias_of_another_type_is_told_each_type_once():
    with pytest.raises(TypeError, match="^bias: an array of float64, expected float32$"):
        qkv.matmul(X, X.swapaxes(2, 3), bias=np.zeros(5))
    with pytest.raises(TypeError, match="^bias: an array of float64, expected float32 or float16$"):
        qkv.matmul(X.astype(np.float16), X.swapaxes(2, 3), bias=np.zeros(5))


class Raising:
    """An array that cannot even be asked."""

    @property
    def __dlpack__(self):
        raise KeyError("gone")


class RaisingDevice(Exporter):
    @property
    def __dlpack_device__(self):
        raise KeyError("gone")


@pytest.mark.parametrize(
    "call, name",
    [
        (lambda x: qkv.attention(X, x, X), "k"),
        (lambda x: qkv.scaled_dot_product_attention(X, X, X, x), "attn_mask"),
        (lambda x: flash_attn_with_kvcache(X, X, X, cache_seqlens=x), "cache_seqlens"),
        (lambda x: qkv.onnx.attention(X, x, X), "K"),
    ],
)
def test_an_exporter_that_raises_when_it_is_asked(call, name):
    with pytest.raises(ValueError, match=f"^{name}: its memory cannot be read.*gone") as raised:
        call(Raising())
    assert isinstance(raised.value.__cause__, KeyError)


def test_an_exporter_whose_device_raises():
    with pytest.raises(ValueError, match="^k: its memory cannot be read.*gone") as raised:
        qkv.attention(X, RaisingDevice(X), X)
    assert isinstance(raised.value.__cause__, KeyError)


def test_a_compact_mask_is_taken_by_its_values():
    padding = torch.tensor([[False, True, True, True, True]])
    made = lambda: CompactMask(1, 5, 5, offset=0, window=(2, None), padding=padding)  # noqa: E731
    expected = qkv.attention(T, T, T, mask=made()._values())
    assert torch.equal(qkv.attention(T, T, T, mask=made()), expected)
    assert torch.equal(qkv.torch.attention(T, T, T, mask=made()), expected)
    assert torch.equal(qkv.scaled_dot_product_attention(T, T, T, made()), expected)
    assert torch.equal(qkv.onnx.attention(T, T, T, made())[0], expected)


@pytest.mark.parametrize("mode", [0, 1, 2, 3])
def test_onnx_scores_of_lazily_negated_tensors(mode):
    negated = torch._neg_view(T)
    assert negated.is_neg()
    mask = torch._neg_view(torch.randn(5, 5))
    got = qkv.onnx.attention(negated, negated, T, mask, qk_matmul_output_mode=mode)
    expected = qkv.onnx.attention(-T, -T, T, mask.resolve_neg().clone(), qk_matmul_output_mode=mode)
    assert all(torch.equal(got[i], expected[i]) for i in (0, 3))


def test_onnx_lengths_that_are_lazily_negated():
    lengths = torch._neg_view(torch.tensor([-3]))
    expected = qkv.onnx.attention(T, T, T, nonpad_kv_seqlen=torch.tensor([3]))
    assert torch.equal(qkv.onnx.attention(T, T, T, nonpad_kv_seqlen=lengths)[0], expected[0])


NODE = onnx.helper.make_node("Attention", ["Q", "K", "V"], ["Y"])


@pytest.mark.parametrize(
    "node, inputs, options, error, match",
    [
        (NODE, {"Q": X, "V": X}, {}, ValueError, "inputs: K missing"),
        (NODE, [X, X], {}, ValueError, "inputs: 2 of them"),
        (onnx.helper.make_node("Attention", ["Q", "K"], ["Y"]), [X, X], {}, ValueError, "inputs: V of Attention missing"),
        (onnx.helper.make_node("Attention", ["Q", "", "V"], ["Y"]), [X, X], {}, ValueError, "inputs: K of Attention missing"),
        (NODE, [X, X, X], {"opset_version": 22}, NotImplementedError, "Attention: opset 22, expected 23"),
        (
            onnx.helper.make_node("Attention", ["Q", "K", "V"], ["Y"], domain="com.microsoft"),
            [X, X, X],
            {},
            NotImplementedError,
            "com.microsoft.Attention: not supported",
        ),
    ],
)
def test_onnx_nodes_that_cannot_be_run(node, inputs, options, error, match):
    with pytest.raises(error, match=match):
        qkv.onnx.Backend.run_node(node, inputs, **options)


def test_onnx_nodes_of_the_spelled_out_domain():
    node = onnx.helper.make_node("Attention", ["Q", "K", "V"], ["Y"], domain="ai.onnx")
    assert np.array_equal(qkv.onnx.Backend.run_node(node, [X, X, X], opset_version=23)[0], qkv.onnx.attention(X, X, X)[0])
