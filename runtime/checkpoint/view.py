"""A checkpoint seen through another one: some of its tensors are made from others whenever they are read.

Nothing of it is ever written down: what was packed is plain, and what was stacked is apart, one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runtime.checkpoint.reader import Checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from runtime.checkpoint.dtypes import Stored
    from runtime.checkpoint.stored_table import StoredTable


@dataclass(frozen=True, kw_only=True, slots=True)
class Derived:
    """A tensor that is made from others.

    Attributes:
        stored: its name, dtype and shape.
        sources: the tensors that it is made from.
        make: reads and makes it; the second argument says which part along the first axis is wanted, None for all.
    """

    stored: Stored
    sources: tuple[str, ...]
    make: Callable[[Checkpoint, int | None], torch.Tensor]


class DerivedCheckpoint(Checkpoint):
    """A checkpoint in whose place some tensors stand for others.

    Args:
        inner: the one that is on disk, or another view.
        tensors: those that are made; what they are made from is not to be seen any more.
        hidden: more that is not to be seen.
        config: its config.json, if that changes.
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
        self._derived = dict(tensors)
        gone = dict.fromkeys([*hidden, *(source for tensor in tensors.values() for source in tensor.sources)])
        self._keys = dict.fromkeys(sorted([*(key for key in inner if key not in gone), *tensors]))

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    @property
    def bytes_read(self) -> int:
        """What was read from the disk so far."""
        return self.inner.bytes_read

    @property
    def shards(self) -> list[Path]:
        """The files on disk."""
        return self.inner.shards

    def stored(self, key: str) -> Stored:
        """Name, dtype and shape of a tensor, as it is seen here."""
        derived = self._derived.get(key)
        return derived.stored if derived is not None else self.inner.stored(key)

    def read(self, key: str) -> torch.Tensor:
        """A tensor, on the CPU."""
        derived = self._derived.get(key)
        return derived.make(self.inner, None) if derived is not None else self.inner.read(key)

    def read_part(self, key: str, index: int) -> torch.Tensor:
        """One part of a tensor along its first axis."""
        derived = self._derived.get(key)
        return derived.make(self.inner, index) if derived is not None else self.inner.read_part(key, index)

    def read_rows(self, key: str, first: int, count: int) -> torch.Tensor:
        """Some parts of a tensor along its first axis, one after the other."""
        if key not in self._derived:
            return self.inner.read_rows(key, first, count)
        return self.read(key)[first : first + count].clone()

    def table(self, key: str) -> StoredTable | None:
        """A tensor that stays on disk; None for one that is made."""
        return self.inner.table(key) if key not in self._derived else None

    def looked_at(self, key: str) -> Iterator[torch.Tensor]:
        """The numbers of a tensor; none for one that is made."""
        return self.inner.looked_at(key) if key not in self._derived else iter(())

    def announce(self, keys: Iterable[str]) -> None:
        """Have what tensors are made from read into the page cache."""
        self.inner.announce(self._sources_of(keys))

    def _sources_of(self, keys: Iterable[str]) -> Iterator[str]:
        """What tensors are made from, each once, as it is asked for: of experts, the stack that hundreds share."""
        seen: dict[str, None] = {}
        for key in keys:
            for source in self._derived[key].sources if key in self._derived else (key,):
                if source not in seen:
                    seen[source] = None
                    yield source

    def pieces(self, key: str) -> Iterator[memoryview]:
        """The bytes of a tensor, some after the other."""
        if key not in self._derived:
            yield from self.inner.pieces(key)
            return
        from runtime.checkpoint.dtypes import bytes_of

        yield bytes_of(self.read(key).contiguous())

    def sample(self, key: str, count: int) -> bytes:
        """A few bytes of what a tensor is made from."""
        derived = self._derived.get(key)
        sources = derived.sources if derived is not None else (key,)
        return b"".join(self.inner.sample(source, count) for source in sources)
