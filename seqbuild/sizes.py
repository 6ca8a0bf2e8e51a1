"""Symbolic sizes that know who turned them into numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from seqbuild.blame import Culprit, find_culprit
from seqbuild.rehearse import sample_sizes


class SizeBurntInError(RuntimeError):
    """A symbol is about to become a number."""


class WatchedSizes(ShapeEnv):
    """Remembers which line of the model's code turned a symbol into a number, or does not let it."""

    def __init__(self) -> None:
        super().__init__()
        self.culprits: dict[Any, Culprit | None] = {}
        self.is_strict = False

    @contextlib.contextmanager
    def sizes_kept_free(self) -> Iterator[None]:
        """Raise `SizeBurntInError` where an input's size would become a number, and forget what a step assumed.

        Its branches on sizes are its own affair: a step is executed again in every run, and decides anew.
        """
        before, self.is_strict = self.is_strict, True
        ranges, num_guards = dict(self.var_to_range), len(self.guards)
        try:
            yield
        finally:
            self.var_to_range.update(ranges)
            del self.guards[num_guards:]
            self._version_counter += 1  # drops what torch has remembered of answers about sizes
            self.is_strict = before

    def is_fixed(self, size: torch.SymInt) -> bool:
        """Whether the trace holds for one value of `size` only."""
        expression = self.replace(size.node.expr)
        bounds = self.bound_sympy(expression)
        return bool(expression.is_number or bounds.lower == bounds.upper)

    def _set_replacement(self, a: Any, tgt: Any, msg: str) -> None:
        if tgt.is_number and a in sample_sizes(self):
            if self.is_strict:
                raise SizeBurntInError(msg)
            self.culprits.setdefault(a, find_culprit())
        super()._set_replacement(a, tgt, msg)
