"""Predict how the work of one subgraph divides among workers: messages, time, and the part that is not divided.

With N workers, and the samples in L lanes, the busiest worker has R = ceil(L / N) / L of the batches. Seconds are
operations or bytes over the rates of `planning.rates`:

    measure          R x the measuring pass, and `propagate` R x the pass that goes on
    statistics       R x T I^2 for each Hessian of T tokens (3 T I^2 with drift), and the owner's additions of L lanes
    lane sums        each lane's H travels to the owner of H, unless the owner has that lane
    solves           each owner factors (I^3 / 3) and sends the factor; all solve tiles (2 O I^2)
    results          packed tiles travel to all other workers
    weights          every worker loads all weights, and unpacks all results
    writing          each worker writes its part of the checkpoint

Times of the busiest worker add up, since all wait for it before the next phase. Undivided is the time of the work that
every worker does, and of waiting: `Share.undivided_s`. JSON texts (a few kB per subgraph) are neglected.

Shapes: O out features, I in features.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from runtime.algorithms.hessian import hessian_bytes
from runtime.planning.rates import Rates, rate_of
from runtime.planning.solve_times import Traffic, solve_times
from runtime.planning.work import FactorSearch, PassWork, SharedInput, StepWork
from runtime.workers.division import Division

# Hessians displace weights and values from the caches, so the same operators take longer than in a plain pass.
_MEASURING = 1.25

# Numbers of weights that one core rotates in a second, in float64 (measured: 4096 channels, an AMD EPYC).
ROTATED_PER_S = 60e6


@dataclass(frozen=True, kw_only=True)
class Share:
    """The cost of one subgraph for each of N workers.

    Attributes:
        seconds: by phase, of the busiest worker.
        undivided_s: the part of them in which work is not divided: all workers do it, or wait for one of them.
        sent_bytes: of each worker.
        buffer_bytes: that a worker needs besides for messages.
    """

    seconds: dict[str, float]
    undivided_s: dict[str, float]
    sent_bytes: tuple[int, ...]
    buffer_bytes: int

    @cached_property
    def total_s(self) -> float:
        """Seconds of the subgraph."""
        return sum(self.seconds.values())


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """How a run divides among workers.

    Attributes:
        num_workers: N.
        num_lanes: of the samples.
        rates: of each worker.
        works: of the subgraphs.
    """

    num_workers: int
    num_lanes: int
    rates: Rates
    works: tuple[StepWork, ...]

    @cached_property
    def shares(self) -> list[Share]:
        """Of the subgraphs."""
        return [share(work, self.num_lanes, self.num_workers, self.rates) for work in self.works]

    @property
    def seconds(self) -> float:
        """Of the run, without the start of the processes."""
        return sum(one.total_s for one in self.shares)

    @cached_property
    def alone_s(self) -> float:
        """Seconds of the run with one worker."""
        return sum(share(work, self.num_lanes, 1, self.rates).total_s for work in self.works)

    @property
    def speedup(self) -> float:
        """Of the run with one worker over that of several."""
        return self.alone_s / self.seconds

    @property
    def phase_s(self) -> dict[str, float]:
        """Seconds of the run by phase."""
        return _summed([one.seconds for one in self.shares])

    @property
    def undivided_s(self) -> dict[str, float]:
        """Seconds in which work is not divided, by phase."""
        return _summed([one.undivided_s for one in self.shares])

    @property
    def sent_bytes(self) -> int:
        """Of all workers."""
        return sum(map(sum, zip(*(one.sent_bytes for one in self.shares), strict=True)))

    @property
    def most_sent_bytes(self) -> int:
        """Of the worker that sends most."""
        return max(map(sum, zip(*(one.sent_bytes for one in self.shares), strict=True)))

    @property
    def serial_share(self) -> float:
        """The part of one worker's time in which work is not divided."""
        return sum(self.undivided_s.values()) / self.alone_s


