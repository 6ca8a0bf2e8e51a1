"""A checkpoint on disk, read tensor by tensor from safetensors shards."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.checkpoint.layout import INDEX_NAME, SINGLE_NAME
from runtime.checkpoint.shard_files import ShardFiles
from runtime.checkpoint.source_formats import described, stated
from runtime.checkpoint.stored import Stored
from runtime.errors import WeightsError
from runtime.host.regular_files import read_text, require_regular_entries

if TYPE_CHECKING:
    import torch

    from runtime.checkpoint.stored_table import StoredTable

_PIECE_BYTES = 2**22  # read at a time when a tensor is copied between files


@dataclass(frozen=True, slots=True)
class _Place:
    """The place of a tensor: bytes `begin` to `end` of a shard."""

    shard: str
    stored: Stored
    begin: int
    end: int


class Checkpoint:
    """The tensors of a model directory.

    Args:
        directory: contains `model.safetensors`, or shards and their index.

    Raises:
        WeightsError: when there is no checkpoint, or its index names a missing file or tensor.
    """

    hidden: tuple[str, ...] = ()  # tensors on disk that a view neither shows nor derives others from

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._bytes_read = 0
        self._files = ShardFiles(directory)
        self._places = self._read_index()
        self.config = self._read_config()

    @property
    def bytes_read(self) -> int:
        """Number of bytes read so far."""
        return self._bytes_read

    @property
    def is_quantized(self) -> bool:
        """Whether the config states that weights are quantized."""
        return bool(stated(self.config))

    @property
    def quantization(self) -> str:
        """How the weights on disk are quantized; empty for a plain checkpoint."""
        entry = stated(self.config)
        return described(entry) if entry else ""

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of all tensors, sorted."""
        return iter(self._places)

    def stored(self, key: str) -> Stored:
        """Return name, dtype and shape of a tensor from its shard's header."""
        return self._places[key].stored

    def source_bytes(self, key: str) -> int:
        """The bytes on disk that a tensor is read from."""
        return self.stored(key).num_bytes

    def computed(self, key: str) -> int:
        """The numbers of a tensor that are computed, in float64, whenever it is read: those of a rotated tensor."""
        return 0

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of a tensor from its shard's header."""
        return self.stored(key).shape

    def num_bytes(self, key: str, *, bits: int | None = None) -> int:
        """Return the size of a tensor, or its size if each number had `bits` bits."""
        stored = self.stored(key)
        return math.prod(stored.shape) * bits // 8 if bits else stored.num_bytes

    def read(self, key: str) -> torch.Tensor:
        """Read a tensor unchanged into new memory on the CPU.

        Raises:
            WeightsError: for a dtype that torch does not have.
        """
        return self._tensor(self._places[key])

    def read_part(self, key: str, index: int) -> torch.Tensor:
        """Read only one index of a tensor's first axis."""
        return self.read_rows(key, index, 1)[0]

    def read_rows(self, key: str, first: int, count: int) -> torch.Tensor:
        """Read only `count` consecutive indices of a tensor's first axis."""
        place = self._places[key]
        stored = Stored(key, place.stored.dtype, (count, *place.stored.shape[1:]))
        begin = place.begin + first * (stored.num_bytes // count)
        part = _Place(place.shard, stored, begin, begin + stored.num_bytes)
        return self._tensor(part)

    def _tensor(self, place: _Place) -> torch.Tensor:
        from runtime.checkpoint.dtypes import DTYPES, bytes_of, empty_bytes

        if place.stored.dtype not in DTYPES:
            where = self.directory / place.shard
            raise WeightsError(f"tensor {place.stored.name} of {where} has the unsupported dtype {place.stored.dtype}")
        data = empty_bytes(place.end - place.begin)
        self._read_into(place, bytes_of(data))  # without holding up other threads
        tensor: torch.Tensor = data.view(DTYPES[place.stored.dtype]).reshape(place.stored.shape)
        return tensor

    def table(self, key: str) -> StoredTable | None:
        """Return a tensor that stays on disk: rows are read when they are looked up, and are not counted as read. None
        for a dtype that torch does not have, and for a tensor without rows.
        """
        from runtime.checkpoint.dtypes import DTYPES
        from runtime.checkpoint.stored_table import StoredTable

        place = self._places[key]
        dtype = DTYPES.get(place.stored.dtype)
        if dtype is None or place.begin == place.end or len(place.stored.shape) != 2:
            return None
        row_bytes = (place.end - place.begin) // place.stored.shape[0]

        def read_rows(first: int, memory: memoryview) -> None:
            self._files.read_into(place.shard, place.begin + first * row_bytes, memory)

        return StoredTable(read_rows, place.stored.shape, dtype)

    def looked_at(self, key: str) -> Iterator[torch.Tensor]:
        """Yield the numbers of a tensor in pieces, not counted as read; nothing for a derived tensor."""
        from runtime.checkpoint.dtypes import DTYPES, bytes_of, empty_bytes

        place = self._places[key]
        dtype = DTYPES.get(place.stored.dtype)
        if dtype is None:
            return
        for begin in range(place.begin, place.end, _PIECE_BYTES):
            data = empty_bytes(min(_PIECE_BYTES, place.end - begin))
            self._files.read_into(place.shard, begin, bytes_of(data))
            yield data.view(dtype)

    def announce(self, keys: Iterable[str]) -> None:
        """Ask the operating system to read tensors into its page cache, if supported; this takes no memory of the
        process and is not counted as read.
        """
        for key in keys:
            place = self._places[key]
            self._files.announce(place.shard, place.begin, place.end)

    def pieces(self, key: str) -> Iterator[memoryview]:
        """Yield the bytes of a tensor in pieces; a piece is valid until the next is requested."""
        place = self._places[key]
        memory = memoryview(bytearray(min(_PIECE_BYTES, place.end - place.begin)))
        for begin in range(place.begin, place.end, _PIECE_BYTES):
            end = min(begin + _PIECE_BYTES, place.end)
            piece = memory[: end - begin]
            self._read_into(_Place(place.shard, place.stored, begin, end), piece)
            yield piece

    def _read_into(self, place: _Place, memory: memoryview) -> None:
        self._bytes_read += place.end - place.begin
        self._files.announce(place.shard, place.begin, place.end)
        self._files.read_into(place.shard, place.begin, memory)

    def sample(self, key: str, count: int) -> bytes:
        """Return a few bytes from the middle of a tensor; not counted as read."""
        place = self._places[key]
        middle = max(place.begin, (place.begin + place.end - count) // 2)
        return self._files.read(place.shard, middle, min(middle + count, place.end))

    @property
    def shards(self) -> list[Path]:
        """List the shard files, each once."""
        return [self.directory / name for name in self._files]

    @property
    def total_bytes(self) -> int:
        """Return the size of all shards on disk."""
        return sum(path.stat().st_size for path in self.shards)

    def _read_index(self) -> dict[str, _Place]:
        if not self.directory.is_dir():
            problem = "is not a directory" if self.directory.exists() else "does not exist"
            raise WeightsError(
                f"checkpoint directory {self.directory} {problem}",
                hint="pass the directory with the model's safetensors files",
            )
        try:
            require_regular_entries(self.directory)
        except OSError as error:
            raise WeightsError(f"{error.filename} cannot be read: {error.strerror}") from error
        index = self.directory / INDEX_NAME
        if index.is_file():
            found = _read_json(index).get("weight_map")
            if not isinstance(found, dict) or not found:
                raise WeightsError(f"{index} is not an index of a checkpoint: it has no weight_map")
            file_of = {key: str(found[key]) for key in sorted(found)}
            for key, name in file_of.items():
                if "/" in name or not (self.directory / name).is_file():
                    raise WeightsError(
                        f"{index} puts {key} into {name}, which is missing", hint="copy the checkpoint again"
                    )
            return self._with_headers(dict.fromkeys(file_of.values()), file_of)
        if not (self.directory / SINGLE_NAME).is_file():
            others = [path.name for path in sorted(self.directory.glob("pytorch_model*.bin"))]
            hint = f"{others[0]} is a pickle: convert it to safetensors" if others else f"it has no {SINGLE_NAME}"
            gguf = next((path.name for path in sorted(self.directory.glob("*.gguf"))), "")
            hint = f"{gguf} is a GGUF file, which is not supported; use the original checkpoint" if gguf else hint
            raise WeightsError(f"{self.directory} does not contain a safetensors checkpoint", hint=hint)
        return self._with_headers({SINGLE_NAME: None}, None)

    def _with_headers(self, names: dict[str, None], stated: dict[str, str] | None) -> dict[str, _Place]:
        """Read the places from the shards themselves; an index must agree with them."""
        found: dict[str, _Place] = {}
        for name in names:
            found.update(self._read_header(name))
        for key, name in (stated or {}).items():
            if key not in found or found[key].shard != name:
                raise WeightsError(f"the index of {self.directory} puts {key} into {name}, which does not contain it")
        return {key: found[key] for key in sorted(found)}

    def _read_header(self, name: str) -> dict[str, _Place]:
        """Read the places in a shard; safetensors checks its header, but does not report where a tensor is."""
        from safetensors import safe_open

        path = self.directory / name
        try:
            self._files.add(name)
            with safe_open(path, framework="pt"):
                pass
        except Exception as error:
            raise WeightsError(
                f"{path} is damaged or not a safetensors file: {error}", hint="copy the checkpoint again"
            ) from error
        size = 8 + int.from_bytes(self._files.read(name, 0, 8), "little")
        header = json.loads(self._files.read(name, 8, size))
        header.pop("__metadata__", None)
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
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{path} is not a JSON object")
    return value
