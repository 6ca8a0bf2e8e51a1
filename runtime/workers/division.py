"""Divide work among workers by its cost; every worker computes the same division."""

from __future__ import annotations

from collections.abc import Iterable


class Division:
    """Assigns pieces of work to the worker with the least load.

    Args:
        size: the number of workers.

    Attributes:
        loads: the cost of the work of each worker so far.
    """

    def __init__(self, size: int) -> None:
        self.loads = [0.0] * size

    def assign(self, cost: float) -> int:
        """Assign one piece, and return the worker's rank; of equal loads the lowest rank."""
        rank = min(range(len(self.loads)), key=lambda one: (self.loads[one], one))
        self.loads[rank] += cost
        return rank

    def owners(self, costs: Iterable[tuple[str, float]]) -> dict[str, int]:
        """Assign named pieces, the largest first and of equal ones in the order of their names."""
        return {name: self.assign(cost) for name, cost in sorted(costs, key=lambda entry: (-entry[1], entry[0]))}
