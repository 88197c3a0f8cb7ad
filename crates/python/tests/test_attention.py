"""qkv.attention: every option against float64, with numpy arrays and torch tensors."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
import qkv
from oracle import BF16


def tensors(rng, b=2, h=4, hk=2, m=5, n=7, d=16, dv=None, dtype=np.float32):
    shapes = (b, h, m, d), (b, hk, n, d), (b, hk, n, dv or d)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


OPTIONS = {
    "plain": lambda rng: {},
    "top_left": lambda rng: {"causal": "top_left"},
    "bottom_right": lambda rng: {"causal": "bottom_right"},
    "offset": lambda rng: {"causal": 1},
    "negative offset": lambda rng: {"causal": -2},
    "window": lambda rng: {"window": (2, 1)},
    "open window": lambda rng: {"window": (None, 0)},
    "window of -1": lambda rng: {"window": (1, -1)},
    "window of nothing": lambda rng: {"window": (-1, None)},
    "causal window": lambda rng: {"window": (2, 0), "causal": "top_left"},
    "mask": lambda rng: {"mask": rng.random((2, 4, 5, 7)) < 0.6},
    "mask per key": lambda rng: {"mask": rng.random((2, 1, 1, 7)) < 0.6},
    "mask of two axes": lambda rng: {"mask": rng.random((5, 7)) < 0.6},
    "mask of one axis": lambda rng: {"mask": rng.random(7) < 0.6},
    "mask of one value": lambda rng: {"mask": np.array(True)},
    "bias": lambda rng: {"bias": rng.standard_normal((1, 4, 5, 7)).astype(np.float32)},
    "bias with -inf": lambda rng: {
        "bias": np.where(rng.random((2, 1, 5, 7)) < 0.5, -np.inf, rng.random((2, 1, 5, 7))).astype(np.float32)
    },
    "mask and bias": lambda rng: {
        "mask": rng.random((2, 4, 5, 7)) < 0.6,
        "bias": rng.standard_normal((4, 1, 1)).astype(np.float32),
    },
    "alibi": lambda rng: {"alibi_slopes": rng.random(4).astype(np.float32)},
    "alibi per batch": lambda rng: {"alibi_slopes": rng.random((2, 4)).astype(np.float32), "causal": "bottom_right"},
    "softcap": lambda rng: {"softcap": 1.5},
    "sinks": lambda rng: {"sinks": rng.standard_normal(4).astype(np.float32)},
    "sinks and nothing else": lambda rng: {"sinks": rng.random(4).astype(np.float32), "mask": np.zeros((1, 1), bool)},
    "scale": lambda rng: {"scale": 0.7},
    "scale of 0": lambda rng: {"scale": 0},
    "negative scale": lambda rng: {"scale": -1.0},
    "lengths": lambda rng: {"kv_lengths": np.array([3, 7], np.int32)},
    "lengths of 64 bits": lambda rng: {"kv_lengths": np.array([0, 5], np.int64), "causal": "bottom_right"},
    "everything": lambda rng: {
        "causal": "bottom_right",
        "window": (4, 0),
        "mask": rng.random((2, 1, 5, 7)) < 0.8,
        "bias": rng.standard_normal((1, 4, 5, 7)).astype(np.float32),
        "alibi_slopes": rng.random(4).astype(np.float32),
        "softcap": 2.0,
        "sinks": rng.standard_normal(4).astype(np.float32),
        "scale": 0.4,
        "kv_lengths": np.array([7, 6], np.int64),
    },
}


def to_torch(x):
    if not isinstance(x, np.ndarray):
        return x
    if x.dtype == BF16:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16], ids=["float32", "float16", "bfloat16"])
def test_options(rng, option, dtype):
    q, k, v = tensors(rng, dtype=dtype)
    options = OPTIONS[option](rng)
    expected = qkv.attention(q, k, v, return_lse=True, **options)
    assert type(expected[0]) is np.ndarray and expected[0].dtype == dtype and expected[1].dtype == np.float32
    oracle.check_attention(expected, q, k, v, **options)
    # The same from torch tensors, and in the other layout, bit by bit.
    of_torch = {name: to_torch(x) for name, x in options.items()}
    out, lse = qkv.attention(*map(to_torch, (q, k, v)), return_lse=True, **of_torch)
    assert type(out) is torch.Tensor and oracle.dtype_name(out) == expected[0].dtype.name
    np.testing.assert_array_equal(oracle.to_f64(out), oracle.to_f64(expected[0]))
    np.testing.assert_array_equal(lse.numpy(), expected[1])
    out, lse = qkv.attention(*(x.swapaxes(1, 2) for x in (q, k, v)), layout="bshd", return_lse=True, **options)
    np.testing.assert_array_equal(oracle.to_f64(out.swapaxes(1, 2)), oracle.to_f64(expected[0]))
    np.testing.assert_array_equal(lse, expected[1])
    assert out.flags.c_contiguous


@pytest.mark.parametrize("bias_dtype", [np.float32, np.float16])
def test_bias_of_the_queries_type_or_float32(rng, bias_dtype):
    q, k, v = tensors(rng, dtype=np.float16)
    bias = rng.standard_normal((5, 7)).astype(bias_dtype)
    oracle.check_attention(qkv.attention(q, k, v, bias=bias, return_lse=True), q, k, v, bias=bias)


@pytest.mark.parametrize(
    "dtypes",
    list(itertools.product([np.float32, np.float16, BF16], repeat=3)),
    ids=lambda d: "-".join(x.__name__ for x in d),
)
def test_types_may_differ(rng, dtypes):
    q, k, v = (x.astype(dtype) for x, dtype in zip(tensors(rng, dv=24), dtypes))
    out, lse = qkv.attention(q, k, v, return_lse=True)
    assert out.dtype == dtypes[0]
    oracle.check_attention((out, lse), q, k, v)


@pytest.mark.parametrize(
    "b, h, hk, m, n, d, dv",
    [
        (1, 1, 1, 1, 1, 1, 1),
        (1, 1, 1, 1, 300, 64, 64),
        (2, 6, 1, 3, 65, 40, 72),
        (1, 8, 8, 33, 129, 128, 64),
        (3, 2, 2, 17, 1, 8, 8),
        (0, 2, 2, 3, 4, 8, 8),
        (2, 2, 2, 0, 4, 8, 8),
        (2, 2, 2, 3, 0, 8, 8),
        (1, 2, 1, 3, 4, 8, 0),
    ],
)
def test_shapes(rng, b, h, hk, m, n, d, dv):
    q = rng.standard_normal((b, h, m, d)).astype(np.float32)
    k = rng.standard_normal((b, hk, n, d)).astype(np.float32)
    v = rng.standard_normal((b, hk, n, dv)).astype(np.float32)
    for options in ({}, {"causal": "bottom_right"}, {"window": (3, 2)}):
        result = qkv.attention(q, k, v, return_lse=True, **options)
        oracle.check_attention(result, q, k, v, **options)
        out, lse = qkv.attention(*map(torch.from_numpy, (q, k, v)), return_lse=True, **options)
        np.testing.assert_array_equal(out.numpy(), result[0])
        np.testing.assert_array_equal(lse.numpy(), result[1])


def test_rows_that_see_nothing(rng):
    q, k, v = tensors(rng, m=3, n=4)
    mask = np.ones((3, 4), bool)
    mask[1] = False
    out, lse = qkv.attention(q, k, v, mask=mask, return_lse=True)
    assert (out[:, :, 1] == 0).all() and np.isneginf(lse[:, :, 1]).all()
    oracle.check_attention((out, lse), q, k, v, mask=mask)
    sinks = np.array([1, 2, 3, 4], np.float32)
    out, lse = qkv.attention(q, k, v, mask=mask, sinks=sinks, return_lse=True)
    assert (out[:, :, 1] == 0).all()
    np.testing.assert_allclose(lse[:, :, 1], np.broadcast_to(sinks, (2, 4)), rtol=2e-7)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_what_is_behind_a_mask_changes_nothing(rng, poison):
    q, k, v = tensors(rng, m=6, n=9)
    clean = qkv.attention(q, k, v, kv_lengths=np.array([5, 9], np.int32))
    dirty_k, dirty_v = k.copy(), v.copy()
    dirty_k[0, :, 5:], dirty_v[0, :, 5:] = poison, poison
    np.testing.assert_array_equal(qkv.attention(q, dirty_k, dirty_v, kv_lengths=np.array([5, 9], np.int32)), clean)
    mask = np.ones((2, 1, 1, 9), bool)
    mask[0, ..., 5:] = False
    masked = qkv.attention(q, dirty_k, dirty_v, mask=mask)
    assert np.isfinite(masked).all()
    bias = np.where(mask, 0, -np.inf).astype(np.float32)
    assert np.isfinite(qkv.attention(q, dirty_k, dirty_v, bias=bias)).all()


def test_a_visible_nan_stays_in_its_row(rng):
    q, k, v = tensors(rng)
    q[0, 1, 2] = np.nan
    out = qkv.attention(q, k, v)
    assert np.isnan(out[0, 1, 2]).all()
    out[0, 1, 2] = 0
    assert np.isfinite(out).all()


def test_any_byte_but_zero_of_a_mask_takes_part(rng):
    q, k = (rng.standard_normal((1, 2, n, 8)).astype(np.float32) for n in (3, 150))
    mask = rng.choice(np.array([0, 1, 2, 128, 255], np.uint8), (3, 150))
    want = qkv.attention(q, k, k, mask=mask != 0)
    assert np.array_equal(qkv.attention(q, k, k, mask=mask.view(bool)), want)
    query, key, seen = (torch.from_numpy(x) for x in (q, k, mask))
    got = qkv.scaled_dot_product_attention(query, key, key, seen.view(torch.bool))
    assert np.array_equal(got.numpy(), want)


def test_out(rng):
    q, k, v = tensors(rng)
    expected = qkv.attention(q, k, v)
    out = np.full_like(expected, np.nan)
    assert qkv.attention(q, k, v, out=out) is out
    np.testing.assert_array_equal(out, expected)
    # Strided: every second head of a larger array, backwards, the lengths first.
    room = np.full((2, 5, 9, 16), 7.0, np.float32)
    out = room[:, :, 8:0:-2].transpose(0, 2, 1, 3)
    result, lse = qkv.attention(q, k, v, out=out, return_lse=True)
    assert result is out and lse.shape == (2, 4, 5)
    np.testing.assert_array_equal(out, expected)
    assert (room[:, :, [0, 1, 3, 5, 7]] == 7).all()
    # A tensor for a result of arrays, and the other way around.
    tensor = torch.zeros(expected.shape)
    assert qkv.attention(q, k, v, out=tensor) is tensor
    np.testing.assert_array_equal(tensor.numpy(), expected)
    out = np.zeros_like(expected)
    assert qkv.attention(*map(torch.from_numpy, (q, k, v)), out=out) is out
    np.testing.assert_array_equal(out, expected)
    # In the other layout.
    out = np.zeros((2, 5, 4, 16), np.float32)
    qkv.attention(*(x.swapaxes(1, 2) for x in (q, k, v)), layout="bshd", out=out)
    np.testing.assert_array_equal(out.swapaxes(1, 2), expected)


def test_out_of_torch_is_known_to_autograd(rng):
    q, k, v = map(torch.from_numpy, tensors(rng))
    x = torch.ones(2, 4, 5, 16, requires_grad=True)
    out = torch.zeros(2, 4, 5, 16)
    y = (x * out).sum()
    qkv.attention(q, k, v, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@st.composite
def calls(draw):
    """Random shapes and options, with the seed of the values."""
    b, hk, group = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    m, n = draw(st.integers(0, 40)), draw(st.integers(0, 70))
    d, dv = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    options = {
        "causal": draw(st.one_of(st.none(), st.sampled_from(["top_left", "bottom_right"]), st.integers(-50, 80))),
        "window": draw(st.one_of(st.none(), st.tuples(*[st.one_of(st.none(), st.integers(-1, 60))] * 2))),
        "softcap": draw(st.one_of(st.none(), st.floats(0.1, 50))),
        "scale": draw(st.one_of(st.none(), st.floats(-2, 2))),
    }
    sizes = [draw(st.sampled_from([1, size])) for size in (b, hk * group, m, n)]
    kinds = draw(st.sets(st.sampled_from(["mask", "bias", "alibi_slopes", "sinks", "kv_lengths"])))
    dtype = draw(st.sampled_from([np.float32, np.float16, BF16]))
    return (b, hk, group, m, n, d, dv), options, sizes, kinds, dtype, draw(st.integers(0, 2**32 - 1))


@settings(max_examples=150)
@given(calls())
def test_random_calls(call):
    (b, hk, group, m, n, d, dv), options, sizes, kinds, dtype, seed = call
    rng = np.random.default_rng(seed)
    h = hk * group
    make = lambda *shape: rng.standard_normal(shape).astype(dtype)  # noqa: E731

    # Axes in any order in memory, some reversed, the first one sometimes repeated.
    def strided(*shape):
        order = rng.permutation(3)
        x = make(*(shape[i] for i in order), shape[3]).transpose(*np.argsort(order), 3)
        flips = tuple(slice(None, None, rng.choice([1, -1])) for _ in range(3))
        x = x[flips]
        return np.broadcast_to(x[:1], shape) if shape[0] and rng.random() < 0.3 else x

    q, k, v = strided(b, h, m, d), strided(b, hk, n, d), strided(b, hk, n, dv)
    if "mask" in kinds:
        options["mask"] = rng.random(sizes) < 0.7
    if "bias" in kinds:
        options["bias"] = rng.standard_normal(sizes).astype(rng.choice([np.float32, dtype]))
    if "alibi_slopes" in kinds:
        options["alibi_slopes"] = rng.random((b, h) if rng.random() < 0.5 else h).astype(np.float32)
    if "sinks" in kinds:
        options["sinks"] = rng.standard_normal(h).astype(np.float32)
    if "kv_lengths" in kinds:
        options["kv_lengths"] = rng.integers(0, n + 1, b).astype(rng.choice([np.int32, np.int64]))
    oracle.check_attention(qkv.attention(q, k, v, return_lse=True, **options), q, k, v, **options)


def test_merge_states(rng):
    q, k, v = tensors(rng, n=11)
    for dtype in (np.float32, BF16):
        a = qkv.attention(q.astype(dtype), k[:, :, :4], v[:, :, :4], return_lse=True)
        b = qkv.attention(q.astype(dtype), k[:, :, 4:], v[:, :, 4:], return_lse=True)
        out, lse = qkv.merge_states(*a, *b)
        assert out.dtype == dtype and lse.dtype == np.float32
        expected, expected_lse = oracle.attention(q.astype(dtype), k, v)
        np.testing.assert_allclose(out.astype(np.float64), expected, atol=2e-6 if dtype is np.float32 else 3e-2)
        np.testing.assert_allclose(lse, expected_lse, atol=2e-6)
        of_torch = qkv.merge_states(*map(to_torch, (*a, *b)))
        assert type(of_torch[0]) is torch.Tensor
        np.testing.assert_array_equal(oracle.to_f64(of_torch[0]), oracle.to_f64(out))
    # A side that saw nothing has no weight, whatever it holds.
    nothing = np.full_like(a[0], np.nan), np.full_like(a[1], -np.inf)
    out, lse = qkv.merge_states(*a, *nothing)
    np.testing.assert_array_equal(oracle.to_f64(out), oracle.to_f64(a[0]))
    np.testing.assert_array_equal(lse, a[1])
    out, lse = qkv.merge_states(*nothing, *nothing)
    assert (out == 0).all() and np.isneginf(lse).all()
    # Strides of any kind.
    flipped = [np.ascontiguousarray(x[..., ::-1])[..., ::-1] for x in a]
    expected = qkv.merge_states(*a, *b)
    for given_, wanted in zip(qkv.merge_states(*flipped, *b), expected):
        np.testing.assert_array_equal(oracle.to_f64(given_), oracle.to_f64(wanted))


def test_merge_states_refuses(rng):
    q, k, v = tensors(rng)
    out, lse = qkv.attention(q, k, v, return_lse=True)
    with pytest.raises(ValueError, match="out_b: shape"):
        qkv.merge_states(out, lse, out[:1], lse)
    with pytest.raises(ValueError, match="lse_b: shape"):
        qkv.merge_states(out, lse, out, lse[:1])
    with pytest.raises(TypeError, match="lse_a: an array of float64"):
        qkv.merge_states(out, lse.astype(np.float64), out, lse)
    with pytest.raises(ValueError, match="out_a: shape"):
        qkv.merge_states(out[0], lse, out, lse)
