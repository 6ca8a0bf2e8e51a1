"""Leaves that the code around them changes: another kind of attention for short inputs, for instance."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from runtime.errors import TraceError

_MISSING = object()


@contextlib.contextmanager
def leaves_left_alone(modules: Iterable[nn.Module]) -> Iterator[None]:
    """While the block runs, refuse recorded code that sets an attribute of one of these modules to another value.

    A chain calls the leaves of a fresh model, on which nobody has done that. As an opaque step the function that does
    it is part of the chain, and then all is well.
    """
    leaves = frozenset(modules)
    plain = nn.Module.__setattr__

    def setattr_(self: nn.Module, name: str, value: Any) -> None:
        if self in leaves and get_proxy_mode() is not None and not _is_same(getattr(self, name, _MISSING), value):
            raise TraceError(f"the model's forward sets {name} of a {type(self).__name__} inside of a step")
        plain(self, name, value)

    nn.Module.__setattr__ = setattr_  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__setattr__ = plain  # type: ignore[method-assign]


def _is_same(old: Any, new: Any) -> bool:
    if old is new:
        return True
    return not isinstance(new, (torch.Tensor, nn.Module)) and type(old) is type(new) and bool(old == new)
