"""The values between subgraphs in a plan: tensors without content, by name, as a run would hold them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from runtime.conditions import size_of
from runtime.errors import ArtifactError
from runtime.shape_run import META, Footprint, storage_bytes

if TYPE_CHECKING:
    from runtime.manifest import Manifest, SubgraphEntry, TensorEntry

BATCH = "batch"


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

    def total(self, num_batches: int, full_batches: float) -> int:
        """Bytes of all batches.

        Args:
            num_batches: how many there are.
            full_batches: the same, where the last counts by its samples.
        """
        return sum(
            round(storage_bytes(value) * (full_batches if self._is_by_sample(name) else num_batches))
            for name, value in self._held.items()
        )

    def _is_by_sample(self, name: str) -> bool:
        entry = self._manifest.values.get(name)
        return entry is None or any(BATCH in str(size) for size in entry.shape)

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
