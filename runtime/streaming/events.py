"""The events of a run, and watchers that receive them: each event is a name and facts.

begin       subgraphs, batches, tokens, modules, resumed_at, device
phase       index, label, phase: work on a subgraph goes on with one of the phases below
load        index, label: the weights of a subgraph are loaded
batch       index, tokens: a batch has passed through a subgraph
solved      index, name, done, count: a module is quantized, `done` of `count` in this subgraph
module      index and the fields of its report: a module is quantized and written
subgraph    index, label, num_modules, seconds, tokens, bytes read and written, peak memory: a subgraph is finished
warning     text
end         seconds, bytes, path
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from runtime.console import human_bytes, warn
from runtime.errors import OutputError
from runtime.host.publish import disk_errors
from runtime.host.regular_files import NotRegularError, open_to_append

READ = "read weights"
MEASURE = "measure"
QUANTIZE = "quantize"
PROPAGATE = "propagate"
WRITE = "write"
REPLAY = "replay"  # finished subgraphs run again, after an interruption or a lack of memory

_BRIEF = ("phase", "load", "batch", "solved")  # too many for a log


class Watcher(Protocol):
    """Receives events, and ignores those of unknown names."""

    def tell(self, event: str, **facts: Any) -> None:
        """Receive an event."""


class Watchers:
    """Passes events on to several watchers, and collects the warnings for the summary.

    Args:
        members: in the order in which they receive events.
    """

    def __init__(self, members: Sequence[Watcher]) -> None:
        self.members = members
        self.warnings: list[str] = []

    def tell(self, event: str, **facts: Any) -> None:
        """Pass an event on."""
        if event == "warning":
            self.warnings.append(facts["text"])
        for member in self.members:
            member.tell(event, **facts)


class Lines:
    """Prints a line for each subgraph and each warning, for logs and pipes.

    Args:
        say: prints a line.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self._begin: dict[str, Any] = {}
        self._start = 0.0
        self._done = 0

    def tell(self, event: str, **facts: Any) -> None:
        """Receive an event."""
        if event == "begin":
            self._begin, self._start = facts, time.perf_counter()
            if facts["resumed_at"]:
                self.say(f"resuming after {facts['resumed_at']} of {facts['subgraphs']} subgraphs")
        elif event == "warning":
            self.say(facts["text"])
        elif event == "subgraph":
            self._done += facts["tokens"]
            parts = step_facts(facts)
            if facts["tokens"]:
                parts[2:2] = [f"{self._begin['batches']} batches"]
                parts[4:4] = [f"{self._seconds_left():.0f} s left"]
            self.say(f"[{facts['index'] + 1}/{self._begin['subgraphs']}] {facts['label']}: {', '.join(parts)}")

    def _seconds_left(self) -> float:
        """An estimate from the time per token so far."""
        elapsed = time.perf_counter() - self._start
        total: int = self._begin["total_tokens"]
        return elapsed * max(total - self._done, 0) / self._done


def step_facts(facts: Mapping[str, Any]) -> list[str]:
    """Return a finished subgraph's modules, time, speed and memory, from the facts of its event."""
    parts = [f"{facts['num_modules']} modules", f"{facts['seconds']:.1f} s"]
    if facts["tokens"]:
        parts.append(f"{facts['tokens'] / max(facts['seconds'], 1e-9):,.0f} tokens/s")
    parts.append(human_bytes(facts["peak_host_bytes"]))
    if facts["peak_device_bytes"]:
        parts.append(f"{human_bytes(facts['peak_device_bytes'])} on the device")
    return parts


class EventLog:
    """Writes every event except those of `_BRIEF` as a line of JSON, with the time in seconds since 1970.

    If the file cannot be written any more, the log ends with a warning, and the run continues.

    Args:
        path: of the file; a resumed run appends to it.

    Raises:
        OutputError: when it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with disk_errors(path):
                self._file: TextIO | None = open_to_append(path)
        except NotRegularError as error:
            raise OutputError(f"cannot write the log {path}: {error.strerror}") from error

    def tell(self, event: str, **facts: Any) -> None:
        """Receive an event."""
        if event in _BRIEF or self._file is None:
            return
        line = json.dumps({"event": event, "time": round(time.time(), 3), **facts})
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        warn(f"cannot write the log {self._path} ({error.strerror}); the run continues without it")
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # the warning covers the rest of the buffer
                self._file.close()
            self._file = None

    def __enter__(self) -> EventLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
