"""The journal of a run: an append-only file of its finished steps, from which another process can resume.

Each line is a checksum and a JSON object. It is written after the data that it describes is on disk, and flushed before
the run continues. So a killed process, or a power failure, leaves at most an incomplete last line, which is ignored.
The first line is the identity of the run: everything that decides the bytes of the result.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime.errors import OutputError
from runtime.host.regular_files import is_there, read_regular
from runtime.workers.comparison import FILE_TIMES

NAME = "journal"
RUN, STEP, MICRO_BATCH = "run", "step", "micro_batch"


class Journal:
    """The journal of one run.

    Args:
        path: the file; it is created if missing.
        is_mine: whether this worker has the file; another worker only keeps the entries in memory.

    Attributes:
        entries: in order; each has a `kind`.
    """

    def __init__(self, path: Path, *, is_mine: bool = True) -> None:
        self.path = path
        self.entries: list[dict[str, Any]] = []
        self._descriptor: int | None = None
        if is_mine:
            self.entries, self._ends = _read(path)
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            self.keep(len(self.entries))

    def keep(self, count: int) -> None:
        """Remove all entries but the first `count`."""
        assert self._descriptor is not None, "the file is another worker's"
        del self.entries[count:], self._ends[count:]
        whole = self._ends[-1] if count else 0
        os.ftruncate(self._descriptor, whole)
        os.lseek(self._descriptor, whole, os.SEEK_SET)

    def append(self, kind: str, **facts: Any) -> None:
        """Append an entry, durably.

        Raises:
            OSError: when it cannot be written; the journal is unchanged then.
        """
        entry = {"kind": kind, **facts}
        if self._descriptor is not None:
            self._write(self._descriptor, _line(entry))
        self.entries.append(entry)

    def _write(self, descriptor: int, line: bytes) -> None:
        start = os.lseek(descriptor, 0, os.SEEK_CUR)
        try:
            done = 0
            while done < len(line):
                done += os.write(descriptor, line[done:])
            os.fsync(descriptor)
        except BaseException:
            os.ftruncate(descriptor, start)
            os.lseek(descriptor, start, os.SEEK_SET)
            raise
        self._ends.append(start + len(line))

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """All entries of a kind, in order."""
        return [entry for entry in self.entries if entry["kind"] == kind]

    def require_same_run(self, identity: Mapping[str, str]) -> None:
        """Reject a run that differs from the one that was started.

        Raises:
            OutputError: naming each ingredient that differs.
        """
        begun = self.of_kind(RUN)
        before = begun[0].get("identity") if len(begun) == 1 else None
        steps = [entry.get("index") for entry in self.of_kind(STEP)]
        if not isinstance(before, dict) or steps != list(range(len(steps))):
            raise OutputError(
                f"{self.path} is damaged: it is not the journal of one run",
                hint=f"remove {self.path.parent} to start again",
            )
        names = _differing(before, identity)
        if names:
            differences = ", ".join(_difference(name, before.get(name), identity.get(name)) for name in names)
            raise OutputError(
                f"this run differs from the interrupted one in {differences}",
                hint=f"resume it with the inputs that it was started with, or remove {self.path.parent} to start again",
            )

    def close(self) -> None:
        """Close the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)


def read(path: Path) -> list[dict[str, Any]]:
    """The entries of a journal, which another process may be writing."""
    return _read(path)[0]


def unit_of(entries: Sequence[Mapping[str, Any]]) -> str:
    """What the steps of a run finish: the `unit` of its identity, by default subgraphs."""
    identity = entries[0].get("identity") if entries else None
    return str(identity.get("unit", "subgraph")) if isinstance(identity, Mapping) else "subgraph"


def _differing(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The ingredients in which two runs differ.

    Files of a checkpoint that were written again count as changed, but only on one host: on another one, they are
    copies, with times of their own and the same content.
    """
    names = [name for name in dict.fromkeys((*before, *now)) if before.get(name) != now.get(name)]
    hosts = [str(identity.get(FILE_TIMES)).partition(" ")[0] for identity in (before, now)]
    if FILE_TIMES in names and hosts[0] == hosts[1] and "checkpoint" not in names:
        names.append("checkpoint")
    return [name for name in names if name != FILE_TIMES]


def _difference(name: str, before: str | None, now: str | None) -> str:
    shown = [str(value) for value in (before, now)]
    is_digest = any(len(value) >= 40 for value in shown)
    return f"the {name}" if is_digest else f"the {name} ({shown[0]} then, {shown[1]} now)"


def _line(entry: Mapping[str, Any]) -> bytes:
    text = json.dumps(entry, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _read(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The entries of a file in complete lines, and the offset at which each line ends."""
    data = read_regular(path) if is_there(path) else b""
    entries: list[dict[str, Any]] = []
    ends: list[int] = []
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
        ends.append((ends[-1] if ends else 0) + len(line))
    return entries, ends
