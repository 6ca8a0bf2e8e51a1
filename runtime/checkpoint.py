"""A checkpoint on disk, read tensor by tensor: safetensors shards, memory-mapped, each opened once.

Pages that were read count as memory of the process until they are given back, so each tensor's are given back as soon
as its bytes have gone where they are needed.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import WeightsError
from runtime.packed import stated

if TYPE_CHECKING:
    import torch

    from runtime.layout import Stored

INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"
_PIECE_BYTES = 2**25  # of a tensor that goes from one file to another
_ANNOUNCED_BYTES = 2**17  # at a time: of a longer piece Linux reads the beginning, as much as it reads ahead


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor lies: bytes `begin` to `end` of a shard."""

    shard: str
    stored: Stored
    begin: int
    end: int


class Checkpoint:
    """The tensors of a model directory.

    Args:
        directory: holds `model.safetensors`, or shards and their index.

    Raises:
        WeightsError: when there is no checkpoint, or its index names what is not there.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._bytes_read = 0
        self._maps: dict[str, mmap.mmap] = {}
        self._places = self._read_index()
        self.config = self._read_config()

    @property
    def bytes_read(self) -> int:
        """What was read so far."""
        return self._bytes_read

    @property
    def is_quantized(self) -> bool:
        """Whether its config says that weights are quantized."""
        return bool(stated(self.config))

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __iter__(self) -> Iterator[str]:
        """Names of all tensors, sorted."""
        return iter(self._places)

    def stored(self, key: str) -> Stored:
        """Name, dtype and shape of a tensor, from its shard's header."""
        return self._places[key].stored

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor, from its shard's header."""
        return self.stored(key).shape

    def num_bytes(self, key: str, *, bits: int | None = None) -> int:
        """The size of a tensor, or the size that it would have with so many bits a number."""
        stored = self.stored(key)
        return math.prod(stored.shape) * bits // 8 if bits else stored.num_bytes

    def read(self, key: str) -> torch.Tensor:
        """A tensor as it is on disk, on the CPU, in memory of its own.

        Raises:
            WeightsError: for a dtype that torch does not have.
        """
        with self._raw(self._places[key]) as view:
            return self._tensor(self._places[key], view)

    def read_part(self, key: str, index: int) -> torch.Tensor:
        """One part of a tensor along its first axis, and nothing else of it."""
        return self.read_rows(key, index, 1)[0]

    def read_rows(self, key: str, first: int, count: int) -> torch.Tensor:
        """Some parts of a tensor along its first axis, one after the other, and nothing else of it."""
        from runtime.layout import Stored

        place = self._places[key]
        stored = Stored(key, place.stored.dtype, (count, *place.stored.shape[1:]))
        begin = place.begin + first * (stored.num_bytes // count)
        part = _Place(place.shard, stored, begin, begin + stored.num_bytes)
        with self._raw(part) as view:
            return self._tensor(part, view)

    def _tensor(self, place: _Place, view: memoryview) -> torch.Tensor:
        import torch

        from runtime.dtypes import DTYPES, empty_bytes

        if place.stored.dtype not in DTYPES:
            where = self.directory / place.shard
            raise WeightsError(f"tensor {place.stored.name} of {where} has the dtype {place.stored.dtype}")
        data = empty_bytes(place.end - place.begin)
        if len(view):
            data.copy_(torch.frombuffer(view, dtype=torch.uint8))  # other threads go on meanwhile
        tensor: torch.Tensor = data.view(DTYPES[place.stored.dtype]).reshape(place.stored.shape)
        return tensor

    def mapped(self, key: str) -> torch.Tensor | None:
        """A tensor that stays where it lies on disk: what of it is looked at takes memory until `release`, and is not
        counted as read. None for one that is made, or begins at an odd place.
        """
        import torch

        from runtime.dtypes import DTYPES

        place = self._places[key]
        dtype = DTYPES.get(place.stored.dtype)
        if dtype is None or place.begin == place.end or place.begin % dtype.itemsize:
            return None
        shard = self._maps[place.shard]
        data = torch.frombuffer(shard, dtype=torch.uint8, count=place.end - place.begin, offset=place.begin)
        return data.view(dtype).reshape(place.stored.shape)

    def looked_at(self, key: str) -> Iterator[torch.Tensor]:
        """The numbers of a tensor, some after the other, without counting it as read; none for one that is made."""
        import torch

        tensor = self.mapped(key)
        for part in () if tensor is None else torch.split(tensor.reshape(-1), _PIECE_BYTES):
            yield part
            self.release()

    def release(self) -> None:
        """Give the pages of all shards back that were looked at."""
        for name in self._maps:
            self._release(name)

    def announce(self, keys: Iterable[str]) -> None:
        """Have the operating system read tensors into its page cache, if it can; they take none of the process's
        memory, and are not counted as read.
        """
        for key in keys:
            place = self._places[key]
            self._announce(place.shard, place.begin, place.end)

    def _announce(self, shard: str, begin: int, end: int) -> None:
        if not hasattr(mmap, "MADV_WILLNEED"):
            return
        for start in range(begin // mmap.PAGESIZE * mmap.PAGESIZE, end, _ANNOUNCED_BYTES):
            self._maps[shard].madvise(mmap.MADV_WILLNEED, start, min(_ANNOUNCED_BYTES, end - start))

    def pieces(self, key: str) -> Iterator[memoryview]:
        """The bytes of a tensor, some after the other, each as long as the next is not asked for."""
        place = self._places[key]
        for begin in range(place.begin, place.end, _PIECE_BYTES):
            with self._raw(_Place(place.shard, place.stored, begin, min(begin + _PIECE_BYTES, place.end))) as view:
                yield view

    @contextlib.contextmanager
    def _raw(self, place: _Place) -> Iterator[memoryview]:
        self._bytes_read += place.end - place.begin
        self._announce(place.shard, place.begin, place.end)
        with memoryview(self._maps[place.shard]) as whole, whole[place.begin : place.end] as view:
            try:
                yield view
            finally:
                self._release(place.shard)

    def _release(self, shard: str) -> None:
        """Give the pages of a shard back; the file still has them.

        Of the whole shard, for with the pages that were asked for the kernel maps some of those around them.
        """
        if hasattr(mmap, "MADV_DONTNEED"):  # Windows has none
            self._maps[shard].madvise(mmap.MADV_DONTNEED)

    def sample(self, key: str, count: int) -> bytes:
        """A few bytes from the middle of a tensor; not counted as reading it."""
        place = self._places[key]
        middle = max(place.begin, (place.begin + place.end - count) // 2)
        found = self._maps[place.shard][middle : min(middle + count, place.end)]
        self._release(place.shard)
        return found

    @property
    def shards(self) -> list[Path]:
        """The files, each once."""
        return [self.directory / name for name in self._maps]

    @property
    def total_bytes(self) -> int:
        """Size of all shards on disk."""
        return sum(path.stat().st_size for path in self.shards)

    def _read_index(self) -> dict[str, _Place]:
        if not self.directory.is_dir():
            raise WeightsError(f"there is no checkpoint directory {self.directory}")
        index = self.directory / INDEX_NAME
        if index.is_file():
            found = _read_json(index).get("weight_map")
            if not isinstance(found, dict) or not found:
                raise WeightsError(f"{index} is not an index of a checkpoint: it has no weight_map")
            file_of = {key: str(found[key]) for key in sorted(found)}
            for key, name in file_of.items():
                if "/" in name or not (self.directory / name).is_file():
                    raise WeightsError(
                        f"{index} puts {key} into {name}, which is not there", hint="copy the checkpoint again"
                    )
            return self._with_headers(dict.fromkeys(file_of.values()), file_of)
        if not (self.directory / SINGLE_NAME).is_file():
            others = [path.name for path in sorted(self.directory.glob("pytorch_model*.bin"))]
            hint = f"{others[0]} is a pickle: convert it to safetensors" if others else f"it has no {SINGLE_NAME}"
            raise WeightsError(f"{self.directory} holds no safetensors checkpoint", hint=hint)
        return self._with_headers({SINGLE_NAME: None}, None)

    def _with_headers(self, names: dict[str, None], stated: dict[str, str] | None) -> dict[str, _Place]:
        """Places from the shards themselves; an index must agree with them."""
        found: dict[str, _Place] = {}
        for name in names:
            found.update(self._map_shard(name))
        for key, name in (stated or {}).items():
            if key not in found or found[key].shard != name:
                raise WeightsError(f"the index of {self.directory} puts {key} into {name}, which does not hold it")
        return {key: found[key] for key in sorted(found)}

    def _map_shard(self, name: str) -> dict[str, _Place]:
        """Map a shard into memory; safetensors checks it, but does not say where a tensor lies in it."""
        from safetensors import safe_open

        from runtime.layout import Stored

        path = self.directory / name
        try:
            with safe_open(path, framework="pt"):
                pass
            with path.open("rb") as file:
                # A private copy, for torch does not take memory that cannot be written; nothing ever writes into it.
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except Exception as error:
            raise WeightsError(
                f"{path} is damaged, or no safetensors file: {error}", hint="copy the checkpoint again"
            ) from error
        size = 8 + int.from_bytes(mapped[:8], "little")
        header = json.loads(mapped[8:size])
        header.pop("__metadata__", None)
        self._maps[name] = mapped
        places = {}
        for key, entry in header.items():
            begin, end = entry["data_offsets"]
            places[key] = _Place(name, Stored(key, entry["dtype"], tuple(entry["shape"])), size + begin, size + end)
        return places

    def _read_config(self) -> dict[str, Any]:
        path = self.directory / "config.json"
        return _read_json(path) if path.is_file() else {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{path} holds no JSON object")
    return value
