"""Attention as operators of PyTorch.

`scaled_dot_product_attention` has the signature of `torch.nn.functional.scaled_dot_product_attention`, and `attention`
the options of `qkv.attention`. Both are operators in torch's dispatcher (`torch.ops.qkv.scaled_dot_product_attention`,
`torch.ops.qkv.attention` and `torch.ops.qkv.attention_with_lse`) with a shape function, so `torch.compile`,
`torch.export`, fake tensors, functionalisation and `torch.vmap` keep them as one node of the graph.

Outside all of these, and where no gradient is wanted, a call goes straight to the native function: the dispatcher
would cost more than a small problem takes.

There are no derivatives yet: the forward pass under grad mode gives a result that is attached to the graph, and
`backward()` through it raises `NotImplementedError`, as do `torch.func.grad`, `torch.func.jvp` and what is made of them.

>>> import torch, qkv.torch
>>> q = torch.randn(2, 8, 128, 64)
>>> k, v = torch.randn(2, 2, 200, 64), torch.randn(2, 2, 200, 64)
>>> qkv.torch.attention(q, k, v, causal="bottom_right", window=(63, 0)).shape
torch.Size([2, 8, 128, 64])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._library.autograd import Info, make_autograd_impl
from torch.autograd import forward_ad

from qkv import attention as _native_attention
from qkv import scaled_dot_product_attention as _native_sdpa

__all__ = ["attention", "scaled_dot_product_attention"]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# The types that the native functions know at all.
_KNOWN = (*_FLOATS, torch.float64, torch.bool, torch.int8, torch.uint8, torch.int32, torch.int64)
_SDPA_TENSORS = ("query", "key", "value", "attn_mask")
_TENSORS = ("q", "k", "v", "mask", "bias", "alibi_slopes", "sinks", "kv_lengths")
_LAYOUT = '"bhsd" or "bshd"'
_CAUSAL = 'None, "top_left", "bottom_right" or an int offset'
_WINDOW = "None or (left, right), each None, -1 or a number of keys"
_NO_BACKWARD = (
    "qkv: the backward pass is not supported yet; run under torch.no_grad() (or detach query, key, value, mask, bias "
    "and sinks), or use torch's own attention where gradients are needed"
)
_NO_FORWARD_MODE = (
    "qkv: forward-mode derivatives (torch.func.jvp, jacfwd, torch.autograd.forward_ad) are not supported yet; use torch's own "
    "attention where they are needed"
)


# --- which way a call goes ---------------------------------------------------------------------------------------


def _direct(*tensors: Any) -> bool:
    """Whether the native function may be called without the dispatcher: nothing observes or transforms the call.

    Each test is for something that would miss the call, or see raw memory that is not the tensor's value: a graph that
    is being traced, a mode on one of the stacks (fake tensors, autocast, profilers that count), a `torch.func` level,
    a subclass, another device, a lazy negation, and a derivative of either mode. Together they take about a microsecond.
    """
    # First, and alone: `torch.compile` reads this as a constant and does not look at the rest.
    if torch.compiler.is_compiling():
        return False
    c = torch._C
    if c._len_torch_dispatch_stack() or c._len_torch_function_stack():
        return False
    if c._functorch.peek_interpreter_stack() is not None or c._get_tracing_state() is not None:
        return False
    # A tangent is not seen on the tensor itself, as a gradient is.
    if forward_ad._current_level >= 0 or torch.is_autocast_enabled("cpu"):
        return False
    for t in tensors:
        if t is None:
            continue
        # A tensor that requires a gradient takes the dispatcher under no_grad too, which detaches it.
        if type(t) is not Tensor or t.requires_grad or not t.is_cpu or t.is_neg():
            return False
    return True


def _plain(t: Tensor | None) -> Tensor | None:
    """The tensor as the native functions take it: of the base class and not asking for a gradient."""
    if t is None:
        return None
    if type(t) is not Tensor:
        t = t.as_subclass(Tensor)
    return t.detach() if t.requires_grad else t


def _autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """What torch's attention does under `torch.autocast("cpu")`: float tensors take the autocast type.

    It also makes one type of what autocast leaves mixed, such as rotated keys in float32 beside bfloat16 values.
    """
    dtype = torch.get_autocast_dtype("cpu")
    return tuple(t.to(dtype) if t is not None and t.dtype in _FLOATS else t for t in tensors)


# --- refusals, in the native functions' words --------------------------------------------------------------------


def _check_tensors(**tensors: Any) -> None:
    """Refuses what is not a tensor, and devices where nothing is computed. All but the first three may be left out."""
    for i, (name, t) in enumerate(tensors.items()):
        if not (isinstance(t, Tensor) or t is None and i >= 3):
            raise TypeError(f"{name}: expected a torch.Tensor{' or None' if i >= 3 else ''}, got {type(t).__name__}")
    _check_devices(tensors)


def _check_devices(tensors: dict[str, Tensor | None]) -> None:
    """Refuses what is not on the CPU, but for "meta" where all tensors are: such a call is about shapes only."""
    given = {name: t for name, t in tensors.items() if t is not None}
    if all(t.is_meta for t in given.values()):
        return
    for name, t in given.items():
        if not t.is_cpu:
            raise ValueError(f"{name}: is on device '{t.device}'; qkv computes on the CPU, so give a tensor on device 'cpu'")


_ONE = np.zeros((1, 1, 1, 1), np.float32)


def _check_options(native: Any, **options: Any) -> None:
    """Refuses what the native function refuses, by calling it on one element (an array, which no mode of torch sees).

    The dispatcher takes some of it, such as 1 for a bool, and refuses the rest in its own words.
    """
    # While dynamo traces there is no calling it: what is wrong and not noticed by then is refused when the graph runs.
    if not torch.compiler.is_compiling():
        native(_ONE, _ONE, _ONE, **{name: _without_symbols(x) for name, x in options.items()})


def _without_symbols(x: Any) -> Any:
    """An option with None in place of symbols: looking at their values would fix them."""
    if isinstance(x, (tuple, list)):
        values = map(_without_symbols, x)
        return list(values) if isinstance(x, list) else tuple(values)
    return None if isinstance(x, (torch.SymInt, torch.SymFloat, torch.SymBool)) else x


def _flag(name: str, x: Any) -> bool:
    """A bool. Checked here too, for a call that is traced: the dispatcher would make one of any number."""
    if not (x is None or isinstance(x, (bool, np.bool_))):
        raise TypeError(f"{name}: {x!r}, expected True or False")
    return bool(x)


def _lengths(kv_lengths: Any, q: Any) -> Tensor:
    """`kv_lengths` that are not a tensor as one, beside q."""
    device = "meta" if isinstance(q, Tensor) and q.is_meta else "cpu"
    try:
        return torch.as_tensor(kv_lengths, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"kv_lengths: {kv_lengths!r}, expected integers (batch,)") from error


# --- the operators -----------------------------------------------------------------------------------------------

_LIB = torch.library.Library("qkv", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)
# All arguments are positional: torch registers no derivative for an operator with tensors that are keyword only.
_ATTENTION_ARGS = (
    "(Tensor q, Tensor k, Tensor v, Tensor? mask=None, Tensor? bias=None, Tensor? alibi_slopes=None, "
    "Tensor? sinks=None, Tensor? kv_lengths=None, str layout='bhsd', str? causal=None, SymInt? causal_offset=None, "
    "SymInt? window_left=None, SymInt? window_right=None, float? softcap=None, float? scale=None)"
)
_DEFAULTS = (None, None, None, None, None, "bhsd", None, None, None, None, None, None)
_LIB.define(
    "scaled_dot_product_attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, "
    "float dropout_p=0.0, bool is_causal=False, float? scale=None, bool enable_gqa=False) -> Tensor",
    tags=_TAGS,
)
_LIB.define(f"attention{_ATTENTION_ARGS} -> Tensor", tags=_TAGS)
_LIB.define(f"attention_with_lse{_ATTENTION_ARGS} -> (Tensor, Tensor)", tags=_TAGS)
# Stands in a traced backward graph, so that a compiled forward pass still runs and only its backward pass raises.
_LIB.define("backward_not_supported(Tensor grad, Tensor like) -> Tensor", tags=_TAGS)


def _sdpa_kernel(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    # Registered for every device, so that another one is refused by name.
    _check_devices(dict(zip(_SDPA_TENSORS, (query, key, value, attn_mask))))
    return _native_sdpa(_plain(query), _plain(key), _plain(value), _plain(attn_mask), dropout_p, is_causal, scale, enable_gqa)


def _run_attention(return_lse: bool, *args: Any) -> Any:
    """The native call, from an operator's flat arguments."""
    # The dispatcher drops trailing arguments that equal their defaults: put them back.
    args += _DEFAULTS[len(args) - 3 :]
    tensors, (layout, causal, causal_offset, left, right, softcap, scale) = args[:8], args[8:]
    _check_devices(dict(zip(_TENSORS, tensors)))
    q, k, v, mask, bias, alibi_slopes, sinks, kv_lengths = map(_plain, tensors)
    # fmt: off
    return _native_attention(
        q, k, v, layout=layout, causal=causal if causal_offset is None else causal_offset,
        window=None if left is None and right is None else (left, right), mask=mask, bias=bias,
        alibi_slopes=alibi_slopes, softcap=softcap, sinks=sinks, scale=scale, kv_lengths=kv_lengths,
        return_lse=return_lse,
    )
    # fmt: on


