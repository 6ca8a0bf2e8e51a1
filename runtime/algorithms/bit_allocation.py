"""Mixed precision as an integer program: one scheme for each group of layers, the least loss within a budget of bytes.

Hubara et al., "Improving Post Training Neural Quantization", arXiv 2006.10518, section 3.3, and HAWQ-V3, arXiv
2011.10680, section 3.4, choose bits by such a program:

    minimize    sum over g, s of  loss_gs x_gs
    subject to  sum over s of x_gs = 1                              for each group g
                sum over g, s of  bytes_gs x_gs <= budget
                x_gs in {0, 1}

A group is whatever must have one scheme. This is the multiple-choice knapsack problem. HiGHS solves it by branch and
bound, and proves that no choice is better by more than the gap that it returns.

Some choices have the same loss, for example if all inputs of a layer are zero. Of those within one part in a million of
the least loss, a second program takes the one with the fewest different schemes, and then the smallest: it has a binary
y_s for each scheme, x_gs <= y_s, and minimizes their number plus the share of the bytes.

HiGHS has absolute tolerances. So bytes are counted from the smallest size of each group, in units of their greatest
common divisor, which makes them integers: the budget is met exactly. Losses are counted from the best one of each
group, in parts of the largest that matters: a first solution shows which ones cannot be part of a better one, and the
second is found without these. HiGHS runs in one thread and is limited by a number of nodes, not by time, so that the
same numbers give the same choice.

Shapes: G groups, S schemes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from runtime.errors import UsageError

_MOST_NODES = 200_000
_TIED = 1e-6  # choices whose losses differ by less, relative to the least one, are equally good


@dataclass(frozen=True, kw_only=True, slots=True)
class Allocation:
    """One scheme for each group.

    Attributes:
        choice: the scheme of each group, by its number.
        loss: of the choice.
        num_bytes: of the choice.
        gap: the largest part of the loss that another choice could save; 0 if this one is proved to be the best.
    """

    choice: tuple[int, ...]
    loss: float
    num_bytes: int
    gap: float


def allocate(losses: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget_bytes: int) -> Allocation:
    """Choose one scheme for each group.

    Args:
        losses: of each group with each scheme, [G][S]; infinite where a group cannot have a scheme.
        sizes: the bytes of each group with each scheme, [G][S].
        budget_bytes: the most bytes of all groups together.

    Raises:
        UsageError: the budget is smaller than the smallest choice, losses are not numbers, or highspy is missing.
    """
    _check(losses, sizes)
    smallest = smallest_bytes(losses, sizes)
    if smallest > budget_bytes:
        raise UsageError(f"the smallest choice takes {smallest:,} bytes, more than the budget of {budget_bytes:,}")
    choice, _ = _Program(losses, sizes, budget_bytes).least_loss()
    program = _Program(_without_worse(losses, choice), sizes, budget_bytes)
    choice, gap = program.least_loss()
    choice = program.simplest(choice)
    return Allocation(
        choice=choice,
        loss=math.fsum(own[scheme] for own, scheme in zip(losses, choice, strict=True)),
        num_bytes=sum(own[scheme] for own, scheme in zip(sizes, choice, strict=True)),
        gap=gap,
    )


def smallest_bytes(losses: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]]) -> int:
    """Compute the bytes of the smallest choice."""
    rows = zip(losses, sizes, strict=True)
    return sum(min(size for loss, size in zip(*row, strict=True) if math.isfinite(loss)) for row in rows)


def _without_worse(losses: Sequence[Sequence[float]], choice: Sequence[int]) -> list[list[float]]:
    """Exclude schemes with which a single group would lose more than this choice does in all."""
    least = [min(own) for own in losses]
    extra = math.fsum(own[scheme] - low for own, scheme, low in zip(losses, choice, least, strict=True))
    most = extra + _TIED * (extra + math.fsum(least))
    return [[loss if loss - low <= most else math.inf for loss in own] for own, low in zip(losses, least, strict=True)]


def _check(losses: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]]) -> None:
    widths = {len(own) for own in (*losses, *sizes)}
    if len(losses) != len(sizes) or len(widths) != 1 or widths == {0}:
        raise UsageError(f"each group must have a loss and a size for each scheme; got {len(losses)} and {len(sizes)}")
    for own in losses:
        if any(math.isnan(loss) or loss < 0 for loss in own) or not any(map(math.isfinite, own)):
            raise UsageError(f"losses must be at least 0, and one of each group finite; got {list(own)}")


class _Program:
    """The program. Its variables are x_gs for the possible schemes of each group, group by group, and then y_s."""

    def __init__(self, losses: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget_bytes: int) -> None:
        possible = [[scheme for scheme, loss in enumerate(own) if math.isfinite(loss)] for own in losses]
        self.places = [(group, scheme) for group, own in enumerate(possible) for scheme in own]
        self.num_groups, self.num_schemes = len(losses), len(losses[0])
        least = [min(own) for own in losses]
        extra = [losses[group][scheme] - least[group] for group, scheme in self.places]
        self.floor, self.unit = math.fsum(least), max(extra) or 1.0
        self.losses = [one / self.unit for one in extra]
        smallest = [min(own[scheme] for scheme in some) for own, some in zip(sizes, possible, strict=True)]
        more = [sizes[group][scheme] - smallest[group] for group, scheme in self.places]
        divisor = math.gcd(*more) or 1
        self.sizes = [one // divisor for one in more]
        self.most = (budget_bytes - sum(smallest)) // divisor

    def least_loss(self) -> tuple[tuple[int, ...], float]:
        """Return the choice with the least loss, and its gap."""
        model = self._model(self.losses)
        model.run()
        info = model.getInfo()
        missing = max(info.objective_function_value - info.mip_dual_bound, 0.0)
        total = self.floor + info.objective_function_value * self.unit
        return self._choice(model), missing * self.unit / total if missing > _TIED / 1e3 else 0.0

    def simplest(self, found: tuple[int, ...]) -> tuple[int, ...]:
        """Return the choice with the fewest schemes, then bytes, that has about the loss of this one."""
        count, schemes = len(self.places), range(self.num_schemes)
        is_chosen = [found[group] == scheme for group, scheme in self.places]
        loss = math.fsum(one for one, is_used in zip(self.losses, is_chosen, strict=True) if is_used)
        whole = self.num_groups * max(*self.sizes, 1) + 1  # so that a scheme counts more than all bytes
        model = self._model([size / whole for size in self.sizes])
        for scheme in schemes:
            self._add_binary(model, count + scheme, 1.0)
        for place, (_, scheme) in enumerate(self.places):
            model.addRow(-math.inf, 0.0, 2, [place, count + scheme], [1.0, -1.0])
        tied = loss + _TIED * (loss + self.floor / self.unit)
        model.addRow(-math.inf, tied, count, list(range(count)), self.losses)
        start = _highs().HighsSolution()
        start.col_value = [*map(float, is_chosen), *(float(scheme in found) for scheme in schemes)]
        model.setSolution(start)
        model.run()
        return self._choice(model)

    def _model(self, costs: Sequence[float]) -> Any:
        model = _highs()._core._Highs()  # the base of highspy.Highs, which prints a banner when it is created
        model.setOptionValue("output_flag", False)
        options = {"threads": 1, "random_seed": 0, "mip_max_nodes": _MOST_NODES}
        for name, value in {**options, "mip_rel_gap": 0.0, "mip_abs_gap": 0.0}.items():
            model.setOptionValue(name, value)
        for place, cost in enumerate(costs):
            self._add_binary(model, place, cost)
        of_groups: list[list[int]] = [[] for _ in range(self.num_groups)]
        for place, (group, _) in enumerate(self.places):
            of_groups[group].append(place)
        for own in of_groups:
            model.addRow(1.0, 1.0, len(own), own, [1.0] * len(own))
        everything = list(range(len(self.places)))
        model.addRow(-math.inf, float(self.most), len(everything), everything, [float(size) for size in self.sizes])
        return model

    def _add_binary(self, model: Any, place: int, cost: float) -> None:
        model.addVar(0.0, 1.0)
        model.changeColCost(place, cost)
        model.changeColIntegrality(place, _highs().HighsVarType.kInteger)

    def _choice(self, model: Any) -> tuple[int, ...]:
        values = model.getSolution().col_value
        return tuple(scheme for place, (_, scheme) in enumerate(self.places) if values[place] > 0.5)


def _highs() -> Any:
    try:
        import highspy
    except ModuleNotFoundError as error:
        raise UsageError(
            "choosing bits requires highspy, which is not installed", hint="pip install highspy"
        ) from error
    return highspy
