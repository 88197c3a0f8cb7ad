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

from ._torch_shapes import (
    FLOATS,
    SDPA_TENSORS,
    TENSORS,
    attention_shapes,
    check_devices,
    check_type,
    sdpa_shape,
    type_name,
)

__all__ = ["attention", "scaled_dot_product_attention"]

_CAUSAL = 'None, "top_left", "bottom_right" or an int offset'
_WINDOW = "None or (left, right), each None, -1 or a number of keys"
_BOTH_CAUSAL = "causal_offset: given with causal, expected one of them"
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
    return tuple(t.to(dtype) if t is not None and t.dtype in FLOATS else t for t in tensors)


# --- refusals, in the native functions' words --------------------------------------------------------------------


def _check_tensors(**tensors: Any) -> None:
    """Refuses what is not a tensor, and devices where nothing is computed. All but the first three may be left out."""
    for i, (name, t) in enumerate(tensors.items()):
        if not (isinstance(t, Tensor) or t is None and i >= 3):
            raise TypeError(f"{name}: expected a torch.Tensor{' or None' if i >= 3 else ''}, got {type(t).__name__}")
    check_devices(tensors)


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


def _scalar(name: str, x: Any) -> Any:
    """A number. Checked here too, for a call that is traced: a number has no derivative, and a tensor's would be dropped."""
    if isinstance(x, Tensor) and x.requires_grad:
        raise TypeError(f"{name}: a tensor that requires a gradient, expected a number (tensor.item() is one, without it)")
    return x


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
    check_devices(dict(zip(SDPA_TENSORS, (query, key, value, attn_mask))))
    return _native_sdpa(_plain(query), _plain(key), _plain(value), _plain(attn_mask), dropout_p, is_causal, scale, enable_gqa)


def _run_attention(return_lse: bool, *args: Any) -> Any:
    """The native call, from an operator's flat arguments."""
    # The dispatcher drops trailing arguments that equal their defaults: put them back.
    args += _DEFAULTS[len(args) - 3 :]
    tensors, (layout, causal, causal_offset, left, right, softcap, scale) = args[:8], args[8:]
    if causal is not None and causal_offset is not None:
        raise ValueError(_BOTH_CAUSAL)
    check_devices(dict(zip(TENSORS, tensors)))
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
@torch.library.register_fake("qkv::scaled_dot_product_attention", lib=_LIB)
def _sdpa_fake(query, *args):
    return query.new_empty(sdpa_shape(query, *args))


def _shapes(args: tuple[Any, ...]) -> tuple[list[Any], list[Any]]:
    """Those of the result and its log-sum-exp, from an operator's flat arguments."""
    args += _DEFAULTS[len(args) - 3 :]
    if args[9] is not None and args[10] is not None:
        raise ValueError(_BOTH_CAUSAL)
    return attention_shapes(args[8], *args[:8])


@torch.library.register_fake("qkv::attention", lib=_LIB)
def _attention_fake(*args):
    return args[0].new_empty(_shapes(args)[0])


@torch.library.register_fake("qkv::attention_with_lse", lib=_LIB)
def _attention_lse_fake(*args):
    out, lse = _shapes(args)
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
    scale, dropout_p = _scalar("scale", scale), _scalar("dropout_p", dropout_p)
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
        if isinstance(causal, bool) or isinstance(causal, Tensor) and causal.dtype is torch.bool:
            raise TypeError(f"causal: {causal}, expected {_CAUSAL}")
        causal, offset = None, causal
    left, right = _window(window)
    softcap, scale = _scalar("softcap", softcap), _scalar("scale", scale)
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
    check_type("out", out, (result.dtype,), type_name(result))
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
