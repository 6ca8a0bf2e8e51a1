"""Compute a key of everything that determines what a module of experts does, except the numbers in its weights.

Modules with the same key share one derived leaf. The key contains everything by value; a module with something that
cannot be compared by value (a buffer, an object of an unknown class, a hook) has no key. Objects compared by identity
(classes, functions) are part of the key, so they live as long as it does.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

# Attributes of `nn.Module` that a forward does not read or that are compared separately.
MODULES_OWN = frozenset(vars(nn.Module())) - {"training"} | {"forward"}
# accelerate's hooks move weights and keep the forward that they wrap; only the class's forward is used here.
_NOT_COMPARED = MODULES_OWN | {"_hf_hook", "_old_forward"}
_BY_IDENTITY = (types.FunctionType, types.BuiltinFunctionType, type, torch.dtype, torch.device)


class UnknownValueError(Exception):
    """A value that cannot be compared."""


def signature(module: nn.Module) -> Hashable | None:
    """Return a module's key, or None if it has none."""
    try:
        return tuple(_parts(module))
    except (UnknownValueError, RecursionError):
        return None


def _parts(module: nn.Module) -> Iterator[Hashable]:
    places: dict[int, int] = {}  # a parameter may occur twice
    for name, inner in module.named_modules(remove_duplicate=False):
        if any(buffer is not None for buffer in inner._buffers.values()) or (inner is not module and _is_hooked(inner)):
            raise UnknownValueError
        own = {key: value for key, value in vars(inner).items() if key not in _NOT_COMPARED}
        shapes = tuple(
            (key, p if p is None else (tuple(p.shape), places.setdefault(id(p), len(places))))
            for key, p in inner._parameters.items()
        )
        yield (
            name,
            type(inner),
            type(inner).forward,
            _compared(own),
            shapes,
            tuple(inner._buffers),
            tuple(inner._modules),
        )


def _is_hooked(inner: nn.Module) -> bool:
    return any("_hooks" in key and "state_dict" not in key and bool(value) for key, value in vars(inner).items())


def _compared(value: Any) -> Hashable:
    """Return a value that is equal for two arguments exactly if they are indistinguishable."""
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return kind, value
    if kind is float:
        return kind, value.hex()
    if kind in (list, tuple):
        return kind, tuple(_compared(item) for item in value)
    if kind in (set, frozenset):
        return kind, frozenset(_compared(item) for item in value)
    if isinstance(value, dict):
        return kind, tuple((_compared(key), _compared(item)) for key, item in value.items())
    if isinstance(value, PretrainedConfig):
        return kind, _compared(dict(vars(value)))
    if kind is functools.partial:
        return kind, _compared((value.func, value.args, value.keywords))
    if isinstance(value, _BY_IDENTITY):
        return value
    raise UnknownValueError
