"""What a run has finished, so that another process can go on: a file that only grows, one line for each fact.

A line is a checksum and a JSON object. It is written after what it speaks of is safely on disk, and flushed to disk
before the run goes on; so a process that is killed, or a machine that loses power, leaves at most a last line that is
cut short, which is ignored. The first line says what run it is: everything that decides the bytes of the result.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.errors import OutputError
from runtime.host.regular_files import is_there, read_regular

NAME = "journal"
RUN, STEP, MICRO_BATCH = "run", "step", "micro_batch"


class Journal:
    """The facts of one run.

    Args:
        path: the file; it is made if it is not there.

    Attributes:
        entries: what it holds, in order; each has a `kind`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries, whole = _read(path)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        os.ftruncate(self._descriptor, whole)
        os.lseek(self._descriptor, whole, os.SEEK_SET)

    def append(self, kind: str, **facts: Any) -> None:
        """Add a fact; when this returns the disk has it.

        Raises:
            OSError: when the disk says so; the fact does not count then.
        """
        entry = {"kind": kind, **facts}
        line = _line(entry)
        start = os.lseek(self._descriptor, 0, os.SEEK_CUR)
        try:
            done = 0
            while done < len(line):
                done += os.write(self._descriptor, line[done:])
            os.fsync(self._descriptor)
        except BaseException:
            os.ftruncate(self._descriptor, start)
            os.lseek(self._descriptor, start, os.SEEK_SET)
            raise
        self.entries.append(entry)

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """All facts of a kind, in order."""
        return [entry for entry in self.entries if entry["kind"] == kind]

    def require_same_run(self, identity: Mapping[str, str]) -> None:
        """Refuse to go on with another run than the one that was begun.

        Raises:
            OutputError: naming each ingredient that differs.
        """
        begun = self.of_kind(RUN)
        before = begun[0].get("identity") if len(begun) == 1 else None
        steps = [entry.get("index") for entry in self.of_kind(STEP)]
        if not isinstance(before, dict) or steps != list(range(len(steps))):
            raise OutputError(
                f"{self.path} is damaged: it is not the journal of one run",
                hint=f"remove {self.path.parent} to start anew",
            )
        names = [name for name in dict.fromkeys((*before, *identity)) if before.get(name) != identity.get(name)]
        if names:
            differences = ", ".join(_difference(name, before.get(name), identity.get(name)) for name in names)
            raise OutputError(
                f"the interrupted run was another one; what differs: {differences}",
                hint=f"resume it with what it was begun with, or remove {self.path.parent} to start anew",
            )

    def close(self) -> None:
        """Give the file back."""
        os.close(self._descriptor)


def read(path: Path) -> list[dict[str, Any]]:
    """The facts in a journal that may be another process's; nothing is changed."""
    return _read(path)[0]


def _difference(name: str, before: str | None, now: str | None) -> str:
    shown = [str(value) for value in (before, now)]
    is_digest = any(len(value) >= 40 for value in shown)
    return f"the {name}" if is_digest else f"the {name} ({shown[0]} then, {shown[1]} now)"


def _line(entry: Mapping[str, Any]) -> bytes:
    text = json.dumps(entry, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The entries of a file, and how many of its bytes are whole lines."""
    data = read_regular(path) if is_there(path) else b""
    entries: list[dict[str, Any]] = []
    whole = 0
    for line in data.splitlines(keepends=True):
        if not line.endswith(b"\n") or line[:9] != b"%08x " % zlib.crc32(line[9:-1]):
            break
        try:
            entry = json.loads(line[9:])
        except (ValueError, RecursionError):
            break
        if not isinstance(entry, dict) or not isinstance(entry.get("kind"), str):
            break
        entries.append(entry)
        whole += len(line)
    return entries, whole
