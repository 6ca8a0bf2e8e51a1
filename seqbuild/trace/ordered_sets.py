"""Let a model's forward go through its sets in one order: Python's own follows the process's hash seed.

Models make a mask or a rotary table `for kind in set(config.layer_types)`. Recorded as it comes, the same model would
give other code in another process. Only what forwards around the leaves do is recorded, so only their code is helped.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn


class _Kind(type):
    """Any set is one of these: `isinstance(value, set)` says what it said."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, set)


class _OrderedSet(set[Any], metaclass=_Kind):
    """A set that is gone through in ascending order where all of it is text."""

    def __iter__(self) -> Iterator[Any]:
        items = list(super().__iter__())
        return iter(sorted(items) if all(type(item) is str for item in items) else items)


@contextlib.contextmanager
def sets_in_order(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Do so for the code and the attributes of these modules, whose attributes the caller puts back."""
    homes: dict[str, None] = {}
    for module in modules:
        for name, value in module.__dict__.items():
            if type(value) is set:
                module.__dict__[name] = _OrderedSet(value)
        homes.update(dict.fromkeys(cls.__module__ for cls in type(module).__mro__))
    outside = ("builtins", "torch", "transformers.modeling_utils")
    scopes = [vars(sys.modules[name]) for name in homes if name in sys.modules and not name.startswith(outside)]
    scopes = [scope for scope in scopes if "set" not in scope]
    try:
        for scope in scopes:
            scope["set"] = _OrderedSet
        yield
    finally:
        for scope in scopes:
            del scope["set"]
