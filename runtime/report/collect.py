"""Collect the facts of a run from its events, as a watcher of the run or from the lines of its log.

A log may have several processes, and several runs. A process that resumes a run takes over what earlier ones in the
same log have finished; any other one starts anew, so that the last run counts. Processes of the command `evaluate` are
left out.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping
from typing import Any

import msgspec

from runtime.report.facts import (
    FINISHED,
    MOST_MODULES,
    Count,
    MeasuredSubgraph,
    ModuleFields,
    Perplexity,
    PlannedSubgraph,
    ReportedModule,
    RunFacts,
    checked,
)

UNFINISHED = "not finished: its log has no last event"


class _RecipeEvent(msgspec.Struct):
    name: str = ""
    text: str | None = None


class _RunEvent(msgspec.Struct):
    command: list[str] = []
    versions: dict[str, str] = {}
    artifact: str | None = None
    weights: str | None = None
    recipe: _RecipeEvent | None = None
    data: list[str] = []


class _InputsEvent(msgspec.Struct):
    artifact: str | None = None
    weights: str | None = None
    recipe: _RecipeEvent | None = None
    dtype: str | None = None


class _BeginEvent(msgspec.Struct):
    subgraphs: Count
    batches: Count = 0
    tokens: Count = 0
    resumed_at: Count = 0
    device: str = ""
    workers: Count = 1


class _PlanEventEntry(msgspec.Struct):
    index: Count
    label: str = ""
    host: Count = 0
    device: Count = 0
    read: Count = 0
    written: Count = 0
    seconds: float | None = None


class _PlanEvent(msgspec.Struct):
    subgraphs: list[_PlanEventEntry] = []
    rates: str = ""


class _PhaseEvent(msgspec.Struct):
    index: Count
    phase: str


class _ModuleEvent(ModuleFields, frozen=True):
    index: Count = 0


class _SubgraphEvent(msgspec.Struct):
    index: Count
    label: str = ""
    rank: Count = 0
    num_modules: Count = 0
    seconds: float | None = None
    tokens: Count = 0
    all_tokens: Count | None = None
    bytes_read: Count = 0
    bytes_written: Count = 0
    peak_host_bytes: Count = 0
    peak_device_bytes: Count = 0


class _WarningEvent(msgspec.Struct):
    text: str


class _PublishedEvent(msgspec.Struct):
    path: str = ""
    bytes: Count = 0
    seconds: float | None = None


class _EvaluationEvent(msgspec.Struct):
    which: str = ""
    perplexity: float | None = None
    tokens: Count = 0
    seconds: float | None = None


class _LastEvent(msgspec.Struct):
    error: str = ""
    signal: str = ""
    path: str | None = None
    bytes: Count | None = None
    seconds: float | None = None


class Collector:
    """Receives events, and returns the facts of the last run that they describe."""

    def __init__(self) -> None:
        self._receive: dict[str, tuple[type[Any], Any]] = {
            "run": (_RunEvent, self._run),
            "inputs": (_InputsEvent, self._inputs),
            "begin": (_BeginEvent, self._begin),
            "plan": (_PlanEvent, self._plan),
            "phase": (_PhaseEvent, self._phase),
            "module": (_ModuleEvent, self._module),
            "subgraph": (_SubgraphEvent, self._subgraph),
            "earlier": (_SubgraphEvent, self._earlier),
            "warning": (_WarningEvent, self._warning),
            "published": (_PublishedEvent, self._published),
            "evaluation": (_EvaluationEvent, self._evaluation),
            "end": (_LastEvent, self._end),
            "failed": (_LastEvent, self._end),
            "interrupted": (_LastEvent, self._end),
        }
        self._modules: dict[str, tuple[int, ReportedModule]] = {}
        self._subgraphs: dict[int, MeasuredSubgraph] = {}
        self._phases: dict[int, dict[str, float]] = {}
        self._running: tuple[int, str, float] | None = None
        self._is_evaluation = False
        self._forget()

    def _forget(self) -> None:
        """Forget all but what a resumed run takes over."""
        self._facts: dict[str, Any] = {"outcome": UNFINISHED}
        self._warnings: dict[str, None] = {}
        self._evaluations: dict[str, _EvaluationEvent] = {}
        self._event = ""
        self.num_events = 0

    def tell(self, event: str, **facts: Any) -> None:
        """Receive an event as a watcher."""
        self.receive(event, facts)

    def receive(self, event: str, facts: Mapping[str, Any]) -> None:
        """Receive an event; unknown ones are ignored.

        Raises:
            msgspec.ValidationError: if a field has another type than the events of a run.
        """
        known = self._receive.get(event)
        if known is not None:
            entry = msgspec.convert(facts, known[0])
            if isinstance(entry, _RunEvent):
                commands = [word for word in entry.command[1:] if not word.startswith("-")]
                self._is_evaluation = commands[:1] == ["evaluate"]
            if self._is_evaluation:
                return
            if self._facts.get("started") is None and isinstance(facts.get("time"), float):
                self._facts["started"] = facts["time"]
            self._event = event
            known[1](entry)
            self.num_events += 1

    def _run(self, entry: _RunEvent) -> None:
        self._forget()
        self._facts |= {
            "command": shlex.join(entry.command),
            "versions": entry.versions,
            "settings": {"calibration data": ", ".join(entry.data)} if entry.data else {},
        }
        self._name(entry.weights, entry.artifact, entry.recipe)

    def _inputs(self, entry: _InputsEvent) -> None:
        self._name(entry.weights, entry.artifact, entry.recipe)
        if entry.dtype:
            self._facts["settings"] = self._facts.get("settings", {}) | {"dtype of the run": entry.dtype}

    def _name(self, weights: str | None, artifact: str | None, recipe: _RecipeEvent | None) -> None:
        """Take the names of the model and of the recipe."""
        if weights:
            self._facts["model"] = weights.rstrip("/").rpartition("/")[2]
        elif artifact and "model" not in self._facts:
            self._facts["model"] = artifact.rstrip("/").rpartition("/")[2]
        if recipe is not None:
            self._facts["recipe_name"] = recipe.name.rstrip("/").rpartition("/")[2]
            self._facts["recipe"] = recipe.text or self._facts.get("recipe", "")

    def _begin(self, entry: _BeginEvent) -> None:
        if "num_subgraphs" in self._facts:  # another run of the same process
            self._forget()
        at = entry.resumed_at
        self._modules = {name: found for name, found in self._modules.items() if found[0] < at}
        self._subgraphs = {index: found for index, found in self._subgraphs.items() if index < at}
        self._phases = {index: found for index, found in self._phases.items() if index < at}
        self._running = None
        settings = {"batches": f"{entry.batches:,}", "tokens": f"{entry.tokens:,}"} if entry.batches else {}
        self._facts |= {
            "num_subgraphs": entry.subgraphs,
            "resumed_at": at,
            "device": entry.device,
            "num_workers": entry.workers,
            "settings": self._facts.get("settings", {}) | settings,
        }

    def _plan(self, entry: _PlanEvent) -> None:
        self._facts["rates"] = entry.rates
        self._facts["plan"] = [
            PlannedSubgraph(*(getattr(one, name) for name in PlannedSubgraph.__struct_fields__))
            for one in entry.subgraphs
        ]

    def _phase(self, entry: _PhaseEvent) -> None:
        """Add the time since the last phase began to that one; only watchers receive these events."""
        now = time.perf_counter()
        if self._running is not None:
            index, phase, since = self._running
            found = self._phases.setdefault(index, {})
            found[phase] = found.get(phase, 0.0) + now - since
        self._running = (entry.index, entry.phase, now)

    def _module(self, entry: _ModuleEvent) -> None:
        if len(self._modules) <= MOST_MODULES:  # one too many is rejected at the end
            self._modules[entry.name] = (entry.index, ReportedModule.of(entry))

    def _subgraph(self, entry: _SubgraphEvent) -> None:
        if entry.rank:
            return
        if self._running is not None:
            self._phase(_PhaseEvent(index=entry.index, phase=""))
            self._running = None
        tokens = entry.tokens if entry.all_tokens is None else entry.all_tokens
        self._subgraphs[entry.index] = MeasuredSubgraph(
            entry.index,
            entry.label,
            entry.num_modules,
            entry.seconds,
            tokens,
            entry.bytes_read,
            entry.bytes_written,
            entry.peak_host_bytes,
            entry.peak_device_bytes,
            self._phases.get(entry.index, {}),
        )

    def _earlier(self, entry: _SubgraphEvent) -> None:
        if entry.index not in self._subgraphs:
            self._subgraph(entry)

    def _warning(self, entry: _WarningEvent) -> None:
        self._warnings[entry.text] = None

    def _published(self, entry: _PublishedEvent) -> None:
        self._facts |= {"bytes_after": entry.bytes, "outcome": FINISHED}
        if entry.seconds is not None:
            self._facts["seconds"] = {"calibrate": entry.seconds}

    def _evaluation(self, entry: _EvaluationEvent) -> None:
        self._evaluations[entry.which] = entry
        seconds = self._facts.setdefault("seconds", {})
        seconds["evaluate"] = seconds.get("evaluate", 0.0) + (entry.seconds or 0.0)

    def _end(self, entry: _LastEvent) -> None:
        if entry.bytes:
            self._facts["bytes_after"] = entry.bytes
        seconds = self._facts.setdefault("seconds", {})
        rest = (entry.seconds or 0.0) - sum(seconds.values())
        if rest > 0:
            seconds["rest"] = rest
        outcomes = {"failed": f"failed: {entry.error}", "interrupted": f"interrupted by {entry.signal}"}
        if self._facts["outcome"] != FINISHED or self._event == "end":
            self._facts["outcome"] = outcomes.get(self._event, FINISHED)

    def facts(self, origin: str) -> RunFacts:
        """Return the facts so far.

        Raises:
            DataError: if they are too many; `origin` names the log.
        """
        subgraphs = [self._subgraphs[index] for index in sorted(self._subgraphs)]
        resumed_at = self._facts.get("resumed_at", 0)
        before, after = (self._evaluations.get(which, _EvaluationEvent()) for which in ("before", "after"))
        perplexity = None
        if before.which or after.which:
            tokens = max(before.tokens, after.tokens)
            perplexity = Perplexity(before=before.perplexity, after=after.perplexity, tokens=tokens)
        facts = RunFacts(
            **self._facts,
            perplexity=perplexity,
            warnings=list(self._warnings),
            modules=[module for _, module in self._modules.values()],
            subgraphs=subgraphs,
            peak_host_bytes=max((entry.peak_host_bytes for entry in subgraphs), default=0),
            peak_device_bytes=max((entry.peak_device_bytes for entry in subgraphs), default=0),
            is_partial=sum(entry.index < resumed_at for entry in subgraphs) < resumed_at,
        )
        return checked(facts, origin)
