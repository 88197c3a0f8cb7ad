"""Types of the native half of qkv; the documentation is in the functions themselves (help(qkv.attention)).

What is not here is for the modules beside this one (flash_attn.py, onnx.py) alone.
"""

from typing import Any, Literal, Protocol, TypeAlias, overload

from numpy.typing import NDArray

class SupportsDLPack(Protocol):
    """An array on the CPU: numpy's, torch's, or another library's."""

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...

# What comes out is a torch tensor where the first argument is one, and a numpy array otherwise.
Array: TypeAlias = SupportsDLPack | NDArray[Any]
Result: TypeAlias = Any
Side: TypeAlias = int | None

__version__: str

def scaled_dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    attn_mask: Array | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Result: ...
@overload
def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    layout: Literal["bhsd", "bshd"] = "bhsd",
    causal: Literal["top_left", "bottom_right"] | int | None = None,
    window: tuple[Side, Side] | None = None,
    mask: Array | None = None,
    bias: Array | None = None,
    alibi_slopes: Array | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
    scale: float | None = None,
    kv_lengths: Array | None = None,
    return_lse: Literal[False] = False,
    out: Array | None = None,
) -> Result: ...
@overload
def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    layout: Literal["bhsd", "bshd"] = "bhsd",
    causal: Literal["top_left", "bottom_right"] | int | None = None,
    window: tuple[Side, Side] | None = None,
    mask: Array | None = None,
    bias: Array | None = None,
    alibi_slopes: Array | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
    scale: float | None = None,
    kv_lengths: Array | None = None,
    return_lse: Literal[True],
    out: Array | None = None,
) -> tuple[Result, Result]: ...
def merge_states(out_a: Array, lse_a: Array, out_b: Array, lse_b: Array) -> tuple[Result, Result]: ...
def matmul(
    a: Array,
    b: Array,
    *,
    bias: Array | None = None,
    activation: Literal["gelu", "gelu_tanh", "relu", "silu"] | None = None,
    out: Array | None = None,
) -> Result: ...
def num_threads() -> int: ...
def set_num_threads(n: int) -> None: ...
def cpu_info() -> dict[str, Any]: ...

# What qkv.flash_attn and qkv.onnx are made of; not for others to call.
def flash_attn_func(
    q: Array, k: Array, v: Array, asked: tuple[Any, Any, Any, Any, Any], training: tuple[Any, Any, Any]
) -> Any: ...
def flash_attn_varlen_func(
    q: Array,
    k: Array,
    v: Array,
    lengths: tuple[Any, Any, Any, Any],
    asked: tuple[Any, Any, Any, Any, Any],
    training: tuple[Any, Any, Any],
    block_table: Array | None,
) -> Any: ...
def flash_attn_with_kvcache(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    new: tuple[Any, Any, Any, Any, Any],
    places: tuple[Any, Any, Any, Any],
    asked: tuple[Any, Any, Any, Any, Any],
    rest: tuple[Any, Any],
) -> Any: ...
def rotate(
    x: Array, cos: Array, sin: Array, positions: Array | None, interleaved: bool, out: Array
) -> None: ...
