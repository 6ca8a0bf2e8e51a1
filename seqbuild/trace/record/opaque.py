"""Opaque steps: functions of the model's code that are recorded as one call instead of being traced through."""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from seqbuild.trace.python.builtins import model_classes


@dataclass(frozen=True, kw_only=True, slots=True)
class OpaqueStep:
    """A function to be recorded as one step.

    Attributes:
        path: the path by which the host finds it: `module.path:function` or `module.path:Class.method`.
        function: the function itself; a method is called with its module as first argument.
        places: each (object, attribute name) through which the model's code can access it.
    """

    path: str
    function: Callable[..., Any]
    places: tuple[tuple[Any, str], ...]

    @contextlib.contextmanager
    def replaced(self, record: Callable[[OpaqueStep, tuple[Any, ...], dict[str, Any]], Any]) -> Iterator[None]:
        """Redirect every call of the function to `record` while the block runs."""

        @functools.wraps(self.function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return record(self, args, kwargs)

        originals = [(owner, name, owner.__dict__[name]) for owner, name in self.places]
        try:
            for owner, name, _ in originals:
                is_static = isinstance(owner.__dict__[name], staticmethod)
                setattr(owner, name, staticmethod(call) if is_static else call)
            yield
        finally:
            for owner, name, original in originals:
                setattr(owner, name, original)


def find_opaque_steps(model: nn.Module, names: Sequence[str]) -> tuple[tuple[OpaqueStep, ...], tuple[str, ...]]:
    """Find functions by name: `function`, `Class.method`, `module.path.function`, or their path.

    A bare function is searched in the Python modules that define the classes of the model's modules, and a method in
    these classes; a dotted path is imported.

    Returns:
        The steps in the order of `names`, and the names without a match.
    """
    classes = model_classes(model)
    steps: dict[str, OpaqueStep] = {}
    unmatched: list[str] = []
    for name in dict.fromkeys(names):
        dotted = name.replace(":", ".")
        found = _methods(dotted, classes) or _functions(dotted, classes)
        if not found:
            unmatched.append(name)
        for step in found:
            steps.setdefault(step.path, step)
    return tuple(steps.values()), tuple(unmatched)


def _methods(name: str, classes: Sequence[type]) -> list[OpaqueStep]:
    owner, _, method = name.rpartition(".")
    steps = []
    for cls in classes:
        is_meant = cls.__name__ == owner or f"{cls.__module__}.{cls.__qualname__}" == owner
        found = cls.__dict__.get(method)
        function: Any = found.__func__ if isinstance(found, staticmethod) else found
        if is_meant and callable(function):
            path = f"{cls.__module__}:{cls.__qualname__}.{method}"
            steps.append(OpaqueStep(path=path, function=function, places=((cls, method),)))
    return steps


def _functions(name: str, classes: Sequence[type]) -> list[OpaqueStep]:
    module_name, _, attribute = name.rpartition(".")
    if module_name:
        with contextlib.suppress(ImportError):
            importlib.import_module(module_name)
        modules = [sys.modules[module_name]] if module_name in sys.modules else []
    else:
        modules = [sys.modules[cls_module] for cls_module in dict.fromkeys(cls.__module__ for cls in classes)]
    steps: list[OpaqueStep] = []
    for module in modules:
        function = getattr(module, attribute, None)
        if not callable(function) or isinstance(function, type):
            continue
        home = getattr(function, "__module__", module.__name__)
        if home.split(".")[0] == "torch":
            continue
        path = f"{home}:{function.__qualname__}"
        if all(step.path != path for step in steps):
            steps.append(OpaqueStep(path=path, function=function, places=_places(function)))
    return steps


def _places(function: Callable[..., Any]) -> tuple[tuple[Any, str], ...]:
    """Return every loaded module's name for the function, because `from x import f` creates one in each importer."""
    places = []
    for _, module in sorted((key, value) for key, value in sys.modules.items() if value is not None):
        names = getattr(module, "__dict__", {})
        for name in [key for key, value in list(names.items()) if value is function]:
            places.append((module, name))
    return tuple(places)
