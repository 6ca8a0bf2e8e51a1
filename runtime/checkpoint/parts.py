"""The parts of a checkpoint whose workers share no directory, and how they are joined.

A part is a directory of safetensors files with the tensors of one worker, `part.json`, and in that of worker 0 the
companions. `part.json` lists all tensors of the checkpoint, so that the layout of every file is computed and never read
from a part. Joining copies the bytes of each tensor to their place; it needs neither the artifact nor torch.

A part is not trusted: names and sizes are checked, links are rejected, and every tensor has a checksum, because parts
are copied between machines.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import msgspec

from runtime.checkpoint.layout import INDEX_NAME, Layout
from runtime.checkpoint.shard_files import ShardFiles
from runtime.checkpoint.stored import BITS, Stored
from runtime.checkpoint.writer import PART_NAME, ShardWriter, owners, part_of, require_space
from runtime.errors import WeightsError
from runtime.host.publish import publish_directory, require_free, require_outside
from runtime.host.regular_files import open_regular, reason_of
from runtime.status import doing

_FORMAT = 1
_LARGEST_TABLE = 2**30  # bytes of part.json
_LARGEST = 2**62  # bytes of a checkpoint, and of any number in part.json
_MOST_DIMENSIONS = 64
_LONGEST_NAME = 255  # bytes, of file systems
_PIECE_BYTES = 2**22
_COPY_AGAIN = "copy the part again"


class _FormatOfPart(msgspec.Struct):
    format: int


class PartTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of `part.json`.

    Attributes:
        format: version of this table.
        run: digest of what decides the bytes of the checkpoint.
        part: the rank of the worker.
        num_parts: the number of workers.
        max_shard_bytes: of the layout.
        tensors: name, dtype, shape and rank of all tensors of the checkpoint, in the order of the layout.
        checksums: CRC-32 of the tensors of this part, in that order.
        companions: size and CRC-32 of the other files by name.
    """

    format: int
    run: str
    part: int
    num_parts: int
    max_shard_bytes: int
    tensors: tuple[tuple[str, str, tuple[int, ...], int], ...]
    checksums: tuple[int, ...]
    companions: dict[str, tuple[int, int]]


def write_part(directory: Path, writer: ShardWriter, run: str) -> None:
    """Describe the files in a directory, which are complete, in its `part.json`.

    Args:
        directory: with the tensors of the writer, and the companions.
        writer: has written everything.
        run: digest of what decides the bytes of the checkpoint.
    """
    ranks = owners(writer.layout, writer.workers.size)
    shards = {shard.name for shard in writer.files.shards}
    others = sorted(path for path in directory.rglob("*") if path.is_file())
    names = [path.relative_to(directory).as_posix() for path in others]
    table = PartTable(
        format=_FORMAT,
        run=run,
        part=writer.workers.rank,
        num_parts=writer.workers.size,
        max_shard_bytes=writer.layout.max_shard_bytes,
        tensors=tuple((one.name, one.dtype, one.shape, ranks[one.name]) for one in writer.layout.tensors),
        checksums=tuple(_written_checksum(writer, tensor) for tensor in writer.files.tensors),
        companions={name: _file_facts(path) for name, path in zip(names, others, strict=True) if name not in shards},
    )
    writer.close()
    (directory / PART_NAME).write_bytes(msgspec.json.encode(table))


def _written_checksum(writer: ShardWriter, tensor: Stored) -> int:
    memory, checksum = memoryview(bytearray(min(_PIECE_BYTES, tensor.num_bytes))), 0
    for begin in range(0, tensor.num_bytes, _PIECE_BYTES):
        piece = memory[: tensor.num_bytes - begin]
        writer.read_into(tensor.name, piece, begin)
        checksum = zlib.crc32(piece, checksum)
    return checksum


def _file_facts(path: Path) -> tuple[int, int]:
    size = checksum = 0
    with open_regular(path) as file:
        while piece := file.read(_PIECE_BYTES):
            size, checksum = size + len(piece), zlib.crc32(piece, checksum)
    return size, checksum


@dataclass(frozen=True, kw_only=True, slots=True)
class JoinedCheckpoint:
    """A checkpoint that was made of parts.

    Attributes:
        num_parts: how many there were.
        num_tensors: of the checkpoint.
        num_bytes: size of its tensors.
    """

    num_parts: int
    num_tensors: int
    num_bytes: int