def _attention_kernel(*args: Any) -> Tensor:
    return _run_attention(False, *args)


def _attention_lse_kernel(*args: Any) -> tuple[Tensor, Tensor]:
    return _run_attention(True, *args)


def _backward_kernel(grad, like):
    raise NotImplementedError(_NO_BACKWARD)


_OPERATORS = {
    "scaled_dot_product_attention": _sdpa_kernel,
    "attention": _attention_kernel,
    "attention_with_lse": _attention_lse_kernel,
    "backward_not_supported": _backward_kernel,
}
for _name, _kernel in _OPERATORS.items():
    _LIB.impl(_name, _kernel, "CompositeExplicitAutograd")

_sdpa_op = torch.ops.qkv.scaled_dot_product_attention.default
_attention_op = torch.ops.qkv.attention.default
_attention_lse_op = torch.ops.qkv.attention_with_lse.default


# --- shapes without values ---------------------------------------------------------------------------------------
# What the native functions say of types and shapes, in the same words, where there is no memory to call them on. Sizes may be
# symbols: `|` and `torch._check_value` keep what is not known yet as a condition of the graph.


def _type_name(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")


def _check_type(name: str, t: Tensor, types: Sequence[torch.dtype], expected: str) -> None:
    if t.dtype in types:
        return
    if t.dtype not in _KNOWN:
        raise TypeError(
            f"{name}: an array of {t.dtype}, expected float32, bfloat16, float16 (masks bool, lengths int32 or int64)"
        )
    raise TypeError(f"{name}: an array of {_type_name(t)}, expected {expected}")


def _check_float(name: str, t: Tensor) -> None:
    _check_type(name, t, _FLOATS, "float32, bfloat16 or float16")


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


@torch.library.register_fake("qkv::scaled_dot_product_attention", lib=_LIB)
def _sdpa_fake(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    tensors = dict(zip(_SDPA_TENSORS, (query, key, value, attn_mask)))
    _check_devices(tensors)
    if dropout_p > 0.0:
        raise NotImplementedError(f"dropout_p: dropout ({dropout_p}) is not supported")
    if is_causal and attn_mask is not None:
        raise ValueError("attn_mask: a mask together with is_causal, expected one of the two")
    least = 3 if enable_gqa else 2
    for name in _SDPA_TENSORS[:3]:
        _check_float(name, tensors[name])
        _check_shape(name, tensors[name], tensors[name].dim() >= least, f"at least {least} axes")
    rank = max(query.dim(), key.dim(), value.dim())
    # With an axis of heads, if it is one of 1.
    full_rank = max(rank, 3)
    shapes = {name: _padded(tensors[name], full_rank) for name in _SDPA_TENSORS[:3]}
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
        _check_type("attn_mask", attn_mask, types, f"bool, query's type ({_type_name(query)}) or float32")
        full = [*lead, q[-2], k[-2]][full_rank - rank :]
        fits = attn_mask.dim() <= rank and _broadcasts(_padded(attn_mask, rank), full)
        _check_shape("attn_mask", attn_mask, fits, f"one that broadcasts to {full}")
    return query.new_empty([*lead, q[-2], v[-1]][full_rank - rank :])


def _check_groups(heads: Any, kv_heads: Any, message: str) -> None:
    torch._check_value(kv_heads != 0, lambda: message)
    torch._check_value(heads % kv_heads == 0, lambda: message)


def _attention_shapes(*args: Any) -> tuple[list[Any], list[Any]]:
    """The shapes of the result and of its log-sum-exp, from an operator's flat arguments."""
    args += _DEFAULTS[len(args) - 3 :]
    tensors, layout = dict(zip(_TENSORS, args)), args[8]
    _check_devices(tensors)
    if layout not in ("bhsd", "bshd"):
        raise ValueError(f"layout: {layout!r}, expected {_LAYOUT}")
    axes = "(batch, heads, length, dim)" if layout == "bhsd" else "(batch, length, heads, dim)"
    for name in _TENSORS[:3]:
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
        ("bias", (q_type, torch.float32), f"q's type ({_type_name(tensors['q'])}) or float32"),
        ("alibi_slopes", (torch.float32,), "float32"),
        ("sinks", (torch.float32,), "float32"),
        ("kv_lengths", (torch.int32, torch.int64), "int32 or int64"),
    ):
        t = tensors[name]
        if t is None:
            continue
        _check_type(name, t, types, expected)
        if name in ("mask", "bias"):
            _check_shape(name, t, t.dim() <= 4, "at most 4 axes (batch, heads, query length, key length)")
        elif name == "alibi_slopes":
            fits = _equal(t.shape, (heads,)) | _equal(t.shape, (batch, heads))
            _check_shape(name, t, fits, f"[{heads}] or [{batch}, {heads}]")
        else:
            size = heads if name == "sinks" else batch
            _check_shape(name, t, _equal(t.shape, (size,)), f"[{size}]")


@torch.library.register_fake("qkv::attention", lib=_LIB)
def _attention_fake(*args):
    return args[0].new_empty(_attention_shapes(*args)[0])


@torch.library.register_fake("qkv::attention_with_lse", lib=_LIB)
def _attention_lse_fake(*args):
    out, lse = _attention_shapes(*args)
    return args[0].new_empty(out), args[0].new_empty(lse, dtype=torch.float32)


@torch.library.register_fake("qkv::backward_not_supported", lib=_LIB)
def _backward_fake(grad, like):
    return torch.empty_like(like)


# --- gradients and vmap ------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output):
    # What the refusal below needs to have the gradients' shapes in a traced graph.
    ctx.tensors = tuple(isinstance(x, Tensor) for x in inputs)
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))