def _summed(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Sum numbers by name."""
    return {name: sum(part[name] for part in parts) for name in parts[0]}


@functools.lru_cache(maxsize=4096)
def share(step: StepWork, lanes: int, size: int, rates: Rates) -> Share:
    """Predict a subgraph's cost for `size` workers."""
    part = -(-lanes // size) / lanes  # of the batches, that the busiest worker has
    owners = _owners(step, size)
    sums, results, solved = Traffic(size=size), Traffic(size=size), solve_times(step, owners, size, rates)
    for entry, owner in zip(step.inputs, owners, strict=True):
        for lane in range(lanes):
            sums.send(lane % size, owner, entry.lane_bytes)
            sums.send_all(lane % size, entry.small_bytes)
        sums.send_all(owner, entry.final_bytes)
    for rank, num_bytes in enumerate(solved.results):
        results.send_all(rank, num_bytes)
    measuring, propagating = _MEASURING * _pass_s(step.measured, rates), _pass_s(step.propagated, rates)
    propagating += step.num_rounded / rate_of(rates.rounding_inputs, step.rounded_kind)
    adding = sum(_adding_s(entry, rates) for entry in step.inputs)
    folded = Division(size)
    for entry, owner in zip(step.inputs, owners, strict=True):
        folded.loads[owner] += 3 * lanes * entry.lane_bytes / rates.memory if lanes > 1 else 0
    fold = max(folded.loads)
    unpacking = sum(num_weights / rate_of(rates.unpacking, kind) for kind, num_weights in step.unpacked)
    everyone = unpacking + rates.step_s + rates.module_s * step.num_modules
    loading = step.read_bytes / rates.reading + step.loaded_bytes / rates.loading + step.rotated / ROTATED_PER_S
    seconds = {
        "measure": part * measuring,
        "statistics": part * adding + fold,
        "solves": max(solved.clocks) + _pass_s(step.tuned, rates),
        "searches": sum(_search_s(search, rates) for search in step.searches),
        "everyone": everyone,
        "messages": (sums.busiest + results.busiest) / rates.link,
        "propagate": part * propagating,
        "writing": step.written_bytes / size / rates.writing,
    }
    if rates.reads_ahead:
        loading = max(0.0, loading - sum(seconds.values()))
    seconds["loading"] = loading
    divided = measuring + propagating + adding
    waiting = (part - 1 / size) * divided + fold - sum(folded.loads) / size
    undivided = {
        "lanes": waiting,
        "solves": max(solved.clocks) - sum(solved.busy) / size,
        "searches": seconds["searches"],
        "everyone": everyone,
        "loading": loading,
    }
    sent = (sum(counts) for counts in zip(sums.sent, solved.factors.sent, results.sent, strict=True))
    return Share(
        seconds=seconds,
        undivided_s=undivided,
        sent_bytes=tuple(sent),
        buffer_bytes=solved.buffer_bytes if size > 1 else 0,
    )


def _owners(step: StepWork, size: int) -> list[int]:
    """The worker that has each input's sum."""
    chosen = Division(size).owners((entry.name, hessian_bytes(entry.width)) for entry in step.inputs)
    return [chosen[entry.name] for entry in step.inputs]


def _pass_s(work: PassWork, rates: Rates) -> float:
    """Seconds of the model's own operators."""
    own = rates.passes
    seconds = work.products / own.products + work.attention / own.attention + work.moved / own.moving
    # A device computes while the host starts the next operators.
    return max(seconds, work.calls * rates.call_s) if rates.reads_ahead else seconds + work.calls * rates.call_s


def _adding_s(entry: SharedInput, rates: Rates) -> float:
    """Seconds of the statistics of an input."""
    numbers = entry.num_tokens * entry.width
    hessian = 0.0
    if entry.has_hessian:
        times = 3 if entry.has_drift else 1  # the drift has no symmetric half
        hessian = numbers * times * (entry.width / rates.sums + 1 / rates.gathering)
        hessian += entry.width**2 / rates.completing
    return hessian + (numbers / rates.channels if entry.small_bytes else 0.0)


def _search_s(search: FactorSearch, rates: Rates) -> float:
    """Seconds of rounding some rows with each candidate, and of multiplying their errors by half of H."""
    num_weights = search.num_candidates * search.num_rows * search.width
    return num_weights * (search.width / rates.searching + 1 / rates.trying)
