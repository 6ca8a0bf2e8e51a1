"""Record `len` of a tensor: Python makes a number of whatever `__len__` returns, and so a constant of the batch."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from seqbuild.trace.opaque import model_classes


@contextlib.contextmanager
def lengths_recorded(model: nn.Module) -> Iterator[None]:
    """While the block runs, `len` of a tensor is a symbol wherever the model's own modules ask for it.

    Names of a module go before built-in ones, so each module that defines a class of the model gets a `len` of its own.
    """
    names = dict.fromkeys(cls.__module__ for cls in model_classes(model))
    places = [vars(sys.modules[name]) for name in names if name in sys.modules and "len" not in vars(sys.modules[name])]
    try:
        for place in places:
            place["len"] = _length
        yield
    finally:
        for place in places:
            del place["len"]


def _length(value: Any, /) -> Any:
    if isinstance(value, torch.Tensor) and value.dim() > 0:
        return value.shape[0]
    return len(value)
