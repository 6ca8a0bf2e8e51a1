"""Predict how the work of one subgraph divides among workers: messages, time, and the part that is not divided.

With N workers, and the samples in L lanes, the busiest worker has R = ceil(L / N) / L of the batches. Seconds are
operations or bytes over the rates of `planning.rates`:

    forward          R x operations of the measuring pass and of the pass that goes on
    sums             R x T I^2 for each Hessian of T tokens, and the owner's additions of L lane sums
    lane sums        each lane's H travels to the owner of H, unless the owner has that lane
    solves           each owner factors (I^3 / 3), sends the factor, and all solve tiles (2 O I^2): `_solving`
    results          packed tiles travel to all other workers
    weights          every worker loads all weights, and unpacks all results

Times of the busiest worker add up, since all wait for it before the next phase. Undivided is the time of the work that
every worker does, and of waiting: `Share.serial_s`. JSON texts (a few kB per subgraph) are neglected.

Shapes: O out features, I in features.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from runtime.algorithms.hessian import hessian_bytes
from runtime.planning.rates import Rates
from runtime.quantize.solve_division import Solve, divided, windows
from runtime.workers.division import Division


@dataclass(frozen=True, kw_only=True)
class SharedInput:
    """An input of measured modules.

    Attributes:
        name: the first module that reads it.
        width: I.
        num_tokens: that are measured.
        has_hessian: whether a Hessian is summed up.
        lane_bytes: of the sum or the sample that the owner gets from each lane.
        small_bytes: of the statistics that every worker gets from every lane.
        final_bytes: of what the owner sends to all workers in the end.
    """

    name: str
    width: int
    num_tokens: float
    has_hessian: bool
    lane_bytes: int
    small_bytes: int
    final_bytes: int


@dataclass(frozen=True, kw_only=True)
class PlannedTile:
    """Rows that are solved at a time.

    Attributes:
        num_rows: O.
        result_bytes: packed.
    """

    num_rows: int
    result_bytes: int


@dataclass(frozen=True, kw_only=True)
class PlannedSolve:
    """Weights with one input that share a factorization.

    Attributes:
        source: the position of their input among the subgraph's.
        tiles: of their stacked rows.
        factor_bytes: of the factor, as it is sent.
        is_expert: whether the weights are of experts, which are solved before the others.
    """

    source: int
    tiles: tuple[PlannedTile, ...]
    factor_bytes: int
    is_expert: bool = False


@dataclass(frozen=True, kw_only=True)
class NearestWeight:
    """A weight that is rounded to nearest, by one worker.

    Attributes:
        source: the position of its input, whose owner rounds it; None for any worker.
        num_weights: O I.
        result_bytes: packed.
    """

    source: int | None
    num_weights: int
    result_bytes: int


@dataclass(frozen=True, kw_only=True)
class FactorSearch:
    """A search for the factors of an input's features, by the owner of its sum while the others wait.

    Attributes:
        width: I.
        num_rows: of all weights that are tried.
        num_candidates: that are tried.
    """

    width: int
    num_rows: int
    num_candidates: int


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """The work of one subgraph, whoever does it.

    Attributes:
        measured, propagated: operations of the passes over all batches.
        inputs: that are measured.
        solves: by GPTQ.
        nearest: the weights that are rounded to nearest.
        searches: of AWQ.
        loaded_bytes: of weights.
        num_quantized: number of quantized weights' elements.
        num_modules: number of quantized modules.
    """

    measured: float
    propagated: float
    inputs: tuple[SharedInput, ...] = ()
    solves: tuple[PlannedSolve, ...] = ()
    nearest: tuple[NearestWeight, ...] = ()
    searches: tuple[FactorSearch, ...] = ()
    loaded_bytes: int = 0
    num_quantized: int = 0
    num_modules: int = 0


@dataclass(kw_only=True)
class Traffic:
    """The bytes that each worker sends and receives in one phase."""

    size: int
    sent: list[int] = field(init=False)
    received: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.sent, self.received = [0] * self.size, [0] * self.size

    def send(self, source: int, target: int, num_bytes: int) -> None:
        """Count a message, unless a worker would send it to itself."""
        if source != target:
            self.sent[source] += num_bytes
            self.received[target] += num_bytes

    def send_all(self, source: int, num_bytes: int) -> None:
        """Count a message to all other workers."""
        for target in range(self.size):
            self.send(source, target, num_bytes)

    @property
    def busiest(self) -> int:
        """The most bytes that one worker sends or receives."""
        return max(*self.sent, *self.received)


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
    sums, results, solving = Traffic(size=size), Traffic(size=size), _solving(step, owners, size, rates)
    for entry, owner in zip(step.inputs, owners, strict=True):
        for lane in range(lanes):
            sums.send(lane % size, owner, entry.lane_bytes)
            sums.send_all(lane % size, entry.small_bytes)
        sums.send_all(owner, entry.final_bytes)
    for rank, num_bytes in enumerate(solving.results):
        results.send_all(rank, num_bytes)
    forward = (step.measured + step.propagated) / rates.forward
    adding = sum(entry.num_tokens * entry.width**2 for entry in step.inputs if entry.has_hessian) / rates.sums
    folded = Division(size)
    for entry, owner in zip(step.inputs, owners, strict=True):
        folded.loads[owner] += 3 * lanes * entry.lane_bytes / rates.memory if lanes > 1 else 0
    fold = max(folded.loads)
    everyone = step.num_quantized / rates.unpacking + rates.step_s + rates.module_s * step.num_modules
    loading = step.loaded_bytes / rates.loading
    seconds = {
        "forward": part * forward,
        "sums": part * adding + fold,
        "solves": max(solving.clocks),
        "searches": sum(_search_s(search, rates) for search in step.searches),
        "everyone": everyone,
        "messages": (sums.busiest + results.busiest) / rates.link,
    }
    if rates.reads_ahead:
        loading = max(0.0, loading - sum(seconds.values()))
    seconds["loading"] = loading
    waiting = (part - 1 / size) * (forward + adding) + fold - sum(folded.loads) / size
    undivided = {
        "lanes": waiting,
        "solves": max(solving.clocks) - sum(solving.busy) / size,
        "searches": seconds["searches"],
        "everyone": everyone,
        "loading": loading,
    }
    sent = (sum(counts) for counts in zip(sums.sent, solving.factors.sent, results.sent, strict=True))
    return Share(
        seconds=seconds,
        undivided_s=undivided,
        sent_bytes=tuple(sent),
        buffer_bytes=_buffer_bytes(step, solving) if size > 1 else 0,
    )


def _owners(step: StepWork, size: int) -> list[int]:
    """The worker that has each input's sum."""
    chosen = Division(size).owners((entry.name, hessian_bytes(entry.width)) for entry in step.inputs)
    return [chosen[entry.name] for entry in step.inputs]


