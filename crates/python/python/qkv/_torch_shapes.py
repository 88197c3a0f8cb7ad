"""What qkv.torch's operators say of tensors without looking into them: devices, types and shapes, and the result's shape.

In the native functions' words, where there is no memory to call these on. Sizes may be symbols: `|` and
`torch._check_value` keep what is not known yet as a condition of the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# The types that the native functions know at all.
_KNOWN = (*FLOATS, torch.float64, torch.bool, torch.int8, torch.uint8, torch.int32, torch.int64)
SDPA_TENSORS = ("query", "key", "value", "attn_mask")
TENSORS = ("q", "k", "v", "mask", "bias", "alibi_slopes", "sinks", "kv_lengths")
LAYOUT = '"bhsd" or "bshd"'


def check_devices(tensors: dict[str, Tensor | None]) -> None:
    """Refuses what is not on the CPU, but for "meta" where all tensors are: such a call is about shapes only."""
    given = {name: t for name, t in tensors.items() if t is not None}
    if all(t.is_meta for t in given.values()):
        return
    for name, t in given.items():
        if not t.is_cpu:
            raise ValueError(f"{name}: is on device '{t.device}'; qkv computes on the CPU, so give a tensor on device 'cpu'")


def type_name(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")


def check_type(name: str, t: Tensor, types: Sequence[torch.dtype], expected: str) -> None:
    if t.dtype in types:
        return
    if t.dtype not in _KNOWN:
        raise TypeError(
            f"{name}: an array of {t.dtype}, expected float32, bfloat16, float16 (masks bool, lengths int32 or int64)"
        )
    raise TypeError(f"{name}: an array of {type_name(t)}, expected {expected}")


def _check_float(name: str, t: Tensor) -> None:
    check_type(name, t, FLOATS, "float32, bfloat16 or float16")


def _check_shape(name: str, t: Tensor, fits: Any, expected: str) -> None:
    torch._check_value(fits, lambda: f"{name}: shape {list(t.shape)}, expected {expected}")


def _equal(a: Sequence[Any], b: Sequence[Any]) -> Any:
    """Whether two shapes are equal."""
    fits = len(a) == len(b)
    for x, y in zip(a, b):
        fits = fits & (x == y)
    return fits


def _broadcasts(shape: Sequence[Any], full: Sequence[Any]) -> Any:
    """Whether a shape of as many axes broadcasts to the full one."""
    fits = True
    for size, whole in zip(shape, full):
        fits = fits & ((size == whole) | (size == 1))
    return fits


def _padded(t: Tensor, rank: int) -> list[Any]:
    """A shape with axes of size 1 in front, so that there are `rank`."""
    return [1] * (rank - t.dim()) + list(t.shape)


def sdpa_shape(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """The shape of the result of `scaled_dot_product_attention`."""
    tensors = dict(zip(SDPA_TENSORS, (query, key, value, attn_mask)))
    check_devices(tensors)
    if dropout_p > 0.0:
        raise NotImplementedError(f"dropout_p: dropout ({dropout_p}) is not supported")
    if is_causal and attn_mask is not None:
        raise ValueError("attn_mask: a mask together with is_causal, expected one of the two")
    least = 3 if enable_gqa else 2
    for name in SDPA_TENSORS[:3]:
        _check_float(name, tensors[name])
        _check_shape(name, tensors[name], tensors[name].dim() >= least, f"at least {least} axes")
    rank = max(query.dim(), key.dim(), value.dim())
    # With an axis of heads, if it is one of 1.
    full_rank = max(rank, 3)
    shapes = {name: _padded(tensors[name], full_rank) for name in SDPA_TENSORS[:3]}
    q, k, v = shapes.values()

    def check(fits, name, what, other):
        torch._check_value(
            fits, lambda: f"{name}: shape {shapes[name]}, expected {what} as in {other} ({shapes[other]})"
        )

    def broadcast(a, b, name, what):
        check((a == b) | (a == 1) | (b == 1), name, what, "query")
        return torch.broadcast_shapes((a,), (b,))[0]

    check(k[-1] == q[-1], "key", "the last axis", "query")
    check(v[-2] == k[-2], "value", "the length (axis -2)", "key")
    lead = []
    for axis in range(full_rank - 3):
        size = broadcast(q[axis], k[axis], "key", "axes that broadcast")
        lead.append(broadcast(size, v[axis], "value", "axes that broadcast"))
    if enable_gqa:
        check(v[-3] == k[-3], "value", "the heads (axis -3)", "key")
        _check_groups(q[-3], k[-3], f"query: {q[-3]} heads (axis -3), expected a multiple of the {k[-3]} heads of key")
        lead.append(q[-3])
    else:
        heads = broadcast(q[-3], k[-3], "key", "heads (axis -3) that broadcast (enable_gqa is not set)")
        lead.append(broadcast(heads, v[-3], "value", "heads (axis -3) that broadcast"))
    if attn_mask is not None:
        types = (torch.bool, torch.float32, query.dtype)
        check_type("attn_mask", attn_mask, types, f"bool, query's type ({type_name(query)}) or float32")
        full = [*lead, q[-2], k[-2]][full_rank - rank :]
        fits = attn_mask.dim() <= rank and _broadcasts(_padded(attn_mask, rank), full)
        _check_shape("attn_mask", attn_mask, fits, f"one that broadcasts to {full}")
    return [*lead, q[-2], v[-1]][full_rank - rank :]


def _check_groups(heads: Any, kv_heads: Any, message: str) -> None:
    torch._check_value(kv_heads != 0, lambda: message)
    torch._check_value(heads % kv_heads == 0, lambda: message)


def attention_shapes(layout: str, *args: Any) -> tuple[list[Any], list[Any]]:
    """The shapes of the result of `attention` and of its log-sum-exp; `args` are its tensors."""
    tensors = dict(zip(TENSORS, args))
    check_devices(tensors)
    if layout not in ("bhsd", "bshd"):
        raise ValueError(f"layout: {layout!r}, expected {LAYOUT}")
    axes = "(batch, heads, length, dim)" if layout == "bhsd" else "(batch, length, heads, dim)"
    for name in TENSORS[:3]:
        _check_float(name, tensors[name])
        _check_shape(name, tensors[name], tensors[name].dim() == 4, f"4 axes {axes}")
    heads_first = (0, 1, 2, 3) if layout == "bhsd" else (0, 2, 1, 3)
    q, k, v = ([t.shape[axis] for axis in heads_first] for t in args[:3])
    (batch, heads, q_len, dk), (_, kv_heads, kv_len, _) = q, k
    _check_extras(tensors, batch, heads)
    for name, axis, given, expected, origin in (
        ("k", "batch", k[0], batch, "q"),
        ("v", "batch", v[0], batch, "q"),
        ("v", "heads", v[1], kv_heads, "k"),
        ("v", "length", v[2], kv_len, "k"),
        ("k", "head dim", k[3], dk, "q"),
    ):
        message = f"{name}: {axis} is {given}, expected {expected} to match {origin}"
        torch._check_value(given == expected, lambda message=message: message)
    for name, axis, size in (("q", "heads", heads), ("k", "heads", kv_heads), ("q", "head dim", dk)):
        message = f"{name}: {axis} is 0, expected at least 1"
        torch._check_value(size != 0, lambda message=message: message)
    _check_groups(heads, kv_heads, f"q: {heads} heads, expected a multiple of the {kv_heads} heads of k")
    full = [batch, heads, q_len, kv_len]
    for name in ("mask", "bias"):
        if tensors[name] is not None:
            given = _padded(tensors[name], 4)
            message = (
                f"{name}: shape {given} does not broadcast to (batch, heads, query length, key length), expected {full} "
                "or 1 in place of each"
            )
            torch._check_value(_broadcasts(given, full), lambda message=message: message)
    lse = [batch, heads, q_len]
    return [*(lse if layout == "bhsd" else (batch, q_len, heads)), v[3]], lse


def _check_extras(tensors: dict[str, Tensor | None], batch: Any, heads: Any) -> None:
    """Types and ranks of the tensors beside q, k and v, and the shapes of those that do not broadcast."""
    q_type = tensors["q"].dtype
    for name, types, expected in (
        ("mask", (torch.bool,), "bool (True takes part); an additive mask is a bias"),
        ("bias", (q_type, torch.float32), f"q's type ({type_name(tensors['q'])}) or float32"),
        ("alibi_slopes", (torch.float32,), "float32"),
        ("sinks", (torch.float32,), "float32"),
        ("kv_lengths", (torch.int32, torch.int64), "int32 or int64"),
    ):
        t = tensors[name]
        if t is None:
            continue
        check_type(name, t, types, expected)
        if name in ("mask", "bias"):
            _check_shape(name, t, t.dim() <= 4, "at most 4 axes (batch, heads, query length, key length)")
        elif name == "alibi_slopes":
            fits = _equal(t.shape, (heads,)) | _equal(t.shape, (batch, heads))
            _check_shape(name, t, fits, f"[{heads}] or [{batch}, {heads}]")
        else:
            size = heads if name == "sinks" else batch
            _check_shape(name, t, _equal(t.shape, (size,)), f"[{size}]")
