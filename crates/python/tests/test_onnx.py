"""`qkv.onnx` against onnx's reference evaluator in float64, over random options, and what must be refused.

The evaluator departs from the operator's text in two places. In mode 0 it returns scores after the soft cap, which is compared
by hand; with `is_causal` it takes a mask of one row for one query, and is given all rows. onnx's own node tests are in test_onnx_nodes.py.
"""

import inspect

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

import qkv.onnx
from qkv.onnx import Backend, attention, rotary_embedding

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
ROUNDING = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}
INPUTS = {
    "Attention": ["Q", "K", "V", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen"],
    "RotaryEmbedding": ["X", "cos_cache", "sin_cache", "position_ids"],
}


def f64(x):
    return x.double().numpy() if isinstance(x, torch.Tensor) else np.asarray(x).astype(np.float64)


def evaluate(op, inputs, outputs, **attributes):
    """The reference evaluator's results for these inputs by name, widened to float64."""
    floats = {"float16", "float32", "bfloat16", "float64"}
    inputs = {name: x for name, x in inputs.items() if x is not None}
    feed = {}
    for name, x in inputs.items():
        kind = str(x.dtype).removeprefix("torch.")
        feed[name] = f64(x) if kind in floats else np.asarray(x)
    if attributes.get("is_causal") and "attn_mask" in feed:
        length, mask = inputs["Q"].shape[-2], np.atleast_2d(feed["attn_mask"])
        feed["attn_mask"] = np.broadcast_to(mask, (*mask.shape[:-2], length, mask.shape[-1])).copy()
    names = [name if name in feed else "" for name in INPUTS[op]]
    node = helper.make_node(op, names, outputs, **attributes)
    types = {name: helper.np_dtype_to_tensor_dtype(x.dtype) for name, x in feed.items()}
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info(name, types[name], x.shape) for name, x in feed.items()],
        [helper.make_tensor_value_info(name, TensorProto.DOUBLE, None) for name in outputs if name],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 25)])
    with np.errstate(all="ignore"):
        return ReferenceEvaluator(model).run(None, feed)


def close(got, expected, dtype):
    got, expected = f64(got), np.asarray(expected)
    assert got.shape == expected.shape
    assert np.array_equal(np.isneginf(got), np.isneginf(expected))
    finite = np.isfinite(expected)
    got, expected = got[finite], expected[finite]
    bound = 1.01 * ROUNDING[dtype] * abs(expected) + 4e-6 * max(1.0, abs(expected).max(initial=0.0))
    assert (abs(got - expected) <= bound).all(), f"{(abs(got - expected) - bound).max()} beyond the bound"


class Maker:
    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.dtype = str(self.rng.choice(list(DTYPES)))
        self.is_torch = bool(self.rng.integers(2))

    def wrap(self, x):
        x = np.asarray(x)
        if x.dtype.kind == "f":
            if self.is_torch:
                return torch.from_numpy(x.astype(np.float32)).to(getattr(torch, self.dtype))
            return x.astype(DTYPES[self.dtype])
        return torch.from_numpy(x) if self.is_torch else x

    def array(self, *shape):
        """Standard normal values; now and then not contiguous."""
        if self.rng.integers(3) == 0:
            return self.wrap(self.rng.standard_normal((*shape[:-2], shape[-1], shape[-2]))).swapaxes(-1, -2)
        if self.rng.integers(3) == 0:
            return self.wrap(self.rng.standard_normal((shape[0], shape[1] * 2, *shape[2:])))[:, ::2]
        return self.wrap(self.rng.standard_normal(shape))


