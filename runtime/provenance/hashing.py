"""Compute the SHA-256 of files and tensors in a thread, beside a run.

The thread gives way to the run: it has a lower priority, where the system knows priorities of threads, and holds the
interpreter only between pieces.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from runtime.errors import WeightsError
from runtime.host.regular_files import descriptor_of, reason_of

_PIECE_BYTES = 2**23  # large reads, for network storage
_NICENESS = 10
Pieces = Callable[[], Iterable[memoryview]]


class Hasher:
    """A thread that computes digests one after the other.

    An error ends it; `require_sound` and `wait` raise the error.

    Attributes:
        digests: the finished ones, by key.
    """

    def __init__(self) -> None:
        self.digests: dict[str, str] = {}
        self._changed = threading.Condition()
        self._tasks: deque[tuple[str, Pieces]] = deque()
        self._num_open = self._bytes_done = 0
        self._is_closed = False
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="hash", daemon=True)
        self._thread.start()

    def add(self, key: str, pieces: Pieces) -> None:
        """Compute the digest of what `pieces` yields, after all that were added before."""
        with self._changed:
            self._tasks.append((key, pieces))
            self._num_open += 1
            self._changed.notify_all()

    def require_sound(self) -> None:
        """Raise the error that has ended the thread, if any.

        Raises:
            WeightsError: a file has changed or cannot be read.
        """
        if self._error is not None:
            raise self._error

    def wait(self, seconds: float) -> bool:
        """Wait until all digests are computed, at most so long; return whether they are.

        Raises:
            WeightsError: as `require_sound`.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._num_open or self._error is not None, seconds)
        self.require_sound()
        return not self._num_open

    @property
    def bytes_done(self) -> int:
        """How many bytes have been hashed."""
        return self._bytes_done

    def close(self) -> None:
        """End the thread, after its present piece."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> Hasher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self) -> None:
        _give_way()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._tasks or self._is_closed)
                if self._is_closed:
                    return
                key, pieces = self._tasks.popleft()
            try:
                digest = self._digest(pieces)
            except Exception as error:
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            if digest is None:
                return
            with self._changed:
                self.digests[key] = digest
                self._num_open -= 1
                self._changed.notify_all()

    def _digest(self, pieces: Pieces) -> str | None:
        digest = hashlib.sha256()
        for piece in pieces():
            if self._is_closed:
                return None
            digest.update(piece)
            self._bytes_done += len(piece)
        return digest.hexdigest()


def _give_way() -> None:
    """Lower the priority of this thread."""
    if sys.platform == "linux":  # elsewhere, it is a property of the process
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)


class WatchedFile:
    """A file that must not change from now on.

    Args:
        path: of the file.

    Attributes:
        size: in bytes.
        changed_ns: when it was modified last.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        status = path.stat()
        self.size, self.changed_ns = status.st_size, status.st_mtime_ns
        self._version = _version(status)

    def pieces(self) -> Iterator[memoryview]:
        """Yield the content in pieces; a piece is valid until the next is requested.

        Raises:
            WeightsError: it has changed, or cannot be read.
        """
        try:
            for piece, status in file_pieces(self.path):
                if _version(status) != self._version:
                    raise self._changed_error(status.st_size)
                yield piece
        except OSError as error:
            raise WeightsError(f"{self.path} cannot be read: {reason_of(error)}", is_resumable=True) from error

    def _changed_error(self, size: int) -> WeightsError:
        sizes = f": it had {self.size} bytes and now has {size}" if size != self.size else ""
        return WeightsError(
            f"{self.path} was changed while it was read{sizes}",
            hint="restore the file with its modification time (cp -p), or start again",
            is_resumable=True,
        )


def plain_pieces(path: Path) -> Iterator[memoryview]:
    """Yield the content of a regular file in pieces; a piece is valid until the next is requested.

    A file that this run has written is read like this: flushing it may change its modification time on NFS.
    """
    return (piece for piece, _ in file_pieces(path))


def file_pieces(path: Path) -> Iterator[tuple[memoryview, os.stat_result]]:
    """Yield the content of a regular file in large pieces, each with the status of the file after it was read; at the
    end an empty piece.
    """
    descriptor = descriptor_of(path)
    try:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        memory, begin = memoryview(bytearray(_PIECE_BYTES)), 0
        while True:
            count = os.preadv(descriptor, [memory], begin)
            yield memory[:count], os.fstat(descriptor)
            if not count:
                return
            begin += count
    finally:
        os.close(descriptor)


def _version(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
