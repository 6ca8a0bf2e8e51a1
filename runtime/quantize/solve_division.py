"""Divide the solves of a step among workers; the plan and every worker compute the same division.

The worker that has a Hessian factors it. While it does, others solve tiles of other inputs: a tile goes to the worker
with the least load, and loads begin with the factorizations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runtime.workers.division import Division

# Time relative to a multiplication of a tile's solve, measured on a CPU: a factorization has smaller products.
_FACTORIZATION = 1.2
_SIZE = 0.5  # the size of a tile's outputs, for the report, takes half of a product


@dataclass(frozen=True, kw_only=True, slots=True)
class Solve:
    """Weights that are solved together.

    Attributes:
        num_in_features: I.
        owner: the worker that has the Hessian.
        rows: the number of rows of each tile.
        is_divided: whether tiles may go to other workers; refinement needs the Hessian itself.
    """

    num_in_features: int
    owner: int
    rows: Sequence[int]
    is_divided: bool = True


def tile_workers(solves: Sequence[Solve], num_workers: int) -> list[list[int]]:
    """Return the rank of the worker that solves each tile of each solve."""
    division = Division(num_workers)
    for solve in solves:
        division.loads[solve.owner] += factorization_cost(solve.num_in_features)
    found = []
    for solve in solves:
        costs = [tile_cost(num_rows, solve.num_in_features) for num_rows in solve.rows]
        if solve.is_divided:
            found.append([division.assign(cost) for cost in costs])
        else:
            division.loads[solve.owner] += sum(costs)
            found.append([solve.owner] * len(costs))
    return found


def factorization_cost(num_in: int) -> float:
    """The cost of a factorization, in multiplications of a tile's solve."""
    return _FACTORIZATION * num_in**3 / 3


def tile_cost(num_rows: int, num_in: int) -> float:
    """The cost of a tile with its size, in the same unit."""
    return (1 + _SIZE) * num_rows * num_in**2
