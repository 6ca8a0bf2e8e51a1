"""Give the model's code functions of Python that can work on symbolic sizes: `min` and `max`.

Python's own compare their arguments and hand one of them back, which makes a decision of what is a calculation. While
recorded code runs, the modules that it lies in have others under the same names.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

_MODELS = "transformers.models."


@contextlib.contextmanager
def replaced(root: nn.Module, functions: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """While the block runs, these functions stand in for builtins of the same names in the code of `root`: the Python
    modules of its modules' classes, and those of functions that these have from other models.
    """
    changed: list[tuple[dict[str, Any], str]] = []
    try:
        for namespace in _namespaces(root):
            for name, function in functions.items():
                if name not in namespace:
                    namespace[name] = function
                    changed.append((namespace, name))
        yield
    finally:
        for namespace, name in changed:
            del namespace[name]


def _namespaces(root: nn.Module) -> Iterator[dict[str, Any]]:
    classes = dict.fromkeys(cls for module in root.modules() for cls in type(module).__mro__)
    names = dict.fromkeys(cls.__module__ for cls in classes if cls.__module__.partition(".")[0] not in _NOT_MODELS)
    for name in list(names):
        found = list(vars(sys.modules[name]).values()) if name in sys.modules else []
        homes = (getattr(value, "__module__", None) or "" for value in found if callable(value))
        names.update(dict.fromkeys(home for home in homes if isinstance(home, str) and home.startswith(_MODELS)))
    return (vars(sys.modules[name]) for name in names if name in sys.modules)


_NOT_MODELS = ("torch", "builtins", "typing", "collections", "abc")


def smallest(*values: Any, **options: Any) -> Any:
    """`min`, a calculation where it is given symbolic sizes in recorded code."""
    return _calculated(builtins.min, torch.sym_min, values, options)


def largest(*values: Any, **options: Any) -> Any:
    """`max`, a calculation where it is given symbolic sizes in recorded code."""
    return _calculated(builtins.max, torch.sym_max, values, options)


def _calculated(plain: Any, symbolic: Any, values: tuple[Any, ...], options: dict[str, Any]) -> Any:
    is_of_sizes = len(values) > 1 and all(type(value) in (int, torch.SymInt) for value in values)
    is_symbolic = is_of_sizes and any(isinstance(value, torch.SymInt) for value in values)
    if options or not is_symbolic or get_proxy_mode() is None:
        return plain(*values, **options)
    return functools.reduce(symbolic, values)
