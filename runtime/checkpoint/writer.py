"""Write a checkpoint tensor by tensor, each directly to its place on disk.

Nothing is buffered in memory: the layout states the place of each tensor. Writing a tensor again changes nothing, so an
interrupted run can repeat its last step. Each tensor is written by one worker: into the common files, if the workers
share a directory, or else into the files of its own part.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.checkpoint.layout import Layout
from runtime.checkpoint.write_queue import WriteQueue
from runtime.console import human_bytes
from runtime.errors import OutputError
from runtime.host.publish import flush_one
from runtime.workers.agreement import agreed
from runtime.workers.division import Division
from runtime.workers.group import Alone

if TYPE_CHECKING:
    import torch

    from runtime.checkpoint.layout import Slot
    from runtime.workers.group import Workers

DEFAULT_SHARD_BYTES = 2 * 10**9
PART_NAME = "part.json"  # describes a part
PART_STEM = "part"  # of the files of a part, which readers of checkpoints must not take for a whole one


class ShardWriter:
    """Writer of tensors into the shards of a layout. Several threads may write.

    Every worker accounts for every tensor; a tensor that another worker writes is only counted.

    Args:
        directory: must exist; shards of an interrupted run in it are continued.
        layout: of the whole checkpoint.
        workers: that share the checkpoint.
        parts: write only this worker's tensors into `directory`, which no other worker shares.

    Attributes:
        files: the layout of the files in `directory`.
    """

    def __init__(self, directory: Path, layout: Layout, workers: Workers | None = None, *, parts: bool = False) -> None:
        self.directory = directory
        self.layout = layout
        self.workers = workers or Alone()
        self._owners = owners(layout, self.workers.size)
        self.files = part_of(layout, self._owners, self.workers.rank) if parts else layout
        self._lock = threading.Lock()
        self._queue = WriteQueue()
        self._files: dict[int, int] = {}
        self._unsynced: dict[int, None] = {}
        self._has_new_files = False
        self._taken: set[int] = set()
        self._missing = dict.fromkeys(layout.slots)
        self._num_missing = Counter(slot.shard for slot in self.files.slots.values())

    def is_mine(self, name: str) -> bool:
        """Whether this worker writes a tensor."""
        return self._owners[name] == self.workers.rank

    def owner_of(self, prefix: str) -> int:
        """The rank of the worker that writes a quantized module, whose tensors have names with this prefix."""
        return self._owners[f"{prefix}weight_scale"]

    def write(self, name: str, tensor: torch.Tensor) -> int:
        """Write a tensor of the layout's dtype and shape, and return its size in bytes.

        A tensor of a GPU is written by a thread, before `sync` or `finish` returns.

        Raises:
            OSError: when the system reports an error.
        """
        from runtime.checkpoint.dtypes import DTYPES, bytes_of

        stored = self.layout.slots[name].stored
        assert tensor.dtype == DTYPES.get(stored.dtype), f"{name} was to be {stored.dtype}"
        assert tuple(tensor.shape) == stored.shape, f"{name} was to have shape {stored.shape}"
        if self.is_mine(name) and self._queue.takes(tensor):
            self._queue.put(tensor, lambda host: self.write_bytes(name, [bytes_of(host)]))
            return stored.num_bytes
        return self.write_bytes(name, [bytes_of(tensor.detach().cpu().contiguous())] if self.is_mine(name) else [])

    def write_bytes(self, name: str, pieces: Iterable[memoryview]) -> int:
        """Write the bytes of a tensor as stored in its source checkpoint, and return their number.

        The pieces of a tensor that another worker writes are not requested.

        Raises:
            OSError: when the system reports an error.
        """
        total = self.layout.slots[name].stored.num_bytes
        if self.is_mine(name):
            slot = self.files.slots[name]
            self._write_pieces(slot, pieces)
            with self._lock:
                self._unsynced[slot.shard] = None
        with self._lock:
            self._count(name)
        return total

    def _write_pieces(self, slot: Slot, pieces: Iterable[memoryview]) -> None:
        name, size = slot.stored.name, slot.stored.num_bytes
        descriptor = self._file(slot)
        total = 0
        for data in pieces:
            assert total + len(data) <= size, f"{name} was to have {size} bytes"
            done = 0
            while done < len(data):
                done += os.pwrite(descriptor, data[done : done + 2**30], slot.offset + total + done)
            total += done
        assert total == size, f"{name} was to have {size} bytes"

    def read(self, name: str) -> torch.Tensor:
        """Read a written tensor on the CPU. All workers get it from the one that writes it."""
        from runtime.checkpoint.dtypes import DTYPES, bytes_of, empty_bytes

        stored = self.layout.slots[name].stored
        data = empty_bytes(stored.num_bytes)
        with agreed(self.workers):
            if self.is_mine(name):
                self._queue.wait()
                self.read_into(name, bytes_of(data))
        if stored.num_bytes:
            self.workers.broadcast(data, self._owners[name])
        return data.view(DTYPES[stored.dtype]).reshape(stored.shape)

    def read_into(self, name: str, memory: memoryview, begin: int = 0) -> None:
        """Fill `memory` with the bytes of a tensor of this worker, starting at `begin`.

        Raises:
            OutputError: when its file was truncated.
        """
        slot = self.files.slots[name]
        descriptor, done = self._file(slot), 0
        while done < len(memory):
            count = os.preadv(descriptor, [memory[done : done + 2**30]], slot.offset + begin + done)
            if not count:
                raise OutputError(f"{self.directory / self.files.shards[slot.shard].name} was truncated")
            done += count

    def is_written(self, name: str) -> bool:
        """Whether a tensor has been written, by this worker or the one that writes it."""
        return name not in self._missing

    def take_as_written(self, names: Iterable[str]) -> None:
        """Mark tensors that an earlier run has written.

        Raises:
            OutputError: when one of their files is missing or differs from what that run created.
        """
        with agreed(self.workers), self._lock:
            for name in names:
                if self.is_mine(name) and (number := self.files.slots[name].shard) not in self._taken:
                    self._require_begun(number)
                    self._taken.add(number)
                self._count(name)

    def _require_begun(self, number: int) -> None:
        shard = self.files.shards[number]
        path = self.directory / shard.name
        try:
            with path.open("rb") as file:
                is_begun = os.fstat(file.fileno()).st_size == shard.num_bytes and (
                    file.read(len(shard.header)) == shard.header
                )
        except FileNotFoundError:
            is_begun = False
        if not is_begun:
            raise OutputError(
                f"{path} has changed since the interrupted run: it is missing, truncated or overwritten",
                hint=f"remove {self.directory.parent} to start again",
            )

    def wait(self) -> None:
        """Wait until the tensors of a GPU are written."""
        self._queue.wait()

    def sync(self) -> None:
        """Flush all data written so far to disk.

        Raises:
            OSError: when the system reports an error.
        """
        self._queue.wait()
        with self._lock:
            shards, self._unsynced = list(self._unsynced), {}
            is_new, self._has_new_files = self._has_new_files, False
        for shard in shards:
            os.fsync(self._files[shard])
        if is_new:
            flush_one(self.directory)
        with self._lock:
            for shard in list(self._files):
                if not self._num_missing[shard] and shard not in self._unsynced:
                    os.close(self._files.pop(shard))  # it is complete, and there may be thousands

    def finish(self) -> None:
        """Close the files when all workers have written everything, and write the index if there are several shards."""
        with agreed(self.workers):
            self._queue.wait()
            assert not self._missing, f"tensors were never written: {', '.join(list(self._missing)[:3])}"
            if not self.files.slots:
                self._open(0)
            self.sync()
            self.close()
            if self.layout.index is not None and self.files is self.layout and not self.workers.rank:
                name, text = self.layout.index
                (self.directory / name).write_text(text, encoding="utf-8")

    def close(self) -> None:
        """Close the files; written data stays."""
        self._queue.close()
        with self._lock:
            while self._files:
                os.close(self._files.popitem()[1])

    def _count(self, name: str) -> None:
        if name in self._missing:
            del self._missing[name]
            if name in self.files.slots:
                self._num_missing[self.files.slots[name].shard] -= 1

    def _file(self, slot: Slot) -> int:
        with self._lock:
            return self._open(slot.shard)

    def _open(self, number: int) -> int:
        if number not in self._files:
            shard = self.files.shards[number]
            path = self.directory / shard.name
            self._files[number] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            if self.workers.size > 1:
                self._share(self._files[number])
            os.pwrite(self._files[number], shard.header, 0)
            os.ftruncate(self._files[number], shard.num_bytes)
            self._unsynced[number] = None
            self._has_new_files = True
        return self._files[number]

    def _share(self, descriptor: int) -> None:
        """Hold a shared lock on a file that other hosts write to at the same time.

        Without one, an NFS client may write a whole page when part of it has changed, and so overwrite what another
        host has written to the rest. Other file systems do not need it, and some have no locks.
        """
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)


def owners(layout: Layout, num_workers: int) -> dict[str, int]:
    """Return the rank that writes each tensor: that with the fewest bytes so far, in the order of the tensors.

    The tensors of one module, whose names differ in the last part, have one writer.
    """
    division = Division(num_workers)
    found: dict[str, int] = {}
    for _, group in itertools.groupby(layout.tensors, key=lambda tensor: module_of(tensor.name)):
        tensors = list(group)
        rank = division.assign(sum(tensor.num_bytes for tensor in tensors))
        found |= {tensor.name: rank for tensor in tensors}
    return found


def module_of(name: str) -> str:
    """The name of a tensor without its last part."""
    return name.rpartition(".")[0]


def part_of(layout: Layout, ranks: Mapping[str, int], rank: int) -> Layout:
    """Return the layout of the files that contain only one worker's tensors."""
    mine = (tensor for tensor in layout.tensors if ranks[tensor.name] == rank)
    return Layout(mine, layout.max_shard_bytes, PART_STEM)


def require_space(path: Path, num_bytes: int) -> None:
    """Check that the disk has space for a checkpoint before it is written; `path` and its parents need not exist.

    Raises:
        OutputError: stating the required and the free space.
    """
    place = next((folder for folder in (path, *path.absolute().parents) if folder.is_dir()), Path("/"))
    free = shutil.disk_usage(place).free
    if free < num_bytes:
        raise OutputError(
            f"{path} needs at least {human_bytes(num_bytes)}, but its disk has {human_bytes(free)} left",
            hint="free disk space, or choose another directory",
        )
