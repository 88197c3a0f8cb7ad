"""What qkv.torch refuses: the same from a plain call, through the dispatcher, and of tensors that have shapes only."""

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import qkv.torch
from test_torch import SDPA, inputs, options


def test_wrong_arguments():
    q, k, v = inputs()
    with pytest.raises(TypeError, match="query"):
        qkv.torch.scaled_dot_product_attention(q.numpy(), k, v)
    with pytest.raises(TypeError, match="mask"):
        qkv.torch.attention(q, k, v, mask=[True])
    with pytest.raises(TypeError, match="causal"):
        qkv.torch.attention(q, k, v, causal=True)
    with pytest.raises(TypeError, match="window"):
        qkv.torch.attention(q, k, v, window=4)
    with pytest.raises(ValueError, match="causal"):
        qkv.torch.attention(q, k, v, causal="upper")
    with pytest.raises(ValueError, match="layout"):
        qkv.torch.attention(q, k, v, layout="sbhd")
    with pytest.raises(ValueError):
        qkv.torch.attention(q, v, v)
    with pytest.raises(NotImplementedError, match="dropout_p.*not supported"):
        qkv.torch.scaled_dot_product_attention(q, k, v, dropout_p=0.1, enable_gqa=True)
    with pytest.raises((TypeError, NotImplementedError)):
        qkv.torch.attention(q.double(), k.double(), v.double())


def test_another_device_is_refused():
    q, k, v = inputs()
    if torch.cuda.is_available():
        with pytest.raises(ValueError, match="q: is on device 'cuda"):
            qkv.torch.attention(q.cuda(), k.cuda(), v.cuda())
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        far = torch.empty(2, 8, 16, 32, device="cuda")
        with pytest.raises(ValueError, match="query: is on device 'cuda"):
            qkv.torch.scaled_dot_product_attention(far, k, v)


@pytest.mark.parametrize("fake", [False, True])
def test_meta_beside_the_cpu_is_refused(fake):
    """Nothing would be computed, and the result's memory would be what was there."""
    from contextlib import nullcontext
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode() if fake else nullcontext():
        q, k, v = (torch.zeros(shape) for shape in ((2, 8, 16, 32), (2, 2, 24, 32), (2, 2, 24, 16)))
        extras = {
            "mask": torch.ones(16, 24, dtype=torch.bool),
            "bias": torch.zeros(16, 24),
            "alibi_slopes": torch.zeros(8),
            "sinks": torch.zeros(8),
            "kv_lengths": torch.ones(2, dtype=torch.int64),
            "out": torch.zeros(2, 8, 16, 16),
        }
        every = {"q": q, "k": k, "v": v, **extras}
        for name in every:
            given = {n: t.to("meta") if n == name else t for n, t in every.items()}
            with pytest.raises(ValueError, match=f"^{name}: is on device 'meta'.*on device 'cpu'"):
                qkv.torch.attention(given.pop("q"), given.pop("k"), given.pop("v"), **given)
        for i, name in enumerate(("query", "key", "value", "attn_mask")):
            given = [t.to("meta") if n == i else t for n, t in enumerate((q, k, v, extras["mask"]))]
            for call in (qkv.torch.scaled_dot_product_attention, SDPA):
                with pytest.raises(ValueError, match=f"^{name}: is on device 'meta'"):
                    call(*given, enable_gqa=True)


def test_meta_with_a_list_of_lengths():
    q, k, v = (t.to("meta") for t in inputs())
    assert qkv.torch.attention(q, k, v, kv_lengths=[3, 24]).device.type == "meta"


def outcome(call):
    """What a call raises, or the shape of what it returns."""
    try:
        result = call()
    except Exception as error:
        return type(error), str(error)
    return [(t.shape, t.dtype) for t in (result if isinstance(result, tuple) else (result,))]


