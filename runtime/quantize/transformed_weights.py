"""A view of a checkpoint in which the weights of transformed modules include their half of the rotation.

Every reader of the view sees one consistent model: whatever measures, rounds, copies or evaluates weights reads W' of
`runtime.quantize.online_transforms`. The matrices that readers of the new checkpoint need are tensors of the view, too,
and are copied like every tensor that the model does not use.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from runtime.checkpoint.dtypes import DTYPES, dtype_name
from runtime.checkpoint.stored import Stored
from runtime.checkpoint.view import Derived, DerivedCheckpoint
from runtime.errors import WeightsError
from runtime.formats.transforms import INPUT, OUTPUT
from runtime.weights.origins import checkpoint_prefix, required_key

if TYPE_CHECKING:
    from runtime.algorithms.hadamard import Hadamard
    from runtime.checkpoint.reader import Checkpoint
    from runtime.formats.transforms import ModelTransforms
    from runtime.weights.origins import ParameterSource


def transformed_view(
    found: ModelTransforms, source: ParameterSource, checkpoint: Checkpoint, *, is_exact: bool = False
) -> Checkpoint:
    """Return the view of a checkpoint.

    Args:
        found: the transforms.
        source: the origins of the parameters.
        checkpoint: without them.
        is_exact: whether weights are read in float64 instead of rounded to their dtype.
    """
    before, after = (
        {name: replace(matrix, dtype=torch.float64) for name, matrix in found.at(location).items()}
        for location in (INPUT, OUTPUT)
    )
    tensors: dict[str, Derived] = {}
    for name in dict.fromkeys((*before, *after)):
        fused = _Fused(before.get(name), after.get(name), is_exact)
        key = required_key(source, f"{name}.weight")
        tensors[key] = Derived(stored=source.stored(key), sources=(key,), make=fused.reader_of(key))
        if name in after and f"{name}.bias" in source.origins:
            key = required_key(source, f"{name}.bias")
            tensors[key] = Derived(stored=source.stored(key), sources=(key,), make=fused.reader_of(key))
    for stored, matrix in stored_matrices(found, source):
        if stored.name in checkpoint:
            raise WeightsError(
                f"{checkpoint.directory} has a tensor {stored.name!r}, and the transforms of the recipe make one of "
                "that name",
                hint="remove it from the checkpoint",
            )
        tensors[stored.name] = Derived(
            stored=stored, sources=(), make=_Rows(matrix, DTYPES[stored.dtype]).make, is_stack=True
        )
    return DerivedCheckpoint(checkpoint, tensors)


def stored_matrices(found: ModelTransforms, source: ParameterSource) -> Iterator[tuple[Stored, Hadamard]]:
    """Yield the matrices that the new checkpoint stores, each once: with the first module that has it.

    Their entries are +1 and -1, which every dtype represents; they have that of the module's weights.
    """
    done: dict[tuple[str, int], None] = {}
    for one in found.transforms:
        if one.matrix in done:
            continue
        done[one.matrix] = None
        prefix = checkpoint_prefix(source, one.module)
        inside = (name for name in source.origins if name.startswith(f"{one.module}."))
        keys = (key for name in inside for key in source.origins[name].keys[:1])
        dtypes = (DTYPES[source.stored(key).dtype] for key in keys)
        dtype = next((dtype for dtype in dtypes if dtype.is_floating_point and dtype.itemsize > 1), torch.float32)
        yield Stored(f"{prefix}.{one.tensor}", dtype_name(dtype), (one.size, one.size)), found.matrices[one.matrix]


@dataclass(frozen=True, slots=True)
class _Fused:
    """The half of a rotation that a weight or a bias includes."""

    before: Hadamard | None
    after: Hadamard | None
    is_exact: bool

    def reader_of(self, key: str) -> _FusedReader:
        """Return the function that reads a tensor and includes the rotation."""
        return _FusedReader(self, key)

    def apply(self, value: torch.Tensor) -> torch.Tensor:
        """Return W' [O, I], or b' [O], rounded once to the dtype of the value."""
        made = value.double() if self.is_exact or (self.before is not None and self.after is not None) else value
        if self.before is not None and value.dim() == 2:
            made = self.before.apply(made)
        if self.after is not None:
            made = self.after.apply(made.T).T.contiguous() if value.dim() == 2 else self.after.apply(made)
        return made if self.is_exact else made.to(value.dtype)


@dataclass(frozen=True, slots=True)
class _FusedReader:
    fused: _Fused
    key: str

    def __call__(self, source: Checkpoint, index: int | None) -> torch.Tensor:
        made = self.fused.apply(source.read(self.key))
        return made if index is None else made[index].clone()


@dataclass(frozen=True, slots=True)
class _Rows:
    """A matrix, made row by row."""

    matrix: Hadamard
    dtype: torch.dtype

    def make(self, source: Checkpoint, index: int | None) -> torch.Tensor:
        """Return the matrix, or one row of it."""
        if index is not None:
            return self.matrix.rows(index, 1)[0].to(self.dtype)
        return self.matrix.rows(0, self.matrix.size).to(self.dtype)
