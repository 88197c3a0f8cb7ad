"""`qkv.onnx.Backend`: runs ONNX models of `Attention` and `RotaryEmbedding` nodes, for `onnx.backend.test`.

Other operators are refused; the function bodies ("expanded" models) that ONNX ships beside its node tests consist of such.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.backend.base import Backend as OnnxBackend
from onnx.backend.base import BackendRep, namedtupledict

from qkv.onnx import attention, rotary_embedding

# The first opset of each operator, and which attributes came in later.
_SINCE = {"Attention": 23, "RotaryEmbedding": 23}
# The inputs that each needs.
_NEEDED = {"Attention": ("Q", "K", "V"), "RotaryEmbedding": ("X", "cos_cache", "sin_cache")}
_LATER = {"left_window_size": 25, "right_window_size": 25}


def _attributes(node: onnx.NodeProto, opset: int) -> dict[str, Any]:
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    for name, since in _LATER.items():
        if name in attributes and opset < since:
            raise ValueError(f"{node.op_type}: {name} needs opset {since}, the model's is {opset}")
    return attributes


def _attention(node: onnx.NodeProto, inputs: list[Any], opset: int) -> list[Any]:
    if len(inputs) > 6 and inputs[6] is not None and opset < 24:
        raise ValueError(f"Attention: nonpad_kv_seqlen needs opset 24, the model's is {opset}")
    attributes = _attributes(node, opset)
    wanted = [bool(name) for name in node.output] + [False] * (4 - len(node.output))
    mode = attributes.pop("qk_matmul_output_mode", 0)
    if wanted[3]:
        attributes["qk_matmul_output_mode"] = mode
    if (wanted[1] or wanted[2]) and (len(inputs) < 6 or inputs[4] is None):
        raise ValueError(f"Attention: {node.output[1] or node.output[2]} is asked for without past_key and past_value")
    return list(attention(*inputs, **attributes))


def _rotary(node: onnx.NodeProto, inputs: list[Any], opset: int) -> list[Any]:
    return [rotary_embedding(*inputs, **_attributes(node, opset))]


_RUN = {"Attention": _attention, "RotaryEmbedding": _rotary}


def _run(node: onnx.NodeProto, inputs: list[Any], opset: int) -> list[Any]:
    for i, name in enumerate(_NEEDED[node.op_type]):
        if i >= len(inputs) or inputs[i] is None:
            raise ValueError(f"inputs: {name} of {node.op_type} missing")
    return _RUN[node.op_type](node, inputs, opset)


def _refusal(nodes: Iterable[onnx.NodeProto], opset: int) -> str | None:
    """Why nodes cannot be run; None: they can."""
    for node in nodes:
        if node.domain not in ("", "ai.onnx") or node.op_type not in _RUN:
            name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            return f"{name}: not supported, expected {' or '.join(_RUN)}"
        if opset < _SINCE[node.op_type]:
            return f"{node.op_type}: opset {opset}, expected {_SINCE[node.op_type]} or later"
    return None


def _opset(model: onnx.ModelProto) -> int:
    return next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)


class Prepared(BackendRep):
    """A model that can be run."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = model
        self._opset = _opset(model)
        self._constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}

    def run(self, inputs: Any, **kwargs: Any) -> tuple[Any, ...]:
        """The model's outputs for these inputs: a list in the graph's order, or a dict by name."""
        if kwargs:
            raise NotImplementedError(f"run: {', '.join(kwargs)}: not supported")
        graph = self._model.graph
        values: dict[str, Any] = {"": None, **self._constants}
        if isinstance(inputs, dict):
            values.update(inputs)
        else:
            names = [i.name for i in graph.input if i.name not in self._constants]
            if len(inputs) != len(names):
                raise ValueError(f"inputs: {len(inputs)} of them, expected {len(names)}: {', '.join(names)}")
            values.update(zip(names, inputs))
        for node in graph.node:
            missing = [name for name in node.input if name not in values]
            if missing:
                raise ValueError(f"inputs: {', '.join(missing)} missing")
            arguments = [None if values[name] is None else np.asarray(values[name]) for name in node.input]
            results = _run(node, arguments, self._opset)
            values.update((name, result) for name, result in zip(node.output, results) if name)
        return namedtupledict("Outputs", [o.name for o in graph.output])(*[values[o.name] for o in graph.output])


class Backend(OnnxBackend):
    """`onnx.backend.base.Backend` for models of `Attention` and `RotaryEmbedding` nodes, on the CPU.

    >>> import numpy as np, qkv.onnx
    >>> from onnx import helper
    >>> node = helper.make_node("Attention", ["Q", "K", "V"], ["Y"], is_causal=1)
    >>> q = np.ones((1, 2, 3, 8), dtype=np.float32)
    >>> (y,) = qkv.onnx.Backend.run_node(node, [q, q, q])
    >>> y.shape
    (1, 2, 3, 8)
    """

    supported: ClassVar[tuple[str, ...]] = tuple(_RUN)

    @classmethod
    def is_compatible(cls, model: onnx.ModelProto, device: str = "CPU", **kwargs: Any) -> bool:
        """Whether the model consists of operators that are supported, and the device is the CPU."""
        return cls.supports_device(device) and _refusal(model.graph.node, _opset(model)) is None

    @classmethod
    def prepare(cls, model: onnx.ModelProto, device: str = "CPU", **kwargs: Any) -> Prepared:
        """Checks the model and makes it ready to run.

        Raises:
            NotImplementedError: for other operators and devices.
        """
        if not cls.supports_device(device):
            raise NotImplementedError(f"device: {device} is not supported, expected CPU")
        reason = _refusal(model.graph.node, _opset(model))
        if reason is not None:
            raise NotImplementedError(reason)
        onnx.checker.check_model(model)
        return Prepared(model)

    @classmethod
    def run_model(cls, model: onnx.ModelProto, inputs: Any, device: str = "CPU", **kwargs: Any) -> tuple[Any, ...]:
        """`prepare` and run."""
        return cls.prepare(model, device, **kwargs).run(inputs)

    @classmethod
    def run_node(
        cls, node: onnx.NodeProto, inputs: Any, device: str = "CPU", outputs_info: Any = None, **kwargs: Any
    ) -> tuple[Any, ...]:
        """Runs one node; `opset_version` is 25 unless given."""
        opset = kwargs.get("opset_version", 25)
        if not cls.supports_device(device):
            raise NotImplementedError(f"device: {device} is not supported, expected CPU")
        reason = _refusal([node], opset)
        if reason is not None:
            raise NotImplementedError(reason)
        names = [name for name in node.input if name]
        if isinstance(inputs, dict):
            given = inputs
        else:
            if len(inputs) != len(names):
                raise ValueError(f"inputs: {len(inputs)} of them, expected {len(names)}: {', '.join(names)}")
            given = dict(zip(names, inputs))
        missing = [name for name in names if name not in given]
        if missing:
            raise ValueError(f"inputs: {', '.join(missing)} missing")
        arguments = [given[name] if name else None for name in node.input]
        results = _run(node, arguments, opset)
        names = [name for name in node.output if name]
        return namedtupledict("Outputs", names)(*[r for name, r in zip(node.output, results) if name])

    @classmethod
    def supports_device(cls, device: str) -> bool:
        """ "CPU" alone."""
        return device == "CPU"
