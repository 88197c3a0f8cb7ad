"""flash-attention 2.8's functions, with its arguments and meaning, on the CPU.

Tensors are (batch, length, heads, dim), `causal` is aligned at the bottom right, and the log-sum-exp of a query without a
visible key is +inf, its output 0, as there. Beyond flash-attention: float32, head dims and pages of any size, `v` of another
head dim than `k`, pages together with left padding, and numpy arrays as well as torch tensors. Dropout raises
`NotImplementedError`; tensors that require a gradient are refused (`qkv.torch` takes them; its backward pass is not
there yet). A call that is refused has changed nothing.
"""

from __future__ import annotations

from typing import Any

from qkv import _qkv

__all__ = ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"]


def flash_attn_func(
    q: Any,
    k: Any,
    v: Any,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Attention of a batch of equally long sequences.

    Args:
        q: (batch, q length, q heads, dim); float32, bfloat16 or float16.
        k: (batch, k length, kv heads, dim) of q's type; q's head h reads head h / (q heads / kv heads).
        v: (batch, k length, kv heads, value dim) of q's type.
        dropout_p: 0; more is not supported.
        softmax_scale: the factor of q k^T; 1 / sqrt(dim) unless given.
        causal: query i sees key j where j <= i + k length - q length.
        window_size: (left, right): query i sees keys p - left to p + right, where p = i + k length - q length; a negative
            one is unbounded.
        softcap: scores become softcap * tanh(score / softcap); 0 is none.
        alibi_slopes: float32 (q heads,) or (batch, q heads): -slope * |p - j| is added to the scores.
        deterministic: chooses a backward pass in flash-attention; the forward pass is deterministic there and here.
        return_attn_probs: also return the log-sum-exp, and None in place of the probabilities that dropout leaves.

    Returns:
        out (batch, q length, q heads, value dim); with `return_attn_probs` (out, softmax_lse, None), where softmax_lse is
        float32 (batch, q heads, q length), +inf for a query that sees no key.

    >>> import numpy as np, qkv
    >>> q = np.ones((1, 2, 4, 8), dtype=np.float32)
    >>> k = np.ones((1, 3, 4, 8), dtype=np.float32)
    >>> v = np.arange(96, dtype=np.float32).reshape(1, 3, 4, 8)
    >>> out = qkv.flash_attn.flash_attn_func(q, k, v, causal=True)
    >>> out.shape, bool(np.allclose(out[:, 0], v[:, :2].mean(axis=1)))
    ((1, 2, 4, 8), True)
    """
    options = (softmax_scale, causal, window_size, softcap, alibi_slopes)
    return _qkv.flash_attn_func(q, k, v, options, (dropout_p, deterministic, return_attn_probs))


def flash_attn_varlen_func(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Any = None,
) -> Any:
    """Attention of sequences of different lengths, packed one after the other.

    Options are those of `flash_attn_func`; lengths and positions count within each sequence.

    Args:
        q: (total q length, q heads, dim).
        k: (total k length, kv heads, dim), or with `block_table` (pages, page size, kv heads, dim).
        v: likewise.
        cu_seqlens_q: int32 (batch + 1,), ascending from 0: sequence i has rows cu_seqlens_q[i] to cu_seqlens_q[i + 1] of q.
            Rows after the last one belong to no sequence; their output is 0.
        cu_seqlens_k: the same for k and v; with `block_table` only the differences count, the lengths.
        max_seqlen_q: at least the longest sequence of q.
        max_seqlen_k: at least the longest sequence of k.
        alibi_slopes: float32 (q heads,) or (batch, q heads).
        block_table: int32 (batch, pages of the longest sequence): key j of sequence i is row j % page size of page
            block_table[i, j // page size]. Entries that a sequence does not reach are not read.

    Returns:
        out (total q length, q heads, value dim); with `return_attn_probs` (out, softmax_lse, None), where softmax_lse is
        float32 (q heads, total q length).

    >>> import numpy as np, qkv
    >>> q = np.ones((5, 2, 8), dtype=np.float32)
    >>> v = np.arange(80, dtype=np.float32).reshape(5, 2, 8)
    >>> ends = np.array([0, 2, 5], dtype=np.int32)  # two sequences, of 2 and 3 tokens
    >>> out = qkv.flash_attn.flash_attn_varlen_func(q, q, v, ends, ends, 3, 3)
    >>> bool(np.allclose(out[:2], v[:2].mean(axis=0))), bool(np.allclose(out[2:], v[2:].mean(axis=0)))
    (True, True)
    """
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options = (softmax_scale, causal, window_size, softcap, alibi_slopes)
    training = (dropout_p, deterministic, return_attn_probs)
    return _qkv.flash_attn_varlen_func(q, k, v, lengths, options, training, block_table)


def flash_attn_with_kvcache(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    k: Any = None,
    v: Any = None,
    rotary_cos: Any = None,
    rotary_sin: Any = None,
    cache_seqlens: Any = None,
    cache_batch_idx: Any = None,
    cache_leftpad: Any = None,
    block_table: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Any = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Attention over a cache of keys and values, to which new ones are added first, in place.

    Keys are read where they lie; pages are not gathered. Other options are those of `flash_attn_func`, where "k length" is
    that of each sequence, new keys included.

    Args:
        q: (batch, q length, q heads, dim).
        k_cache: (at least batch, capacity, kv heads, dim), or with `block_table` (pages, page size, kv heads, dim), of q's
            type, the last axis contiguous.
        v_cache: (.., value dim), likewise.
        k: (batch, new, kv heads, dim): appended to the cache behind each sequence's `cache_seqlens`. Needs `v` and
            `cache_seqlens`.
        v: (batch, new, kv heads, value dim).
        rotary_cos: (positions, r / 2), with `k`: the first r dims of the heads of k and q are rotated. k by the positions
            cache_seqlens, cache_seqlens + 1, ...; q likewise if `causal` or a window is given, else all of it by
            cache_seqlens. float32, bfloat16 or float16.
        rotary_sin: likewise.
        cache_seqlens: int, or int32 (batch,): how many keys of each sequence are in the cache before the call; all that fit
            unless given.
        cache_batch_idx: int32 (batch,): the row of the cache of each sequence; not with `block_table`. Distinct where
            `k` is given.
        cache_leftpad: int32 (batch,): keys of the cache before this one are not there. Positions still count from 0.
        block_table: int32 (batch, pages per sequence): key j of sequence i is row j % page size of page
            block_table[i, j // page size]. Entries that a sequence does not reach are not read.
        rotary_interleaved: pairs are dims (0, 1), (2, 3), ...; else (i, i + r / 2).
        num_splits: how flash-attention should split the keys of a sequence among processors, a hint that does not
            change what is computed; the number of parts follows from the sizes here.
        return_softmax_lse: also return the log-sum-exp.

    Returns:
        out (batch, q length, q heads, value dim); with `return_softmax_lse` (out, softmax_lse), where softmax_lse is float32
        (batch, q heads, q length).

    >>> import numpy as np, qkv
    >>> cache = np.zeros((1, 16, 2, 8), dtype=np.float32), np.zeros((1, 16, 2, 8), dtype=np.float32)
    >>> new = np.ones((1, 1, 2, 8), dtype=np.float32)
    >>> out = qkv.flash_attn.flash_attn_with_kvcache(new, *cache, new, 3 * new, cache_seqlens=0)
    >>> float(out[0, 0, 0, 0]), float(cache[1][0, 0, 0, 0])
    (3.0, 3.0)
    """
    new = (k, v, rotary_cos, rotary_sin, rotary_interleaved)
    places = (cache_seqlens, cache_batch_idx, cache_leftpad, block_table)
    options = (softmax_scale, causal, window_size, softcap, alibi_slopes)
    return _qkv.flash_attn_with_kvcache(q, k_cache, v_cache, new, places, options, (num_splits, return_softmax_lse))
