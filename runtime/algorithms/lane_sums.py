"""A sum over lanes: that of the lane that runs, and the total of those before it, panel by panel.

Lanes are added in their order, on one worker or on several, so that the sum has the same bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch


class SumOverLanes(ABC):
    """The state of a sum over lanes.

    Args:
        width: the rows of a panel.

    Attributes:
        has_lane: whether the lane that runs has a sum.
        has_total: whether earlier lanes have one.
        width: the rows of a panel.
    """

    __slots__ = ("_is_ended", "has_lane", "has_total", "width")

    def __init__(self, width: int) -> None:
        self.has_lane = self.has_total = self._is_ended = False
        self.width = width

    @property
    @abstractmethod
    def size(self) -> int:
        """The rows of the sum."""

    @abstractmethod
    def lane_panel(self, left: int) -> torch.Tensor:
        """The panel of the lane's sum that begins with this row; not a copy."""

    @abstractmethod
    def fold_(self, left: int, lane: torch.Tensor, *, is_first: bool | None = None) -> None:
        """Add a lane's sum to the total of a panel.

        Args:
            left: the panel's first row.
            lane: the sum, as `lane_panel` returns it.
            is_first: whether there is no total of this panel; by default `has_total` tells.
        """

    def panels(self) -> Iterator[int]:
        """The first row of each panel."""
        return iter(range(0, self.size, self.width))

    def end_lane(self) -> None:
        """End a lane; the next one is added to its sum."""
        self._is_ended = True

    def fold_ended_(self) -> None:
        """Add a lane that has ended to the total, so that the sums of other workers can follow."""
        if self.has_lane and self._is_ended:
            for left in self.panels():
                self.fold_(left, self.lane_panel(left))
            self.has_total = True
            self.drop_lane()

    def drop_lane(self) -> None:
        """Forget the sum of the lane, after it was added to a total here or elsewhere."""
        self.has_lane = self._is_ended = False
