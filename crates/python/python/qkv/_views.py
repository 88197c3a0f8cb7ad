"""What `qkv.onnx` needs to know about arrays: numpy's and torch's, without importing torch.

Arrays stay what they are, numpy or torch, and are only sliced, reshaped and looked at here; numbers are computed by the
compiled module. torch is never imported: where a torch tensor came in, it has been imported already.
"""

from __future__ import annotations

import operator
import sys
from typing import Any

import numpy as np

FLOATS = ("float32", "bfloat16", "float16")


def is_torch(x: Any) -> bool:
    """Whether `x` is a torch tensor."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def derivative(x: Any) -> str | None:
    """What a torch tensor carries that results would silently lack, in words; None: nothing."""
    if x.requires_grad:
        return "a tensor that requires a gradient"
    forward_ad = sys.modules["torch"].autograd.forward_ad
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        return "a tensor with a tangent (a dual of torch.autograd.forward_ad)"
    return None


def as_array(name: str, x: Any, like: Any = None) -> Any:
    """`x` as a torch tensor or a numpy array, whichever it is; anything else with `__dlpack__` becomes numpy's.

    With `like`, `x` becomes what `like` is, without a copy. Tensors of other devices, and those that have a derivative,
    are refused.
    """
    if is_torch(x):
        if x.device.type != "cpu":
            raise ValueError(f"{name}: on device {x.device}, expected the CPU")
        carried = derivative(x)
        if carried is not None:
            raise ValueError(
                f"{name}: {carried}, expected one without (qkv.torch.scaled_dot_product_attention takes a gradient, without "
                "a backward pass yet; tensor.detach() leaves gradient and tangent out)"
            )
        if x.layout is not sys.modules["torch"].strided:
            raise TypeError(f"{name}: layout {x.layout}, expected a strided tensor")
    elif not isinstance(x, np.ndarray):
        try:
            exports = hasattr(x, "__dlpack__")
        except Exception as error:
            raise ValueError(f"{name}: its memory cannot be read ({error}), expected an array on the CPU") from error
        if not exports:
            raise TypeError(f"{name}: {type(x).__name__}, expected a numpy array or a tensor on the CPU with __dlpack__")
        try:
            x = np.from_dlpack(x)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            raise TypeError(f"{name}: {type(x).__name__} that numpy cannot read ({error})") from error
    if like is None or is_torch(like) == is_torch(x):
        return x
    try:
        return sys.modules["torch"].from_numpy(x) if is_torch(like) else to_numpy(x)
    except (TypeError, ValueError, RuntimeError) as error:
        kind = "torch" if is_torch(like) else "numpy"
        raise TypeError(f"{name}: {dtype_name(x)} of another library, expected a {kind} array as the first one is") from error


def dtype_name(x: Any) -> str:
    """ "float32", "bfloat16", "int64", ..., the same for numpy and torch."""
    return str(x.dtype).removeprefix("torch.")


def check_float(name: str, x: Any) -> None:
    """Refuses what is not float32, bfloat16 or float16."""
    given = dtype_name(x)
    if given == "float64":
        raise NotImplementedError(f"{name}: float64 is not supported, expected float32, bfloat16 or float16")
    if given not in FLOATS:
        raise TypeError(f"{name}: {given}, expected float32, bfloat16 or float16")


def check_same_type(name: str, x: Any, other: str, of: Any) -> None:
    """Refuses `x` where its type is not that of `of`."""
    if dtype_name(x) != dtype_name(of):
        raise TypeError(f"{name}: {dtype_name(x)}, expected {dtype_name(of)} as {other} is")


def check_shape(name: str, x: Any, expected: tuple[int | None, ...], axes: str) -> None:
    """Refuses `x` where a size is not the expected one; None stands for any."""
    shape = tuple(x.shape)
    fits = len(shape) == len(expected) and all(e in (None, s) for s, e in zip(shape, expected))
    if not fits:
        wanted = ", ".join("any" if e is None else str(e) for e in expected)
        raise ValueError(f"{name}: shape {shape}, expected {axes} = ({wanted}{',' if len(expected) == 1 else ''})")


def empty(shape: tuple[int, ...], like: Any) -> Any:
    """New memory of this shape and of the library and type of `like`."""
    if is_torch(like):
        return sys.modules["torch"].empty(shape, dtype=like.dtype)
    return np.empty(shape, dtype=like.dtype)


def concatenate(parts: list[Any], axis: int) -> Any:
    """New memory that holds the parts one after the other."""
    if is_torch(parts[0]):
        return sys.modules["torch"].cat(parts, dim=axis)
    return np.concatenate(parts, axis=axis)


def to_numpy(x: Any) -> np.ndarray:
    """A torch tensor as numpy's, a copy only where it is negated lazily."""
    return x.resolve_neg().numpy()


def to_float32(x: Any) -> np.ndarray:
    """A numpy array of float32 with the same values."""
    return to_numpy(x.float()) if is_torch(x) else x.astype(np.float32)


def from_float(x: np.ndarray, like: Any) -> Any:
    """An array of the library and type of `like`, rounded to it."""
    if is_torch(like):
        torch = sys.modules["torch"]
        return torch.from_numpy(np.ascontiguousarray(x)).to(like.dtype)
    return x.astype(like.dtype)


def integers(name: str, x: Any, shape: tuple[int, ...], kinds: tuple[str, ...], axes: str = "(batch,)") -> np.ndarray:
    """A numpy array of int64, contiguous, of `shape`, from an array of one of the integer types `kinds`."""
    x = as_array(name, x)
    if dtype_name(x) not in kinds:
        raise TypeError(f"{name}: {dtype_name(x)}, expected {' or '.join(kinds)}")
    check_shape(name, x, shape, axes)
    x = to_numpy(x) if is_torch(x) else x
    return np.ascontiguousarray(x, dtype=np.int64)


def integer(name: str, x: Any, least: int | None = None) -> int:
    """`x` as an int, at least `least`."""
    try:
        value = operator.index(x)
    except TypeError:
        raise TypeError(f"{name}: {type(x).__name__}, expected an integer") from None
    if least is not None and value < least:
        raise ValueError(f"{name}: {value}, expected at least {least}")
    return value


def flag(name: str, x: Any) -> bool:
    """`x` as a truth value: a bool, or 0 or 1."""
    if isinstance(x, (bool, np.bool_)):
        return bool(x)
    value = integer(name, x)
    if value not in (0, 1):
        raise ValueError(f"{name}: {value}, expected 0 or 1")
    return value == 1


def number(name: str, x: Any) -> float:
    """`x` as a finite float."""
    carried = derivative(x) if is_torch(x) else None
    if carried is not None:
        raise TypeError(f"{name}: {carried}, expected a number (tensor.item() is one, without the derivative)")
    try:
        value = float(x)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: {type(x).__name__}, expected a number") from None
    if not np.isfinite(value):
        raise ValueError(f"{name}: {value}, expected a finite number")
    return value
