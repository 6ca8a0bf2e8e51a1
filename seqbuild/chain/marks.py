"""Functions that mark loops and checks in a flat graph; generated code has Python statements in their place.

A loop over a symbolic size consists of these nodes, in this order:

    outputs = collected()              a list to which the loop appends
    state = variable(zeros)            a variable that the loop assigns; after the loop it has the last value
    index = begin(size)                the loop begins; the index of the iteration
    ...                                its body
    assign(state, add)                 the body ends with the values for the next iteration
    append(outputs, matmul)
    end(index)                         the loop ends

Code that processes single nodes (sections, partitions) needs no special cases for loops.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NoReturn

import torch
from torch import fx

from runtime.errors import TraceError

# Numbers that the model's code may read from the weights' dtype. Other dtypes have the same numbers, and arithmetic can
# produce them. During a trace, each is therefore changed by a trillionth, which identifies it later.
LIMIT_MARK = 1 + 2.0**-40


def _refuse() -> NoReturn:
    raise TraceError("a loop over a symbolic size can only be executed as generated code")


def collected() -> list[Any]:
    """Mark an empty list."""
    _refuse()


def variable(initial: Any) -> Any:
    """Mark a variable that a loop assigns to."""
    _refuse()


def begin(size: int) -> int:
    """Mark the beginning of a loop of `size` iterations."""
    _refuse()


def assign(place: Any, value: Any) -> None:
    """Mark an assignment to a variable."""
    _refuse()


def append(values: list[Any], value: Any) -> None:
    """Mark an append to a list."""
    _refuse()


def end(index: int) -> None:
    """Mark the end of a loop."""
    _refuse()


STATEMENTS = (begin, assign, append, end)


def paths(nodes: Iterable[fx.Node]) -> Iterator[tuple[fx.Node, tuple[fx.Node, ...]]]:
    """Yield each node with the `begin` nodes of the loops around it, outermost first; a `begin` node is inside."""
    around: tuple[fx.Node, ...] = ()
    for node in nodes:
        if node.target is begin:
            around = (*around, node)
        yield node, around
        if node.target is end:
            around = around[:-1]


def require(value: Any, expected: bool) -> None:
    """Mark the check that generated code makes with `run.require`."""


def marked(dtype: torch.dtype, name: str) -> float:
    """Return the number that represents `torch.finfo(run's dtype).<name>` in a trace whose weights have this dtype."""
    return float(getattr(torch.finfo(dtype), name)) * LIMIT_MARK


def copy_dict(value: Mapping[Any, Any]) -> dict[Any, Any]:
    """Copy a dictionary shallowly; the graph uses this to capture the dictionary's content at this point."""
    return dict(value)


def is_empty_cache(value: Any) -> bool:
    """Return whether a value is an empty key-value cache."""
    if not any(cls.__module__ == "transformers.cache_utils" for cls in type(value).__mro__):
        return False
    length = getattr(value, "get_seq_length", None)
    return length is not None and length() == 0