def _backward(ctx, *grads):
    grad = next(g for g in grads if g is not None)
    saved = iter(ctx.saved_tensors)
    refused = []
    for is_tensor, wanted in zip(ctx.tensors, ctx.needs_input_grad):
        t = next(saved) if is_tensor else None
        refused.append(torch.ops.qkv.backward_not_supported(grad, t) if wanted else None)
    return tuple(refused)


def _differentiable(op):
    """The operator's kernel for autograd: torch's, behind refusals of what it would leave out or not name.

    It has no place for a tangent and would drop it. The levels of `torch.func` go through here one by one, each with the
    tensors as it sees them, so that only a derivative that is really asked for is refused.
    """
    # What `torch.library.register_autograd` registers.
    kernel = make_autograd_impl(op, Info(_backward, _setup_context))

    def checked(keyset, *args):
        tensors = [x for x in args if isinstance(x, Tensor)]
        if forward_ad._current_level >= 0 and any(torch._unpack_dual(t, 0)[1] is not None for t in tensors):
            raise NotImplementedError(_NO_FORWARD_MODE)
        # torch takes no operator with a backward pass in here; outside of it, only `backward()` is refused.
        if torch._C._functorch.peek_interpreter_stack() is not None and torch.is_grad_enabled():
            if any(t.requires_grad for t in tensors):
                raise NotImplementedError(_NO_BACKWARD)
        return kernel(keyset, *args)

    return checked


