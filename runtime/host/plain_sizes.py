"""Run operators on the meta device without importing torch's compiler and sympy.

torch computes the shapes of most operators in Python. The same functions serve symbolic sizes, so they import the
compiler and the algebra of sizes when they are first called, which takes two seconds and a hundred megabytes. Neither
does anything for sizes that are numbers. While the block runs, these imports get stand-ins that answer for numbers,
and ask the real module about everything else.
"""

from __future__ import annotations

import contextlib
import importlib
import operator
import types
from collections.abc import Callable, Iterator, Mapping
from functools import reduce
from typing import Any

from runtime.host.stand_ins import StandIn, standing_in

_COMPILER, _SYMPY, _ALGEBRA = "torch._dynamo", "sympy", "torch.fx.experimental.symbolic_shapes"
# The modules of torch that compute shapes.
_SHAPES = ("torch._refs", "torch._decomp", "torch._prims", "torch._prims_common", "torch._meta_registrations")


@contextlib.contextmanager
def plain_sizes() -> Iterator[None]:
    """Skip the compiler and sympy while the block runs operators whose sizes are numbers."""
    disabled: list[Any] = []
    stand_ins = {
        _COMPILER: StandIn(_compiler(disabled), modules=("torch._compile",)),
        _SYMPY: StandIn(_Numbers(_SYMPY), packages=_SHAPES, modules=("torch",)),
        _ALGEBRA: StandIn(_Numbers(_ALGEBRA), packages=_SHAPES, modules=("torch",)),
    }
    try:
        with standing_in(stand_ins):
            yield
    finally:
        for function in disabled:
            function.__dict__.pop("__dynamo_disable", None)


def _compiler(disabled: list[Any]) -> Any:
    """What `import torch._dynamo` binds: a module whose function `disable` returns its argument, which it records."""

    def disable(function: Any, *_: Any, **__: Any) -> Any:
        disabled.append(function)
        return function

    return types.SimpleNamespace(_dynamo=types.SimpleNamespace(disable=disable))


class _Numbers(types.ModuleType):
    """Computes the functions of a module for numbers; for any other name or value it imports the module."""

    def __getattr__(self, name: str) -> Any:
        if name in _ANSWERS and self.__name__ == _ALGEBRA:
            return self._answering(name, *_ANSWERS[name])
        if name == "Basic" and self.__name__ == _SYMPY:
            return _NoExpression
        return getattr(importlib.import_module(self.__name__), name)

    def _answering(self, name: str, is_known: Callable[[Any], bool], answer: Callable[..., Any]) -> Callable[..., Any]:
        def function(*values: Any, **options: Any) -> Any:
            if values and not options and all(map(is_known, values)):
                return answer(*values)
            return getattr(importlib.import_module(self.__name__), name)(*values, **options)

        return function


class _NoExpression:
    """A class without instances, in place of the base class of expressions."""


def _is_bool(value: Any) -> bool:
    return value is True or value is False


def _is_number(value: Any) -> bool:
    return type(value) in (bool, int)


def _is_size(value: Any) -> bool:
    return all(map(_is_number, value)) if isinstance(value, (tuple, list)) else _is_number(value)


def _same(value: Any) -> Any:
    return value


def _equal(one: Any, other: Any) -> bool:
    is_sequence = isinstance(one, (tuple, list))
    return (tuple(one) == tuple(other)) if is_sequence else bool(one == other)


_ANSWERS: Mapping[str, tuple[Callable[[Any], bool], Callable[..., Any]]] = {
    "expect_true": (_is_bool, _same),
    "guard_or_false": (_is_bool, _same),
    "guard_or_true": (_is_bool, _same),
    "guard_size_oblivious": (_is_bool, _same),
    "statically_known_true": (_is_bool, _same),
    "sym_and": (_is_bool, lambda *values: reduce(operator.and_, values)),
    "sym_or": (_is_bool, lambda *values: reduce(operator.or_, values)),
    "sym_eq": (_is_size, _equal),
    "is_nested_int": (_is_number, lambda size: False),
    "has_guarding_hint": (_is_number, lambda size: True),
    "guarding_hint_or_throw": (_is_number, _same),
}
