"""The lanes of a run: contiguous parts of the data whose statistics are summed up alone, and then added in order.

Sums of floating point numbers depend on the order of additions. So the data fixes the order, not the number of workers:
each lane belongs to one worker, and a batch never crosses the border of two lanes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from runtime.data.batches import Batches, cut_batches, largest_batch, num_samples, split_batches

if TYPE_CHECKING:
    from runtime.artifact.manifest import Manifest

NUM_LANES = 16
TOKENS_PER_LANE = 1024  # at least: the sums of short lanes would take longer to add than to compute


@dataclass(frozen=True, kw_only=True, slots=True)
class Lanes:
    """The batches of each lane, in file order.

    Lane l belongs to the worker of rank l modulo the number of workers. In round t, the workers run the lanes from
    t times their number on, at most one each.
    """

    lanes: tuple[Batches, ...]

    @classmethod
    def of(cls, manifest: Manifest, batches: Sequence[Mapping[str, Any]]) -> Lanes:
        """Divide batches into lanes with as many samples each, and split batches at their borders.

        If batches cannot be split, a lane has whole ones.
        """
        firsts = [batch.get(manifest.inputs[0].name) for batch in batches]
        tokens = sum(first.numel() for first in firsts if isinstance(first, torch.Tensor))
        counts = [num_samples(manifest, batch) or 0 for batch in batches]
        borders = lane_borders(sum(counts), tokens) if all(counts) else []
        parts = cut_batches(
            manifest, batches, lambda first, last: (border for border in borders if first < border < last)
        )
        if parts is None or not all(counts):
            parts = [dict(batch) for batch in batches]
            borders, counts = lane_borders(len(parts), tokens), [1] * len(parts)
        else:
            counts = [num_samples(manifest, part) or 0 for part in parts]
        lanes: list[Batches] = [[] for _ in range(len(borders) - 1)]
        lane = first = 0
        for part, count in zip(parts, counts, strict=True):
            lane += first == borders[lane + 1]
            lanes[lane].append(part)
            first += count
        return cls(lanes=tuple(lanes))

    def split(self, manifest: Manifest, size: int) -> Lanes | None:
        """Split batches into parts of at most `size` samples; None if they cannot be split."""
        found = [split_batches(manifest, lane, size) for lane in self.lanes]
        lanes = tuple(lane for lane in found if lane is not None)
        return Lanes(lanes=lanes) if len(lanes) == len(found) else None

    def largest(self, manifest: Manifest) -> int:
        """Return the number of samples of the largest batch that can be split; 1 if no batch can."""
        return largest_batch(manifest, self.batches())

    def num_rounds(self, size: int) -> int:
        """The number of rounds in which so many workers run all lanes."""
        return -(-len(self.lanes) // size)

    def own(self, rank: int, size: int) -> tuple[Batches, ...]:
        """Return the lanes of one of `size` workers, in the order of rounds; the last round may have none for it."""
        return self.lanes[rank::size]

    def batches(self, rank: int = 0, size: int = 1) -> Batches:
        """Return the batches of one of `size` workers, in order."""
        return [batch for lane in self.own(rank, size) for batch in lane]

    def rounds(self, rank: int, size: int) -> list[int]:
        """Return how many batches one of `size` workers runs in each round."""
        counts = [len(lane) for lane in self.own(rank, size)]
        return counts + [0] * (self.num_rounds(size) - len(counts))

    def places(self, rank: int, size: int) -> list[tuple[int, int]]:
        """Return the lane of each batch of one of `size` workers, and its position there."""
        return [
            (rank + turn * size, place) for turn, lane in enumerate(self.own(rank, size)) for place in range(len(lane))
        ]


def lane_borders(count: int, tokens: int) -> list[int]:
    """Return the first sample of each lane, and the number of samples.

    Args:
        count: the number of samples.
        tokens: of all samples.
    """
    num_lanes = min(NUM_LANES, count, max(1, tokens // TOKENS_PER_LANE))
    return [lane * count // num_lanes for lane in range(num_lanes + 1)] if num_lanes else []