def join_parts(
    paths: Sequence[Path], out: Path, complete: Callable[[Path], None] = lambda directory: None
) -> JoinedCheckpoint:
    """Make the checkpoint of all its parts. It has the same bytes as one that was written in a shared directory.

    Args:
        paths: the directories of all parts, in any order.
        out: a directory that does not exist or is empty; it appears when it is complete.
        complete: is called with the directory of the joined files before it appears.

    Raises:
        WeightsError: when a part is missing, damaged, or of another run.
        OutputError: when `out` is not free or cannot be written.
    """
    require_free(out)
    require_outside(out, *paths)
    doing("checking the parts")
    parts = _AllParts(paths)
    layout = parts.layout
    require_space(out, layout.file_bytes + parts[0].companion_bytes)
    with publish_directory(out) as partial:
        writer, shard = ShardWriter(partial, layout), -1
        for name, slot in layout.slots.items():  # one file after the other
            if slot.shard != shard:
                shard = slot.shard
                doing(f"joining file {shard + 1} of {len(layout.shards)}")
                writer.sync()
            writer.write_bytes(name, parts[parts.ranks[name]].pieces(name))
        writer.finish()
        parts[0].copy_companions(partial)
        complete(partial)
    return JoinedCheckpoint(num_parts=len(parts), num_tensors=len(layout.slots), num_bytes=layout.total_bytes)


