"""The integer program that chooses schemes within a budget."""

from __future__ import annotations

import builtins
import itertools
import math
import random
from typing import Any

import pytest

from runtime.algorithms.bit_allocation import allocate
from runtime.errors import UsageError


def instance(seed: int) -> tuple[list[list[float]], list[list[int]], int]:
    """A small problem, whose losses span many powers of ten, as those of 2 to 8 bits do."""
    chance = random.Random(seed)
    num_groups, num_schemes = chance.randint(1, 6), chance.randint(1, 4)
    losses = [[chance.random() * 10 ** chance.randint(-6, 6) for _ in range(num_schemes)] for _ in range(num_groups)]
    sizes = [[chance.randint(1, 50) * 128 + 16 for _ in range(num_schemes)] for _ in range(num_groups)]
    budget = chance.randint(sum(map(min, sizes)), sum(map(max, sizes)))
    return losses, sizes, budget


@pytest.mark.parametrize("seed", range(40))
def test_no_choice_is_better(seed: int) -> None:
    losses, sizes, budget = instance(seed)
    choices = itertools.product(range(len(losses[0])), repeat=len(losses))
    best = min(
        math.fsum(own[scheme] for own, scheme in zip(losses, choice, strict=True))
        for choice in choices
        if sum(own[scheme] for own, scheme in zip(sizes, choice, strict=True)) <= budget
    )
    found = allocate(losses, sizes, budget)
    assert found.num_bytes == sum(own[scheme] for own, scheme in zip(sizes, found.choice, strict=True)) <= budget
    assert found.loss == pytest.approx(best, rel=2e-6)
    assert found.gap == 0
    assert allocate(losses, sizes, budget) == found


def test_a_larger_budget_never_loses_more() -> None:
    losses, sizes, _ = instance(3)
    budgets = range(sum(map(min, sizes)), sum(map(max, sizes)) + 128, 512)
    found = [allocate(losses, sizes, budget).loss for budget in budgets]
    assert found == sorted(found, reverse=True)


def test_a_budget_is_met_to_the_byte() -> None:
    losses, sizes = [[4.0, 1.0]] * 1000, [[10**9, 2 * 10**9 + 1]] * 1000
    whole = sum(own[1] for own in sizes)
    assert allocate(losses, sizes, whole).choice == (1,) * 1000
    assert allocate(losses, sizes, whole - 1).choice.count(1) == 999


def test_of_equal_choices_the_simplest_and_smallest_is_taken() -> None:
    same = [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [9.0, 1.0, 9.0]]
    sizes = [[10, 20, 30], [10, 20, 30], [10, 20, 30]]
    assert allocate(same, sizes, 90).choice == (1, 1, 1)
    assert allocate(same, sizes, 50).choice == (0, 0, 1)  # nothing else fits with one scheme
    nothing = [[0.0, 0.0]] * 3
    assert allocate(nothing, [[8, 4]] * 3, 100).choice == (1, 1, 1)


def test_impossible_schemes_are_not_chosen() -> None:
    assert allocate([[math.inf, 1.0], [0.5, 2.0]], [[1, 5], [1, 5]], 6).choice == (1, 0)


@pytest.mark.parametrize(
    ("losses", "sizes", "budget", "words"),
    [
        ([[1.0, 2.0]], [[5, 4]], 3, "the smallest choice takes 4 bytes, more than the budget of 3"),
        ([[math.nan]], [[1]], 3, "losses must be at least 0"),
        ([[-1.0]], [[1]], 3, "losses must be at least 0"),
        ([[math.inf]], [[1]], 3, "one of each group finite"),
        ([[1.0], [1.0, 2.0]], [[1], [1]], 3, "a loss and a size for each scheme"),
        ([], [], 3, "a loss and a size for each scheme"),
    ],
)
def test_bad_input(losses: Any, sizes: Any, budget: int, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        allocate(losses, sizes, budget)


def test_without_highspy_the_command_to_install_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name == "highspy":
            raise ModuleNotFoundError("No module named 'highspy'", name=name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UsageError, match="requires highspy, which is not installed") as caught:
        allocate([[1.0]], [[1]], 1)
    assert caught.value.hint == "pip install highspy"
