"""Rotary tables: only the rows that are used are read, however long a table is."""

import numpy as np
import pytest
import torch

import qkv.onnx
from qkv.flash_attn import flash_attn_with_kvcache

# More rows than there is memory to copy.
HUGE = 1 << 36


def huge(row):
    """A table of so many rows, all of them the same."""
    return row.expand(HUGE, -1)


def decode(q, k, cos, sin, **options):
    caches = [torch.zeros(q.shape[0], 16, 1, 8) for _ in range(2)]
    out = flash_attn_with_kvcache(q, *caches, k, k, cos, sin, **options)
    return out, *caches


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
def test_the_cache_takes_a_table_that_could_not_be_copied(dtype, causal):
    torch.manual_seed(1)
    q, k = torch.randn(2, 3, 2, 8), torch.randn(2, 2, 1, 8)
    angle = torch.rand(1, 3)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    lengths = torch.tensor([5, 11], dtype=torch.int32)
    options = {"cache_seqlens": lengths, "causal": causal}
    for got, expected in zip(
        decode(q, k, huge(cos), huge(sin), **options),
        decode(q, k, cos.expand(16, -1).clone(), sin.expand(16, -1).clone(), **options),
    ):
        assert torch.equal(got, expected)


def test_onnx_takes_a_table_that_could_not_be_copied():
    x = torch.randn(2, 1, 3, 8)
    angle = torch.rand(1, 4)
    positions = torch.tensor([[0, HUGE - 1, 7], [3, 3, 1 << 30]])
    got = qkv.onnx.rotary_embedding(x, huge(angle.cos()), huge(angle.sin()), positions)
    few = [t.expand(2, -1).clone() for t in (angle.cos(), angle.sin())]
    assert torch.equal(got, qkv.onnx.rotary_embedding(x, *few, torch.zeros(2, 3, dtype=torch.int64)))


def test_the_rows_are_those_of_the_positions():
    """Against turning by hand: scattered rows, sequences that share some, and both pairings."""
    rng = np.random.default_rng(7)
    angles = rng.uniform(-3, 3, (40, 4)).astype(np.float32)
    cos, sin = np.cos(angles), np.sin(angles)
    x = rng.standard_normal((3, 2, 5, 8), dtype=np.float32)
    positions = rng.integers(0, 40, (3, 5))
    for interleaved in (0, 1):
        got = qkv.onnx.rotary_embedding(x, cos, sin, positions, interleaved=interleaved)
        a, b = (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :4], x[..., 4:])
        c, s = cos[positions][:, None], sin[positions][:, None]
        parts = [a * c - b * s, a * s + b * c]
        expected = np.stack(parts, -1).reshape(x.shape) if interleaved else np.concatenate(parts, -1)
        np.testing.assert_allclose(got, expected, atol=1e-6)


def test_more_tokens_than_are_copied_at_once():
    """Tables and positions that take several rounds give what single tokens give."""
    rng = np.random.default_rng(8)
    length = 40_000
    cos, sin = rng.standard_normal((2, 1, length, 1), dtype=np.float32)
    x = rng.standard_normal((1, 1, length, 2), dtype=np.float32)
    a, b = x[..., :1], x[..., 1:]
    expected = np.concatenate([a * cos - b * sin, a * sin + b * cos], -1)
    np.testing.assert_allclose(qkv.onnx.rotary_embedding(x, cos, sin), expected, atol=1e-5)
    order = rng.permutation(length)
    back = qkv.onnx.rotary_embedding(x[:, :, order], cos[0], sin[0], order[None])
    np.testing.assert_allclose(back, expected[:, :, order], atol=1e-5)


def test_rows_that_are_not_used_may_hold_anything():
    k = torch.randn(1, 2, 1, 8)
    cos, sin = torch.full((2, 40, 4), torch.nan)
    cos[5:7], sin[5:7] = 0.6, 0.8
    out, keys, _ = decode(k, k, cos, sin, cache_seqlens=5, causal=True)
    assert out.isfinite().all() and keys.isfinite().all()
    x = torch.randn(1, 1, 2, 8)
    assert qkv.onnx.rotary_embedding(x, cos, sin, torch.tensor([[6, 5]])).isfinite().all()


def test_a_position_out_of_the_table_changes_nothing():
    k = torch.ones(1, 2, 1, 8)
    caches = [torch.zeros(1, 16, 1, 8) for _ in range(2)]
    table = torch.ones(6, 4)
    with pytest.raises(ValueError, match="^rotary_cos: 6 positions, expected 7 or more for these lengths"):
        flash_attn_with_kvcache(k, *caches, k, k, table, table, cache_seqlens=5)
    assert not any(cache.any() for cache in caches)
    flash_attn_with_kvcache(k, *caches, k, k, table, table, cache_seqlens=4)
