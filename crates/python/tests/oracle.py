"""The reference of the tests: attention by the book, in float64, from the meanings that the documentation states."""

import ml_dtypes
import numpy as np

BF16 = ml_dtypes.bfloat16
FLOATS = [np.float32, np.float16, BF16]


def to_f64(x):
    """Any array or tensor as float64 numpy, every value exact."""
    if type(x).__module__.startswith("torch"):
        return x.double().numpy()
    return np.asarray(x).astype(np.float64)


def attention(
    q,
    k,
    v,
    *,
    causal=None,
    window=None,
    mask=None,
    bias=None,
    alibi_slopes=None,
    softcap=None,
    sinks=None,
    scale=None,
    kv_lengths=None,
):
    """(out, lse) of (batch, heads, length, dim) arrays, in float64."""
    q, k, v = to_f64(q), to_f64(k), to_f64(v)
    (b, h, m, dk), (_, hk, n, dv) = q.shape, v.shape
    out, lse = np.zeros((b, h, m, dv)), np.full((b, h, m), -np.inf)
    scale = dk**-0.5 if scale is None else np.float64(np.float32(scale))
    full = (b, h, m, n)
    mask = np.ones(full, bool) if mask is None else np.broadcast_to(np.asarray(mask), full)
    bias = np.zeros(full) if bias is None else np.broadcast_to(to_f64(bias), full)
    if alibi_slopes is not None:
        alibi_slopes = np.broadcast_to(to_f64(alibi_slopes), (b, h))
    for bi in range(b):
        length = n if kv_lengths is None else int(kv_lengths[bi])
        i, j = np.arange(m)[:, None], np.arange(n)[None, :]
        p = i if causal == "top_left" else i + causal if isinstance(causal, int) else i + length - m
        seen = np.broadcast_to(j < length, (m, n)).copy()
        if causal is not None:
            seen &= j <= p
        left, right = (None, None) if window is None else window
        if left is not None and left >= 0:
            seen &= j >= p - left
        if right is not None and right >= 0:
            seen &= j <= p + right
        for hi in range(h):
            kh = hi // (h // hk)
            with np.errstate(all="ignore"):
                s = scale * (q[bi, hi] @ k[bi, kh].T)
                if softcap is not None:
                    cap = np.float64(np.float32(softcap))
                    s = cap * np.tanh(s / cap)
                s = s + bias[bi, hi]
                if alibi_slopes is not None:
                    s = s - alibi_slopes[bi, hi] * np.abs(p - j)
            visible = seen & mask[bi, hi] & ~np.isneginf(bias[bi, hi])
            for row in range(m):
                js = np.flatnonzero(visible[row])
                scores = s[row, js]
                every = scores if sinks is None else np.append(scores, np.float64(sinks[hi]))
                if every.size == 0 or np.all(np.isneginf(every)):
                    continue
                if np.any(np.isnan(every)):
                    out[bi, hi, row], lse[bi, hi, row] = np.nan, np.nan
                    continue
                top = every.max()
                total = np.exp(every - top).sum()
                lse[bi, hi, row] = top + np.log(total)
                out[bi, hi, row] = np.exp(scores - top) @ v[bi, kh, js] / total
    return out, lse


# Half a unit in the last place of a value in [1, 2): what one rounding may change.
ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def dtype_name(x):
    return str(x.dtype).rpartition(".")[2]


def close(given, expected, largest=1.0, terms=1.0):
    """Compares with float64: float32's sums (`largest` is the largest absolute value that is averaged) and one rounding."""
    dtype = dtype_name(given)
    given = to_f64(given)
    assert given.shape == expected.shape
    slack = 24 * terms * ROUNDING["float32"] * largest
    if dtype != "float32":
        slack = slack + 1.01 * ROUNDING[dtype] * np.abs(expected)
        if dtype == "float16":
            slack = slack + 2.0**-24
    np.testing.assert_array_equal(np.isnan(given), np.isnan(expected))
    with np.errstate(invalid="ignore"):  # inf - inf, which is equal
        difference = np.abs(given - expected)
    bad = ~(np.isnan(expected) | (given == expected) | (difference <= slack))
    assert not bad.any(), f"{bad.sum()} of {bad.size} differ, by up to {difference[bad].max()}"


def check_attention(result, q, k, v, **options):
    """Compares (out, lse) with the reference. Inputs (batch, heads, length, dim)."""
    out, lse = result
    expected, expected_lse = attention(q, k, v, **options)
    v = to_f64(v)
    finite = np.abs(v[np.isfinite(v)])
    close(out, expected, largest=max(1.0, finite.max() if finite.size else 0.0), terms=4)
    finite = np.abs(expected_lse[np.isfinite(expected_lse)])
    close(lse, expected_lse, largest=max(1.0, finite.max() if finite.size else 0.0), terms=4)