@dataclass(kw_only=True)
class _Solving:
    """The division of a subgraph's solves: for each worker when it is done, how long it computes, and its results."""

    size: int
    clocks: list[float] = field(init=False)
    busy: list[float] = field(init=False)
    results: list[int] = field(init=False)
    factors: Traffic = field(init=False)

    def __post_init__(self) -> None:
        self.clocks, self.busy, self.results = [0.0] * self.size, [0.0] * self.size, [0] * self.size
        self.factors = Traffic(size=self.size)

    def work(self, rank: int, seconds: float, result_bytes: int = 0) -> None:
        """Let a worker compute."""
        self.clocks[rank] += seconds
        self.busy[rank] += seconds
        self.results[rank] += result_bytes

    def meet(self, ranks: Iterable[int], seconds: float = 0.0) -> None:
        """Let workers wait for each other, and then exchange a message."""
        ranks = list(ranks)
        end = max(self.clocks[rank] for rank in ranks) + seconds
        for rank in ranks:
            self.clocks[rank] = end


def _solving(step: StepWork, owners: Sequence[int], size: int, rates: Rates) -> _Solving:
    """Divide factorizations and tiles as the run does (`quantize.rounding`)."""
    done = _Solving(size=size)
    for is_expert in (True, False):
        _follow(done, [solve for solve in step.solves if solve.is_expert is is_expert], step, owners, rates)
    division = Division(size)
    for weight in step.nearest:
        cost = weight.num_weights * (1 / rates.nearest + 1 / rates.packing)
        rank = division.assign(cost) if weight.source is None else owners[weight.source]
        done.work(rank, cost, weight.result_bytes)
    return done


def _follow(
    done: _Solving, planned: Sequence[PlannedSolve], step: StepWork, owners: Sequence[int], rates: Rates
) -> None:
    """Follow each worker through factorizations and tiles."""
    solves = [
        Solve(
            num_in_features=step.inputs[solve.source].width,
            owner=owners[solve.source],
            rows=[tile.num_rows for tile in solve.tiles],
        )
        for solve in planned
    ]
    size = done.size
    sizes = [sum(solve.rows) * solve.num_in_features for solve in solves]
    for window in windows(sizes, size):
        own = list(zip(planned[window], solves[window], strict=True))
        for _, solve in own:
            done.work(solve.owner, solve.num_in_features**3 / 3 / rates.factorization)
        found = divided(solves[window], size)
        for index in found.order:
            (one, solve), ranks = own[index], found.workers[index]
            takers = [rank for rank in dict.fromkeys(ranks) if rank != solve.owner]
            for rank in takers:
                done.factors.send(solve.owner, rank, one.factor_bytes)
            done.meet([solve.owner, *takers], len(takers) * one.factor_bytes / rates.link)
            for tile, rank in zip(one.tiles, ranks, strict=True):
                done.work(rank, _tile_s(tile, solve.num_in_features, rates), tile.result_bytes)
        done.meet(range(size))  # results are exchanged


def _tile_s(tile: PlannedTile, width: int, rates: Rates) -> float:
    """Seconds of solving and packing the rows of a tile, and of their part of ||W X||^2."""
    num_weights = tile.num_rows * width
    blocks = -(-width // 128)
    return (
        2 * num_weights * width / rates.products
        + num_weights * (1 / rates.columns + 1 / rates.packing)
        + blocks * rates.block_s
    )


def _search_s(search: FactorSearch, rates: Rates) -> float:
    """Seconds of rounding some rows with each candidate, and of multiplying their errors by H."""
    num_weights = search.num_candidates * search.num_rows * search.width
    return num_weights * (2 * search.width / rates.products + 1 / rates.nearest)


def _buffer_bytes(step: StepWork, solving: _Solving) -> int:
    """A received factor, panels of lane sums, and the packed results of all workers."""
    factor = max((solve.factor_bytes for solve in step.solves), default=0)
    return factor + sum(solving.results)
