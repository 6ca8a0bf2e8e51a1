"""Dictionaries that steps fill and later ones read, such as key-values that layers share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def copy_dict(value: Mapping[Any, Any]) -> dict[Any, Any]:
    """A shallow copy: how a graph states which content of a dictionary it means."""
    return dict(value)


def without_empty_cache(value: Any) -> Any:
    """None for a cache of key-values that nobody has filled: some models make one whether it is asked for or not, and
    a step computes the same without it.
    """
    if not any(cls.__module__ == "transformers.cache_utils" for cls in type(value).__mro__):
        return value
    length = getattr(value, "get_seq_length", None)
    return None if length is not None and length() == 0 else value
