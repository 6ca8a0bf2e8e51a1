"""Parametrizations that take many models through one check: a few in every run, the rest in `make test-all`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def sweep(values: Iterable[Any], *always: Any) -> list[Any]:
    """The values of a parametrization; those that are not in `always` are marked `wide`.

    A tuple is the arguments of one case.
    """
    found = list(values)
    assert all(value in found for value in always), f"{always} are not all among {found}"
    return [value if value in always else _wide(value) for value in found]


def _wide(value: Any) -> Any:
    arguments = value if isinstance(value, tuple) else (value,)
    return pytest.param(*arguments, marks=pytest.mark.wide)