SDPA_OPTIONS = [
    *({"is_causal": x} for x in (1, 0, "x", None, True, np.bool_(True))),
    *({"enable_gqa": x} for x in (1, "x", None, True)),
    *({"scale": x} for x in ("x", [1.0], 1, np.float32(0.5), torch.tensor(0.5), math.nan, math.inf)),
    *({"dropout_p": x} for x in ("x", None, 0, 0.1, -0.1, 2.0)),
]
ATTENTION_OPTIONS = [
    *({"causal": x} for x in (True, 1.5, "x", "top_left", 3, np.int64(1), torch.tensor(1), 2**50, 2**70)),
    *({"window": x} for x in (4, (1,), (1, 2, 3), (1.5, 0), [1.5, 0], (True, 0), (-2, 0), [1, None], (-1, 3), (2**63, 0))),
    *({"softcap": x} for x in ("x", 0.0, -1.0, np.float32(2), math.nan)),
    *({"scale": x} for x in ("x", math.inf, 1)),
    *({"layout": x} for x in ("x", 1, None, "bhsd")),
    *({"return_lse": x} for x in (1, "x", None, True)),
    *({"kv_lengths": x} for x in ("x", [[1], [1, 2]], [1.0, 2.0], [3, 99], [3, 2], np.array([3, 2]))),
    *({"out": torch.empty(x)} for x in ((2, 8, 16, 15), (2, 8, 16, 16))),
    {"out": torch.empty(2, 8, 16, 16, dtype=torch.float16)},
]


@pytest.mark.parametrize("given", SDPA_OPTIONS, ids=str)
def test_both_routes_take_the_same_options_of_sdpa(given):
    q, k, v = inputs(kv_heads=8)
    direct = outcome(lambda: qkv.torch.scaled_dot_product_attention(q, k, v, **given))
    with torch.no_grad():
        through = outcome(lambda: qkv.torch.scaled_dot_product_attention(q.requires_grad_(), k, v, **given))
    assert direct == through and (isinstance(direct, list) or direct[1].startswith(f"{next(iter(given))}: "))


@pytest.mark.parametrize("given", ATTENTION_OPTIONS, ids=str)
def test_both_routes_take_the_same_options_of_attention(given):
    q, k, v = inputs()
    direct = outcome(lambda: qkv.torch.attention(q, k, v, **given))
    with torch.no_grad():
        through = outcome(lambda: qkv.torch.attention(q.requires_grad_(), k, v, **given))
    assert direct == through and (isinstance(direct, list) or direct[1].startswith(next(iter(given))))


@pytest.mark.parametrize("given", [{"is_causal": 1}, {"window": (True, 0)}, {"return_lse": 1}], ids=str)
def test_compile_makes_no_bool_of_a_number(given):
    torch.compiler.reset()
    call = qkv.torch.scaled_dot_product_attention if "is_causal" in given else qkv.torch.attention
    with pytest.raises(TypeError, match=next(iter(given))):
        torch.compile(lambda *t: call(*t, **given), backend="eager")(*inputs(kv_heads=8))


