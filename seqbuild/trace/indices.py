"""Symbolic numbers as indices: `x[:, index]` with the number of a loop's turn, recorded as a selection.

Torch itself turns such an index into a number. Each is taken out of the indices and done by a selection of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.overrides import TorchFunctionMode


class SymbolicIndices(TorchFunctionMode):
    """Record reading from and writing to tensors at symbolic indices."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and get_proxy_mode() is not None:
            items = args[1] if isinstance(args[1], tuple) else (args[1],)
            if _is_handled(items):
                return self._indexed(func, args[0], items, *args[2:])
        return func(*args, **(kwargs or {}))

    def _indexed(self, func: Callable[..., Any], tensor: torch.Tensor, items: tuple[Any, ...], *value: Any) -> Any:
        axes = {_axis(items, place, tensor.dim()): item for place, item in enumerate(items) if _is_symbol(item)}
        for axis in sorted(axes, reverse=True):
            tensor = torch.ops.aten.select.int(tensor, axis, axes[axis])
        rest = tuple(item for item in items if not _is_symbol(item))
        if not value and all(item is Ellipsis or item == slice(None) for item in rest):
            return tensor
        return func(tensor, rest or (Ellipsis,), *value)


def _is_symbol(item: Any) -> bool:
    return isinstance(item, torch.SymInt)


def _is_handled(items: tuple[Any, ...]) -> bool:
    """Whether there is a symbol among plain indices; a mask or a tensor of indices has rules of its own."""
    is_plain = all(item is None or item is Ellipsis or type(item) in (int, slice, torch.SymInt) for item in items)
    return is_plain and any(_is_symbol(item) for item in items)


def _axis(items: tuple[Any, ...], place: int, num_axes: int) -> int:
    """The axis that an item is for."""
    if any(item is Ellipsis for item in items[:place]):
        return num_axes - sum(item is not None for item in items[place:])
    return sum(item is not None for item in items[:place])
