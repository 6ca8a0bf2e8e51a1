"""The values between subgraphs in a plan: tensors without content, by name, as a run would hold them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from runtime.artifact.size_expressions import size_of
from runtime.errors import ArtifactError
from runtime.planning.shapes import META, Footprint, storage_bytes

if TYPE_CHECKING:
    from runtime.artifact.manifest import Manifest, SubgraphEntry, TensorEntry
    from runtime.planning.workload import Workload


class ShapeValues:
    """What lies between subgraphs, for one full batch.

    Args:
        manifest: names the inputs and describes the values.
        sizes: of its dims.
        dtype: of the run.
    """

    def __init__(self, manifest: Manifest, sizes: Mapping[str, int], dtype: torch.dtype) -> None:
        self._manifest = manifest
        self._sizes = sizes
        self._dtype = dtype
        self._lasting = _lasting(manifest.subgraphs)
        self._held: dict[str, Any] = {entry.name: self._empty(entry.dtype, entry.shape) for entry in manifest.inputs}

    def take(self, entry: SubgraphEntry) -> dict[str, Any]:
        """The inputs of a subgraph."""
        missing = [name for name in entry.input_names if name not in self._held]
        self._held.update(self.described(missing))
        return {name: self._held[name] for name in entry.input_names}

    def advance(self, entry: SubgraphEntry, footprint: Footprint | None) -> None:
        """Store what a subgraph returns, and drop what it was the last to take."""
        outputs = self.described(entry.output_names) if footprint is None else dict(footprint.outputs)
        for name in entry.consumed_names:
            self._held.pop(name, None)
        self._held.update(outputs)

    def described(self, names: Iterable[str]) -> dict[str, Any]:
        """Values as the manifest describes them; what is no tensor is None."""
        entries: Mapping[str, TensorEntry] = self._manifest.values
        found = {}
        for name in names:
            entry = entries.get(name)
            found[name] = self._empty(entry.dtype, entry.shape) if entry is not None and entry.dtype else None
        return found

    def total(self, work: Workload) -> int:
        """Bytes of all batches; what is the same for all of them is held once, see `activations`."""
        return sum(round(storage_bytes(value) * self._times(name, value, work)) for name, value in self._held.items())

    def _times(self, name: str, value: Any, work: Workload) -> float:
        """How often a batch's value is held; the last batch counts by its samples."""
        if name in self._lasting and isinstance(value, torch.Tensor) and self._is_same(value, work):
            return 1.0
        return work.num_samples / work.batch_size

    def _is_same(self, value: torch.Tensor, work: Workload) -> bool:
        """Rotary tables know nothing of samples, and masks are alike where no sample is padded."""
        is_mask = value.dim() == 4 and value.shape[1] == 1 and value.shape[-1] > 1
        return (is_mask and not work.is_padded) or (value.dim() > 1 and value.shape[0] == 1 < work.batch_size)

    def _empty(self, dtype: str, shape: Iterable[int | str]) -> torch.Tensor:
        own: torch.dtype = self._dtype if dtype == "model" else getattr(torch, dtype)
        return torch.empty([self._size(size) for size in shape], dtype=own, device=META)

    def _size(self, size: int | str) -> int:
        if isinstance(size, int):
            return size
        try:
            return max(size_of(size, self._sizes), 0)
        except ArtifactError:  # a number that comes from values: no more than there are tokens, mostly
            return max(self._sizes.values(), default=1)


def _lasting(entries: Sequence[SubgraphEntry]) -> frozenset[str]:
    """The values that outlive the subgraph after the one that made them: only those are compared across batches."""
    made: dict[str, int] = {}
    lasting: dict[str, None] = {}
    for index, entry in enumerate(entries):
        lasting.update({name: None for name in entry.input_names if name in made and made[name] < index - 1})
        made.update(dict.fromkeys(entry.output_names, index))
    return frozenset(lasting)