class _AllParts:
    """All parts of one checkpoint, by rank.

    Args:
        paths: their directories, in any order.

    Raises:
        WeightsError: when they are not all parts of one checkpoint, or one is damaged.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._found: dict[int, _Part] = {}
        origin, first = paths[0], _read_table(paths[0])
        self.layout = Layout([Stored(*row[:3]) for row in first.tensors], first.max_shard_bytes)
        self.ranks = {name: rank for name, *_, rank in first.tensors}
        for path in paths:
            table = first if path is origin else _read_table(path)
            if (table.run, table.num_parts) != (first.run, first.num_parts):
                raise WeightsError(f"{origin} and {path} are parts of different runs", hint="pass the parts of one run")
            if (table.tensors, table.max_shard_bytes) != (first.tensors, first.max_shard_bytes):
                raise WeightsError(f"{origin} and {path} list different tensors", hint=_COPY_AGAIN)
            if table.part in self._found:
                raise WeightsError(
                    f"{self._found[table.part].directory} and {path} are both part {table.part}",
                    hint="pass each part once",
                )
            self._found[table.part] = _Part(path, table, part_of(self.layout, self.ranks, table.part))
        missing = next((rank for rank in range(first.num_parts) if rank not in self._found), None)
        if missing is not None:
            raise WeightsError(
                f"part {missing} is missing: {origin} is one of {first.num_parts} parts",
                hint="pass the directories of all parts",
            )

    def __getitem__(self, rank: int) -> _Part:
        return self._found[rank]

    def __len__(self) -> int:
        return len(self._found)


class _Part:
    """One part.

    Args:
        directory: of the part.
        table: its checked `part.json`.
        files: the layout of its files.

    Raises:
        WeightsError: when a file is missing, or differs from the layout.
    """

    def __init__(self, directory: Path, table: PartTable, files: Layout) -> None:
        self.directory = directory
        self._files = files
        self._companions = table.companions
        if len(files.tensors) != len(table.checksums):
            raise WeightsError(f"{directory / PART_NAME} needs one checksum for each tensor", hint=_COPY_AGAIN)
        self._checksums = {one.name: sum_ for one, sum_ in zip(files.tensors, table.checksums, strict=True)}
        self._shards = ShardFiles(directory)
        for shard in files.shards:
            path = _plain(directory, shard.name)
            with _readable(path):
                size = self._shards.add(shard.name)
                is_whole = size == shard.num_bytes
                is_whole = is_whole and self._shards.read(shard.name, 0, len(shard.header)) == shard.header
            if not is_whole:
                raise WeightsError(
                    f"{path} is truncated or not the file that the run has written: it has {size} bytes, and "
                    f"{shard.num_bytes} are expected",
                    hint=_COPY_AGAIN,
                )

    @property
    def companion_bytes(self) -> int:
        """Size of the files that are copied as they are."""
        return sum(size for size, _ in self._companions.values())

    def pieces(self, name: str) -> Iterator[memoryview]:
        """Yield the bytes of a tensor, and check them."""
        slot = self._files.slots[name]
        shard, end = self._files.shards[slot.shard].name, slot.offset + slot.stored.num_bytes
        memory, checksum = memoryview(bytearray(min(_PIECE_BYTES, slot.stored.num_bytes))), 0
        for begin in range(slot.offset, end, _PIECE_BYTES):
            piece = memory[: end - begin]
            self._shards.read_into(shard, begin, piece)
            checksum = zlib.crc32(piece, checksum)
            yield piece
        if checksum != self._checksums[name]:
            raise WeightsError(f"tensor {name} in {self.directory / shard} is damaged", hint=_COPY_AGAIN)

    def copy_companions(self, target: Path) -> None:
        """Copy the other files of the checkpoint, and check them."""
        for name, facts in self._companions.items():
            path = _plain(self.directory, name)
            size = path.stat().st_size
            if size != facts[0]:
                raise WeightsError(f"{path} has {size} bytes, and {facts[0]} are expected", hint=_COPY_AGAIN)
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / name)
            if _file_facts(target / name) != facts:
                raise WeightsError(f"{path} is damaged", hint=_COPY_AGAIN)


def _plain(directory: Path, name: str) -> Path:
    """Return the path of a regular file in a part, to which no link leads."""
    path = directory
    for component in PurePosixPath(name).parts:
        path = path / component
        if path.is_symlink():
            raise WeightsError(f"{path} is a link, which no part contains", hint=_COPY_AGAIN)
    if not path.is_file():
        raise WeightsError(f"{path} is {'not a regular file' if path.exists() else 'missing'}", hint=_COPY_AGAIN)
    return path


def _read_table(directory: Path) -> PartTable:
    """Read and check the `part.json` of a part."""
    if not os.path.lexists(directory / PART_NAME):
        problem = f"has no {PART_NAME}" if directory.is_dir() else "is not a directory"
        raise WeightsError(
            f"{directory} is not a part of a checkpoint: it {problem}",
            hint="pass the directories that calibrate --parts has written",
        )
    path = _plain(directory, PART_NAME)
    with _readable(path), open_regular(path) as file:
        data = file.read(_LARGEST_TABLE + 1)
    try:
        if len(data) > _LARGEST_TABLE:
            raise ValueError(f"it has more than {_LARGEST_TABLE} bytes")
        version = msgspec.json.decode(data, type=_FormatOfPart).format
        if version == _FORMAT:
            table = msgspec.json.decode(data, type=PartTable)
            _require_sound(table)
            return table
    except (ValueError, RecursionError) as error:  # msgspec's own errors are ValueErrors
        raise WeightsError(f"{path} is damaged: {error}", hint=_COPY_AGAIN) from error
    raise WeightsError(
        f"{path} has format {version}, and this version reads format {_FORMAT}",
        hint="join with the version of seqbuild that wrote the parts",
    )


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {reason_of(error)}", hint=_COPY_AGAIN) from error


def _require_sound(table: PartTable) -> None:
    """Check everything that the layout and the paths of files are computed from.

    Raises:
        ValueError: naming the value.
    """
    if not 0 <= table.part < table.num_parts or not 0 < table.max_shard_bytes <= _LARGEST:
        raise ValueError(f"part {table.part} of {table.num_parts} with files of {table.max_shard_bytes} bytes")
    total, names = 0, dict.fromkeys(row[0] for row in table.tensors)
    if len(names) != len(table.tensors) or "__metadata__" in names:
        raise ValueError("two tensors have the same name, or one has a reserved name")
    for name, dtype, shape, rank in table.tensors:
        if not 0 <= rank < table.num_parts:
            raise ValueError(f"tensor {name} is in part {rank}, and there are {table.num_parts} parts")
        if dtype not in BITS or len(shape) > _MOST_DIMENSIONS or not all(0 <= size <= _LARGEST for size in shape):
            raise ValueError(f"tensor {name} has dtype {dtype} and shape {list(shape)}")
        bits = math.prod(shape) * BITS[dtype]
        total += bits // 8
        if bits % 8 or total > _LARGEST:
            raise ValueError(f"tensor {name} has {bits} bits")
    for name, (size, _) in table.companions.items():
        if not _is_companion(name) or not 0 <= size <= _LARGEST:
            raise ValueError(f"file {name!r} of {size} bytes")
    if table.companions and table.part:
        raise ValueError("only part 0 has companions")


def _is_companion(name: str) -> bool:
    """Whether a file may be copied under this name: inside the checkpoint, and not over one of its own files."""
    components = name.split("/")
    if not name.isprintable() or "\\" in name or name in (INDEX_NAME, PART_NAME):
        return False
    if len(components) == 1 and name.endswith(".safetensors"):
        return False
    return all(one and not one.startswith(".") and len(one.encode()) <= _LONGEST_NAME for one in components)
