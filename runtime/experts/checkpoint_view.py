"""Experts that a checkpoint holds in one tensor, seen as a tensor for each matrix of each of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runtime.checkpoint.view import Derived, DerivedCheckpoint
from runtime.language.program import Run

if TYPE_CHECKING:
    import torch

    from runtime.checkpoint.reader import Checkpoint
    from runtime.language.program import Program
    from runtime.model.experts import Stack


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldStack:
    """A stacked parameter as a checkpoint has it.

    Attributes:
        sources: the tensor, or those of which the parameter is made, expert by expert.
        shape: of the parameter, [E, ...].
        stack: how it is made of an expert's own.
        keys: by these, what they are to be called.
        program: makes the parameter from the tensors, expert by expert; None where it is the only one.
        is_flat: whether the tensor has no axis for experts: [E * R, ...], an expert's rows one after the other.
    """

    sources: tuple[str, ...]
    shape: tuple[int, ...]
    stack: Stack
    keys: Mapping[str, str]
    program: Program | None
    is_flat: bool = False


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
    from runtime.checkpoint.dtypes import Stored

    stack = held.stack
    key = held.keys[stack.parts[expert][place]]

    def make(source: Checkpoint, index: int | None) -> torch.Tensor:
        part = stack.take(rows.read(source, expert), place)
        return part if index is None else part[index].contiguous()

    stored = Stored(key, checkpoint.stored(held.sources[0]).dtype, stack.part_shape(held.shape))
    return Derived(stored=stored, sources=held.sources, make=make)


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
            left, row = len(self.held.stack.parts[0]), self._made(source, expert)
        if left > 1:
            self._last = (expert, left - 1, row)
        return row

    def _made(self, source: Checkpoint, expert: int) -> torch.Tensor:
        held = self.held
        if held.is_flat:
            num_rows = held.shape[1]
            return source.read_rows(held.sources[0], expert * num_rows, num_rows)
        rows = [source.read_part(key, expert) for key in held.sources]
        if held.program is None:
            return rows[0]
        run = Run(device=rows[0].device, dtype=rows[0].dtype)
        sources = {f"source_{place}": row[None] for place, row in enumerate(rows)}
        made: torch.Tensor = held.program(None, **sources, run=run)["value"][0]
        return made
