"""The attention of transformers models on qkv.

`register()` adds an attention function and the mask function that goes with it to transformers' tables, under the
name "qkv". Models then take it by name:

>>> import torch, transformers, qkv.transformers
>>> qkv.transformers.register()
>>> config = transformers.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
...                                   num_attention_heads=4, num_key_value_heads=2)
>>> model = transformers.LlamaForCausalLM(config).eval()
>>> model.set_attn_implementation("qkv")
>>> with torch.no_grad():
...     model(torch.tensor([[1, 2, 3]])).logits.shape
torch.Size([1, 3, 64])

What the two functions agree on
-------------------------------
The mask function is asked once per forward pass for a pattern (causal, sliding window, padding, or anything else) and
its answer reaches the attention function of each layer. The answer is one of:

* a `qkv._mask.CompactMask`: an offset, a window and a row of padding, or nothing of these. The attention function runs
  these fused. A model that computes with its mask, or cuts it (Gemma 4), sees the ordinary boolean mask.
* `None`: one query that sees every key. Also what a traced model gets where transformers skips a mask, and what a model
  has that asks for none: then nothing is masked but what `is_causal` says, exactly as with transformers' own "sdpa": a
  module that is causal masks from the upper left if there is more than one query. (`is_causal` alone does not tell:
  PaliGemma's text is causal in a module that says it is not, StableLM's may be the opposite.)
* an ordinary boolean mask (batch, 1, q_len, kv_len): what cannot be said in those words (packed sequences, chunks,
  prefixes and images that see both ways, functions of the caller's own), what is traced by `torch.compile` or
  `torch.export` with padding, and what the model wants filled in. Padding alone is a row that is repeated with
  stride 0, also when traced.
* a float mask as "eager" has it, 0 and the lowest number, to be added.

`None` and boolean masks need a model that is written for them. transformers refuses "sdpa" where one is not, but no
name that is registered, so this is found out here from what the model's class says (`_Form`):

* it supports sdpa: everything above, without the float mask.
* it supports flash or flex attention, but not sdpa (GPT-OSS and Gemma 2 because of their sinks and soft caps): it takes
  masks of any kind, but need not say rightly whether it is causal (PegasusX). `None` masks nothing, as with "eager".
* it supports eager only: it may add the mask to its own scores, or join it to another (BigBirdPegasus, DeepSeek V4).
  Float masks, filled in; `None` masks nothing.
* its attention does not go through transformers' interface at all (BLOOM): refused, as nothing would run here.

A mask that the caller made, (.., q_len, kv_len) boolean or float, is the whole truth, as with "eager": `is_causal` and
`sliding_window` are not added to it. A two-dimensional mask (batch, kv_len) is padding only, as with flash attention:
causality and window come on top, aligned at the lower right.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import Tensor
from transformers import masking_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, prepare_padding_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils.import_utils import is_tracing

from ._mask import CompactMask
from .torch import attention

# Positions came as a tensor before 5.4, and reach the mask function as numbers since.
if "q_offset" not in inspect.signature(sdpa_mask).parameters:
    raise ImportError(f"qkv.transformers: transformers {transformers.__version__} is here, expected 5.4 or later")

__all__ = ["attention_forward", "attention_mask", "register"]

# Names with a meaning of their own in transformers: the models ask for them by name, and "paged|", "/", ":" and "@"
# make it look elsewhere.
_RESERVED = ("eager", "sdpa", "flash", "flex_attention", "paged")


def register(name: str = "qkv") -> None:
    """Makes `model.set_attn_implementation(name)` and `attn_implementation=name` run attention here.

    Registers the attention function and its mask function together; calling it again changes nothing. Raises
    `ValueError` for a name that transformers reads in a way of its own.
    """
    if not isinstance(name, str):
        raise TypeError(f"name: expected a str, got {type(name).__name__}")
    if not name or any(c in name for c in "/|:@") or any(word in name for word in _RESERVED):
        raise ValueError(
            f"name: '{name}' was given, expected a name without any of {', '.join(_RESERVED)} and without / | : @, "
            "which transformers reads in a way of its own"
        )
    ALL_ATTENTION_FUNCTIONS.register(name, attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, attention_mask)


# --- what a model understands ------------------------------------------------------------------------------------


# The masks that a family of models understands (see the module's text). Strings, because torch.compile does not keep
# the identity of an enum's members.
_Form = Literal["skipped", "explicit", "additive", "none"]

# By class of configuration, which is all that the mask function is told about the model.
_forms: WeakKeyDictionary[type, _Form] = WeakKeyDictionary()


# A constant for torch.compile, which could not trace the search.
@torch.compiler.assume_constant_result
def _form(kind: type) -> _Form:
    """What the models with this class of configuration understand."""
    form = _forms.get(kind)
    if form is None:
        form = _forms[kind] = _form_of(_models(kind))
    return form


def _form_of(models: list[type[PreTrainedModel]]) -> _Form:
    # Without a model's word (a module that is no PreTrainedModel), the form that says everything. Where several models
    # share a configuration, the form that is right for each.
    if not models:
        return "explicit"
    # transformers looks into the source for this, which tells about its own files only.
    if all(m.__module__.startswith("transformers.") and not m._can_set_attn_implementation() for m in models):
        return "none"
    if all(m._supports_sdpa for m in models):
        return "skipped"
    if all(m._supports_sdpa or m._supports_flash_attn or m._supports_flex_attn for m in models):
        return "explicit"
    return "additive"


def _models(kind: type) -> list[type[PreTrainedModel]]:
    """The loaded models whose configuration this is, or else is the nearest base of this one."""

    def below(model: type[PreTrainedModel]) -> Iterator[type[PreTrainedModel]]:
        for child in model.__subclasses__():
            yield child
            yield from below(child)

    every = set(below(PreTrainedModel))
    for base in kind.__mro__:
        if base is transformers.PreTrainedConfig:
            break
        if models := [m for m in every if m.config_class is base]:
            return models
    return []


# What models pass on and what has nothing to do with how scores become an output.
_MEANINGLESS = frozenset(
    {
        "cache_position",
        "encoder_hidden_states",
        "inputs_embeds",
        "labels",
        "num_items_in_batch",
        "position_embeddings",
        "position_ids",
    }
)

# By class of module: the arguments of the eager attention beside it, or None where there is none.
_eager_options: WeakKeyDictionary[type, frozenset[str] | None] = WeakKeyDictionary()


def _refuse_unknown(module: Any, options: dict[str, Any]) -> None:
    """Refuses what has a meaning for the model's attention and none here."""
    for name, value in options.items():
        if value is None or name in _MEANINGLESS:
            continue
        if _has_meaning(type(module), name, isinstance(value, Tensor) and value.is_floating_point()):
            raise NotImplementedError(f"{name}: this argument of {type(module).__name__}'s attention is not supported")


