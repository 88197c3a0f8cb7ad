"""qkv.matmul: against numpy in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
import qkv

ERF = np.vectorize(math.erf, otypes=[np.float64])
ACTIVATIONS = {
    None: lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x / 2 * (1 + ERF(x / np.sqrt(2))),
    "gelu_tanh": lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
}


def check(given, a, b, bias=None, activation=None):
    a, b = oracle.to_f64(a), oracle.to_f64(b)
    sums = a @ b + (0 if bias is None else oracle.to_f64(bias))
    with np.errstate(over="ignore"):
        expected = ACTIVATIONS[activation](sums)
    largest = (np.abs(a) @ np.abs(b)).max(initial=1.0)
    oracle.close(given, expected, largest=largest)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", oracle.FLOATS, ids=lambda d: d.__name__)
def test_bias_and_activation(rng, activation, dtype):
    a, b = rng.standard_normal((5, 9, 17)).astype(dtype), rng.standard_normal((17, 13)).astype(dtype)
    for bias in (None, rng.standard_normal(13).astype(dtype), rng.standard_normal(13).astype(np.float32)):
        out = qkv.matmul(a, b, bias=bias, activation=activation)
        assert out.dtype == dtype
        check(out, a, b, bias, activation)


@pytest.mark.parametrize(
    "a, b",
    [
        ((3, 4), (4, 5)),
        ((2, 3, 4), (4, 5)),
        ((2, 3, 4), (2, 4, 5)),
        ((2, 1, 3, 4), (6, 4, 5)),
        ((1, 6, 3, 4), (2, 1, 4, 5)),
        ((3, 4), (2, 4, 5)),
        ((2, 1, 2, 1, 2, 1, 2, 1, 3, 4), (1, 3, 1, 1, 2, 1, 2, 1, 4, 5)),
        ((1, 1), (1, 1)),
        ((1, 300), (300, 200)),
        ((130, 70), (70, 90)),
        ((0, 4), (4, 5)),
        ((3, 0), (0, 5)),
        ((3, 4), (4, 0)),
        ((0, 3, 4), (4, 5)),
        ((0, 3, 4), (1, 4, 5)),
    ],
)
def test_shapes(rng, a, b):
    a, b = rng.standard_normal(a).astype(np.float32), rng.standard_normal(b).astype(np.float32)
    out = qkv.matmul(a, b)
    assert out.shape == (a @ b).shape
    check(out, a, b)
    of_torch = qkv.matmul(torch.from_numpy(a), torch.from_numpy(b))
    assert type(of_torch) is torch.Tensor
    np.testing.assert_array_equal(of_torch.numpy(), out)
    half = qkv.matmul(a.astype(np.float16), b.astype(np.float16))
    check(half, a.astype(np.float16), b.astype(np.float16))


@settings(max_examples=100)
@given(
    st.lists(st.integers(1, 3), max_size=3),
    st.integers(0, 40),
    st.integers(0, 40),
    st.integers(0, 40),
    st.integers(0, 2**32 - 1),
)
def test_random_strides(batch, m, k, n, seed):
    rng = np.random.default_rng(seed)
    dtype = rng.choice(oracle.FLOATS)

    def strided(*shape):
        order = rng.permutation(len(shape))
        x = rng.standard_normal([shape[i] for i in order]).astype(dtype).transpose(*np.argsort(order))
        x = x[tuple(slice(None, None, rng.choice([1, -1])) for _ in shape[:-2])]
        return x[(..., slice(None, None, rng.choice([1, -1])), slice(None, None, rng.choice([1, -1])))]

    a = strided(*batch, m, k)
    b = strided(*a.shape[:-2], k, n) if rng.random() < 0.5 else strided(k, n)
    out = None
    if rng.random() < 0.5:
        order = rng.permutation(a.ndim - 1)
        shape = (*a.shape[:-1], n)
        out = np.full([shape[i] for i in order] + [n], 3, dtype).transpose(*np.argsort(order), a.ndim - 1)
    result = qkv.matmul(a, b, out=out)
    assert out is None or result is out
    check(result, a, b)


def test_out(rng):
    a, b = rng.standard_normal((4, 6)).astype(np.float32), rng.standard_normal((6, 3)).astype(np.float32)
    room = np.full((8, 5), 7, np.float32)
    qkv.matmul(a, b, out=room[::2, 1:4])
    check(room[::2, 1:4].copy(), a, b)
    assert (room[1::2] == 7).all() and (room[:, [0, 4]] == 7).all()


def test_refusals(rng):
    a, b = rng.standard_normal((4, 6)).astype(np.float32), rng.standard_normal((6, 3)).astype(np.float32)

    def raises(error, match, *arguments, **options):
        with pytest.raises(error, match=match):
            qkv.matmul(*arguments, **options)

    raises(ValueError, "b: shape .* 6 rows", a, b.T)
    raises(ValueError, "a: shape .*at least 2 axes", a[0], b)
    raises(ValueError, "b: shape .*at least 2 axes", a, b[:, 0])
    raises(ValueError, "b: shape .*axes that broadcast", np.ones((2, 4, 6), "f"), np.ones((3, 6, 3), "f"))
    raises(NotImplementedError, "a: .*not supported", np.ones((1,) * 9 + (4, 6), "f"), b)
    raises(TypeError, "a: an array of float64", a.astype(float), b)
    raises(TypeError, "b: an array of int64", a, b.astype(np.int64))
    raises(TypeError, "b: list", a, b.tolist())
    raises(ValueError, r"bias: shape \[4\]", a, b, bias=np.ones(4, "f"))
    raises(TypeError, "bias: an array of float64", a, b, bias=np.ones(3))
    raises(TypeError, "bias: an array of float16", a, b, bias=np.ones(3, np.float16))
    raises(ValueError, "activation: 'tanh'", a, b, activation="tanh")
    raises(TypeError, "activation: 3", a, b, activation=3)
    raises(ValueError, r"out: shape \[4, 4\]", a, b, out=np.ones((4, 4), "f"))
    raises(TypeError, "out: an array of float16", a, b, out=np.ones((4, 3), np.float16))
    raises(ValueError, "out: a last axis of stride 4", a, b, out=np.ones((3, 4), "f").T)
    raises(ValueError, "out: memory that a lies in", a, b, out=a[:, :3])
    raises(ValueError, "a: a tensor that requires a gradient", torch.ones(4, 6, requires_grad=True), b)
    with pytest.raises(TypeError):
        qkv.matmul(a, b, np.ones(3, "f"))
