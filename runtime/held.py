"""Experts that a checkpoint holds in one tensor, seen as a tensor for each matrix of each of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runtime.derived import Derived, DerivedCheckpoint
from runtime.program import Run

if TYPE_CHECKING:
    import torch

    from runtime.checkpoint import Checkpoint
    from runtime.experts import Stack
    from runtime.program import Program


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldStack:
    """A stacked parameter as a checkpoint has it.

    Attributes:
        key: the tensor.
        shape: of the parameter, [E, ...].
        stack: how it is made of an expert's own.
        keys: by these, what they are to be called.
        program: makes the parameter from the tensor, expert by expert; None where it is that.
    """

    key: str
    shape: tuple[int, ...]
    stack: Stack
    keys: Mapping[str, str]
    program: Program | None


def experts_apart(checkpoint: Checkpoint, stacks: Iterable[HeldStack]) -> Checkpoint:
    """The checkpoint in which these tensors are apart."""
    tensors: dict[str, Derived] = {}
    for held in stacks:
        rows = _Rows(held)
        for expert, parts in enumerate(held.stack.parts):
            for place, part in enumerate(parts):
                tensors[held.keys[part]] = _derived(checkpoint, held, rows, expert, place)
    return DerivedCheckpoint(checkpoint, tensors)


def _derived(checkpoint: Checkpoint, held: HeldStack, rows: _Rows, expert: int, place: int) -> Derived:
    from runtime.layout import Stored

    stack = held.stack
    key = held.keys[stack.parts[expert][place]]

    def make(source: Checkpoint, index: int | None) -> torch.Tensor:
        part = stack.take(rows.read(source, expert), place)
        return part if index is None else part[index].contiguous()

    stored = Stored(key, checkpoint.stored(held.key).dtype, stack.part_shape(held.shape))
    return Derived(stored=stored, sources=(held.key,), make=make)


class _Rows:
    """Reads one expert's part of a stack; the last one is kept, for its matrices are asked for one after the other."""

    def __init__(self, held: HeldStack) -> None:
        self.held = held
        self._last: tuple[int, int, torch.Tensor] | None = None  # the expert, how often it is still wanted, its part

    def read(self, source: Checkpoint, expert: int) -> torch.Tensor:
        last, self._last = self._last, None
        if last is not None and last[0] == expert:
            _, left, row = last
        else:
            left, row = len(self.held.stack.parts[0]), source.read_part(self.held.key, expert)
            if self.held.program is not None:
                run = Run(device=row.device, dtype=row.dtype)
                row = self.held.program(None, source_0=row[None], run=run)["value"][0]
        if left > 1:
            self._last = (expert, left - 1, row)
        return row
