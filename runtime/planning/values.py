"""The values between subgraphs in a plan: tensors without content, by name."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from runtime.artifact.size_expressions import size_of
from runtime.errors import ArtifactError
from runtime.planning.shapes import META, Footprint, storage_bytes

if TYPE_CHECKING:
    from runtime.artifact.manifest import Manifest, SubgraphEntry, TensorEntry
    from runtime.planning.forecast import Workload


class ShapeValues:
    """The values between subgraphs for one full batch.

    Args:
        manifest: names the inputs and describes the values.
        sizes: of its dims.
        dtype: of the run.
        lasting: values that are compared across batches, and stored once if they are equal.
    """

    def __init__(
        self, manifest: Manifest, sizes: Mapping[str, int], dtype: torch.dtype, lasting: Collection[str]
    ) -> None:
        self._manifest = manifest
        self._sizes = sizes
        self._dtype = dtype
        self._lasting = lasting
        self._originals: dict[str, Any] = {}  # those of the original model that are not shared
        self._held: dict[str, Any] = {entry.name: self._empty(entry.dtype, entry.shape) for entry in manifest.inputs}

    def take(self, entry: SubgraphEntry) -> dict[str, Any]:
        """Return the inputs of a subgraph."""
        return {name: self._held[name] for name in entry.input_names}

    def advance(self, entry: SubgraphEntry, footprint: Footprint | None, *, is_split: bool = False) -> None:
        """Store the outputs of a subgraph, and drop the values that it consumes.

        Args:
            entry: the subgraph.
            footprint: of its code; None if that does not run on shapes.
            is_split: whether the original model has outputs of its own.
        """
        outputs = self.described(entry.output_names) if footprint is None else dict(footprint.outputs)
        for name in entry.consumed_names:
            self._held.pop(name, None)
            self._originals.pop(name, None)
        self._held.update(outputs)
        self._originals = {**self._originals, **outputs} if is_split else {}

    def described(self, names: Iterable[str]) -> dict[str, Any]:
        """Return values as the manifest describes them; None for a value that is not a tensor."""
        entries: Mapping[str, TensorEntry] = self._manifest.values
        found = {}
        for name in names:
            entry = entries.get(name)
            found[name] = self._empty(entry.dtype, entry.shape) if entry is not None and entry.dtype else None
        return found

    def total(self, work: Workload) -> int:
        """Bytes of all batches; equal values that last are stored once, see `streaming.activations`."""
        held = sum(round(storage_bytes(value) * self._times(name, value, work)) for name, value in self._held.items())
        return held + self.originals(self._originals, work)

    def originals(self, names: Iterable[str], work: Workload) -> int:
        """Bytes of the original model's values of these names, without those that it shares."""
        found = {name: self._originals[name] for name in names if name in self._originals}
        times = {name: self._times(name, value, work) for name, value in found.items()}
        return sum(round(storage_bytes(value) * times[name]) for name, value in found.items() if times[name] != 1.0)

    def _times(self, name: str, value: Any, work: Workload) -> float:
        """How often a batch's value is stored; the last batch counts by its samples."""
        if name in self._lasting and isinstance(value, torch.Tensor) and self._is_same(value, work):
            return 1.0
        return work.own_samples / work.batch_size

    def _is_same(self, value: torch.Tensor, work: Workload) -> bool:
        """Rotary tables do not depend on samples, and masks are equal if no sample is padded."""
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
        except ArtifactError:  # a number that depends on values: mostly not more than there are tokens
            return max(self._sizes.values(), default=1)