def _by_slices(op):
    """The rule for `torch.vmap`: one call per slice.

    A slice of a mask, of sinks or of lengths has no place in one call's arguments in general, so no larger call is
    made of them; each call is threaded inside.
    """

    def rule(info, in_dims, *args):
        parts = []
        if info.batch_size == 0:
            # There is no slice to call it for; one of zeros has the shapes.
            one = op(*(a if d is None else a.new_zeros(a.shape[:d] + a.shape[d + 1 :]) for a, d in zip(args, in_dims)))
            if isinstance(one, tuple):
                return tuple(t.new_empty((0, *t.shape)) for t in one), (0,) * len(one)
            return one.new_empty((0, *one.shape)), 0
        for i in range(info.batch_size):
            parts.append(op(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims))))
        if isinstance(parts[0], tuple):
            return tuple(torch.stack(p) for p in zip(*parts)), (0,) * len(parts[0])
        return torch.stack(parts), 0

    return rule


for _name, _op in (
    ("scaled_dot_product_attention", _sdpa_op),
    ("attention", _attention_op),
    ("attention_with_lse", _attention_lse_op),
):
    _LIB.impl(_name, _differentiable(_op), "Autograd", with_keyset=True)
    torch.library.register_vmap(f"qkv::{_name}", _by_slices(_op), lib=_LIB)


