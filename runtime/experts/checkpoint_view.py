"""A view of a checkpoint in which a stacked tensor appears as a tensor for each matrix of each expert."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runtime.checkpoint.view import Derived, DerivedCheckpoint
from runtime.errors import ArtifactError, WeightsError
from runtime.language.program import run_conversion

if TYPE_CHECKING:
    import torch

    from runtime.checkpoint.reader import Checkpoint
    from runtime.language.program import Program
    from runtime.model.experts import Stack


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredStack:
    """A stacked parameter in a checkpoint.

    Attributes:
        sources: the tensor, or those that the parameter is made from expert by expert.
        shape: of the parameter, [E, ...].
        stack: its composition.
        prefix: of the names of its parts in the view.
        program: makes an expert's slice of the parameter from those of the tensors; None for a single tensor.
        is_flat: whether the tensor has no axis for experts: [E * R, ...].
    """

    sources: tuple[str, ...]
    shape: tuple[int, ...]
    stack: Stack
    prefix: str
    program: Program | None
    is_flat: bool = False


def split_checkpoint(checkpoint: Checkpoint, stacks: Iterable[StoredStack]) -> Checkpoint:
    """Return the view in which these stacks are split.

    Raises:
        WeightsError: when a tensor does not have the shape of its parameter.
    """
    tensors: dict[str, Derived] = {}
    for stored in stacks:
        _require_shape(checkpoint, stored)
        slices = _Slices(stored)
        for expert, parts in enumerate(stored.stack.parts):
            for place, part in enumerate(parts):
                key = f"{stored.prefix}.{part}"
                tensors[key] = _derived(checkpoint, key, slices, expert, place)
    return DerivedCheckpoint(checkpoint, tensors)


def _require_shape(checkpoint: Checkpoint, stored: StoredStack) -> None:
    """Compare a tensor with its parameter, which may have fewer experts: the others have no weights."""
    if stored.program is not None:
        return  # what it makes is compared when it is made
    found, key = checkpoint.shape(stored.sources[0]), stored.sources[0]
    num_experts, *own = stored.shape
    expected = (num_experts * own[0], *own[1:]) if stored.is_flat else stored.shape
    if found[1:] != expected[1:] or found[0] < expected[0] or (stored.is_flat and found != expected):
        raise WeightsError(
            f"tensor {key!r} of {checkpoint.directory} has shape {list(found)}, the artifact expects {list(expected)} "
            f"for {num_experts} experts",
            hint="use the checkpoint of the model that was compiled",
        )


def _derived(checkpoint: Checkpoint, key: str, slices: _Slices, expert: int, place: int) -> Derived:
    from runtime.checkpoint.stored import Stored

    stack, sources = slices.stored.stack, slices.stored.sources

    def make(source: Checkpoint, index: int | None) -> torch.Tensor:
        part = stack.take(slices.read(source, expert), place)
        return part if index is None else part[index].contiguous()

    shape = stack.part_shape(slices.stored.shape)
    return Derived(stored=Stored(key, checkpoint.stored(sources[0]).dtype, shape), sources=sources, make=make)


class _Slices:
    """Reads one expert's slice of a stack, and keeps it until all of its parts have been taken."""

    def __init__(self, stored: StoredStack) -> None:
        self.stored = stored
        self._last: tuple[int, int, torch.Tensor] | None = None  # expert, number of parts to be taken, slice

    def read(self, source: Checkpoint, expert: int) -> torch.Tensor:
        last, self._last = self._last, None
        if last is not None and last[0] == expert:
            _, left, own = last
        else:
            left, own = len(self.stored.stack.parts[0]), self._make(source, expert)
        if left > 1:
            self._last = (expert, left - 1, own)
        return own

    def _make(self, source: Checkpoint, expert: int) -> torch.Tensor:
        stored = self.stored
        if stored.is_flat:
            num_rows = stored.shape[1]
            return source.read_rows(stored.sources[0], expert * num_rows, num_rows)
        slices = [source.read_part(key, expert) for key in stored.sources]
        if stored.program is None:
            return slices[0]
        made = run_conversion(stored.program, [own[None] for own in slices])[0]
        if tuple(made.shape) != stored.shape[1:]:
            raise ArtifactError(
                f"the conversion of {stored.sources[0]} makes {list(made.shape)} of one expert's slice, and the layout "
                f"of the experts states {list(stored.shape[1:])}",
                hint="compile the model again",
            )
        return made
