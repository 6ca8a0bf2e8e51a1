"""A view of a checkpoint in which some tensors are derived from others whenever they are read.

Nothing is written to disk: tensors are dequantized, and stacked experts are split, one at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runtime.checkpoint.reader import Checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from runtime.checkpoint.stored import Stored
    from runtime.checkpoint.stored_table import StoredTable


@dataclass(frozen=True, kw_only=True, slots=True)
class Derived:
    """A tensor that is derived from others.

    Attributes:
        stored: its name, dtype and shape.
        sources: the tensors that it is derived from.
        make: reads and computes it; the second argument is an index of the first axis, None for the whole tensor.
        is_stack: whether one index of the first axis is computed without the others.
    """

    stored: Stored
    sources: tuple[str, ...]
    make: Callable[[Checkpoint, int | None], torch.Tensor]
    is_stack: bool = False


class DerivedCheckpoint(Checkpoint):
    """A checkpoint in which derived tensors replace their sources.

    Args:
        inner: the checkpoint on disk, or another view.
        tensors: the derived tensors; their sources are hidden.
        hidden: further hidden tensors.
        config: the config.json of the view, if it differs.

    Attributes:
        hidden: the further hidden tensors, also those of an inner view.
    """

    def __init__(
        self,
        inner: Checkpoint,
        tensors: Mapping[str, Derived],
        *,
        hidden: tuple[str, ...] = (),
        config: dict[str, Any] | None = None,
    ) -> None:
        self.inner = inner
        self.directory = inner.directory
        self.config = inner.config if config is None else config
        self.hidden = (*hidden, *inner.hidden)
        self._derived = dict(tensors)
        gone = dict.fromkeys([*hidden, *(source for tensor in tensors.values() for source in tensor.sources)])
        self._uses = Counter(source for tensor in tensors.values() for source in dict.fromkeys(tensor.sources))
        self._keys = dict.fromkeys(sorted([*(key for key in inner if key not in gone), *tensors]))

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def is_derived(self, key: str) -> bool:
        """Whether a tensor is derived from others."""
        return key in self._derived

    @property
    def bytes_read(self) -> int:
        """Number of bytes read from disk so far."""
        return self.inner.bytes_read

    @property
    def quantization(self) -> str:
        """How the weights on disk are quantized."""
        return self.inner.quantization

    @property
    def shards(self) -> list[Path]:
        """List the files on disk."""
        return self.inner.shards

    def stored(self, key: str) -> Stored:
        """Return name, dtype and shape of a tensor in this view."""
        derived = self._derived.get(key)
        return derived.stored if derived is not None else self.inner.stored(key)

    def source_bytes(self, key: str) -> int:
        """The bytes on disk that a tensor is derived from; tensors that share a source have equal parts of it."""
        if key not in self._derived:
            return self.inner.source_bytes(key)
        sources = dict.fromkeys(self._derived[key].sources)
        return round(sum(self.inner.source_bytes(source) / self._uses[source] for source in sources))

    def computed(self, key: str) -> int:
        """The numbers of a tensor that are computed; tensors that share a source have equal parts of it."""
        sources = self._derived[key].sources if key in self._derived else (key,)
        found = (self.inner.computed(source) / self._uses.get(source, 1) for source in dict.fromkeys(sources))
        return round(sum(found))

    def read(self, key: str) -> torch.Tensor:
        """Read or derive a tensor on the CPU."""
        derived = self._derived.get(key)
        return derived.make(self.inner, None) if derived is not None else self.inner.read(key)

    def read_part(self, key: str, index: int) -> torch.Tensor:
        """Read or derive one index of a tensor's first axis."""
        derived = self._derived.get(key)
        return derived.make(self.inner, index) if derived is not None else self.inner.read_part(key, index)

    def read_rows(self, key: str, first: int, count: int) -> torch.Tensor:
        """Read or derive consecutive indices of a tensor's first axis."""
        if key not in self._derived:
            return self.inner.read_rows(key, first, count)
        return self.read(key)[first : first + count].clone()

    def table(self, key: str) -> StoredTable | None:
        """Return a tensor that stays on disk; None for a derived tensor."""
        return self.inner.table(key) if key not in self._derived else None

    def looked_at(self, key: str) -> Iterator[torch.Tensor]:
        """Yield the numbers of a tensor; nothing for a derived tensor."""
        return self.inner.looked_at(key) if key not in self._derived else iter(())

    def announce(self, keys: Iterable[str]) -> None:
        """Ask for the sources of tensors to be read into the page cache."""
        self.inner.announce(self._sources_of(keys))

    def _sources_of(self, keys: Iterable[str]) -> Iterator[str]:
        """Yield the sources of tensors lazily, each once: hundreds of experts share one stack."""
        seen: dict[str, None] = {}
        for key in keys:
            for source in self._derived[key].sources if key in self._derived else (key,):
                if source not in seen:
                    seen[source] = None
                    yield source

    def pieces(self, key: str) -> Iterator[memoryview]:
        """Yield the bytes of a tensor in pieces: a derived stack one index at a time."""
        if key not in self._derived:
            yield from self.inner.pieces(key)
            return
        from runtime.checkpoint.dtypes import bytes_of

        derived = self._derived[key]
        for index in range(derived.stored.shape[0]) if derived.is_stack else (None,):
            yield bytes_of(derived.make(self.inner, index).contiguous())

    def sample(self, key: str, count: int) -> bytes:
        """Return a few bytes of a tensor's sources."""
        derived = self._derived.get(key)
        sources = derived.sources if derived is not None else (key,)
        return b"".join(self.inner.sample(source, count) for source in sources)
