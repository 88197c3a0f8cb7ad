"""A boolean attention mask that is written down, not filled in.

transformers builds one mask per forward pass and hands it through the model to each layer's attention function. The
masks of language models are an offset, a window and a row of padding; filled in they take q_len x kv_len bytes.
`CompactMask` is a tensor of that shape and type that holds those few numbers only. The attention function reads them.
Everything else that a model may do with the mask (slice it, turn it into a float mask, add to it) sees the values: the
first operation fills the mask in and goes on with an ordinary tensor. So a model cannot tell the difference, and one
that touches its mask loses the saving and nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from typing_extensions import Self


class CompactMask(Tensor):
    """A bool tensor (batch, 1, q_len, kv_len) of which True takes part, kept as its description.

    Attributes:
        offset: the position of query i among the keys is i + offset.
        causal: whether key j must satisfy j <= i + offset.
        window: (left, right), keys position - left ..= position + right; None is unbounded.
        padding: bool (batch, kv_len), True for a key that is there, or None where all are.
        filled: the values, once something has asked for them.
    """

    offset: int
    causal: bool
    window: tuple[int | None, int | None]
    padding: Tensor | None
    filled: Tensor | None

    # Python-level overrides would only repeat what __torch_dispatch__ does.
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(
        cls,
        batch: int,
        q_len: int,
        kv_len: int,
        *,
        offset: int,
        causal: bool = True,
        window: tuple[int | None, int | None] = (None, None),
        padding: Tensor | None = None,
        device: Any = "cpu",
    ) -> Self:
        self = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, (batch, 1, q_len, kv_len), dtype=torch.bool, device=device
        )
        self.offset = offset
        self.causal = causal
        self.window = window
        self.padding = padding
        self.filled = None
        return self

    @property
    def compact(self) -> bool:
        """Whether the description still says what the mask is.

        It does until something has asked for the values: views of them may be about, and a write through one of those
        cannot be seen here. From then on the values are the mask.
        """
        return self.filled is None

    @property
    def hides_nothing(self) -> bool:
        """Whether it was made to say that every query sees every key."""
        return not self.causal and self.window == (None, None) and self.padding is None

    def fill(self) -> Tensor:
        """The same mask as an ordinary tensor."""
        if self.filled is None:
            self.filled = self._values()
        return self.filled

    def _values(self) -> Tensor:
        batch, _, q_len, kv_len = self.shape
        key = torch.arange(kv_len, device=self.device)
        position = torch.arange(q_len, device=self.device)[:, None] + self.offset
        visible = torch.ones((q_len, kv_len), dtype=torch.bool, device=self.device)
        left, right = self.window
        if self.causal:
            visible &= key <= position
        if left is not None:
            visible &= key >= position - left
        if right is not None:
            visible &= key <= position + right
        mask = visible[None, None]
        if self.padding is not None:
            mask = mask & self.padding[:, None, None, :]
        return mask.expand(batch, 1, q_len, kv_len).contiguous()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map_only(CompactMask, CompactMask.fill, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return (
            f"CompactMask(shape={tuple(self.shape)}, offset={self.offset}, causal={self.causal}, window={self.window}, "
            f"padding={None if self.padding is None else tuple(self.padding.shape)})"
        )

    # These read memory without going through an operator.
    def numpy(self, *, force: bool = False) -> Any:
        return self.fill().numpy(force=force)

    def tolist(self) -> Any:
        return self.fill().tolist()

    def __dlpack__(self, **options: Any) -> Any:
        return self.fill().__dlpack__(**options)

    # A copy or a pickle is the ordinary tensor.
    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.fill().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.fill().clone()