@pytest.mark.parametrize("seed", range(300))
def test_attention_random(seed):
    make = Maker(seed)
    rng = make.rng
    batch, kv_heads, group = (int(x) for x in rng.integers(1, 4, size=3))
    heads, dim, value_dim = kv_heads * group, int(rng.choice([4, 8, 33])), int(rng.choice([4, 8, 20]))
    q_len, kv_len = (int(x) for x in rng.choice([1, 2, 5, 17, 40], size=2))
    three = bool(rng.integers(2))
    attributes = {}
    if three:
        q, k = make.array(batch, q_len, heads * dim), make.array(batch, kv_len, kv_heads * dim)
        v = make.array(batch, kv_len, kv_heads * value_dim)
        attributes |= {"q_num_heads": heads, "kv_num_heads": kv_heads}
    else:
        q, k = make.array(batch, heads, q_len, dim), make.array(batch, kv_heads, kv_len, dim)
        v = make.array(batch, kv_heads, kv_len, value_dim)
    inputs = {"Q": q, "K": k, "V": v}
    total = kv_len
    how = str(rng.choice(["none", "past", "nonpad"]))
    if how == "past":
        past_len = int(rng.choice([0, 1, 9]))
        total += past_len
        inputs["past_key"] = make.array(batch, kv_heads, past_len, dim)
        inputs["past_value"] = make.array(batch, kv_heads, past_len, value_dim)
    reached = total
    if rng.integers(2):
        # Each of the outer axes there, 1, or left out from the front; the last one short now and then.
        rank = int(rng.integers(1, 5))
        reached = total if rng.integers(2) else int(rng.integers(1, total + 1))
        full = [batch, heads, q_len]
        shape = [n if rng.integers(3) else 1 for n in full][4 - rank :] + [reached]
        if rng.integers(2):
            inputs["attn_mask"] = make.wrap(rng.random(shape) < 0.7)
        else:
            mask = rng.standard_normal(shape)
            mask[rng.random(shape) < 0.2] = -np.inf
            inputs["attn_mask"] = make.wrap(mask)
    if how == "nonpad":
        inputs["nonpad_kv_seqlen"] = make.wrap(rng.integers(0, reached + 1, size=batch))
    if rng.integers(2):
        attributes["is_causal"] = 1
    if rng.integers(3) == 0:
        attributes["softcap"] = float(rng.choice([0.5, 5.0]))
    if rng.integers(3) == 0:
        attributes["scale"] = float(rng.choice([0.25, 1.0]))
    if rng.integers(2):
        attributes["left_window_size"] = int(rng.integers(-1, 8))
    if rng.integers(2):
        attributes["right_window_size"] = int(rng.integers(-1, 8))
    mode = None if rng.integers(2) else int(rng.integers(4))
    if mode == 0:
        attributes.pop("softcap", None)
    if rng.integers(4) == 0:
        attributes["softmax_precision"] = int(rng.choice([1, 10, 11, 16]))

    outputs = ["Y", *(["present_key", "present_value"] if how == "past" else ["", ""]), "" if mode is None else "qk"]
    reference_attributes = attributes | {"softmax_precision": 11} | ({} if mode is None else {"qk_matmul_output_mode": mode})
    expected = dict(zip([o for o in outputs if o], evaluate("Attention", inputs, outputs, **reference_attributes)))
    y, present_key, present_value, qk = attention(**inputs, **attributes, qk_matmul_output_mode=mode)
    assert isinstance(y, torch.Tensor) == make.is_torch and y.dtype == q.dtype
    close(y, expected["Y"], make.dtype)
    if how == "past":
        assert np.array_equal(f64(present_key), expected["present_key"]) and present_key.dtype == k.dtype
        assert np.array_equal(f64(present_value), expected["present_value"])
    else:
        assert present_key is None and present_value is None
    if mode is None:
        assert qk is None
    else:
        close(qk, expected["qk"], make.dtype)
        assert qk.dtype == q.dtype and isinstance(qk, torch.Tensor) == make.is_torch


def test_mode_0_is_before_the_soft_cap():
    q, k = np.full((1, 1, 1, 4), 2.0, np.float32), np.full((1, 1, 2, 4), 3.0, np.float32)
    *_, raw = attention(q, k, k, softcap=1.0, qk_matmul_output_mode=0)
    assert np.array_equal(raw, np.full((1, 1, 1, 2), 12.0))
    *_, capped = attention(q, k, k, softcap=1.0, qk_matmul_output_mode=1)
    assert np.allclose(capped, np.tanh(12.0))


