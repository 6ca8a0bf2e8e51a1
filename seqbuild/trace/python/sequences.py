"""Sequences of tensors whose length depends on data, such as one tensor per image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.overrides import TorchFunctionMode

from runtime.errors import TraceError

_JOINS: dict[Any, Any] = {
    torch.cat: torch.ops.aten.cat.default,
    torch.concat: torch.ops.aten.cat.default,
    torch.stack: torch.ops.aten.stack.default,
}


class UnknownLength(tuple[Any, ...]):
    """Placeholder for a step's result that is a tuple or list of unknown length.

    It can be passed to another step or joined by `torch.cat` or `torch.stack`; any other use raises TraceError.
    """

    node: fx.Node

    def __new__(cls, node: fx.Node | None = None) -> UnknownLength:
        """Create a placeholder for the result of `node`, which can be set later."""
        made = super().__new__(cls)
        if node is not None:
            made.node = node
        return made

    def _refuse(self, *_: Any) -> NoReturn:
        raise TraceError("the model's code reads a step's result that is a sequence of data-dependent length")

    __len__ = __iter__ = __getitem__ = __bool__ = __reversed__ = __contains__ = _refuse
    __add__ = __mul__ = _refuse


class JoinsRecorded(TorchFunctionMode):
    """Record `torch.cat` and `torch.stack` of a sequence of unknown length as one step.

    Args:
        record: called with the operator and its arguments.
        record_collected: called instead for a list that a recorded loop has filled.
        is_collected: whether a list was filled by a recorded loop.
    """

    def __init__(
        self,
        record: Callable[[Any, tuple[Any, ...]], Any],
        record_collected: Callable[[Any, tuple[Any, ...]], Any],
        is_collected: Callable[[Any], bool],
    ) -> None:
        super().__init__()
        self.record = record
        self.record_collected = record_collected
        self.is_collected = is_collected

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _JOINS and get_proxy_mode() is not None:
            tensors = args[0] if args else kwargs.get("tensors")
            dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
            if isinstance(tensors, UnknownLength):
                return self.record(_JOINS[func], (tensors, dim))
            if self.is_collected(tensors):
                return self.record_collected(_JOINS[func], (tensors, dim))
        return func(*args, **kwargs)
