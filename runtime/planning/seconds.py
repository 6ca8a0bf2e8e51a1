"""The predicted seconds of a run, by subgraph and by phase.

A phase of a worker that waits for others is that of the busiest one (`planning.distribution`). Writing to the disk goes
on while the next subgraphs compute, and so do digests of files; what is left of both at the end counts as `publish`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from runtime.checkpoint.writer import DEFAULT_SHARD_BYTES
from runtime.planning.distribution import ROTATED_PER_S, Share
from runtime.planning.rates import Rates
from runtime.streaming.events import MEASURE, PROPAGATE, QUANTIZE, READ, WRITE

# The phases of a subgraph, each the sum of some parts of `Share.seconds`, and the words of a run's events for them.
_PARTS = {
    "load": ("loading",),
    "measure": ("measure",),
    "statistics": ("statistics",),
    "solve": ("solves", "searches", "everyone", "messages"),
    "propagate": ("propagate",),
    "write": ("writing",),
}
_EVENTS = {
    READ: ("load",),
    MEASURE: ("measure", "statistics"),
    QUANTIZE: ("solve",),
    PROPAGATE: ("propagate",),
    WRITE: ("write",),
}
PHASES = ("start", *_PARTS, "publish")
_PUBLISH_S = 0.05
_PROOFS = 3


@dataclass(frozen=True, kw_only=True)
class RunSeconds:
    """The predicted seconds of a run.

    Attributes:
        start: of imports, and of everything before the first subgraph.
        steps: of each subgraph by phase.
        publish: after the last subgraph.
        origin: where the rates are from: `assumed`, or what they were measured on.
    """

    start: float
    steps: tuple[Mapping[str, float], ...]
    publish: float
    origin: str

    @cached_property
    def phases(self) -> dict[str, float]:
        """Seconds of the run by phase."""
        sums = {phase: sum(step[phase] for step in self.steps) for phase in _PARTS}
        return {"start": self.start, **sums, "publish": self.publish}

    @property
    def total(self) -> float:
        """Seconds of the run."""
        return sum(self.phases.values())


def step_seconds(share: Share, rates: Rates) -> dict[str, float]:
    """The seconds of a subgraph by phase."""
    return {phase: rates.in_a_run * sum(share.seconds[part] for part in parts) for phase, parts in _PARTS.items()}


def event_seconds(step: Mapping[str, float]) -> dict[str, float]:
    """The seconds of a subgraph by the phases that a run's events name."""
    return {name: sum(step[phase] for phase in phases) for name, phases in _EVENTS.items()}


def run_seconds(
    steps: Sequence[Mapping[str, float]],
    rates: Rates,
    *,
    num_parameters: int,
    passed_bytes: int,
    read_bytes: int,
    num_bytes: int,
    rotated: int = 0,
) -> RunSeconds:
    """Add the seconds outside of subgraphs.

    Args:
        steps: of each subgraph, by phase.
        rates: of a worker.
        num_parameters: of the model, each matrix of an expert counted alone.
        passed_bytes: that no subgraph reads, and that are copied in the end.
        read_bytes: of the original checkpoint.
        num_bytes: of the new checkpoint.
        rotated: numbers of the checkpoint that are rotated when they are read.
    """
    start = rates.start_s + rates.parameter_s * num_parameters
    if rotated:  # the original and two rotated models are read for the proof
        start += _PROOFS * (read_bytes / rates.reading + rotated / ROTATED_PER_S)
    copied = passed_bytes * (1 / rates.reading + 1 / rates.writing)
    meanwhile_s = sum(map(sum, (step.values() for step in steps)))
    unflushed_s = num_bytes / rates.flushing - meanwhile_s
    last_shard = min(num_bytes, DEFAULT_SHARD_BYTES)  # is hashed when it is complete
    unhashed_s = (read_bytes + num_bytes - last_shard) / rates.hashing - meanwhile_s
    return RunSeconds(
        start=start,
        steps=tuple(steps),
        publish=_PUBLISH_S + copied + max(unflushed_s, 0.0) + max(unhashed_s, 0.0) + last_shard / rates.hashing,
        origin=rates.origin,
    )
