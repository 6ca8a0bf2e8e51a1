"""The digests of a run: of its source weights, and of the files that it writes, computed while it runs.

A source file is hashed when the run begins to read files of about this place in the order of their names, so that most
of it is in the page cache for one of both; a written file after the last step that writes to it. Workers
divide the files.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from runtime.console import human_bytes
from runtime.provenance.hashing import Hasher, Pieces, WatchedFile, plain_pieces
from runtime.provenance.record import FILES, TENSORS, FileDigest, WeightsFacts
from runtime.streaming.events import HASH
from runtime.workers.agreement import agreed
from runtime.workers.division import Division

if TYPE_CHECKING:
    from runtime.checkpoint.reader import Checkpoint
    from runtime.checkpoint.writer import ShardWriter
    from runtime.streaming.events import Watchers
    from runtime.streaming.schedule import Schedule
    from runtime.workers.group import Workers

_SOURCE, _OUTPUT = "source:", "output:"
_KEPT = "digests-"  # the beginning of the names of files
_LOOK_S = 1.0  # between two looks at the work that is left


@dataclass(frozen=True, slots=True)
class _HashedSource:
    """A file or a tensor of the source.

    Attributes:
        line: its name in the list of digests.
        size: in bytes.
        changed_ns: when a file was modified last; 0 for a tensor.
        pieces: its content.
    """

    line: str
    size: int
    changed_ns: int
    pieces: Pieces


class RunDigests(AbstractContextManager["RunDigests"]):
    """Digests of the source weights and of the written files.

    Args:
        checkpoint: the source.
        writer: of the result.
        schedule: which step writes what.
        workers: of the run.
        folder: of the run, where finished digests of source files are kept for a resumed run.
        hash_weights: whether the source is hashed; if not, only the sizes of its files are known.
        hash_output: whether the written files are hashed; parts are hashed when they are joined.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        writer: ShardWriter,
        schedule: Schedule,
        workers: Workers,
        folder: Path,
        *,
        hash_weights: bool,
        hash_output: bool,
    ) -> None:
        self._workers, self._writer = workers, writer
        self._num_steps = len(schedule.steps)
        self._form = FILES if checkpoint.shards else TENSORS
        self._sources = {source.line: source for source in _sources_of(checkpoint)}
        self._total_bytes = checkpoint.total_bytes
        owners = Division(workers.size).owners((line, source.size) for line, source in self._sources.items())
        mine = [line for line in self._sources if owners[line] == workers.rank]
        self._file = folder / f"{_KEPT}{workers.rank}"
        self._known = self._kept(folder) if hash_weights else {}
        self._waiting = [line for line in mine if _SOURCE + line not in self._known] if hash_weights else []
        self._num_sources, self._announced_bytes = len(self._waiting), 0
        self._last_steps = _last_steps(writer, schedule) if hash_output else {}
        self._num_kept = len(self._known)
        self._hasher = Hasher()

    def __exit__(self, *_: object) -> None:
        self._hasher.close()

    def reach(self, index: int) -> None:
        """Take note that a step begins: hash the source files that are read about now.

        Raises:
            WeightsError: a source file has changed or cannot be read.
        """
        self._hasher.require_sound()
        num_done = self._num_sources - len(self._waiting)
        wanted = -(-self._num_sources * (index + 2) // max(self._num_steps, 1)) - num_done
        self._waiting, some = self._waiting[max(wanted, 0) :], self._waiting[: max(wanted, 0)]
        for line in some:
            self._add(_SOURCE + line, self._sources[line].pieces, self._sources[line].size)

    def written(self, index: int) -> None:
        """Take note that all workers have written a step: hash the files that no later step writes to."""
        self._keep()
        shards = self._writer.files.shards
        for number, last in list(self._last_steps.items()):
            if last <= index:
                del self._last_steps[number]
                if number % self._workers.size == self._workers.rank:
                    path = self._writer.directory / shards[number].name
                    self._add(_OUTPUT + shards[number].name, partial(plain_pieces, path), shards[number].num_bytes)

    def _kept(self, folder: Path) -> dict[str, str]:
        """Return the digests that an interrupted run has computed, of files that have not changed since."""
        found: dict[str, str] = {}
        for path in sorted(folder.glob(f"{_KEPT}*")):
            try:
                entries = msgspec.json.decode(path.read_bytes(), type=dict[str, tuple[int, int, str]])
            except (OSError, ValueError):  # the disk was full, or the power went off
                continue
            for line, (size, changed_ns, digest) in entries.items():
                source = self._sources.get(line)
                if source is not None and (source.size, source.changed_ns) == (size, changed_ns) and changed_ns:
                    found[_SOURCE + line] = digest
        return found

    def _keep(self) -> None:
        """Keep the finished digests of source files for a resumed run; it computes those that cannot be kept."""
        finished = list(self._hasher.digests.items())
        found = self._known | {key: digest for key, digest in finished if key.startswith(_SOURCE)}
        if self._form != FILES or len(found) == self._num_kept:
            return
        entries = {}
        for key, digest in found.items():
            source = self._sources[key.removeprefix(_SOURCE)]
            entries[source.line] = source.size, source.changed_ns, digest
        with contextlib.suppress(OSError):
            partial_file = self._file.with_name(f".{self._file.name}")
            partial_file.write_bytes(msgspec.json.encode(entries))
            os.replace(partial_file, self._file)
            self._num_kept = len(found)

    def _add(self, key: str, pieces: Pieces, size: int) -> None:
        self._announced_bytes += size
        self._hasher.add(key, pieces)

    def finish(self, watch: Watchers) -> tuple[WeightsFacts, dict[str, str]]:
        """Wait for all digests, after everything is written; return those of the source and of the written files.

        Raises:
            WeightsError: a source file has changed or cannot be read.
        """
        with agreed(self._workers):
            self.reach(self._num_steps)
            self.written(self._num_steps)
        while True:  # in short periods, because a worker that waits longer takes the others for dead
            with agreed(self._workers):
                is_done = self._hasher.wait(_LOOK_S)
            left = self._workers.exchange(0 if is_done else max(self._announced_bytes - self._hasher.bytes_done, 1))
            if not any(left):
                break
            facts = {"index": self._num_steps - 1, "label": f"{human_bytes(sum(left))} left"}
            watch.tell("phase", **facts, phase=HASH)
        found: dict[str, str] = {}
        for of_worker in self._workers.exchange(self._known | self._hasher.digests):
            found |= of_worker
        outputs = {key.removeprefix(_OUTPUT): value for key, value in found.items() if key.startswith(_OUTPUT)}
        return self._weights_facts(found), outputs

    def _weights_facts(self, found: dict[str, str]) -> WeightsFacts:
        lines = [f"{found.get(_SOURCE + line, '')}  {line}\n" for line in self._sources]
        is_hashed = any(key.startswith(_SOURCE) for key in found)
        files = [
            FileDigest(name=line, bytes=source.size, sha256=found.get(_SOURCE + line, ""))
            for line, source in self._sources.items()
        ]
        return WeightsFacts(
            form=self._form,
            bytes=self._total_bytes,
            sha256=hashlib.sha256("".join(lines).encode()).hexdigest() if is_hashed else "",
            files=tuple(files) if self._form == FILES else (),
        )


def _sources_of(checkpoint: Checkpoint) -> Iterator[_HashedSource]:
    """Yield the files of a checkpoint in the order of their names, or the tensors of one in memory."""
    for path in sorted(checkpoint.shards, key=lambda one: one.name):
        file = WatchedFile(path)
        yield _HashedSource(path.name, file.size, file.changed_ns, file.pieces)
    if not checkpoint.shards:
        for key in checkpoint:
            stored = checkpoint.stored(key)
            line = f"{key} {stored.dtype} {list(stored.shape)}"
            yield _HashedSource(line, stored.num_bytes, 0, partial(_tensor_pieces, checkpoint, key))


def _tensor_pieces(checkpoint: Checkpoint, key: str) -> Iterator[memoryview]:
    from runtime.checkpoint.dtypes import bytes_of

    return (bytes_of(piece.contiguous()) for piece in checkpoint.looked_at(key))


def _last_steps(writer: ShardWriter, schedule: Schedule) -> dict[int, int]:
    """Map the number of each shard to the last step that writes to it; tensors of no step are written at the end."""
    found = dict.fromkeys(range(len(writer.files.shards)), 0)
    tensors = [(step.index, step.writes) for step in schedule.steps] + [(len(schedule.steps), schedule.rest)]
    for index, stored in tensors:
        for one in stored:
            shard = writer.files.slots[one.name].shard
            found[shard] = max(found[shard], index)
    return found
