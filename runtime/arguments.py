"""Checks of the arguments of the Python API; each raises an error that names the argument."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from runtime.errors import UsageError


def as_path(name: str, value: Any) -> Path:
    """Convert a str or path object to a Path; raise UsageError for anything else."""
    if isinstance(value, (str, os.PathLike)):
        text = os.fspath(value)
        if isinstance(text, str) and text and "\0" not in text:
            return Path(text)
    raise UsageError(f"{name} is {shown(value)}", hint="it must be a path: a str or a pathlib.Path")


def require_count(name: str, value: Any) -> int:
    """Require a whole number of at least 1, and return it; raise UsageError for anything else."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    raise UsageError(f"{name} is {shown(value)}", hint="it must be a whole number, 1 or more")


def require_counts(**numbers: Any) -> None:
    """Require whole numbers of at least 1, or None; raise UsageError naming the first that is anything else."""
    for name, number in numbers.items():
        if number is not None:
            require_count(name, number)


def require_kind(name: str, value: Any, kind: type, hint: str) -> None:
    """Require an object of this class, or None; raise UsageError for anything else."""
    if value is not None and not isinstance(value, kind):
        raise UsageError(f"{name} is {shown(value)}", hint=hint)


def require_methods(name: str, values: Any, method: str) -> None:
    """Require a list or tuple of objects with this method; raise UsageError for anything else."""
    if isinstance(values, (list, tuple)) and all(callable(getattr(value, method, None)) for value in values):
        return
    raise UsageError(f"{name} is {shown(values)}", hint=f"it must be a list of objects with a method {method}")


def require_callable(name: str, value: Any) -> None:
    """Require a callable; raise UsageError for anything else."""
    if not callable(value):
        raise UsageError(f"{name} is {shown(value)}", hint="it must be a function that takes one line of text")


def shown(value: Any) -> str:
    """Format a value for an error message: numbers and strings as they are, of anything else the type."""
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    if isinstance(value, (str, os.PathLike)):
        return repr(os.fspath(value)[:80])
    kind = type(value)
    name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
    return str(value) if name == "torch.dtype" else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
