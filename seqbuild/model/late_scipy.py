"""Import transformers without scipy, which it only calls to compute losses of object detection."""

from __future__ import annotations

import contextlib
import importlib
import types
from collections.abc import Callable
from typing import Any

from runtime.host.own_process import is_ours
from runtime.host.stand_ins import StandIn, standing_in

_NAME, _LOSSES = "scipy.optimize", "transformers.loss"


def late_scipy() -> contextlib.AbstractContextManager[None]:
    """While the block imports transformers, give its losses functions that import scipy when they are called."""
    return standing_in({_NAME: StandIn(_Later(_NAME), packages=(_LOSSES,))} if is_ours() else {})


class _Later(types.ModuleType):
    """A module of functions that call those of the module of the same name."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args: Any, **kwargs: Any) -> Any:
            return getattr(importlib.import_module(self.__name__), name)(*args, **kwargs)

        return call
