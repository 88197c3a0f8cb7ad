"""ONNX's `Attention` (opsets 23 to 25) and `RotaryEmbedding` (23), in the wording of ONNX 1.23, and a back end for its tests.

`attention` runs in one fused pass: no score matrix exists unless `qk_matmul_output_mode` asks for it. `Backend` needs the
onnx package; the functions do not.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

import qkv
from qkv import _qkv
from qkv._views import (
    as_array,
    check_float,
    check_same_type,
    check_shape,
    concatenate,
    dtype_name,
    empty,
    flag,
    from_float,
    integer,
    integers,
    is_torch,
    number,
    to_float32,
    to_numpy,
)

if TYPE_CHECKING:
    from qkv._onnx_backend import Backend

__all__ = ["Backend", "attention", "rotary_embedding"]

# onnx.TensorProto's numbers of the types that `softmax_precision` may name: FLOAT, FLOAT16, DOUBLE, BFLOAT16.
_FLOAT, _FLOAT16, _DOUBLE, _BFLOAT16 = 1, 10, 11, 16


def __getattr__(name: str) -> Any:
    if name == "Backend":
        from qkv._onnx_backend import Backend

        return Backend
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def attention(
    Q: Any,
    K: Any,
    V: Any,
    attn_mask: Any = None,
    past_key: Any = None,
    past_value: Any = None,
    nonpad_kv_seqlen: Any = None,
    *,
    is_causal: int = 0,
    kv_num_heads: int | None = None,
    q_num_heads: int | None = None,
    qk_matmul_output_mode: int | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int | None = None,
    left_window_size: int = -1,
    right_window_size: int = -1,
) -> tuple[Any, Any, Any, Any]:
    """ONNX's `Attention`: softmax(softcap(scale Q K^T) + bias) V.

    Arrays are numpy's, or anything on the CPU with `__dlpack__`, of float32, bfloat16 or float16; torch gives torch.
    Everything is computed in float32 and rounded once.

    Args:
        Q: (batch, q heads, q length, dim), or (batch, q length, q heads * dim) with `q_num_heads` and `kv_num_heads`.
        K: (batch, kv heads, kv length, dim), or (batch, kv length, kv heads * dim). Query head h reads
            head h / (q heads / kv heads).
        V: (batch, kv heads, kv length, value dim), or (batch, kv length, kv heads * value dim).
        attn_mask: broadcasts to (batch, q heads, q length, total length); bool, True = takes part, or floats that are
            added. A last axis shorter than the total length (1 is, too, as in ONNX's reference) is filled up with masked
            keys.
        past_key: (batch, kv heads, past length, dim): keys before `K`. Together with `past_value`.
        past_value: (batch, kv heads, past length, value dim).
        nonpad_kv_seqlen: int64 (batch,): the number of keys that are there in each sequence. Not with `past_key`.
        is_causal: 1: query i sees key j where j <= i + offset. The offset is the past length; with
            `nonpad_kv_seqlen` that of the sequence - q length; else 0.
        kv_num_heads: heads of K and V, needed where they have 3 axes.
        q_num_heads: heads of Q, needed where it has 3 axes.
        qk_matmul_output_mode: None: no fourth result. 0: scale Q K^T. 1: after the soft cap. 2: after bias and masks. 3:
            after softmax. The result has (batch, q heads, q length, total length) values, which are computed beside
            the attention itself.
        scale: 1 / sqrt(dim) unless given.
        softcap: scores become softcap * tanh(score / softcap); 0 is none.
        softmax_precision: 1 (float), 10 (float16), 11 (double) or 16 (bfloat16). `Y` is computed in float32 with
            each of them; for the fourth result in mode 3, 11 means float64.
        left_window_size: the query at p = i + offset sees keys from p - left_window_size on; -1: all.
        right_window_size: and up to p + right_window_size; -1: all.

    Returns:
        (Y, present_key, present_value, qk_matmul_output). Y has the axes of Q. present_* are (batch, kv heads, total
        length, ...), None without past_*; qk_matmul_output is None where its mode is.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what was expected.
        NotImplementedError: for float64.

    >>> import numpy as np, qkv
    >>> q = np.ones((1, 2, 3, 8), dtype=np.float32)
    >>> v = np.arange(48, dtype=np.float32).reshape(1, 2, 3, 8)
    >>> y, *_ = qkv.onnx.attention(q, q, v, is_causal=1)
    >>> y.shape, bool(np.allclose(y[:, :, 0], v[:, :, 0]))
    ((1, 2, 3, 8), True)
    """
    Q = as_array("Q", Q)
    K, V = as_array("K", K, Q), as_array("V", V, Q)
    for name, x in (("Q", Q), ("K", K), ("V", V)):
        check_float(name, x)
        if x.ndim not in (3, 4) or x.ndim != Q.ndim:
            expected = "3 or 4 axes" if name == "Q" else f"{Q.ndim} axes as Q has"
            raise ValueError(f"{name}: shape {tuple(x.shape)}, expected {expected}")
    check_same_type("K", K, "Q", Q)
    three = Q.ndim == 3
    q = _split_heads("Q", Q, "q_num_heads", q_num_heads)
    k = _split_heads("K", K, "kv_num_heads", kv_num_heads)
    v = _split_heads("V", V, "kv_num_heads", kv_num_heads)
    batch, q_heads, q_len, dim = q.shape
    kv_heads, value_dim = k.shape[1], v.shape[3]
    axes = "(batch, kv heads, length, dim)"
    check_shape("K", k, (batch, None, None, dim), axes)
    check_shape("V", v, (batch, kv_heads, k.shape[2], None), axes)
    if dim == 0 or q_heads == 0 or kv_heads == 0:
        raise ValueError(f"Q, K: {q_heads} and {kv_heads} heads of dim {dim}, expected at least 1 of each")
    if q_heads % kv_heads:
        raise ValueError(f"Q: {q_heads} heads, expected a multiple of the {kv_heads} heads of K")

    causal = flag("is_causal", is_causal)
    # Beyond 2^48 it makes no difference, and stays in 64 bits.
    left = min(integer("left_window_size", left_window_size, -1), 2**48)
    right = min(integer("right_window_size", right_window_size, -1), 2**48)
    scale = None if scale is None else number("scale", scale)
    softcap = number("softcap", softcap)
    if softcap < 0:
        raise ValueError(f"softcap: {softcap}, expected 0 or a positive number")
    softmax_precision = _one_of("softmax_precision", softmax_precision, (_FLOAT, _FLOAT16, _DOUBLE, _BFLOAT16))
    qk_matmul_output_mode = _one_of("qk_matmul_output_mode", qk_matmul_output_mode, (0, 1, 2, 3))

    past_len, present_key, present_value = 0, None, None
    if (past_key is None) != (past_value is None):
        missing = "past_key" if past_key is None else "past_value"
        raise ValueError(f"{missing}: None, expected it together with the other of past_key and past_value")
    if past_key is not None:
        if nonpad_kv_seqlen is not None:
            raise ValueError("nonpad_kv_seqlen: given with past_key, expected one of them")
        past_key, past_value = as_array("past_key", past_key, Q), as_array("past_value", past_value, Q)
        check_same_type("past_key", past_key, "K", K)
        check_same_type("past_value", past_value, "V", V)
        check_shape("past_key", past_key, (batch, kv_heads, None, dim), axes)
        past_len = past_key.shape[2]
        check_shape("past_value", past_value, (batch, kv_heads, past_len, value_dim), axes)
        k = present_key = concatenate([past_key, k], 2)
        v = present_value = concatenate([past_value, v], 2)
    total = k.shape[2]

    lengths = None
    if nonpad_kv_seqlen is not None:
        lengths = integers("nonpad_kv_seqlen", nonpad_kv_seqlen, (batch,), ("int64",))
        if batch and not 0 <= lengths.min() <= lengths.max() <= total:
            raise ValueError(f"nonpad_kv_seqlen: {lengths.tolist()}, expected 0 to the kv length, {total}")
    mask = None
    if attn_mask is not None:
        mask = _mask(attn_mask, Q, (batch, q_heads, q_len, total))
        if lengths is not None and batch and mask.shape[3] < lengths.max():
            raise ValueError(
                f"attn_mask: last axis {mask.shape[3]}, expected at least the largest nonpad_kv_seqlen, {lengths.max()}"
            )

    options: dict[str, Any] = {"scale": scale}
    if softcap > 0:
        options["softcap"] = softcap
    if mask is not None:
        options["mask" if dtype_name(mask) == "bool" else "bias"] = mask
    if lengths is not None:
        # Both count from the end of the sequence's own keys, as a bottom-right mask does.
        options["kv_lengths"] = lengths
        options["causal"] = "bottom_right" if causal else None
        options["window"] = _window(left, right, total + q_len)
    else:
        options["causal"], options["window"] = _offset_and_window(causal, left, right, past_len, q_len, total)
    # Keys that a short mask does not reach are masked: as good as not there, since the alignments do not count them.
    reached = total if mask is None else mask.shape[3]
    y, out = _new_output(q, value_dim, three)
    keys, values = k[:, :, :reached], v[:, :, :reached]
    qkv.attention(q, keys, values, out=out, **options)

    scores = None
    if qk_matmul_output_mode is not None:
        factor = 1.0 / math.sqrt(dim) if scale is None else scale
        # What is not finite is so in the result too, where it is visible, and no news.
        with np.errstate(invalid="ignore", over="ignore"):
            scores = factor * _products(q, k)
            if qk_matmul_output_mode >= 1 and softcap > 0:
                scores = softcap * np.tanh(scores / softcap)
            if qk_matmul_output_mode >= 2:
                scores = _masked(scores, mask, _visible(q, total, past_len, lengths, causal, left, right))
            if qk_matmul_output_mode == 3:
                scores = _softmax(scores, np.float64 if softmax_precision == _DOUBLE else np.float32)
            scores = from_float(scores, Q)
    return y, present_key, present_value, scores


def _one_of(name: str, x: Any, values: tuple[int, ...]) -> int | None:
    """`x` as one of these integers, or None."""
    if x is None:
        return None
    value = integer(name, x)
    if value not in values:
        raise ValueError(f"{name}: {value}, expected None or one of {', '.join(map(str, values))}")
    return value


def _split_heads(name: str, x: Any, attribute: str, heads: int | None) -> Any:
    """(batch, heads, length, dim), a view."""
    if heads is not None:
        heads = integer(attribute, heads, 1)
    if x.ndim == 4:
        if heads is not None and heads != x.shape[1]:
            raise ValueError(f"{attribute}: {heads}, expected None or the {x.shape[1]} heads of {name}, which has 4 axes")
        return x
    if heads is None:
        raise ValueError(f"{attribute}: None, expected the number of heads of {name}, which has 3 axes")
    batch, length, hidden = x.shape
    if hidden % heads:
        raise ValueError(f"{name}: last axis {hidden}, expected a multiple of {attribute}, {heads}")
    return x.reshape(batch, length, heads, hidden // heads).swapaxes(1, 2)


def _new_output(q: Any, value_dim: int, three: bool) -> tuple[Any, Any]:
    """Y in its own shape, and as (batch, q heads, q length, value dim)."""
    batch, heads, length, _ = q.shape
    if not three:
        y = empty((batch, heads, length, value_dim), q)
        return y, y
    y = empty((batch, length, heads * value_dim), q)
    return y, y.reshape(batch, length, heads, value_dim).swapaxes(1, 2)


def _mask(attn_mask: Any, Q: Any, full: tuple[int, int, int, int]) -> Any:
    """The mask with 4 axes; its last one may be shorter than that of `full`."""
    mask = as_array("attn_mask", attn_mask, Q)
    if dtype_name(mask) not in ("bool", "float32", "bfloat16", "float16"):
        raise TypeError(f"attn_mask: {dtype_name(mask)}, expected bool or {dtype_name(Q)} as Q is")
    shape = tuple(mask.shape)
    if not 1 <= len(shape) <= 4:
        raise ValueError(f"attn_mask: shape {shape}, expected 1 to 4 axes that broadcast to {full}")
    mask = mask.reshape((1,) * (4 - len(shape)) + shape)
    fits = all(given in (1, wanted) for given, wanted in zip(mask.shape[:3], full[:3])) and mask.shape[3] <= full[3]
    if not fits:
        raise ValueError(f"attn_mask: shape {shape}, expected one that broadcasts to {full}, the last axis {full[3]} or less")
    if dtype_name(mask) not in ("bool", "float32", dtype_name(Q)):
        mask = mask.float() if is_torch(mask) else mask.astype(np.float32)
    return mask


def _window(left: int, right: int, beyond: int) -> tuple[int | None, int | None] | None:
    """The window of `qkv.attention`; `beyond` is further than any key is from any query."""
    if left < 0 and right < 0:
        return None
    return (None if left < 0 else min(left, beyond), None if right < 0 else min(right, beyond))


def _offset_and_window(
    causal: bool, left: int, right: int, offset: int, q_len: int, total: int
) -> tuple[int | None, tuple[int, None] | None]:
    """`causal` and `window` of `qkv.attention` for keys p - left ..= p + right, where p = i + offset.

    qkv's window counts from the position that its causal mask sets, so that the right end of the window becomes the
    offset of a causal mask, and the left one is counted from there.
    """
    beyond = q_len + total + offset
    right = 0 if causal else min(right, beyond)
    if left < 0:
        return (None if right < 0 else offset + right), None
    if right < 0:
        right = max(total - offset, 0)
    return offset + right, (min(left, beyond) + right, None)


def _products(q: Any, k: Any) -> np.ndarray:
    """Q K^T of every query head, float32 (batch, q heads, q length, kv length)."""
    batch, heads, q_len, dim = q.shape
    kv_heads, kv_len = k.shape[1], k.shape[2]
    # The query heads of a key head one after the other are the rows of one matrix.
    rows = np.ascontiguousarray(to_float32(q)).reshape(batch, kv_heads, heads // kv_heads * q_len, dim)
    columns = np.ascontiguousarray(to_float32(k).swapaxes(2, 3))
    return qkv.matmul(rows, columns).reshape(batch, heads, q_len, kv_len)


def _visible(q: Any, total: int, past_len: int, lengths: np.ndarray | None, causal: bool, left: int, right: int) -> np.ndarray:
    """Which keys the causal mask, the window and the lengths leave, broadcasting to (batch, q heads, q length, total)."""
    length = q.shape[2]
    offset = np.asarray([past_len]) if lengths is None else lengths - length
    p = (np.arange(length)[:, None] + offset[:, None, None])[:, None]
    j = np.arange(total)
    visible = np.ones((1, 1, length, total), dtype=bool)
    if causal:
        visible = visible & (j <= p)
    if left >= 0:
        visible = visible & (j >= p - left)
    if right >= 0:
        visible = visible & (j <= p + right)
    if lengths is not None:
        visible = visible & (j < lengths[:, None, None, None])
    return visible


def _masked(scores: np.ndarray, mask: Any, visible: np.ndarray) -> np.ndarray:
    """Scores with the mask added and -inf wherever a key is not visible, whatever its score is."""
    if mask is not None:
        mask = to_numpy(mask) if dtype_name(mask) == "bool" and is_torch(mask) else mask
        is_bool = dtype_name(mask) == "bool"
        mask = mask if is_bool else to_float32(mask)
        short = scores.shape[3] - mask.shape[3]
        mask = np.pad(mask, [(0, 0)] * 3 + [(0, short)], constant_values=False if is_bool else -np.inf)
        visible = visible & (mask if is_bool else ~np.isneginf(mask))
        if not is_bool:
            scores = scores + mask
    return np.where(visible, scores, np.float32(-np.inf))


def _softmax(scores: np.ndarray, dtype: type) -> np.ndarray:
    """Over the last axis; a row without a visible key gives 0."""
    scores = scores.astype(dtype)
    largest = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    weights = np.exp(scores - np.where(np.isneginf(largest), 0, largest))
    total = weights.sum(axis=-1, keepdims=True)
    return weights / np.where(total == 0, 1, total)


def rotary_embedding(
    X: Any,
    cos_cache: Any,
    sin_cache: Any,
    position_ids: Any = None,
    *,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
) -> Any:
    """ONNX's `RotaryEmbedding`: pairs of each head's dims turned by the angle of the token's position.

    Pair (x, y) becomes (x cos - y sin, x sin + y cos), computed in float32 and rounded once.

    Args:
        X: (batch, heads, length, dim), or (batch, length, heads * dim) with `num_heads`; float32, bfloat16 or float16.
        cos_cache: (positions, r / 2) with `position_ids`, else (batch, length, r / 2), where r is the number of dims that
            are rotated; of X's type.
        sin_cache: as cos_cache.
        position_ids: int64 (batch, length): rows of the caches.
        interleaved: 1: pairs are dims (0, 1), (2, 3), ...; 0: (i, i + r / 2).
        num_heads: heads of X, needed where it has 3 axes.
        rotary_embedding_dim: r, the first dims of a head; 0: all of them.

    Returns:
        Y, of the shape and type of X.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what was expected.

    >>> import numpy as np, qkv
    >>> x = np.array([[[[1.0, 0.0]]]], dtype=np.float32)
    >>> cos, sin = np.array([[0.6]], dtype=np.float32), np.array([[0.8]], dtype=np.float32)
    >>> qkv.onnx.rotary_embedding(x, cos, sin, np.array([[0]]))
    array([[[[0.6, 0.8]]]], dtype=float32)
    """
    X = as_array("X", X)
    check_float("X", X)
    if X.ndim not in (3, 4):
        raise ValueError(f"X: shape {tuple(X.shape)}, expected 3 or 4 axes")
    heads = integer("num_heads", num_heads, 0)
    x = _split_heads("X", X, "num_heads", heads or None)
    batch, heads, length, dim = x.shape
    rotated = integer("rotary_embedding_dim", rotary_embedding_dim, 0) or dim
    if rotated % 2 or not 2 <= rotated <= dim:
        raise ValueError(f"rotary_embedding_dim: {rotated}, expected an even number from 2 to the head size, {dim}")
    tables = []
    for name, table in (("cos_cache", cos_cache), ("sin_cache", sin_cache)):
        table = as_array(name, table)
        check_float(name, table)
        check_same_type(name, table, "X", X)
        if position_ids is None:
            check_shape(name, table, (batch, length, rotated // 2), "(batch, length, r / 2)")
            table = table.reshape(batch * length, rotated // 2)
        else:
            check_shape(name, table, (None, rotated // 2), "(positions, r / 2)")
        tables.append(table)
    cos, sin = tables
    check_shape("sin_cache", sin, tuple(cos.shape), "cos_cache's shape")
    if position_ids is None:
        positions = None
    else:
        positions = integers("position_ids", position_ids, (batch, length), ("int64",), "(batch, length)")
        if positions.size and not 0 <= positions.min() <= positions.max() < cos.shape[0]:
            worst = positions.min() if positions.min() < 0 else positions.max()
            raise ValueError(f"position_ids: {worst}, expected 0 to {cos.shape[0] - 1}, the last row of cos_cache")
    y, out = _new_output(x, dim, X.ndim == 3)
    _qkv.rotate(x, cos, sin, None if positions is None else positions.reshape(-1), flag("interleaved", interleaved), out)
    return y
