"""Estimate the time left of a run from its events: the plan's seconds, corrected by those measured so far.

Each phase has a ratio of measured to planned seconds, of the finished part of the run. A phase of which little has run
yet leans on the ratio of the whole run, so assumed rates that are wrong by a factor are corrected by the first
subgraph, and the ratio of one phase does not jump when it begins.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from runtime.streaming.events import MEASURE, PROPAGATE, QUANTIZE, READ, REPLAY, WRITE

_ORDER = (READ, MEASURE, QUANTIZE, PROPAGATE, WRITE)
_EQUAL = dict.fromkeys(_ORDER, 1.0)  # without a plan
# Shares of the planned seconds: how much of a phase the ratio of the run counts as, how much of the run the plan itself
# counts as, and how much must have run before assumed rates are corrected well enough to show a time.
_OF_A_PHASE, _OF_THE_RUN, _FIRST = 0.003, 0.002, 0.01


class TimeLeft:
    """Receives the events of a run, and tells how much of it is done."""

    def __init__(self) -> None:
        self._begin = self._since = time.perf_counter()
        self._steps: Sequence[Mapping[str, float]] = ()
        self._is_measured = False
        self._num_batches = self._target = 0  # the target is the next subgraph that finishes
        self._index, self._phase = 0, ""
        self._progress = 0.0  # of the phase that runs
        self._planned = dict.fromkeys(_ORDER, 0.0)  # of finished phases
        self._taken = dict.fromkeys(_ORDER, 0.0)
        self._own = dict.fromkeys(_ORDER, 0.0)  # of the subgraph that runs
        self._most = 0.0

    def tell(self, event: str, **facts: Any) -> None:
        """Receive an event."""
        if event == "begin":
            self._begin = self._since = time.perf_counter()
            self._num_batches, self._target = facts["batches"], facts["resumed_at"]
            self._steps = [_EQUAL] * facts["subgraphs"]
        elif event == "plan":
            steps = [step.get("phases") for step in facts["subgraphs"]]
            if len(steps) == len(self._steps) and all(steps):
                self._steps, self._is_measured = steps, facts.get("rates", "assumed") != "assumed"
        elif event == "phase":
            self._end_phase()
            is_planned = facts["phase"] in (*_ORDER, REPLAY)
            self._index, self._phase, self._progress = facts["index"], facts["phase"] if is_planned else "", 0.0
        elif event == "batch":
            self._progress = min(self._progress + facts["batches"] / max(self._num_batches, 1), 1.0)
        elif event in ("solved", "tuned"):
            self._progress = max(self._progress, facts["done"] / max(facts["count"], 1))
        elif event == "subgraph" and facts["rank"] == 0:
            self._end_phase()
            self._planned = _sums(self._planned, self._steps[facts["index"]])
            self._taken = _sums(self._taken, self._own)
            self._own = dict.fromkeys(_ORDER, 0.0)
            self._phase, self._target = "", facts["index"] + 1

    def _end_phase(self) -> None:
        """Add the phase that ran to the subgraph, or a replay to the run."""
        now = time.perf_counter()
        if self._phase == REPLAY:
            self._planned[PROPAGATE] += self._progress * self._steps[self._index][PROPAGATE]
            self._taken[PROPAGATE] += now - self._since
        elif self._phase:
            self._own[self._phase] += now - self._since
        self._since = now

    @property
    def seconds(self) -> float | None:
        """The seconds left; None while too little has run to correct assumed rates."""
        total = self._total
        ratios = self._ratios()
        if not total or (not self._is_measured and sum(self._running()[0].values()) < _FIRST * total):
            return None
        left = sum(ratios[name] * step[name] for step in self._steps[self._target + 1 :] for name in _ORDER)
        if self._target < len(self._steps):
            left += sum(self._left_of(name, ratios[name]) for name in _ORDER)
        if self._phase == REPLAY:
            replayed = [step[PROPAGATE] for step in self._steps[self._index : self._target]]
            left += ratios[PROPAGATE] * (sum(replayed) - self._progress * sum(replayed[:1]))
        return left

    @property
    def part(self) -> float:
        """The part of the run that is done; it never decreases."""
        left = self.seconds
        if left is not None:
            taken = time.perf_counter() - self._begin
            self._most = max(self._most, taken / max(taken + left, 1e-9))
        return min(self._most, 1.0)

    @property
    def _total(self) -> float:
        return sum(map(sum, (step.values() for step in self._steps)))

    def _left_of(self, name: str, ratio: float) -> float:
        """The seconds left of a phase of the next subgraph that finishes."""
        whole = ratio * self._steps[self._target][name]
        if self._phase in ("", REPLAY) or self._index != self._target:
            return whole
        place, current = _ORDER.index(name), _ORDER.index(self._phase)
        if place != current:
            return whole if place > current else 0.0
        if self._progress:
            return (1 - self._progress) * whole
        return max(whole - self._own[name] - (time.perf_counter() - self._since), 0.0)

    def _running(self) -> tuple[dict[str, float], dict[str, float]]:
        """The planned and the measured seconds so far, by phase, with those of the subgraph that runs."""
        planned, taken = dict(self._planned), _sums(self._taken, self._own)
        if self._phase and self._phase != REPLAY:
            taken[self._phase] += time.perf_counter() - self._since
        if not self._phase or self._phase == REPLAY or self._index >= len(self._steps):
            return planned, taken
        step, current = self._steps[self._index], _ORDER.index(self._phase)
        for name in _ORDER[:current]:
            planned[name] += step[name]
        # A phase without progress that has taken longer than planned is taken for complete.
        is_late = taken[self._phase] - self._taken[self._phase] > step[self._phase]
        planned[self._phase] += step[self._phase] * (self._progress or float(is_late))
        return planned, taken

    def _ratios(self) -> dict[str, float]:
        """The measured over the planned seconds of each phase."""
        planned, taken = self._running()
        few = _OF_THE_RUN * self._total
        ratio = (sum(taken.values()) + few) / max(sum(planned.values()) + few, 1e-9)
        found = {}
        for name in _ORDER:
            some = _OF_A_PHASE * sum(step[name] for step in self._steps) + 1e-9
            found[name] = (taken[name] + some * ratio) / (planned[name] + some)
        return found


def _sums(one: Mapping[str, float], two: Mapping[str, float]) -> dict[str, float]:
    return {name: one[name] + two[name] for name in _ORDER}