def both(call, tensors):
    """What a call comes to for tensors, and for fake ones."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode() as mode:
        fake = outcome(lambda: call(*(None if t is None else mode.from_tensor(t) for t in tensors)))
    return outcome(lambda: call(*tensors)), fake


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize("gqa", [False, True])
@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 4, 3, 8), (2, 3, 5, 8), (2, 3, 5, 6)),
        ((2, 4, 3, 8), (2, 2, 5, 8), (2, 2, 5, 6)),
        ((2, 4, 3, 8), (2, 2, 5, 8), (2, 4, 5, 6)),
        ((2, 4, 3, 8), (2, 0, 5, 8), (2, 0, 5, 6)),
        ((2, 4, 3, 8), (2, 4, 5, 7), (2, 4, 5, 6)),
        ((2, 4, 3, 8), (2, 4, 5, 8), (2, 4, 4, 6)),
        ((2, 4, 3, 8), (3, 4, 5, 8), (2, 4, 5, 6)),
        ((1, 4, 3, 8), (2, 1, 5, 8), (3, 1, 5, 6)),
        ((3, 8), (5, 8), (5, 6)),
        ((3, 8), (7, 4, 5, 8), (4, 5, 6)),
        ((3, 8), (5, 9), (5, 6)),
        ((8,), (5, 8), (5, 6)),
    ],
    ids=str,
)
def test_fake_shapes_of_sdpa(shapes, gqa):
    real, fake = both(lambda *t: qkv.torch.scaled_dot_product_attention(*t, enable_gqa=gqa), [zeros(*s) for s in shapes])
    assert real == fake


@pytest.mark.parametrize("mask", [(3, 5), (2, 5), (5,), (1, 4, 1, 1), (3, 1, 1, 1), (1, 1, 1, 3, 5), (2, 4, 3, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.float16, torch.float64, torch.int16])
def test_fake_masks(mask, dtype):
    tensors = [zeros(2, 4, 3, 8), zeros(2, 4, 5, 8), zeros(2, 4, 5, 6), zeros(*mask, dtype=dtype)]
    for causal in (False, True):
        call = lambda q, k, v, m: qkv.torch.scaled_dot_product_attention(q, k, v, m, is_causal=causal)
        real, fake = both(call, tensors)
        assert real == fake
    for name in ("mask", "bias"):
        real, fake = both(lambda q, k, v, m: qkv.torch.attention(q, k, v, **{name: m}), tensors)
        assert real == fake


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize(
    "name,shape",
    [
        *(("q", s) for s in ((2, 6, 4, 8), (2, 5, 5, 8), (1, 4, 4, 8), (2, 4, 4, 7), (2, 4, 8), (2, 0, 4, 8), (2, 4, 0, 8))),
        *(("k", s) for s in ((2, 2, 2, 7), (2, 0, 0, 8), (2, 3, 3, 8))),
        *(("v", s) for s in ((2, 2, 2, 9), (3, 2, 2, 8), (2, 1, 2, 8), (2, 2, 1, 8), (2, 2, 2, 2, 8))),
        *(("alibi_slopes", s) for s in ((4,), (2, 4), (1, 4), (3,), ())),
        *(("sinks", s) for s in ((4,), (2, 4), (3,))),
        *(("kv_lengths", s) for s in ((2,), (3,), (1, 2))),
    ],
)
def test_fake_shapes_of_attention(name, shape, layout):
    given = {"q": zeros(2, 4, 4, 8), "k": zeros(2, 2, 2, 8), "v": zeros(2, 2, 2, 8)}
    given[name] = zeros(*shape, dtype=torch.int64 if name == "kv_lengths" else torch.float32)
    for return_lse in (False, True):
        options = {"layout": layout, "return_lse": return_lse}
        call = lambda q, k, v, *x: qkv.torch.attention(q, k, v, **dict(zip(list(given)[3:], x)), **options)
        real, fake = both(call, list(given.values()))
        assert real == fake


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.int16, torch.complex64, torch.float16])
@pytest.mark.parametrize("name", ["q", "k", "v", "alibi_slopes", "sinks", "kv_lengths"])
def test_fake_types(name, dtype):
    given = {"q": zeros(2, 4, 4, 8), "k": zeros(2, 2, 2, 8), "v": zeros(2, 2, 2, 8)}
    shape = given[name].shape if name in given else (2 if name == "kv_lengths" else 4,)
    given[name] = zeros(*shape, dtype=dtype)
    call = lambda q, k, v, *x: qkv.torch.attention(q, k, v, **dict(zip(list(given)[3:], x)))
    real, fake = both(call, list(given.values()))
    assert real == fake
    if len(given) == 3:
        call = lambda *t: qkv.torch.scaled_dot_product_attention(*t, enable_gqa=True)
        real, fake = both(call, list(given.values()))
        assert real == fake
