"""Read parts of files that another process may truncate or replace at the same time.

Accessing a mapped file that was truncated kills the process (SIGBUS). So parts are read by `pread` into memory that the
caller owns, which takes no longer than copying them out of a map. A read that ends early, or a file whose size or
modification time differs from when it was first opened, is an error that names the file.

Few descriptors are open at a time, because a checkpoint may have hundreds of files and a process 64 descriptors.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import WeightsError
from runtime.host.regular_files import descriptor_of

_OPEN_AT_A_TIME = 8
_PIECE_BYTES = 2**30  # the most that one system call reads
_ANNOUNCED_BYTES = 2**17  # per call: of a longer range Linux reads only the first part, up to its read-ahead size


@dataclass(frozen=True, slots=True)
class _Version:
    """The attributes that reveal that a file was replaced or rewritten."""

    device: int
    inode: int
    size: int
    changed_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> _Version:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


class _Descriptor:
    """An open file that is closed after its last use: another thread may be reading from it."""

    def __init__(self, path: Path) -> None:
        self.number = descriptor_of(path)

    def version(self) -> _Version:
        return _Version.of(os.fstat(self.number))

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class ShardFiles:
    """The files of a checkpoint, by name.

    Args:
        directory: that contains them.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._versions: dict[str, _Version] = {}
        self._open: dict[str, _Descriptor] = {}  # the most recently used is last
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the added files."""
        return iter(self._versions)

    def add(self, name: str) -> int:
        """Record the present version of a file, and return its size.

        Raises:
            OSError: when it cannot be opened.
        """
        with self._lock:
            opened = self._open[name] = _Descriptor(self.directory / name)
            self._versions[name] = opened.version()
            self._close_some()
        return self._versions[name].size

    def read_into(self, name: str, begin: int, memory: memoryview) -> None:
        """Fill `memory` with the bytes of a file, starting at `begin`.

        Raises:
            WeightsError: when the file has changed since it was added, or cannot be read.
        """
        opened, done = self._descriptor(name), 0
        while done < len(memory):
            try:
                count = os.preadv(opened.number, [memory[done : done + _PIECE_BYTES]], begin + done)
            except OSError as error:
                what = f"{self.directory / name} cannot be read: {error.strerror}"
                raise WeightsError(what, is_resumable=True) from error
            if not count:
                break
            done += count
        if done < len(memory) or opened.version() != self._versions[name]:
            raise self._changed(name, opened.version())

    def read(self, name: str, begin: int, end: int) -> bytes:
        """Read the bytes `begin` to `end` of a file.

        Raises:
            WeightsError: as `read_into`.
        """
        found = bytearray(end - begin)
        self.read_into(name, begin, memoryview(found))
        return bytes(found)

    def announce(self, name: str, begin: int, end: int) -> None:
        """Ask the operating system to read bytes into its page cache, if supported."""
        if not hasattr(os, "posix_fadvise"):
            return
        opened = self._descriptor(name)
        for start in range(begin, end, _ANNOUNCED_BYTES):
            os.posix_fadvise(opened.number, start, min(_ANNOUNCED_BYTES, end - start), os.POSIX_FADV_WILLNEED)

    def _descriptor(self, name: str) -> _Descriptor:
        with self._lock:
            opened = self._open.pop(name, None)
            if opened is None:
                try:
                    opened = _Descriptor(self.directory / name)
                except OSError as error:
                    what = f"{self.directory / name} cannot be read: {error.strerror}"
                    raise WeightsError(what, is_resumable=True) from error
                if opened.version() != self._versions[name]:
                    raise self._changed(name, opened.version())
            self._open[name] = opened
            self._close_some()
        return opened

    def _close_some(self) -> None:
        while len(self._open) > _OPEN_AT_A_TIME:
            del self._open[next(iter(self._open))]

    def _changed(self, name: str, found: _Version) -> WeightsError:
        expected = self._versions[name]
        sizes = f": it had {expected.size} bytes and now has {found.size}" if found.size != expected.size else ""
        return WeightsError(
            f"{self.directory / name} was changed while it was read{sizes}",
            hint="restore the file with its modification time (cp -p), or start again",
            is_resumable=True,
        )
