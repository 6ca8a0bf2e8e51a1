"""Follow each worker through the factorizations and tiles of a subgraph: when it is done, and what it sends."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from runtime.algorithms.hessian import hessian_bytes
from runtime.planning.rates import Rates, rate_of
from runtime.planning.work import NearestWeight, PlannedSolve, PlannedTile, StepWork
from runtime.quantize.solve_division import Solve, divided, windows
from runtime.workers.division import Division


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


@dataclass(kw_only=True)
class SolveTimes:
    """The division of a subgraph's solves.

    Attributes:
        size: the number of workers.
        clocks: for each worker, the second at which it is done; `busy` are its seconds without waiting.
        results: the packed bytes of each worker.
        factors: the messages with factors.
        buffer_bytes: of results that are exchanged at a time, and of factors that an owner keeps beside the first.
    """

    size: int
    clocks: list[float] = field(init=False)
    busy: list[float] = field(init=False)
    results: list[int] = field(init=False)
    factors: Traffic = field(init=False)
    buffer_bytes: int = 0

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


def solve_times(step: StepWork, owners: Sequence[int], size: int, rates: Rates) -> SolveTimes:
    """Divide factorizations and tiles as the run does (`quantize.rounding`)."""
    done = SolveTimes(size=size)
    for is_expert in (True, False):
        _follow(done, [solve for solve in step.solves if solve.is_expert is is_expert], step, owners, rates)
    division = Division(size)
    for weight in step.nearest:
        cost = _nearest_s(weight, rates)
        rank = division.assign(cost) if weight.source is None else owners[weight.source]
        done.work(rank, cost, weight.result_bytes)
    return done


def _follow(
    done: SolveTimes, planned: Sequence[PlannedSolve], step: StepWork, owners: Sequence[int], rates: Rates
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
    for window in windows(sizes, are_joined=size > 1):
        own = list(zip(planned[window], solves[window], strict=True))
        kept, exchanged, known = [0] * size, 0, dict[int, None]()
        for one, solve in own:
            done.work(solve.owner, _factorization_s(solve.num_in_features, rates, is_corrected=one.is_corrected))
            kept[solve.owner] += hessian_bytes(solve.num_in_features) if one.source in known else 0
            known[one.source] = None
            exchanged += sum(tile.result_bytes for tile in one.tiles)
        done.buffer_bytes = max(done.buffer_bytes, max(kept) + exchanged)
        found = divided(solves[window], size)
        for index in found.order:
            (one, solve), ranks = own[index], found.workers[index]
            takers = [rank for rank in dict.fromkeys(ranks) if rank != solve.owner]
            for rank in takers:
                done.factors.send(solve.owner, rank, one.factor_bytes)
            done.meet([solve.owner, *takers], len(takers) * one.factor_bytes / rates.link)
            for tile, rank in zip(one.tiles, ranks, strict=True):
                done.work(rank, _tile_s(tile, solve.num_in_features, one, rates), tile.result_bytes)
        done.meet(range(size))  # results are exchanged


def _factorization_s(width: int, rates: Rates, *, is_corrected: bool) -> float:
    """Seconds of checking, sorting and factoring a Hessian, and of two triangular solves for a correction."""
    correcting = 2 * width**3 / rates.products + 3 * width**2 / rates.ordering if is_corrected else 0.0
    return width**3 / 3 / rates.factorization + width**2 / rates.ordering + correcting


def _tile_s(tile: PlannedTile, width: int, solve: PlannedSolve, rates: Rates) -> float:
    """Seconds of correcting, solving and packing the rows of a tile, of their part of ||W X||^2, and of the search for
    ranges.
    """
    num_weights = tile.num_rows * width
    blocks = -(-width // 128) / solve.num_stacked
    product_s = num_weights * width / rates.products  # by half of a matrix; the correction is by all of one
    correction_s = 2 * product_s if solve.is_corrected else 0.0
    search_s = num_weights / rate_of(rates.nearest, solve.searched_kind) if solve.searched_kind else 0.0
    solve_s = product_s + num_weights / rates.columns + blocks * rates.block_s + search_s
    return correction_s + solve.num_passes * (solve_s + product_s) - product_s  # a product for each following pass


def _nearest_s(weight: NearestWeight, rates: Rates) -> float:
    """Seconds of rounding a weight to nearest and packing it, and of the size of its error."""
    rate = rates.clipping if weight.is_clipped else rate_of(rates.nearest, weight.kind)
    return weight.num_weights / rate + weight.compared / rates.sums
