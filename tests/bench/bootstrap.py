"""Intervals of a mean by the paired bootstrap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
_AT_A_TIME = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean and its interval of 95 %."""

    mean: float
    low: float
    high: float

    @property
    def is_significant(self) -> bool:
        """Whether zero is outside."""
        return self.low > 0 or self.high < 0


def paired_interval(
    one: Sequence[float], other: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Estimate the mean of one minus other, which were measured on the same windows.

    Differences are resampled with replacement, so that what the windows have in common cancels.

    Raises:
        ValueError: if there are not equally many, or fewer than two.
    """
    if len(one) != len(other) or len(one) < 2:
        raise ValueError(f"a paired interval requires two equally long lists, got {len(one)} and {len(other)} numbers")
    differences = np.asarray(one, dtype=np.float64) - np.asarray(other, dtype=np.float64)
    generator, means = np.random.default_rng(seed), []
    for start in range(0, resamples, _AT_A_TIME):
        count = min(_AT_A_TIME, resamples - start)
        means.append(differences[generator.integers(len(differences), size=(count, len(differences)))].mean(axis=1))
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return Interval(mean=float(differences.mean()), low=float(low), high=float(high))
