"""Record the ranges of keys and values, from which the scales of any scheme of the cache follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from runtime.artifact.cached_values import QUERY
from runtime.formats.key_values import KeyValues

if TYPE_CHECKING:
    from runtime.artifact.manifest import Manifest


@dataclass(kw_only=True)
class CacheSpans(KeyValues):
    """Keeps minimum and maximum of each call and head, in the order of lanes: averages depend on the scheme.

    Attributes:
        kept: by module and part, [2, H] of each call.
    """

    kept: dict[tuple[str, str], list[torch.Tensor]] = field(default_factory=dict)

    @classmethod
    def of_manifest(cls, manifest: Manifest) -> CacheSpans | None:
        """Create the recorder of an artifact's model; None if the artifact lists no cached values."""
        if not manifest.cached:
            return None
        from compressed_tensors.quantization import QuantizationArgs

        has_queries = any(entry.part == QUERY for entry in manifest.cached)
        found = cls.of(manifest, QuantizationArgs(num_bits=8, type="float", strategy="tensor"), has_queries=has_queries)
        assert isinstance(found, cls)
        return found

    def forget(self, modules: Sequence[str]) -> None:
        """Drop the measurements of some modules."""
        super().forget(modules)
        self.kept = {key: spans for key, spans in self.kept.items() if key[0] not in modules}

    def _measure(self, module: str, part: str, states: torch.Tensor) -> None:
        if states.dim() == 4 and self._heads(module, part):
            low, high = states.amin((0, 2, 3)).float(), states.amax((0, 2, 3)).float()
        else:
            low, high = (bound.float().reshape(1) for bound in states.aminmax())
        self.measured.setdefault((module, part), []).append((low, high))

    def _heads(self, module: str, part: str) -> int:
        entries = (entry for inside in self.entries.values() for entry in inside)
        return next((entry.heads for entry in entries if (entry.module, entry.part) == (module, part)), 0)

    def add_span(self, key: tuple[str, str], low: torch.Tensor, high: torch.Tensor) -> None:
        """Keep minimum and maximum of a call."""
        self.kept.setdefault(key, []).append(torch.stack((low, high)))
