"""The events of a run, and watchers that receive them: each event is a name and facts.

Each has a `rank`, that of the worker. Those of the first worker arrive at once. Of the others, it gets the batches
(summed up), the finished subgraphs and the warnings, whenever the workers share their events.

inputs      artifact, weights, recipe (name and text), out, device, dtype: what runs, before anything runs
workers     hosts: the machine of each worker, by rank
begin       subgraphs, batches, tokens, modules, resumed_at, device, workers
plan        the predicted memory and traffic of the run, and of each of its `subgraphs`
phase       index, label, phase: work on a subgraph goes on with one of the phases below
load        index, label: the weights of a subgraph are loaded
batch       index, tokens, batches, seconds: a batch, or several, have passed through a subgraph
solved      index, name, done, count: a module is quantized, `done` of `count` in this subgraph
tuned       index, done, count: a step of gradient descent, `done` of `count` in this subgraph
module      index and the fields of its report: a module is quantized and written
subgraph    index, label, num_modules, seconds, tokens, bytes read and written, peak memory: a subgraph is finished;
            that of the first worker comes last, with the tokens of all workers (all_tokens) and the rank of the slowest
earlier     as subgraph: an earlier process has finished a subgraph; told after `begin` of a resumed run
warning     text
evaluated   batches: all batches of an evaluation have passed
published   path, bytes, seconds, warnings: the checkpoint is complete

docs/operate.md lists all their facts, and the events that only a log has (`runtime.host.event_log`).
"""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from runtime.console import human_bytes
from runtime.workers.group import Alone, Workers

READ = "read weights"
MEASURE = "measure"
QUANTIZE = "quantize"
PROPAGATE = "propagate"
WRITE = "write"
HASH = "hash files"  # after the last subgraph, if digests are not finished; its label is what is left
REPLAY = "replay"  # finished subgraphs run again, after an interruption or a lack of memory


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
