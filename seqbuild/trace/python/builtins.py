"""Replace builtins in the model's code by versions for symbolic sizes: `min`, `max`, `int`, `len`, `set`.

Python's `min` and `max` compare their arguments, which turns a calculation into a decision, and `int` turns a size into
a number. While recorded code runs, the modules that contain it have replacements under the same names.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

_MODELS = "transformers.models."
# `int` used as a value, such as a dtype, rather than called, passed to `isinstance` or used as an annotation.
_INT_AS_VALUE = re.compile(
    r"(?<![:=!<>])=\s*int\b(?!\s*\()|\b(is|is not|==|!=|in)\s+\(?int\b(?!\s*\()|\.(to|type|view)\(int\b"
)


@contextlib.contextmanager
def replaced(root: nn.Module, functions: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Replace builtins by these functions of the same names in the code of `root` while the block runs.

    This affects the Python modules that define the classes of its modules, and those that define functions which
    they import from other models.
    """
    with contextlib.ExitStack() as stack:
        for namespace in _namespaces(root):
            for name, function in functions.items():
                if not (name == "int" and _has_int_as_value(namespace)):
                    _define(stack, namespace, name, function)
        yield


def _define(stack: contextlib.ExitStack, namespace: dict[str, Any], name: str, value: Any) -> None:
    """Define a name in a namespace that has none, until the stack is closed."""
    if name not in namespace:
        namespace[name] = value
        stack.callback(namespace.__delitem__, name)


def _namespaces(root: nn.Module) -> Iterator[dict[str, Any]]:
    classes = dict.fromkeys(cls for module in root.modules() for cls in type(module).__mro__)
    names = dict.fromkeys(cls.__module__ for cls in classes if cls.__module__.partition(".")[0] not in _NOT_MODELS)
    for name in list(names):
        found = list(vars(sys.modules[name]).values()) if name in sys.modules else []
        homes = (getattr(value, "__module__", None) or "" for value in found if callable(value))
        names.update(dict.fromkeys(home for home in homes if isinstance(home, str) and home.startswith(_MODELS)))
    return (vars(sys.modules[name]) for name in names if name in sys.modules)


@functools.cache
def _source_has_int_as_value(module: str) -> bool:
    try:
        return _INT_AS_VALUE.search(inspect.getsource(sys.modules[module])) is not None
    except (OSError, TypeError):
        return True


def _has_int_as_value(namespace: Mapping[str, Any]) -> bool:
    name = str(namespace.get("__name__"))
    return name not in sys.modules or _source_has_int_as_value(name)


_NOT_MODELS = ("torch", "builtins", "typing", "collections", "abc")


def symbolic_min(*values: Any, **options: Any) -> Any:
    """Return `min(...)`, recorded as an operation for symbolic sizes."""
    return _recorded(builtins.min, torch.sym_min, values, options)


def symbolic_max(*values: Any, **options: Any) -> Any:
    """Return `max(...)`, recorded as an operation for symbolic sizes."""
    return _recorded(builtins.max, torch.sym_max, values, options)


def _recorded(plain: Any, symbolic: Any, values: tuple[Any, ...], options: dict[str, Any]) -> Any:
    is_of_sizes = len(values) > 1 and all(type(value) in (int, torch.SymInt) for value in values)
    is_symbolic = is_of_sizes and any(isinstance(value, torch.SymInt) for value in values)
    if options or not is_symbolic or get_proxy_mode() is None:
        return plain(*values, **options)
    return functools.reduce(symbolic, values)


class _IntMeta(type):
    """Metaclass with the behavior of `int`, except that calling it on a symbolic size is recorded."""

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, builtins.int)

    def __subclasscheck__(cls, other: type) -> bool:
        return issubclass(other, builtins.int)

    def __call__(cls, *values: Any, **options: Any) -> Any:
        is_symbolic = len(values) == 1 and not options and isinstance(values[0], (torch.SymInt, torch.SymFloat))
        if is_symbolic and get_proxy_mode() is not None:
            return torch.sym_int(values[0])  # type: ignore[no-untyped-call]
        return builtins.int(*values, **options)


class SymbolicInt(builtins.int, metaclass=_IntMeta):
    """Replacement for `int` that records the conversion of a symbolic size as an operation."""


@contextlib.contextmanager
def lengths_recorded(model: nn.Module) -> Iterator[None]:
    """Make `len(tensor)` symbolic in the Python modules that define the model's classes while the block runs."""
    with contextlib.ExitStack() as stack:
        for name in dict.fromkeys(cls.__module__ for cls in model_classes(model)):
            if name in sys.modules:
                _define(stack, vars(sys.modules[name]), "len", _length)
        yield


def _length(value: Any, /) -> Any:
    if isinstance(value, torch.Tensor) and value.dim() > 0:
        return value.shape[0]
    return len(value)


class _SetMeta(type):
    """Metaclass that keeps the result of `isinstance(value, set)`."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, set)


class _OrderedSet(set[Any], metaclass=_SetMeta):
    """A set that is iterated in ascending order if all elements are strings."""

    def __iter__(self) -> Iterator[Any]:
        items = list(super().__iter__())
        return iter(sorted(items) if all(type(item) is str for item in items) else items)


@contextlib.contextmanager
def sets_in_order(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Make sets ordered in the code and attributes of these modules; the caller restores the attributes."""
    homes: dict[str, None] = {}
    for module in modules:
        for name, value in module.__dict__.items():
            if type(value) is set:
                module.__dict__[name] = _OrderedSet(value)
        homes.update(dict.fromkeys(cls.__module__ for cls in type(module).__mro__))
    outside = ("builtins", "torch", "transformers.modeling_utils")
    with contextlib.ExitStack() as stack:
        for name in homes:
            if name in sys.modules and not name.startswith(outside):
                _define(stack, vars(sys.modules[name]), "set", _OrderedSet)
        yield


def model_classes(model: nn.Module) -> list[type]:
    """Return the classes of the model's modules and their bases outside torch, in the order of the module tree."""
    classes: dict[type, None] = {}
    for module in model.modules():
        for cls in type(module).__mro__:
            if cls.__module__.split(".")[0] not in ("torch", "builtins"):
                classes.setdefault(cls)
    return list(classes)