@torch.compiler.assume_constant_result
def _has_meaning(kind: type, name: str, floating: bool) -> bool:
    """Whether the attention of this class of module computes with an argument that is not known here.

    Models pass on whatever their caller gave, so most of it means nothing. What does is an argument of the model's own
    eager attention; where that is not found, a float tensor may be a bias, a sink or a gate.
    """
    if kind not in _eager_options:
        beside = vars(sys.modules[kind.__module__]) if kind.__module__ in sys.modules else {}
        eager = [f for f in beside.values() if getattr(f, "__name__", "").endswith("eager_attention_forward")]
        names = {p.name for f in eager for p in inspect.signature(f).parameters.values() if p.kind != p.VAR_KEYWORD}
        _eager_options[kind] = frozenset(names) if eager else None
    known = _eager_options[kind]
    return floating if known is None else name in known


# --- masks -------------------------------------------------------------------------------------------------------


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: Any = "cpu",
    dtype: torch.dtype = torch.float32,
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask of one forward pass, in the shortest form that says it exactly (see the module's text).

    The arguments are those of `transformers.masking_utils.sdpa_mask`: query i stands at i + q_offset and key j at
    j + kv_offset, `mask_function(batch, head, query, key)` is the pattern, and `attention_mask` (batch, seen) the
    padding. `config` says for which model it is; without one, it is for a model that supports sdpa.
    """
    form = "skipped" if config is None else _form(type(config))
    if form == "skipped" and getattr(config, "num_kv_shared_layers", None):
        # Gemma 4 cuts its queries for these layers, and the mask with them: a `None` would stay, also in a graph.
        form = "explicit"
    if form == "none":
        raise NotImplementedError(
            f"config: the attention of models with {type(config).__name__} does not go through transformers' attention "
            "interface, so it is not supported; use attn_implementation='eager'"
        )

    def filled_in(may_skip: bool = False) -> Tensor | None:
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=allow_is_causal_skip and may_skip and form == "skipped",
            allow_is_bidirectional_skip=allow_is_bidirectional_skip and may_skip,
            use_vmap=use_vmap,
            device=device,
            **kwargs,
        )

    # 1. What is traced. Values cannot be read, so neither a static cache's position nor whether there is any padding is
    #    known, and the mask may cross into a compiled region. transformers' own rules apply; without padding they skip
    #    a plain causal mask here too, except where keys have left the cache: their test of a chunk's size counts the
    #    keys that are there, and not where they stand. Padding alone needs no values and stays a row.
    tracing = is_tracing(attention_mask) or is_tracing(q_offset) or torch._C._len_torch_dispatch_stack() > 0
    only_padding = mask_function is masking_utils.bidirectional_mask_function and _is_padding(attention_mask)
    if form == "additive":
        # As transformers' own mask for "eager", which skips what masks nothing too. Rows that are all alike are one row
        # in memory here.
        mask = filled_in(may_skip=True)
        if mask is None:
            return None
        mask = mask[:, :, :1] if only_padding else mask
        mask = torch.where(mask, torch.zeros((), dtype=dtype, device=mask.device), torch.finfo(dtype).min)
        return mask.expand(batch_size, -1, q_length, kv_length)
    if tracing:
        if only_padding:
            return _padding_only(batch_size, q_length, kv_length, kv_offset, attention_mask)
        return filled_in(may_skip=kv_offset == 0)

    # 2. What the model wants filled in: `allow_is_causal_skip` is False where it computes with its mask, where it has
    #    changed the pattern, and for one query with a static cache, whose mask is a row anyway and enters a graph.
    pattern = _pattern(mask_function)
    if pattern is None or not (attention_mask is None or _is_padding(attention_mask)):
        return filled_in()
    causal, window, chunk = pattern
    if not (allow_is_causal_skip if causal else allow_is_bidirectional_skip):
        return filled_in()

    # 3. Positions. A static cache gives q_offset as a tensor; it is on the CPU and may be read here. Its unfilled keys
    #    lie behind the last query and are masked by causality, or by the padding that transformers appends for them.
    offset = int(q_offset) - kv_offset
    padding = _padding(batch_size, kv_length, kv_offset, attention_mask)
    if chunk is not None:
        # Chunks (Llama 4) count from the first token that is not left padding. While everything lies in the first one
        # the pattern is causal: the keys before it are padding, so they are masked either way.
        size, left_padding = chunk
        first = int(left_padding.min()) if left_padding.numel() else 0
        if int(q_offset) + q_length - first > size:
            return filled_in()
    if window is not None:
        left, right = window
        # A window that reaches past both ends hides nothing. The lowest position is `offset`, the highest
        # `offset + q_length - 1`.
        if left is not None and offset + q_length - 1 - left <= 0:
            left = None
        if right is not None and (causal or offset + right >= kv_length - 1):
            right = None
        window = (left, right)
    else:
        window = (None, None)

    if not causal:
        if window == (None, None):
            if padding is not None:
                return padding[:, None, None, :].expand(batch_size, 1, q_length, kv_length)
        elif offset != kv_length - q_length:
            # Without causality the attention function centres a window at the lower right only.
            return filled_in()
    # 4. `None` where it cannot be read otherwise: one query that sees every key.
    if q_length == 1 and window == (None, None) and padding is None and (not causal or offset >= kv_length - 1):
        return None
    return CompactMask(
        batch_size, q_length, kv_length, offset=offset, causal=causal, window=window, padding=padding, device=device
    )


def _pattern(function: Callable) -> tuple[bool, tuple[int, int] | None, tuple[int, Tensor] | None] | None:
    """(causal, window, chunk) of a pattern that transformers made from its own parts, or None for any other.

    The parts are closures, told apart by the function that made them; their numbers are read from the closure. What is
    not recognised for certain (a new part, a changed name, a caller's function) is None, and gets the ordinary mask.
    """
    if function is masking_utils.causal_mask_function:
        return True, None, None
    if function is masking_utils.bidirectional_mask_function:
        return False, None, None
    parts = _closure(function, "and_masks", "and_mask").get("mask_functions")
    if not isinstance(parts, tuple) or len(parts) != 2:
        return None
    overlay, base = parts
    if base is masking_utils.causal_mask_function:
        # key > query - size: the query itself and the size - 1 keys before it.
        size = _closure(overlay, "sliding_window_overlay", "inner_mask").get("sliding_window")
        if isinstance(size, int) and size >= 1:
            return True, (size - 1, 0), None
        chunk = _closure(overlay, "chunked_overlay", "inner_mask")
        size, left_padding = chunk.get("chunk_size"), chunk.get("left_padding")
        if isinstance(size, int) and isinstance(left_padding, Tensor):
            return True, None, (size, left_padding)
    if base is masking_utils.bidirectional_mask_function:
        # |query - key| <= size.
        size = _closure(overlay, "sliding_window_bidirectional_overlay", "inner_mask").get("sliding_window")
        if isinstance(size, int) and size >= 0:
            return False, (size, size), None
    return None


def _closure(function: Any, maker: str, inner: str) -> dict:
    """The captured variables of `inner`, if transformers' `maker` made this function; else nothing."""
    code = getattr(function, "__code__", None)
    if (
        code is None
        or getattr(function, "__module__", None) != masking_utils.__name__
        or getattr(function, "__qualname__", None) != f"{maker}.<locals>.{inner}"
    ):
        return {}
    return dict(zip(code.co_freevars, (cell.cell_contents for cell in function.__closure__ or ())))


def _is_padding(mask: Any) -> bool:
    """Whether this is the usual two-dimensional padding mask."""
    return isinstance(mask, Tensor) and mask.dim() == 2 and mask.dtype == torch.bool


def _padding_only(batch: int, q_len: int, kv_len: int, kv_offset: int, mask: Tensor) -> Tensor:
    """The padding as a mask whose rows are one row in memory."""
    row = prepare_padding_mask(mask, kv_len, kv_offset)[:, kv_offset : kv_offset + kv_len]
    return row[:, None, None, :].expand(batch, 1, q_len, kv_len)


def _padding(batch: int, kv_len: int, kv_offset: int, mask: Tensor | None) -> Tensor | None:
    """The padding of the keys that are there, bool (batch, kv_len), or None where nothing is padded."""
    if mask is None:
        return None
    row = prepare_padding_mask(mask, kv_len, kv_offset)[:, kv_offset : kv_offset + kv_len]
    return None if bool(row.all()) else row.expand(batch, kv_len)


# --- attention ---------------------------------------------------------------------------------------------------


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: Any = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    cache: Any = None,
    output_attentions: bool | None = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function: query (batch, heads, q_len, dk), key and value (batch, kv_heads, kv_len, ..) in, the
    output (batch, q_len, heads, dv), contiguous, and None for the weights out.

    `s_aux` is a sink for each head, `sinks` (batch, heads, q_len, 1) one for each query.

    `NotImplementedError` for dropout, for the weights (`output_attentions`), for continuous batching's paged cache, for
    a model's selection of keys by index and for what else has a meaning for its attention. Other keyword arguments are
    the model's business between its own parts (`position_ids`, `use_cache`, lengths that flash attention would need)
    and carry no meaning here.
    """
    if dropout:
        raise NotImplementedError(f"dropout: {dropout} was given; it is not supported yet, expected 0 (model.eval())")
    if output_attentions:
        raise NotImplementedError(
            "output_attentions: the attention weights are never formed, so returning them is not supported; use "
            "attn_implementation='eager' for them"
        )
    if cache is not None:
        raise NotImplementedError("cache: continuous batching's paged cache is not supported")
    for name in ("indices", "block_indices"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"{name}: attention to a selection of keys is not supported")
    _refuse_unknown(module, kwargs)

    q_len, kv_len = query.shape[2], key.shape[2]
    if query.shape[0] != key.shape[0]:
        # Learned queries with batch 1; stride 0, no copy.
        batch = max(query.shape[0], key.shape[0])
        query, key, value = (t.expand(batch, -1, -1, -1) for t in (query, key, value))
    if isinstance(scaling, Tensor):
        # A learned scale belongs to the graph.
        query, scaling = query * scaling, 1.0

    mask, bias, causal, window = _expressed(
        module, attention_mask, q_len, kv_len, is_causal=is_causal, sliding_window=sliding_window
    )
    if position_bias is not None:
        bias = position_bias if bias is None else position_bias + bias
    if bias is not None and bias.dtype not in (query.dtype, torch.float32):
        bias = bias.to(torch.float32)
    if s_aux is not None:
        s_aux = s_aux.to(torch.float32)
    if sinks is not None and sinks.shape != (query.shape[0], query.shape[1], q_len, 1):
        raise NotImplementedError(
            f"sinks: shape {tuple(sinks.shape)} is not supported, expected {(query.shape[0], query.shape[1], q_len, 1)}"
        )

    # The heads are one axis of a projection's output, so this is its layout in memory: nothing is moved on the way in,
    # and the output is what the next projection reads.
    result = attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        layout="bshd",
        causal=causal,
        window=window,
        mask=mask,
        bias=bias,
        softcap=softcap,
        sinks=s_aux,
        scale=scaling,
        return_lse=sinks is not None,
    )
    if sinks is None:
        return result, None
    # A sink has no value, so it only takes its share of the weights: exp(lse) / (exp(lse) + exp(sink)) is left.
    output, lse = result
    left = torch.sigmoid(lse[..., None] - sinks.to(torch.float32)).transpose(1, 2)
    return (output * left).to(output.dtype), None


def _expressed(
    module: torch.nn.Module,
    mask: Tensor | None,
    q_len: int,
    kv_len: int,
    *,
    is_causal: bool | None,
    sliding_window: int | None,
) -> tuple[Tensor | None, Tensor | None, Any, Any]:
    """(mask, bias, causal, window) for `qkv.torch.attention`, from the mask and what the module says."""
    if isinstance(mask, CompactMask):
        if mask.compact:
            if mask.hides_nothing:
                return None, None, None, None
            if (mask.shape[2], mask.shape[3]) != (q_len, kv_len):
                raise ValueError(
                    f"attention_mask: shape {tuple(mask.shape)} was given, expected q_len {q_len} and kv_len {kv_len}"
                )
            # Without causality the mask function has made sure that the offset is kv_len - q_len, the default.
            padding = None if mask.padding is None else mask.padding[:, None, None, :]
            window = None if mask.window == (None, None) else mask.window
            return padding, None, mask.offset if mask.causal else None, window
        mask = mask.fill()
    if mask is not None and mask.dim() != 2:
        if mask.dtype == torch.bool:
            return mask, None, None, None
        return None, mask, None, None

    if is_causal is None:
        config = getattr(module, "config", None)
        # Of several queries these have a mask wherever they are causal, whatever the module says (BridgeTower).
        masked = mask is None and config is not None and _form(type(config)) in ("explicit", "additive")
        is_causal = not masked and _module_is_causal(module)
    if mask is not None:
        if mask.shape[1] != kv_len:
            raise ValueError(f"attention_mask: shape {tuple(mask.shape)} was given, expected (batch, {kv_len})")
        mask = mask.to(torch.bool)[:, None, None, :]
        causal = "bottom_right" if is_causal else None
    else:
        # As transformers' "sdpa" reads it. A single query sees all; several, with more keys than queries, are the
        # prompt of a static cache that is still empty, so they are aligned at the upper left.
        causal = "top_left" if is_causal and q_len > 1 else None
    window = None
    if sliding_window is not None:
        # `sliding_window` counts the query itself, on either side, as with flash attention.
        window = (sliding_window - 1, 0 if is_causal else sliding_window - 1)
    return mask, None, causal, window


def _module_is_causal(module: Any) -> bool:
    """Whether an attention module is causal by itself.

    Where it does not say (the attribute is missing), its configuration does. Neither is always right: the decoders of
    PegasusX, BigBirdPegasus and NLLB-MoE say that they are not causal and rely on their mask. This is asked only where
    there is none, and the mask function leaves none out for them.
    """
    stated = getattr(module, "is_causal", None)
    if stated is None:
        return bool(getattr(getattr(module, "config", None), "is_decoder", False))
    return bool(stated)
