"""Compute the place of every tensor of a checkpoint on disk before the first is written.

Names, dtypes and shapes are known when a run starts, and with them the shards, their headers and the offset of each
byte. Tensors can then be written in any order, and again if necessary, and none waits in memory for others. A shard has
the same bytes as one written by the safetensors library: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from runtime.checkpoint.stored import BITS, Stored

INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"


_RANK = {name: rank for rank, name in enumerate(BITS)}
_ALIGNMENT = 8  # of the first tensor: the header is padded to it


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of a tensor: `offset` bytes into the file of a shard."""

    stored: Stored
    shard: int
    offset: int


@dataclass(frozen=True)
class ShardLayout:
    """The header and total size of one file."""

    name: str
    header: bytes
    num_bytes: int


class Layout:
    """The files of a checkpoint.

    Args:
        tensors: all tensors, in the order in which they fill the shards.
        max_shard_bytes: a shard is closed before a tensor would make it larger; a larger tensor gets a shard of its
            own.
        stem: the beginning of the names of its files.
    """

    def __init__(self, tensors: Iterable[Stored], max_shard_bytes: int, stem: str = "model") -> None:
        self.tensors = tuple(tensors)
        self.max_shard_bytes = max_shard_bytes
        filled: list[list[Stored]] = [[]]
        size = self.total_bytes = 0
        for tensor in self.tensors:
            if filled[-1] and size + tensor.num_bytes > max_shard_bytes:
                filled.append([])
                size = 0
            filled[-1].append(tensor)
            size += tensor.num_bytes
            self.total_bytes += tensor.num_bytes
        self.slots: dict[str, Slot] = {}
        self.shards: list[ShardLayout] = []
        for number, shard in enumerate(filled):
            place = f"-{number + 1:05d}-of-{len(filled):05d}" if len(filled) > 1 else ""
            self._add_shard(f"{stem}{place}.safetensors", shard)

    def _add_shard(self, name: str, tensors: list[Stored]) -> None:
        ordered = sorted(tensors, key=lambda tensor: (-_RANK[tensor.dtype], tensor.name))
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        ends: list[int] = []
        end = 0
        for tensor in ordered:
            begin, end = end, end + tensor.num_bytes
            entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, end]}
            ends.append(end)
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        header = len(text).to_bytes(8, "little") + text
        for tensor, last in zip(ordered, ends, strict=True):
            assert tensor.name not in self.slots, f"tensor {tensor.name} is laid out twice"
            self.slots[tensor.name] = Slot(tensor, len(self.shards), len(header) + last - tensor.num_bytes)
        self.shards.append(ShardLayout(name, header, len(header) + end))

    @cached_property
    def file_bytes(self) -> int:
        """Total size of all shards on disk, including headers."""
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def index(self) -> tuple[str, str] | None:
        """Return the name and text of the index file; None for a single shard, which needs no index."""
        if len(self.shards) == 1:
            return None
        weight_map = {name: self.shards[slot.shard].name for name, slot in sorted(self.slots.items())}
        content = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        return INDEX_NAME, json.dumps(content, indent=2) + "\n"
