"""Dictionaries that steps fill and later ones read, such as key-values that layers share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def copy_dict(value: Mapping[Any, Any]) -> dict[Any, Any]:
    """A shallow copy: how a graph states which content of a dictionary it means."""
    return dict(value)
