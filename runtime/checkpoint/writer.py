"""Write a checkpoint tensor by tensor, each directly to its place on disk.

Nothing is buffered in memory: the layout states the place of each tensor. Writing a tensor again changes nothing, so an
interrupted run can repeat its last step.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.checkpoint.dtypes import DTYPES, bytes_of, empty_bytes
from runtime.console import human_bytes
from runtime.errors import OutputError
from runtime.host.publish import flush_one

if TYPE_CHECKING:
    import torch

    from runtime.checkpoint.layout import Layout, Slot

DEFAULT_SHARD_BYTES = 2 * 10**9


class ShardWriter:
    """Writer of tensors into the shards of a layout. Several threads may write.

    Args:
        directory: must exist; shards of an interrupted run in it are continued.
        layout: of the whole checkpoint.
    """

    def __init__(self, directory: Path, layout: Layout) -> None:
        self.directory = directory
        self.layout = layout
        self._lock = threading.Lock()
        self._files: dict[int, int] = {}
        self._unsynced: dict[int, None] = {}
        self._has_new_files = False
        self._taken: set[int] = set()
        self._missing = dict.fromkeys(layout.slots)
        self._num_missing = Counter(slot.shard for slot in layout.slots.values())

    def write(self, name: str, tensor: torch.Tensor) -> int:
        """Write a tensor of the layout's dtype and shape, and return its size in bytes.

        Raises:
            OSError: when the system reports an error.
        """
        slot = self.layout.slots[name]
        assert tensor.dtype == DTYPES.get(slot.stored.dtype), f"{name} was to be {slot.stored.dtype}"
        assert tuple(tensor.shape) == slot.stored.shape, f"{name} was to have shape {slot.stored.shape}"
        return self.write_bytes(name, [bytes_of(tensor.detach().cpu().contiguous())])

    def write_bytes(self, name: str, pieces: Iterable[memoryview]) -> int:
        """Write the bytes of a tensor as stored in its source checkpoint, and return their number.

        Raises:
            OSError: when the system reports an error.
        """
        slot = self.layout.slots[name]
        descriptor = self._file(slot)
        total = 0
        for data in pieces:
            assert total + len(data) <= slot.stored.num_bytes, f"{name} was to have {slot.stored.num_bytes} bytes"
            done = 0
            while done < len(data):
                done += os.pwrite(descriptor, data[done : done + 2**30], slot.offset + total + done)
            total += done
        assert total == slot.stored.num_bytes, f"{name} was to have {slot.stored.num_bytes} bytes"
        with self._lock:
            self._count(name)
            self._unsynced[slot.shard] = None
        return total

    def read(self, name: str) -> torch.Tensor:
        """Read a written tensor on the CPU."""
        slot = self.layout.slots[name]
        data = empty_bytes(slot.stored.num_bytes)
        view, done, descriptor = bytes_of(data), 0, self._file(slot)
        while done < len(view):
            count = os.preadv(descriptor, [view[done : done + 2**30]], slot.offset + done)
            if not count:
                raise OutputError(f"{self.directory / self.layout.shards[slot.shard].name} was truncated")
            done += count
        return data.view(DTYPES[slot.stored.dtype]).reshape(slot.stored.shape)

    def is_written(self, name: str) -> bool:
        """Whether a tensor has been written."""
        return name not in self._missing

    def take_as_written(self, names: Iterable[str]) -> None:
        """Mark tensors that an earlier run has written.

        Raises:
            OutputError: when one of their files is missing or differs from what that run created.
        """
        with self._lock:
            for name in names:
                number = self.layout.slots[name].shard
                if number not in self._taken:
                    self._require_begun(number)
                    self._taken.add(number)
                self._count(name)

    def _require_begun(self, number: int) -> None:
        shard = self.layout.shards[number]
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

    def sync(self) -> None:
        """Flush all data written so far to disk.

        Raises:
            OSError: when the system reports an error.
        """
        with self._lock:
            shards, self._unsynced = list(self._unsynced), {}
            is_new, self._has_new_files = self._has_new_files, False
        for shard in shards:
            os.fsync(self._files[shard])
        if is_new:
            flush_one(self.directory)
        with self._lock:
            for shard in shards:
                if not self._num_missing[shard] and shard not in self._unsynced:
                    os.close(self._files.pop(shard))  # it is complete, and there may be thousands

    def finish(self) -> None:
        """Write the index if there are several shards."""
        assert not self._missing, f"tensors were never written: {', '.join(list(self._missing)[:3])}"
        if not self.layout.slots:
            self._open(0)
        self.sync()
        self.close()
        if self.layout.index is not None:
            name, text = self.layout.index
            (self.directory / name).write_text(text, encoding="utf-8")

    def close(self) -> None:
        """Close the files; written data stays."""
        with self._lock:
            while self._files:
                os.close(self._files.popitem()[1])

    def _count(self, name: str) -> None:
        if name in self._missing:
            del self._missing[name]
            self._num_missing[self.layout.slots[name].shard] -= 1

    def _file(self, slot: Slot) -> int:
        with self._lock:
            return self._open(slot.shard)

    def _open(self, number: int) -> int:
        if number not in self._files:
            shard = self.layout.shards[number]
            path = self.directory / shard.name
            self._files[number] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            os.pwrite(self._files[number], shard.header, 0)
            os.ftruncate(self._files[number], shard.num_bytes)
            self._unsynced[number] = None
            self._has_new_files = True
        return self._files[number]


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
