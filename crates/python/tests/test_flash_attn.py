"""`qkv.flash_attn` against a plain float64 reference, written after the reference of flash-attention's own tests.

The reference builds the whole score matrix of one sequence; lengths, pages, packing and caches are taken apart here, in the
tests, and not by what is tested. Random cases run over all options, libraries, types and strides; then come cases by hand
(figures of flash-attention's documentation, empty sequences) and inputs that must be refused without a change.
"""

import inspect

import ml_dtypes
import numpy as np
import pytest
import torch

from qkv.flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
# Half a unit in the last place, relative.
ROUNDING = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def f64(x):
    """A float64 numpy array of the same values."""
    return x.double().numpy() if isinstance(x, torch.Tensor) else np.asarray(x).astype(np.float64)


def reference(q, k, v, *, scale=None, causal=False, window=(-1, -1), softcap=0.0, slopes=None, leftpad=0):
    """One sequence: q (n, heads, dim), k (m, kv heads, dim), v (m, kv heads, value dim); out (n, heads, value dim), lse (heads, n).

    The first `leftpad` keys are not there; everything else counts as if they were.
    """
    q, k, v = f64(q), f64(k), f64(v)
    n, heads, dim = q.shape
    m = k.shape[0]
    k, v = (np.repeat(x, heads // x.shape[1], axis=1) for x in (k, v))
    s = np.einsum("nhd,mhd->hnm", q, k) * (dim**-0.5 if scale is None else scale)
    if softcap > 0:
        s = softcap * np.tanh(s / softcap)
    p, j = np.arange(n)[:, None] + m - n, np.arange(m)
    if slopes is not None:
        s = s - f64(slopes)[:, None, None] * abs(p - j)
    left, right = window
    if causal:
        right = 0
    hidden = np.broadcast_to(j < leftpad, (n, m)).copy()
    if left >= 0:
        hidden |= j < p - left
    if right >= 0:
        hidden |= j > p + right
    s = np.where(hidden, -np.inf, s)
    largest = s.max(axis=-1, keepdims=True, initial=-np.inf)
    largest = np.where(np.isneginf(largest), 0, largest)
    weights = np.exp(s - largest)
    total = weights.sum(axis=-1, keepdims=True)
    empty = total[..., 0] == 0
    out = np.einsum("hnm,mhd->nhd", weights / np.where(total == 0, 1, total), v)
    with np.errstate(divide="ignore"):
        lse = np.where(empty, np.inf, np.log(total[..., 0]) + largest[..., 0])
    return out, lse


def rotated(x, cos, sin, positions, interleaved):
    """x (n, heads, dim) turned to positions (n,), float64."""
    x, pairs = f64(x), cos.shape[1]
    c, s = f64(cos)[positions][:, None], f64(sin)[positions][:, None]
    at = (np.arange(pairs) * 2, np.arange(pairs) * 2 + 1) if interleaved else (np.arange(pairs), np.arange(pairs) + pairs)
    out = x.copy()
    out[..., at[0]] = x[..., at[0]] * c - x[..., at[1]] * s
    out[..., at[1]] = x[..., at[0]] * s + x[..., at[1]] * c
    return out


def close(got, expected, dtype):
    """Within float32's error and one rounding to `dtype`."""
    got = f64(got)
    assert got.shape == expected.shape
    assert np.array_equal(np.isinf(got), np.isinf(expected))
    finite = np.isfinite(expected)
    got, expected = got[finite], expected[finite]
    bound = 1.01 * ROUNDING[dtype] * abs(expected) + 4e-6 * max(1.0, abs(expected).max(initial=0.0))
    assert (abs(got - expected) <= bound).all(), f"{(abs(got - expected) - bound).max()} beyond the bound"


class Maker:
    """Random arrays of one type, numpy's or torch's, contiguous or not."""

    def __init__(self, seed, dtype=None, torch_too=True):
        self.rng = np.random.default_rng(seed)
        self.dtype = dtype or str(self.rng.choice(list(DTYPES)))
        self.is_torch = torch_too and bool(self.rng.integers(2))

    def wrap(self, x, dtype):
        x = np.asarray(x, dtype=np.float32 if dtype in DTYPES else dtype)
        if self.is_torch:
            x = torch.from_numpy(x)
            return x.to(getattr(torch, dtype)) if dtype in DTYPES else x
        return x.astype(DTYPES.get(dtype, dtype))

    def array(self, *shape, dtype=None, dense=False):
        """Standard normal values, in one of several layouts."""
        dtype = dtype or self.dtype
        x = self.rng.standard_normal(shape).astype(np.float32)
        how = 0 if dense else self.rng.integers(4)
        if how == 1 and len(shape) == 4:  # heads before length in memory
            return self.wrap(x.transpose(0, 2, 1, 3).copy(), dtype).swapaxes(1, 2)
        if how == 2:  # the middle of something larger
            whole = self.rng.standard_normal([n + 3 for n in shape]).astype(np.float32)
            inner = tuple(slice(1, n + 1) for n in shape)
            whole[inner] = x
            return self.wrap(whole, dtype)[inner]
        if how == 3:  # every other head of a packed projection
            whole = self.rng.standard_normal((*shape[:-2], shape[-2] * 2, shape[-1])).astype(np.float32)
            whole[..., ::2, :] = x
            return self.wrap(whole, dtype)[..., ::2, :]
        return self.wrap(x, dtype)

    def integers(self, values):
        return self.wrap(values, np.int32)

    def options(self, batch, heads, longest):
        """Arguments for the call, and for the reference of each sequence."""
        rng = self.rng
        call = {"causal": bool(rng.integers(2))}
        if rng.integers(2):
            call["window_size"] = tuple(int(x) for x in rng.integers(-1, max(longest, 1), size=2))
        if rng.integers(3) == 0:
            call["softcap"] = float(rng.choice([0.5, 3.0, 30.0]))
        if rng.integers(3) == 0:
            call["softmax_scale"] = float(rng.choice([0.1, 1.0, -0.3]))
        slopes = None
        if rng.integers(3) == 0:
            slopes = rng.random((batch, heads) if rng.integers(2) else (heads,), dtype=np.float32)
            call["alibi_slopes"] = self.wrap(slopes, "float32")
        per_sequence = [
            {
                "causal": call["causal"],
                "window": call.get("window_size", (-1, -1)),
                "softcap": call.get("softcap", 0.0),
                "scale": call.get("softmax_scale"),
                "slopes": slopes if slopes is None or slopes.ndim == 1 else slopes[i],
            }
            for i in range(batch)
        ]
        return call, per_sequence

    def sizes(self):
        """batch, heads, kv heads, dim, value dim."""
        kv_heads = int(self.rng.integers(1, 4))
        dim = int(self.rng.choice([4, 8, 24, 64]))
        value_dim = dim if self.rng.integers(3) else int(self.rng.choice([3, 16, 40]))
        return int(self.rng.integers(1, 4)), kv_heads * int(self.rng.integers(1, 5)), kv_heads, dim, value_dim


def library(x):
    return "torch" if isinstance(x, torch.Tensor) else "numpy"


@pytest.mark.parametrize("seed", range(120))
def test_func_random(seed):
    make = Maker(seed)
    batch, heads, kv_heads, dim, value_dim = make.sizes()
    q_len, k_len = (int(x) for x in make.rng.choice([1, 2, 7, 33, 90], size=2))
    q, k = make.array(batch, q_len, heads, dim), make.array(batch, k_len, kv_heads, dim)
    v = make.array(batch, k_len, kv_heads, value_dim)
    call, per_sequence = make.options(batch, heads, k_len)
    out, lse, probs = flash_attn_func(q, k, v, return_attn_probs=True, **call)
    assert probs is None and library(out) == library(lse) == library(q) and out.dtype == q.dtype
    assert tuple(lse.shape) == (batch, heads, q_len) and "float32" in str(lse.dtype)
    for i in range(batch):
        expected, expected_lse = reference(q[i], k[i], v[i], **per_sequence[i])
        close(out[i], expected, make.dtype)
        close(lse[i], expected_lse, "float32")
    alone = flash_attn_func(q, k, v, **call)
    assert np.array_equal(f64(alone), f64(out))


def lengths_of(rng, batch, longest):
    return [int(x) for x in rng.integers(0, longest + 1, size=batch)]


def paged(make, rows, page_size, spare=3):
    """Sequences of rows in pages of a pool in random order: ([pools], block table), the entries beyond a sequence wild."""
    counts = [-(-len(r[0]) // page_size) for r in rows]
    order = make.rng.permutation(sum(counts) + spare)
    pools = [make.array(len(order), page_size, *x.shape[1:]) for x in rows[0]]
    wild = make.rng.choice([-1, 2**31 - 1, len(order)], size=(len(rows), max(counts, default=0) + 1))
    table, at = wild.astype(np.int32), 0
    for i, (parts, count) in enumerate(zip(rows, counts)):
        table[i, :count] = order[at : at + count]
        at += count
        for pool, part in zip(pools, parts):
            for page in range(count):
                piece = part[page * page_size : (page + 1) * page_size]
                pool[int(table[i, page]), : len(piece)] = piece
    return pools, table


@pytest.mark.parametrize("seed", range(120))
def test_varlen_random(seed):
    make = Maker(seed + 1000)
    batch, heads, kv_heads, dim, value_dim = make.sizes()
    q_lens, k_lens = lengths_of(make.rng, batch, 40), lengths_of(make.rng, batch, 60)
    q_ends, k_ends = (np.cumsum([0, *x]).astype(np.int32) for x in (q_lens, k_lens))
    tail = int(make.rng.choice([0, 0, 5]))
    q = make.array(q_ends[-1] + tail, heads, dim)
    k, v = make.array(k_ends[-1] + tail, kv_heads, dim), make.array(k_ends[-1] + tail, kv_heads, value_dim)
    call, per_sequence = make.options(batch, heads, 60)
    ends = (make.integers(q_ends), make.integers(k_ends), max(q_lens), max(k_lens) + 3)
    rows = [(k[k_ends[i] : k_ends[i + 1]], v[k_ends[i] : k_ends[i + 1]]) for i in range(batch)]
    kv, table = (k, v), {}
    if make.rng.integers(2):
        kv, block_table = paged(make, rows, int(make.rng.choice([1, 3, 16])))
        table = {"block_table": make.integers(block_table)}
    out, lse, _ = flash_attn_varlen_func(q, *kv, *ends, return_attn_probs=True, **table, **call)
    assert library(out) == library(q) and out.dtype == q.dtype and tuple(lse.shape) == (heads, len(q))
    for i in range(batch):
        expected, expected_lse = reference(q[q_ends[i] : q_ends[i + 1]], *rows[i], **per_sequence[i])
        close(out[q_ends[i] : q_ends[i + 1]], expected, make.dtype)
        close(lse[:, q_ends[i] : q_ends[i + 1]], expected_lse, "float32")
    assert (f64(out[q_ends[-1] :]) == 0).all() and np.isposinf(f64(lse[:, q_ends[-1] :])).all()
    assert np.array_equal(f64(flash_attn_varlen_func(q, *kv, *ends, **table, **call)), f64(out))


@pytest.mark.parametrize("seed", range(240))
def test_kvcache_random(seed):
    make = Maker(seed + 2000)
    rng = make.rng
    batch, heads, kv_heads, dim, value_dim = make.sizes()
    capacity = 48
    q_len = int(rng.choice([1, 1, 4, 19]))
    new = 0 if rng.integers(3) == 0 else int(rng.choice([1, q_len, 0]))
    before = np.asarray(lengths_of(rng, batch, capacity - new))
    how = str(rng.choice(["plain", "indexed", "paged"]))
    page_size = capacity if how != "paged" else int(rng.choice([1, 4, 16]))
    rows_of_cache = batch + int(rng.integers(3))
    call, per_sequence = make.options(batch, heads, capacity)
    if how == "paged":
        width = capacity // page_size
        rows_of_cache *= width
        table = rng.permutation(rows_of_cache)[: batch * width].reshape(batch, width)
        wild = np.where(np.arange(width) * page_size < (before + new)[:, None], table, -7)
        call["block_table"] = make.integers(wild)
    elif how == "indexed":
        table = rng.permutation(rows_of_cache)[:batch, None]
        call["cache_batch_idx"] = make.integers(table[:, 0])
    else:
        table = np.arange(batch)[:, None]
    if rng.integers(3) == 0:  # keys and values side by side in one array, as vLLM has them
        both = make.array(rows_of_cache, 2, page_size, kv_heads, dim, dense=True)
        k_cache, v_cache = both[:, 0], both[:, 1]
        value_dim = dim
    else:
        k_cache = make.array(rows_of_cache, page_size, kv_heads, dim)
        v_cache = make.array(rows_of_cache, page_size, kv_heads, value_dim)
    q = make.array(batch, q_len, heads, dim)
    call["cache_seqlens"] = make.integers(before)
    if rng.integers(3) == 0:
        before[:] = before.min(initial=capacity)
        call["cache_seqlens"] = int(before.min(initial=capacity))
    leftpad = np.zeros(batch, dtype=np.int64)
    if rng.integers(3) == 0:
        leftpad = rng.integers(0, before + 1)
        call["cache_leftpad"] = make.integers(leftpad)
    k = make.array(batch, new, kv_heads, dim)
    v = make.array(batch, new, kv_heads, value_dim)
    with_new = new > 0 or rng.integers(4) == 0
    rotary = with_new and bool(rng.integers(2))
    if with_new:
        call |= {"k": k, "v": v}
    turn_q, turn_k = (lambda i, x: f64(x)), (lambda i, x: f64(x))
    if rotary:
        pairs = int(rng.integers(1, dim // 2 + 1))
        angles = rng.random((capacity + q_len, pairs)) * 6
        cos, sin = make.wrap(np.cos(angles), make.dtype), make.wrap(np.sin(angles), make.dtype)
        interleaved = bool(rng.integers(2))
        call |= {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": interleaved}
        local = call["causal"] or call.get("window_size", (-1, -1)) != (-1, -1)
        steps = np.arange(q_len) if local else np.zeros(q_len, dtype=int)
        turn_q = lambda i, x: rotated(x, cos, sin, before[i] + steps, interleaved)
        turn_k = lambda i, x: rotated(x, cos, sin, before[i] + np.arange(new), interleaved)

    expected_caches = [f64(k_cache).copy(), f64(v_cache).copy()]
    written = np.zeros(expected_caches[0].shape[:2], dtype=bool)
    for i in range(batch):
        for t in range(new if with_new else 0):
            at = before[i] + t
            place = int(table[i, at // page_size]), at % page_size
            written[place] = True
            expected_caches[0][place] = turn_k(i, k[i])[t]
            expected_caches[1][place] = f64(v[i])[t]
    out, lse = flash_attn_with_kvcache(q, k_cache, v_cache, return_softmax_lse=True, **call)
    assert library(out) == library(q) and out.dtype == q.dtype
    for cache, expected in zip((k_cache, v_cache), expected_caches):
        assert np.array_equal(f64(cache)[~written], expected[~written])
        close(f64(cache)[written], expected[written], make.dtype)
    for i in range(batch):
        length = before[i] + (new if with_new else 0)
        places = [(int(table[i, at // page_size]), at % page_size) for at in range(length)]
        # What is in the cache now, rounding included, is what is attended to.
        keys, values = (
            np.array([f64(cache[place]) for place in places]).reshape(length, kv_heads, cache.shape[-1])
            for cache in (k_cache, v_cache)
        )
        expected, expected_lse = reference(turn_q(i, q[i]), keys, values, leftpad=leftpad[i], **per_sequence[i])
        close(out[i], expected, make.dtype)
        close(lse[i], expected_lse, "float32")


def test_figures_of_the_documentation():
    """The two causal masks that flash-attention's documentation draws."""
    for n, m, drawn in ((2, 5, ["11110", "11111"]), (5, 2, ["00", "00", "00", "10", "11"])):
        q, k = np.zeros((1, n, 1, 8), dtype=np.float32), np.zeros((1, m, 1, 8), dtype=np.float32)
        v = np.eye(m, 8, dtype=np.float32).reshape(1, m, 1, 8)
        out, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
        seen = (out[0, :, 0, :m] > 0).astype(int)
        assert ["".join(map(str, row)) for row in seen] == drawn
        counts = seen.sum(axis=1)
        assert np.allclose(lse[0, 0], np.where(counts == 0, np.inf, np.log(np.maximum(counts, 1))))


def test_no_keys():
    q, none = torch.ones(2, 3, 4, 8), torch.ones(2, 0, 2, 8)
    out, lse, _ = flash_attn_func(q, none, none, return_attn_probs=True)
    assert (out == 0).all() and torch.isposinf(lse).all()
    out, lse = flash_attn_with_kvcache(
        q, torch.ones(2, 5, 2, 8), torch.ones(2, 5, 2, 8), cache_seqlens=0, return_softmax_lse=True
    )
    assert (out == 0).all() and torch.isposinf(lse).all()
    for batch, length in ((0, 3), (2, 0)):
        assert flash_attn_func(torch.ones(batch, length, 4, 8), torch.ones(batch, 3, 2, 8), torch.ones(batch, 3, 2, 8)).shape == (
            batch,
            length,
            4,
            8,
        )


def test_decoding_step_by_step_is_prefill():
    """Keys that were appended one by one, in pages, give what they give at once: nearly the same bits."""
    make = Maker(7, "float32", torch_too=False)
    q, k, v = make.array(2, 9, 4, 16), make.array(2, 9, 2, 16), make.array(2, 9, 2, 16)
    at_once = flash_attn_func(q, k, v, causal=True)
    pools = [np.zeros((8, 3, 2, 16), dtype=np.float32) for _ in range(2)]
    table = np.array([[5, 0, 3], [1, 7, 2]], dtype=np.int32)
    for i in range(9):
        out = flash_attn_with_kvcache(
            q[:, i : i + 1], *pools, k[:, i : i + 1], v[:, i : i + 1], cache_seqlens=i, block_table=table, causal=True
        )
        assert np.allclose(out[:, 0], at_once[:, i], atol=2e-6)
    assert (pools[0][[4, 6]] == 0).all()


def test_signatures_are_flash_attentions():
    shared = "dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs"
    for function, names in (
        (flash_attn_func, f"q k v {shared}"),
        (flash_attn_varlen_func, f"q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k {shared} block_table"),
        (
            flash_attn_with_kvcache,
            " ".join(
                [
                    "q k_cache v_cache k v rotary_cos rotary_sin cache_seqlens cache_batch_idx cache_leftpad block_table",
                    "softmax_scale causal window_size softcap rotary_interleaved alibi_slopes num_splits return_softmax_lse",
                ]
            ),
        ),
    ):
        parameters = inspect.signature(function).parameters
        assert list(parameters) == names.split()
        assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters.values())
    defaults = inspect.signature(flash_attn_with_kvcache).parameters
    assert (defaults["rotary_interleaved"].default, defaults["num_splits"].default) == (True, 0)


def z(*shape, dtype=np.float32):
    return np.zeros(shape, dtype=dtype)


def i32(*values):
    return np.array(values, dtype=np.int32)


FUNC = {"q": z(2, 3, 4, 8), "k": z(2, 5, 2, 8), "v": z(2, 5, 2, 8)}


@pytest.mark.parametrize(
    ("change", "error", "names"),
    [
        ({"q": z(3, 4, 8)}, ValueError, "q"),
        ({"q": z(2, 3, 4, 8, dtype=np.float64)}, TypeError, "q"),
        ({"q": z(2, 3, 4, 8, dtype=np.int32)}, TypeError, "q"),
        ({"q": "no array"}, TypeError, "q"),
        ({"q": z(2, 3, 0, 8)}, ValueError, "q"),
        ({"q": z(2, 3, 3, 8)}, ValueError, "q"),
        ({"k": z(1, 5, 2, 8)}, ValueError, "k"),
        ({"k": z(2, 5, 2, 9)}, ValueError, "k"),
        ({"k": z(2, 5, 2, 8, dtype=np.float16)}, TypeError, "k"),
        ({"k": z(2, 5, 0, 8), "v": z(2, 5, 0, 8)}, ValueError, "k"),
        ({"v": z(2, 4, 2, 8)}, ValueError, "v"),
        ({"dropout_p": 0.1}, NotImplementedError, "dropout_p"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p"),
        ({"dropout_p": None}, TypeError, "dropout_p"),
        ({"softmax_scale": float("nan")}, ValueError, "softmax_scale"),
        ({"softmax_scale": "x"}, TypeError, "softmax_scale"),
        ({"causal": 2}, ValueError, "causal"),
        ({"causal": "yes"}, TypeError, "causal"),
        ({"window_size": 3}, TypeError, "window_size"),
        ({"window_size": (1, 2, 3)}, TypeError, "window_size"),
        ({"window_size": (1.5, 2)}, TypeError, "window_size"),
        ({"softcap": -1.0}, ValueError, "softcap"),
        ({"softcap": float("inf")}, ValueError, "softcap"),
        ({"alibi_slopes": z(3)}, ValueError, "alibi_slopes"),
        ({"alibi_slopes": z(4, dtype=np.float16)}, TypeError, "alibi_slopes"),
        ({"alibi_slopes": z(4) + np.inf}, ValueError, "alibi_slopes"),
        ({"q": torch.zeros(2, 3, 4, 8, requires_grad=True)}, Exception, "qkv.torch"),
        ({"q": torch.zeros(2, 3, 4, 8, device="meta")}, (ValueError, TypeError), "q"),
    ],
)
def test_func_refuses(change, error, names):
    with pytest.raises(error, match=names):
        flash_attn_func(**FUNC | change)


VARLEN = {
    "q": z(5, 4, 8),
    "k": z(7, 2, 8),
    "v": z(7, 2, 8),
    "cu_seqlens_q": i32(0, 2, 5),
    "cu_seqlens_k": i32(0, 3, 7),
    "max_seqlen_q": 3,
    "max_seqlen_k": 4,
}
PAGES = {"k": z(4, 2, 2, 8), "v": z(4, 2, 2, 8), "block_table": i32([0, 1], [2, 3])}


@pytest.mark.parametrize(
    ("change", "error", "names"),
    [
        ({"cu_seqlens_q": i32(0, 3, 2)}, ValueError, "cu_seqlens_q"),
        ({"cu_seqlens_q": i32(0, 6, 5)}, ValueError, "cu_seqlens_q"),
        ({"cu_seqlens_q": i32(1, 2, 5)}, ValueError, "cu_seqlens_q"),
        ({"cu_seqlens_q": i32(0, 2, 6)}, ValueError, "cu_seqlens_q"),
        ({"cu_seqlens_q": i32()}, ValueError, "cu_seqlens_q"),
        ({"cu_seqlens_q": i32(0, 2, 5).astype(np.int64)}, TypeError, "cu_seqlens_q"),
        ({"cu_seqlens_q": [0, 2, 5]}, TypeError, "cu_seqlens_q"),
        ({"cu_seqlens_k": i32(0, 7)}, ValueError, "cu_seqlens_k"),
        ({"cu_seqlens_k": i32(0, 3, 8)}, ValueError, "cu_seqlens_k"),
        ({"cu_seqlens_k": i32(0, -3, 7)}, ValueError, "cu_seqlens_k"),
        ({"max_seqlen_q": 2}, ValueError, "max_seqlen_q"),
        ({"max_seqlen_k": 3}, ValueError, "max_seqlen_k"),
        ({"max_seqlen_k": 3.0}, TypeError, "max_seqlen_k"),
        ({"q": z(1, 5, 4, 8)}, ValueError, "q"),
        ({"k": z(7, 2, 9)}, ValueError, "k"),
        ({"v": z(6, 2, 8)}, ValueError, "v"),
        ({"dropout_p": 0.5}, NotImplementedError, "dropout_p"),
        (PAGES | {"block_table": i32([0, 1], [2, 4])}, ValueError, "block_table"),
        (PAGES | {"block_table": i32([0, 1], [-1, 3])}, ValueError, "block_table"),
        (PAGES | {"block_table": i32([0], [2])}, ValueError, "cu_seqlens_k"),
        (PAGES | {"block_table": i32([0, 1])}, ValueError, "block_table"),
        (PAGES | {"block_table": i32(0, 1)}, ValueError, "block_table"),
        (PAGES | {"block_table": i32([0, 1], [2, 3]).astype(np.float32)}, TypeError, "block_table"),
        (PAGES | {"k": z(4, 0, 2, 8), "v": z(4, 0, 2, 8)}, ValueError, "cu_seqlens_k"),
    ],
)
def test_varlen_refuses(change, error, names):
    with pytest.raises(error, match=names):
        flash_attn_varlen_func(**VARLEN | change)


def cache_case():
    rng = np.random.default_rng(0)
    cache = rng.standard_normal((2, 3, 6, 2, 8)).astype(np.float32)
    return {
        "q": z(2, 1, 4, 8) + 1,
        "k_cache": cache[0],
        "v_cache": cache[1],
        "k": z(2, 2, 2, 8) + 2,
        "v": z(2, 2, 2, 8) + 3,
        "cache_seqlens": i32(1, 2),
    }


CACHE = cache_case()
ONE = z(3, 6, 2, 8)


@pytest.mark.parametrize(
    ("change", "error", "names"),
    [
        ({"cache_seqlens": i32(1, 5)}, ValueError, "cache_seqlens"),
        ({"cache_seqlens": i32(-1, 2)}, ValueError, "cache_seqlens"),
        ({"cache_seqlens": 5}, ValueError, "cache_seqlens"),
        ({"cache_seqlens": 2**80}, ValueError, "cache_seqlens"),
        ({"cache_seqlens": i32(1)}, ValueError, "cache_seqlens"),
        ({"cache_seqlens": z(2)}, TypeError, "cache_seqlens"),
        ({"cache_seqlens": None}, ValueError, "cache_seqlens"),
        ({"v": None}, ValueError, "v"),
        ({"k": None}, ValueError, "v"),
        ({"k": z(2, 2, 2, 8, dtype=np.float16)}, TypeError, "k"),
        ({"k": z(2, 2, 3, 8)}, ValueError, "k"),
        ({"v": z(2, 1, 2, 8)}, ValueError, "v"),
        ({"k": z(2, 7, 2, 8), "v": z(2, 7, 2, 8)}, ValueError, "cache_seqlens"),
        ({"q": z(4, 1, 4, 8)}, ValueError, "k"),
        ({"q": z(4, 1, 4, 8), "k": None, "v": None, "cache_seqlens": 1}, ValueError, "k_cache"),
        ({"q": z(2, 1, 4, 8, dtype=np.float16)}, TypeError, "k_cache"),
        ({"k_cache": z(3, 6, 2, 16)[..., ::2]}, ValueError, "k_cache"),
        ({"v_cache": z(3, 5, 2, 8)}, ValueError, "v_cache"),
        ({"cache_batch_idx": i32(0, 3)}, ValueError, "cache_batch_idx"),
        ({"cache_batch_idx": i32(0, -1)}, ValueError, "cache_batch_idx"),
        ({"cache_batch_idx": i32(1, 1), "cache_seqlens": 2}, ValueError, "cache_batch_idx"),
        ({"cache_batch_idx": i32(0, 1), "block_table": i32([0], [1])}, ValueError, "cache_batch_idx"),
        ({"cache_leftpad": i32(2, 0)}, ValueError, "cache_leftpad"),
        ({"cache_leftpad": i32(-1, 0)}, ValueError, "cache_leftpad"),
        ({"block_table": i32([0], [3])}, ValueError, "block_table"),
        ({"block_table": i32([0], [-1])}, ValueError, "block_table"),
        ({"block_table": i32([0, 1], [1, 2]), "cache_seqlens": i32(5, 0)}, ValueError, "block_table"),
        ({"block_table": i32([0], [1]), "cache_seqlens": i32(5, 0)}, ValueError, "cache_seqlens"),
        ({"rotary_cos": z(9, 4)}, ValueError, "rotary_sin"),
        ({"rotary_cos": z(9, 4), "rotary_sin": z(9, 3)}, ValueError, "rotary_sin"),
        ({"rotary_cos": z(9, 5), "rotary_sin": z(9, 5)}, ValueError, "rotary_cos"),
        ({"rotary_cos": z(3, 4), "rotary_sin": z(3, 4)}, ValueError, "rotary_cos"),
        ({"rotary_cos": z(9, 4), "rotary_sin": z(9, 4), "k": None, "v": None}, ValueError, "rotary_cos"),
        ({"rotary_interleaved": 3}, ValueError, "rotary_interleaved"),
        ({"num_splits": -1}, ValueError, "num_splits"),
        ({"num_splits": 1.5}, TypeError, "num_splits"),
        ({"alibi_slopes": z(4) + np.inf}, ValueError, "alibi_slopes"),
        ({"softcap": -1.0}, ValueError, "softcap"),
        ({"k_cache": np.broadcast_to(z(1, 1, 2, 8), (3, 6, 2, 8))}, ValueError, "k_cache"),
        ({"v_cache": np.lib.stride_tricks.as_strided(z(200), (3, 6, 2, 8), (64, 64, 32, 4))}, ValueError, "v_cache"),
        ({"k_cache": ONE, "v_cache": ONE}, ValueError, "v_cache"),
        ({"k": CACHE["k_cache"][:2, 3:5]}, ValueError, "k_cache"),
        ({"k_cache": torch.zeros(3, 6, 2, 8, requires_grad=True)}, Exception, "qkv.torch"),
    ],
)
def test_kvcache_refuses_and_changes_nothing(change, error, names):
    call = CACHE | change
    before = [
        f64(call[name].detach() if isinstance(call[name], torch.Tensor) else call[name]).copy() for name in ("k_cache", "v_cache")
    ]
    with pytest.raises(error, match=names):
        flash_attn_with_kvcache(**call)
    for name, old in zip(("k_cache", "v_cache"), before):
        now = call[name]
        assert np.array_equal(f64(now.detach() if isinstance(now, torch.Tensor) else now), old)


def test_kvcache_read_only():
    call = cache_case()
    call["v_cache"].flags.writeable = False
    with pytest.raises(ValueError, match="v_cache"):
        flash_attn_with_kvcache(**call)
    assert not (call["k_cache"] == 2).any()
    # Without new ones nothing is written, and it is fine.
    flash_attn_with_kvcache(**call | {"k": None, "v": None})
