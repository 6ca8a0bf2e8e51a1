"""Divide the solves of a step among workers; the plan and every worker compute the same division.

The worker that has a Hessian factors it. While it does, others solve tiles of other inputs: each tile goes to the
worker that can begin it first, when it is free and the factors are there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

NUMBERS_AT_A_TIME = 2**30  # of the weights that several workers quantize before they exchange results
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Divided:
    """The division of solves.

    Attributes:
        order: the indices of the solves in the order in which their factors are complete; each worker factors its own
            Hessians in this order, and all workers solve tiles in it.
        workers: for each solve the worker of each tile.
    """

    order: Sequence[int]
    workers: Sequence[Sequence[int]]


def divided(solves: Sequence[Solve], num_workers: int) -> Divided:
    """Divide the solves of a window."""
    clock = [0.0] * num_workers
    ready = {}
    for index in sorted(range(len(solves)), key=lambda index: (solves[index].num_in_features, index)):
        owner = solves[index].owner
        clock[owner] += factorization_cost(solves[index].num_in_features)
        ready[index] = clock[owner]
    order = sorted(ready, key=lambda index: (ready[index], index)) if num_workers > 1 else list(range(len(solves)))
    workers: list[list[int]] = [[] for _ in solves]
    for index in order:
        solve = solves[index]
        for num_rows in solve.rows:
            rank = solve.owner
            if solve.is_divided:
                rank = min(range(num_workers), key=lambda one: (max(clock[one], ready[index]), one))
            clock[rank] = max(clock[rank], ready[index]) + tile_cost(num_rows, solve.num_in_features)
            workers[index].append(rank)
    return Divided(order=order, workers=workers)


def factorization_cost(num_in: int) -> float:
    """The cost of a factorization, in multiplications of a tile's solve."""
    return _FACTORIZATION * num_in**3 / 3


def tile_cost(num_rows: int, num_in: int) -> float:
    """The cost of a tile with its size, in the same unit."""
    return (1 + _SIZE) * num_rows * num_in**2


def windows(sizes: Sequence[int], *, are_joined: bool) -> Iterator[slice]:
    """Yield the slices of weights that are quantized at a time, given their numbers of elements.

    Args:
        sizes: of the weights.
        are_joined: whether a slice has several. A single worker has nothing to exchange, and takes one after the other.
    """
    start = total = 0
    for index, size in enumerate(sizes):
        if index > start and (not are_joined or total + size > NUMBERS_AT_A_TIME):
            yield slice(start, index)
            start, total = index, 0
        total += size
    if sizes:
        yield slice(start, len(sizes))
