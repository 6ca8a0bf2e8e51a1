"""The events of a run, and watchers that receive them: each event is a name and facts.

Each has a `rank`, that of the worker. Those of the first worker arrive at once. Of the others, it gets the batches
(summed up), the finished subgraphs and the warnings, whenever the workers share their events.

workers     hosts: the machine of each worker, by rank
begin       subgraphs, batches, tokens, modules, resumed_at, device
phase       index, label, phase: work on a subgraph goes on with one of the phases below
load        index, label: the weights of a subgraph are loaded
batch       index, tokens, batches, seconds: a batch, or several, have passed through a subgraph
solved      index, name, done, count: a module is quantized, `done` of `count` in this subgraph
module      index and the fields of its report: a module is quantized and written
subgraph    index, label, num_modules, seconds, tokens, bytes read and written, peak memory: a subgraph is finished;
            that of the first worker comes last, with the tokens of all workers (all_tokens) and the rank of the slowest
warning     text
evaluated   batches: all batches of an evaluation have passed
end         seconds, bytes, path
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from runtime.console import human_bytes, warn
from runtime.errors import OutputError
from runtime.host.publish import disk_errors
from runtime.host.regular_files import NotRegularError, open_to_append
from runtime.workers.group import Alone, Workers

READ = "read weights"
MEASURE = "measure"
QUANTIZE = "quantize"
PROPAGATE = "propagate"
WRITE = "write"
EVALUATE = "evaluate"
REPLAY = "replay"  # finished subgraphs run again, after an interruption or a lack of memory

_BRIEF = ("phase", "load", "batch", "solved")  # too many for a log


class Watcher(Protocol):
    """Receives events, and ignores those of unknown names."""

    def tell(self, event: str, **facts: Any) -> None:
        """Receive an event."""


class Watchers:
    """Passes events on to several watchers, and collects the warnings for the summary.

    Args:
        members: in the order in which they receive events; those of the first worker also receive events of the others.
        workers: of the run.
    """

    def __init__(self, members: Sequence[Watcher], workers: Workers | None = None) -> None:
        self.members = members
        self.warnings: list[str] = []
        self._workers = Alone() if workers is None else workers
        self._unshared: list[dict[str, Any]] = []
        self._held: dict[str, Any] | None = None  # the subgraph event of the first worker
        self._speeds = Speeds()
        self._since = time.perf_counter()
        self._are_hosts_known = self._workers.size == 1

    def tell(self, event: str, **facts: Any) -> None:
        """Pass an event on."""
        facts = {"rank": self._workers.rank, **facts}
        if event == "warning":
            self.warnings.append(facts["text"])
        if event in ("batch", "phase"):
            now = time.perf_counter()
            facts |= {"batches": 1, "seconds": now - self._since} if event == "batch" else {}
            self._since = now
        if self._workers.size > 1:
            self._keep(event, facts)
            if event == "subgraph" and self._workers.rank == 0:
                self._held = facts
                return
        self._pass_on(event, facts)

    def share(self) -> None:
        """Give the events of all workers since the last call to the first one; every worker must call it."""
        if self._workers.size == 1:
            return
        found = self._workers.exchange({"host": socket.gethostname(), "events": self._unshared})
        self._unshared = []
        self._since = time.perf_counter()  # the time of the next batch is not that of waiting for other workers
        if self._workers.rank:
            return
        if not self._are_hosts_known:
            self._are_hosts_known = True
            self._pass_on("workers", {"rank": 0, "hosts": [facts["host"] for facts in found]})
        finished = []
        for rank, message in enumerate(found):
            for event in message["events"]:
                facts = {**event, "rank": rank}
                kind = facts.pop("event")
                if kind == "batch":
                    self._speeds.add(facts)
                finished += [facts] if kind == "subgraph" else []
                is_known = kind == "warning" and facts["text"] in self.warnings
                if rank and not is_known:
                    self.warnings += [facts["text"]] if kind == "warning" else []
                    self._pass_on(kind, facts)
        if self._held is not None:
            tokens = sum(facts["tokens"] for facts in finished)
            held, self._held = self._held, None
            self._pass_on("subgraph", {**held, "all_tokens": tokens, "slowest": self._speeds.slowest()})
            self._speeds = Speeds()

    def _keep(self, event: str, facts: dict[str, Any]) -> None:
        """Keep an event until the workers share theirs; batches of a subgraph are summed up."""
        last = self._unshared[-1] if self._unshared else None
        if event == "batch" and last is not None and (last["event"], last.get("index")) == (event, facts["index"]):
            for name in ("tokens", "batches", "seconds"):
                last[name] += facts[name]
        elif event in ("batch", "subgraph", "warning"):
            self._unshared.append({"event": event, **facts})

    def _pass_on(self, event: str, facts: dict[str, Any]) -> None:
        for member in self.members:
            member.tell(event, **facts)


class Speeds:
    """The tokens and seconds of each worker."""

    def __init__(self) -> None:
        self._sums: dict[int, tuple[int, float]] = {}

    def add(self, batch: Mapping[str, Any]) -> None:
        """Add a batch, or several, from the facts of their event."""
        tokens, seconds = self._sums.get(batch["rank"], (0, 0.0))
        self._sums[batch["rank"]] = tokens + batch["tokens"], seconds + batch["seconds"]

    def slowest(self) -> int | None:
        """The rank of the worker with the fewest tokens per second; None if fewer than two have any."""
        speeds = {rank: tokens / max(seconds, 1e-9) for rank, (tokens, seconds) in self._sums.items()}
        return min(speeds, key=lambda rank: (speeds[rank], rank)) if len(speeds) > 1 else None


class Lines:
    """Prints a line for each subgraph and each warning, for logs and pipes.

    Args:
        say: prints a line.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self._begin: dict[str, Any] = {}
        self._hosts: list[str] = []
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
        elif event == "workers":
            self._hosts = facts["hosts"]
        elif event == "subgraph" and facts["rank"] == 0:
            tokens = facts.get("all_tokens", facts["tokens"])
            self._done += tokens
            parts = step_facts(facts, self._hosts)
            if tokens:
                at = 1 + ("num_modules" in facts)  # after the time
                parts[at:at] = [f"{self._begin['batches']} batches"]
                parts[at + 2 : at + 2] = [f"{self._seconds_left():.0f} s left"]
            self.say(f"[{facts['index'] + 1}/{self._begin['subgraphs']}] {facts['label']}: {', '.join(parts)}")

    def _seconds_left(self) -> float:
        """An estimate from the time per token so far."""
        elapsed = time.perf_counter() - self._start
        total: int = self._begin["total_tokens"]
        return elapsed * max(total - self._done, 0) / self._done


def step_facts(facts: Mapping[str, Any], hosts: Sequence[str] = ()) -> list[str]:
    """Return a finished subgraph's modules, time, speed and memory, from the facts of its event.

    Args:
        facts: of the event.
        hosts: the machine of each worker, to name the slowest one.
    """
    parts = [f"{facts['num_modules']} modules"] if "num_modules" in facts else []  # none in an evaluation
    parts.append(f"{facts['seconds']:.1f} s")
    tokens = facts.get("all_tokens", facts["tokens"])
    if tokens:
        parts.append(f"{tokens / max(facts['seconds'], 1e-9):,.0f} tokens/s")
    parts.append(human_bytes(facts["peak_host_bytes"]))
    if facts["peak_device_bytes"]:
        parts.append(f"{human_bytes(facts['peak_device_bytes'])} on the device")
    slowest = facts.get("slowest")
    return parts if slowest is None else [*parts, slowest_text(slowest, hosts)]


def slowest_text(rank: int, hosts: Sequence[str]) -> str:
    """Name the slowest worker, and its machine if there are several."""
    return f"slowest: worker {rank}{f' on {hosts[rank]}' if len(set(hosts)) > 1 else ''}"


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
