"""Magnitudes and ranges of the input features of Linear modules."""

from __future__ import annotations

import math

import torch

from runtime.algorithms.hessian import FLOAT32, FLOAT64
from runtime.formats.presets import AVERAGING_CONSTANT

_TOKENS_PER_SUM = 256
_ROWS_OF_CHANNELS = 6  # of `ChannelSums`, in float32


class ChannelSums:
    """Magnitudes and ranges of input features, over the batches of one lane or of several.

    A moving average of several lanes is that of the earlier ones, times a power of what a batch leaves of it, plus the
    average of the lane's batches from zero.

    Args:
        num_in_features: I.
        device: the device of the sums, and of the inputs.

    Attributes:
        num_batches: of inputs that had tokens.
        sum_abs_I: the sum of magnitudes, float64.
        bounds_2I: minimum and maximum.
        averages_2I: moving averages of the batches' minima and maxima, from those of the first batch.
        from_zero_2I: the same from zero.
        spans: minimum and maximum of each batch, over all features, each [2].
    """

    def __init__(self, num_in_features: int, device: torch.device) -> None:
        self.num_batches = 0
        self.sum_abs_I = torch.zeros(num_in_features, dtype=torch.float64, device=device)
        smallest_I = torch.full((num_in_features,), torch.inf, device=device)
        self.bounds_2I = torch.stack((smallest_I, -smallest_I))
        self.averages_2I = self.from_zero_2I = torch.zeros(2, num_in_features, device=device)
        self.spans: list[torch.Tensor] = []

    def add(self, flat_TI: torch.Tensor) -> None:
        """Add a batch of inputs, at least one."""
        ends_2I = torch.stack((flat_TI.amin(dim=0), flat_TI.amax(dim=0))).to(torch.float32)
        self._widen(ends_2I)
        self.spans.append(torch.stack((ends_2I[0].amin(), ends_2I[1].amax())))
        before_2I = self.averages_2I if self.num_batches else ends_2I
        self.averages_2I = torch.lerp(before_2I, ends_2I, AVERAGING_CONSTANT) if self.num_batches else ends_2I
        self.from_zero_2I = torch.lerp(self.from_zero_2I, ends_2I, AVERAGING_CONSTANT)
        self.num_batches += 1
        # On the CPU, a sum in float64 copies its operand; a GPU converts while it adds.
        for part_TI in torch.split(flat_TI, _TOKENS_PER_SUM if flat_TI.device.type == "cpu" else len(flat_TI)):
            self.sum_abs_I += part_TI.abs().sum(dim=0, dtype=torch.float64)

    def fold(self, lane: ChannelSums) -> None:
        """Add the sums of the next lane, which has batches."""
        self._widen(lane.bounds_2I)
        if self.num_batches:
            left = math.prod([1 - AVERAGING_CONSTANT] * lane.num_batches)  # a power may differ between C libraries
            self.averages_2I = self.averages_2I * left + lane.from_zero_2I
        else:
            self.averages_2I = lane.averages_2I.clone()  # it may be part of a larger message
        self.num_batches += lane.num_batches
        self.spans += lane.spans
        self.sum_abs_I += lane.sum_abs_I

    def _widen(self, ends_2I: torch.Tensor) -> None:
        self.bounds_2I = torch.stack(
            (torch.minimum(self.bounds_2I[0], ends_2I[0]), torch.maximum(self.bounds_2I[1], ends_2I[1]))
        )

    def packed(self) -> torch.Tensor:
        """Return the sums as bytes, for another worker."""
        rows = (self.bounds_2I, self.averages_2I, self.from_zero_2I, torch.stack(self.spans))
        return torch.cat([part.reshape(-1).view(torch.uint8) for part in (self.sum_abs_I, *rows)])

    @staticmethod
    def packed_bytes(num_in_features: int, num_batches: int) -> int:
        """The size of `packed`."""
        return num_in_features * (FLOAT64 + _ROWS_OF_CHANNELS * FLOAT32) + num_batches * 2 * FLOAT32

    @classmethod
    def unpacked(cls, data: torch.Tensor, num_in_features: int, num_batches: int) -> ChannelSums:
        """Return the sums that another worker has packed."""
        found = cls(num_in_features, data.device)
        found.num_batches = num_batches
        sums, rows = data[: num_in_features * FLOAT64].view(torch.float64), data[num_in_features * FLOAT64 :]
        numbers = rows.view(torch.float32)
        parts = numbers[: _ROWS_OF_CHANNELS * num_in_features].view(3, 2, num_in_features)
        found.sum_abs_I = sums
        found.bounds_2I, found.averages_2I, found.from_zero_2I = parts
        found.spans = list(numbers[_ROWS_OF_CHANNELS * num_in_features :].view(num_batches, 2).clone())
        return found