def test_nothing_behind_a_mask_counts():
    """NaN and infinity in keys and values that no query sees change nothing, in the fourth result either."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 2, 6, 8)).astype(np.float32) for _ in range(3))
    mask = np.ones((6, 6), dtype=bool)
    mask[:, 4] = False
    clean = [attention(q, k, v, mask, qk_matmul_output_mode=mode) for mode in (2, 3)]
    k[:, :, 4], v[:, :, 4] = np.nan, np.inf
    for mode, (y, _, _, qk) in zip((2, 3), clean):
        dirty = attention(q, k, v, mask, qk_matmul_output_mode=mode)
        assert np.array_equal(dirty[0], y) and np.array_equal(dirty[3], qk)


def test_no_score_matrix(monkeypatch):
    """Only the fourth result is computed beside the fused pass."""
    asked = []
    monkeypatch.setattr(qkv, "matmul", lambda *args, **kwargs: asked.append(args))
    q = np.ones((1, 2, 3, 8), np.float32)
    attention(q, q, q, np.zeros((3, 3), np.float32), is_causal=1, softcap=2.0)
    assert not asked


@pytest.mark.parametrize("seed", range(80))
def test_rotary_random(seed):
    make = Maker(seed + 500)
    rng = make.rng
    batch, heads, length = (int(x) for x in rng.integers(1, 5, size=3))
    dim = int(rng.choice([2, 4, 10, 64]))
    attributes = {}
    rotated = dim
    if rng.integers(2):
        rotated = attributes["rotary_embedding_dim"] = int(rng.integers(1, dim // 2 + 1)) * 2
    if rng.integers(2):
        attributes["interleaved"] = 1
    if rng.integers(2):
        x = make.array(batch, length, heads * dim)
        attributes["num_heads"] = heads
    else:
        x = make.array(batch, heads, length, dim)
    inputs = {"X": x}
    rows = (batch, length)
    if rng.integers(2):
        rows = (20,)
        inputs["position_ids"] = make.wrap(rng.integers(0, 20, size=(batch, length)))
    angles = rng.random((*rows, rotated // 2)) * 6
    inputs |= {"cos_cache": make.wrap(np.cos(angles)), "sin_cache": make.wrap(np.sin(angles))}
    (expected,) = evaluate("RotaryEmbedding", inputs, ["Y"], **attributes)
    got = rotary_embedding(**inputs, **attributes)
    assert got.dtype == x.dtype and isinstance(got, torch.Tensor) == make.is_torch
    close(got, expected, make.dtype)


def test_signatures():
    parameters = inspect.signature(attention).parameters
    positional = ["Q", "K", "V", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen"]
    assert [n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD] == positional
    keywords = {n: p.default for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert keywords == {
        "is_causal": 0,
        "kv_num_heads": None,
        "q_num_heads": None,
        "qk_matmul_output_mode": None,
        "scale": None,
        "softcap": 0.0,
        "softmax_precision": None,
        "left_window_size": -1,
        "right_window_size": -1,
    }
    keywords = {n: p.default for n, p in inspect.signature(rotary_embedding).parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert keywords == {"interleaved": 0, "num_heads": 0, "rotary_embedding_dim": 0}


def z(*shape, dtype=np.float32):
    return np.zeros(shape, dtype=dtype)


GOOD = {"Q": z(2, 4, 3, 8), "K": z(2, 2, 5, 8), "V": z(2, 2, 5, 6)}
PAST = {"past_key": z(2, 2, 7, 8), "past_value": z(2, 2, 7, 6)}
FLAT = {"Q": z(2, 3, 32), "K": z(2, 5, 16), "V": z(2, 5, 12)}


@pytest.mark.parametrize(
    ("change", "error", "names"),
    [
        ({"Q": z(2, 4, 3, 8, dtype=np.float64)}, NotImplementedError, "Q"),
        ({"Q": z(2, 4, 3, 8, dtype=np.int64)}, TypeError, "Q"),
        ({"Q": [[1.0]]}, TypeError, "Q"),
        ({"Q": z(4, 3, 8)}, ValueError, "q_num_heads|K"),
        ({"Q": z(8)}, ValueError, "Q"),
        ({"Q": z(2, 3, 3, 8)}, ValueError, "Q"),
        ({"Q": z(2, 4, 3, 0), "K": z(2, 2, 5, 0)}, ValueError, "Q"),
        ({"Q": torch.zeros(2, 4, 3, 8, requires_grad=True)}, ValueError, "qkv.torch"),
        ({"K": z(2, 2, 5, 9)}, ValueError, "K"),
        ({"K": z(1, 2, 5, 8)}, ValueError, "K"),
        ({"K": z(2, 2, 5, 8, dtype=np.float16)}, TypeError, "K"),
        ({"V": z(2, 2, 4, 6)}, ValueError, "V"),
        ({"V": z(2, 1, 5, 6)}, ValueError, "V"),
        ({"attn_mask": z(3, 6)}, ValueError, "attn_mask"),
        ({"attn_mask": z(2, 5)}, ValueError, "attn_mask"),
        ({"attn_mask": z(1, 1, 1, 3, 5)}, ValueError, "attn_mask"),
        ({"attn_mask": np.float32(1)}, (TypeError, ValueError), "attn_mask"),
        ({"attn_mask": z(3, 5, dtype=np.int64)}, TypeError, "attn_mask"),
        (PAST | {"past_value": None}, ValueError, "past_value"),
        (PAST | {"past_key": None}, ValueError, "past_key"),
        (PAST | {"past_key": z(2, 2, 7, 9)}, ValueError, "past_key"),
        (PAST | {"past_value": z(2, 2, 6, 6)}, ValueError, "past_value"),
        (PAST | {"past_key": z(2, 2, 7, 8, dtype=np.float16)}, TypeError, "past_key"),
        (PAST | {"nonpad_kv_seqlen": np.array([1, 2])}, ValueError, "nonpad_kv_seqlen"),
        ({"nonpad_kv_seqlen": np.array([1, 6])}, ValueError, "nonpad_kv_seqlen"),
        ({"nonpad_kv_seqlen": np.array([-1, 2])}, ValueError, "nonpad_kv_seqlen"),
        ({"nonpad_kv_seqlen": np.array([1])}, ValueError, "nonpad_kv_seqlen"),
        ({"nonpad_kv_seqlen": np.array([1.0, 2.0])}, TypeError, "nonpad_kv_seqlen"),
        ({"nonpad_kv_seqlen": np.array([1, 5]), "attn_mask": z(3, 4)}, ValueError, "attn_mask"),
        ({"is_causal": 2}, ValueError, "is_causal"),
        ({"is_causal": 1.0}, TypeError, "is_causal"),
        ({"q_num_heads": 5}, ValueError, "q_num_heads"),
        ({"qk_matmul_output_mode": 4}, ValueError, "qk_matmul_output_mode"),
        ({"scale": float("inf")}, ValueError, "scale"),
        ({"softcap": -1.0}, ValueError, "softcap"),
        ({"softmax_precision": 7}, ValueError, "softmax_precision"),
        ({"left_window_size": -2}, ValueError, "left_window_size"),
        ({"right_window_size": 1.5}, TypeError, "right_window_size"),
        (FLAT, ValueError, "q_num_heads"),
        (FLAT | {"q_num_heads": 4}, ValueError, "kv_num_heads"),
        (FLAT | {"q_num_heads": 5, "kv_num_heads": 2}, ValueError, "Q"),
        (FLAT | {"q_num_heads": 0, "kv_num_heads": 2}, ValueError, "q_num_heads"),
        (FLAT | {"q_num_heads": 4, "kv_num_heads": -2}, ValueError, "kv_num_heads"),
    ],
)
def test_attention_refuses(change, error, names):
    with pytest.raises(error, match=names):
        attention(**GOOD | change)


ROTARY = {"X": z(2, 4, 3, 8), "cos_cache": z(9, 4), "sin_cache": z(9, 4), "position_ids": np.zeros((2, 3), np.int64)}


@pytest.mark.parametrize(
    ("change", "error", "names"),
    [
        ({"X": z(2, 4, 3, 8, dtype=np.float64)}, NotImplementedError, "X"),
        ({"X": z(2, 4, 3, 7)}, ValueError, "rotary_embedding_dim"),
        ({"X": z(2, 3, 32)}, ValueError, "num_heads"),
        ({"X": z(2, 3, 32), "num_heads": 5}, ValueError, "X"),
        ({"num_heads": 3}, ValueError, "num_heads"),
        ({"num_heads": -1}, ValueError, "num_heads"),
        ({"cos_cache": z(9, 3)}, ValueError, "cos_cache"),
        ({"sin_cache": z(8, 4)}, ValueError, "sin_cache"),
        ({"sin_cache": z(9, 4, dtype=np.float16)}, TypeError, "sin_cache"),
        ({"position_ids": None}, ValueError, "cos_cache"),
        ({"position_ids": np.full((2, 3), 9)}, ValueError, "position_ids"),
        ({"position_ids": np.full((2, 3), -1)}, ValueError, "position_ids"),
        ({"position_ids": np.zeros((3, 2), np.int64)}, ValueError, "position_ids"),
        ({"position_ids": z(2, 3)}, TypeError, "position_ids"),
        ({"rotary_embedding_dim": 10}, ValueError, "rotary_embedding_dim"),
        ({"rotary_embedding_dim": 3}, ValueError, "rotary_embedding_dim"),
        ({"interleaved": 2}, ValueError, "interleaved"),
    ],
)
def test_rotary_refuses(change, error, names):
    with pytest.raises(error, match=names):
        rotary_embedding(**ROTARY | change)


def test_backend():
    """A model of two nodes, run by position and by name; what the back end has not is refused."""
    rotate = helper.make_node("RotaryEmbedding", ["X", "cos", "sin"], ["Q"])
    attend = helper.make_node("Attention", ["Q", "Q", "V"], ["Y"], is_causal=1)
    info = lambda name, shape: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
    angles = np.random.default_rng(0).random((1, 3, 4)).astype(np.float32)
    graph = helper.make_graph(
        [rotate, attend],
        "two",
        [info("X", (1, 2, 3, 8)), info("V", (1, 2, 3, 8))],
        [info("Y", (1, 2, 3, 8))],
        [onnx.numpy_helper.from_array(np.cos(angles), "cos"), onnx.numpy_helper.from_array(np.sin(angles), "sin")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)])
    x, v = np.random.default_rng(1).standard_normal((2, 1, 2, 3, 8)).astype(np.float32)
    (expected,) = ReferenceEvaluator(model).run(None, {"X": x, "V": v})
    prepared = Backend.prepare(model)
    for inputs in ([x, v], {"X": x, "V": v}):
        assert np.allclose(prepared.run(inputs).Y, expected, atol=1e-6)
    assert np.allclose(Backend.run_model(model, [x, v])[0], expected, atol=1e-6)
    assert Backend.supports_device("CPU") and not Backend.supports_device("CUDA")
    with pytest.raises(ValueError, match="inputs"):
        prepared.run([x])
    with pytest.raises(NotImplementedError, match="CUDA"):
        Backend.prepare(model, "CUDA")
    with pytest.raises(NotImplementedError, match="Relu"):
        Backend.run_node(helper.make_node("Relu", ["X"], ["Y"]), [x])
    with pytest.raises(ValueError, match="left_window_size"):
        Backend.run_node(helper.make_node("Attention", ["Q", "K", "V"], ["Y"], left_window_size=1), [x, x, v], opset_version=24)
