"""The time left, as a run is simulated whose seconds differ from those of its plan."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from runtime.streaming.events import MEASURE, PROPAGATE, QUANTIZE, READ, REPLAY, WRITE
from runtime.streaming.time_left import TimeLeft

PHASES = (READ, MEASURE, QUANTIZE, PROPAGATE, WRITE)
LAYER = dict(zip(PHASES, (0.5, 4.0, 10.0, 3.0, 0.5), strict=True))
HEAD = dict.fromkeys(PHASES, 0.0) | {WRITE: 2.0}
NUM_BATCHES = 10


class Simulated:
    """A run whose phases take `slowness` times their planned seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, slowness: Mapping[str, float], **plan: Any) -> None:
        self.now = 0.0
        self.slowness = slowness
        self.steps = [*[LAYER] * 9, HEAD]
        monkeypatch.setattr("time.perf_counter", lambda: self.now)
        self.left = TimeLeft()
        self.plan = {"subgraphs": [{"phases": step} for step in self.steps], **plan}

    def begin(self, resumed_at: int = 0) -> None:
        self.left.tell("begin", subgraphs=len(self.steps), batches=NUM_BATCHES, resumed_at=resumed_at)
        self.left.tell("plan", **self.plan)

    def seconds(self, first: int) -> float:
        return sum(self.slowness.get(name, 1.0) * step[name] for step in self.steps[first:] for name in PHASES)

    def phase(self, index: int, name: str, planned: float) -> Iterator[None]:
        self.left.tell("phase", index=index, label="", phase=name)
        own = self.slowness.get(PROPAGATE if name == REPLAY else name, 1.0) * planned
        for part in range(NUM_BATCHES):
            self.now += own / NUM_BATCHES
            if name in (MEASURE, PROPAGATE, REPLAY) and planned:
                self.left.tell("batch", index=index, batches=1, tokens=1)
            elif name == QUANTIZE and planned:
                self.left.tell("solved", index=index, done=part + 1, count=NUM_BATCHES)
            yield

    def run(self, first: int = 0) -> Iterator[None]:
        for index, step in enumerate(self.steps[first:], first):
            for name in PHASES:
                yield from self.phase(index, name, step[name])
            self.left.tell("subgraph", index=index, rank=0)


@pytest.mark.parametrize("slowness", [{}, dict.fromkeys(PHASES, 7.0), {QUANTIZE: 5.0, PROPAGATE: 0.2}])
def test_the_time_left_is_right_after_the_first_subgraph(
    monkeypatch: pytest.MonkeyPatch, slowness: dict[str, float]
) -> None:
    run = Simulated(monkeypatch, slowness)
    run.begin()
    total, parts, ends = run.seconds(0), [], []
    for _ in run.run():
        parts.append(run.left.part)
        left = run.left.seconds
        if run.now > run.seconds(0) - run.seconds(1) + 1e-6:
            assert left is not None
            ends.append(run.now + left)
            assert left == pytest.approx(total - run.now, rel=0.15, abs=0.05 * total)
    assert parts == sorted(parts), "the bar never goes back"
    assert parts[-1] == pytest.approx(1.0, abs=0.01)
    jumps = [abs(after - before) for before, after in itertools.pairwise(ends)]
    assert max(jumps) < 0.06 * total, "the expected end does not jump"


def test_assumed_rates_show_no_time_before_they_are_corrected(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Simulated(monkeypatch, dict.fromkeys(PHASES, 3.0))
    run.begin()
    assert (run.left.seconds, run.left.part) == (None, 0.0)
    run = Simulated(monkeypatch, {}, rates="measured on a machine")
    run.begin()
    assert run.left.seconds == pytest.approx(run.seconds(0))


def test_a_resumed_run_counts_what_it_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Simulated(monkeypatch, {}, rates="measured on a machine")
    run.begin(resumed_at=6)
    for index in range(6):
        for _ in run.phase(index, REPLAY, LAYER[PROPAGATE]):
            expected = 6 * LAYER[PROPAGATE] - run.now + run.seconds(6)
            assert run.left.seconds == pytest.approx(expected, rel=0.01)
    for _ in run.run(6):
        pass
    assert run.left.seconds == pytest.approx(0.0, abs=0.01)


def test_without_a_plan_subgraphs_count_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Simulated(monkeypatch, {})
    run.plan = {"subgraphs": []}
    run.begin()
    steps = run.run()
    for _ in range(5 * NUM_BATCHES * 3):
        next(steps)
    assert run.left.part == pytest.approx(0.3, abs=0.02)