# --- what people call --------------------------------------------------------------------------------------------


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, computed by qkv.

    Shapes: `query` (..., q_heads, q_len, dk), `key` (..., kv_heads, kv_len, dk), `value` (..., kv_heads, kv_len, dv),
    `attn_mask` (bool: True takes part; or float, added) that broadcasts to (..., q_heads, q_len, kv_len). The result
    is (..., q_heads, q_len, dv), contiguous, of query's type. `is_causal` lets query i see the keys 0 ..= i, and
    `enable_gqa` lets q_heads be a multiple of kv_heads.

    It differs from torch's where torch gives NaN: a row that sees no key gives 0, and a NaN behind a mask is ignored.

    Raises `TypeError` and `ValueError` with the argument's name, and `NotImplementedError` for `dropout_p` above 0.

    >>> import torch, qkv.torch
    >>> q, k, v = (torch.randn(1, 4, 10, 16) for _ in range(3))
    >>> out = qkv.torch.scaled_dot_product_attention(q, k, v, is_causal=True)
    >>> expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    >>> torch.allclose(out, expected, atol=1e-5)
    True
    """
    if _direct(query, key, value, attn_mask):
        return _native_sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    _check_tensors(query=query, key=key, value=value, attn_mask=attn_mask)
    _check_options(_native_sdpa, dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
    dropout_p = 0.0 if dropout_p is None else dropout_p
    is_causal, enable_gqa = _flag("is_causal", is_causal), _flag("enable_gqa", enable_gqa)
    if torch.is_autocast_enabled("cpu"):
        query, key, value, attn_mask = _autocast(query, key, value, attn_mask)
    return _sdpa_op(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: str = "bhsd",
    causal: None | str | int = None,
    window: tuple[int | None, int | None] | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    kv_lengths: None | Tensor | Sequence[int] = None,
    return_lse: bool = False,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`qkv.attention` as an operator of torch: the same options with the same meaning.

    Shapes for `layout="bhsd"`: `q` (batch, q_heads, q_len, dk), `k` (batch, kv_heads, kv_len, dk), `v` (batch,
    kv_heads, kv_len, dv); for `"bshd"` heads and lengths change places. The result is contiguous in the same layout,
    and with `return_lse` comes with the log-sum-exp, float32 (batch, q_heads, q_len).

    Options:
        causal: None, "top_left" (key j <= query i), "bottom_right" (j <= i + kv_len - q_len) or an int offset
            (j <= i + offset).
        window: (left, right), keys p - left ..= p + right around the query's position p; None or -1 is unbounded.
        mask: bool, True takes part; broadcasts to (batch, q_heads, q_len, kv_len) and is never expanded in memory.
        bias: float, added to the scores; broadcasts likewise.
        alibi_slopes: float32 (q_heads,) or (batch, q_heads); adds -slope * |p - j|.
        softcap: scores become softcap * tanh(score / softcap).
        sinks: float32 (q_heads,), one more logit per head in the softmax, without a value.
        scale: of the products; 1 / sqrt(dk) where None.
        kv_lengths: integers (batch,); keys past them are not there.
        out: where the result goes, of the result's shape and type.

    Raises `TypeError` and `ValueError` with the argument's name, `NotImplementedError` for `out` with a gradient.

    >>> import torch, qkv.torch
    >>> q = torch.randn(2, 5, 4, 32)                      # batch, length, heads, features
    >>> k, v = torch.randn(2, 9, 2, 32), torch.randn(2, 9, 2, 32)
    >>> out, lse = qkv.torch.attention(q, k, v, layout="bshd", kv_lengths=torch.tensor([9, 4]), return_lse=True)
    >>> out.shape, lse.shape
    (torch.Size([2, 5, 4, 32]), torch.Size([2, 4, 5]))
    """
    if kv_lengths is not None and not isinstance(kv_lengths, Tensor):
        kv_lengths = _lengths(kv_lengths, q)
    if _direct(q, k, v, mask, bias, alibi_slopes, sinks, kv_lengths, out):
        # fmt: off
        return _native_attention(
            q, k, v, layout=layout, causal=causal, window=window, mask=mask, bias=bias, alibi_slopes=alibi_slopes,
            softcap=softcap, sinks=sinks, scale=scale, kv_lengths=kv_lengths, return_lse=return_lse, out=out,
        )
        # fmt: on
    # fmt: off
    _check_tensors(
        q=q, k=k, v=v, mask=mask, bias=bias, alibi_slopes=alibi_slopes, sinks=sinks, kv_lengths=kv_lengths, out=out,
    )
    _check_options(
        _native_attention, layout=layout, causal=causal, window=window, softcap=softcap, scale=scale, return_lse=return_lse,
    )
    # fmt: on
    layout = "bhsd" if layout is None else layout
    return_lse = _flag("return_lse", return_lse)
    offset = None
    if causal is not None and not isinstance(causal, str):
        if isinstance(causal, bool):
            raise TypeError(f"causal: {causal}, expected {_CAUSAL}")
        causal, offset = None, causal
    left, right = _window(window)
    if torch.is_autocast_enabled("cpu"):
        q, k, v = _autocast(q, k, v)
        # A bias of float32 goes with any type and stays exact.
        if bias is not None and bias.dtype is not torch.float32:
            (bias,) = _autocast(bias)
    tensors = (q, k, v, mask, bias, alibi_slopes, sinks, kv_lengths)
    flat = (*tensors, layout, causal, offset, left, right, softcap, scale)
    if out is not None and torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise NotImplementedError("out: a given output is not supported where a gradient is wanted, expected None")
    if not return_lse:
        result = _attention_op(*flat)
        return result if out is None else _copy_out(out, result)
    result, lse = _attention_lse_op(*flat)
    return (result if out is None else _copy_out(out, result)), lse


def _copy_out(out: Tensor, result: Tensor) -> Tensor:
    """`out=` where the call is traced: the operators are functions, so the copy is a node of its own."""
    _check_type("out", out, (result.dtype,), _type_name(result))
    if out.shape != result.shape:
        raise ValueError(f"out: shape {list(out.shape)}, expected {list(result.shape)}")
    return out.copy_(result)


def _window(window: Any) -> tuple[int | None, int | None]:
    """(left, right) with None for an end that is not bounded."""
    if window is None:
        return None, None
    if not isinstance(window, (tuple, list)) or any(isinstance(w, bool) for w in window):
        raise TypeError(f"window: {window!r}, expected {_WINDOW}")
    if len(window) != 2:
        raise ValueError(f"window: {window!r}, expected {_WINDOW}")
    ends = tuple(None if w is None or w == -1 else w for w in window)
    return ends[0], ends[1]
