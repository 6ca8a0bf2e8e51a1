"""The lock on an artifact's path: one process at a time compiles it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from runtime.host.publish import disk_errors


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time make the artifact at `path`."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.parent / f".{path.name}.lock", mode=0o666)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
