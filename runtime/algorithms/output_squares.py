"""The squared size of a layer's output or of its error, ||W X||^2 over calibration inputs X, without running the layer.

A Gram matrix H = X X^T gives it for all tokens:

    ||W X||^2 = tr(W H W^T)

This product would take as long as several of AWQ's searches, so of a weight with more than `NUM_ROWS` rows, evenly
spread ones are multiplied, and the result is an estimate.

If only the report needs H, a sample of the tokens is kept instead: all of them up to `NUM_SAMPLED`, then every second,
every fourth and so on of each lane, evenly spread over the data. An error and the size that it is compared with always
come from the same tokens and rows.

Shapes: O out features, I in features, T tokens, R some rows, P some columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from runtime.algorithms.grid import work_dtype
from runtime.algorithms.products import multiplied

NUM_SAMPLED = 1024
NUM_ROWS = 512
WIDEST_GRAM = 512  # features up to which a Gram matrix takes no more memory than a sample
_ROWS = 1024  # rows that are multiplied at a time
SQUARE, _SQUARE_ELSEWHERE = 512, 2048  # side of the part of H that is multiplied at a time, on the CPU and elsewhere
_SMALLEST_SUM, _LARGEST_SUM = 2.0**-60, 2.0**120  # of squares in float32 that are neither subnormal nor infinite


class TokenSample:
    """A sample of input tokens, evenly spread over the tokens of each lane, in their own dtype.

    It has every token of a lane whose number is a multiple of the stride, a power of two. So the sample of some lanes
    can be joined from samples of single lanes, and does not depend on where they were taken.

    Attributes:
        stride: the tokens of a lane from one that is kept to the next.
    """

    def __init__(self) -> None:
        self.stride = 1
        self._lanes: dict[int, torch.Tensor] = {}
        self._parts: list[torch.Tensor] = []  # of the lane that runs
        self._num_in_lane = self._num_seen = self._num_kept = 0

    @classmethod
    def of_kept(cls, kept_TI: torch.Tensor, num_seen: int) -> TokenSample:
        """Return the sample of these tokens, which was taken from `num_seen` before."""
        found = cls()
        found._lanes = {0: kept_TI}
        found._num_kept, found._num_seen = len(kept_TI), num_seen
        return found

    def add(self, inputs_TI: torch.Tensor) -> None:
        """Add the tokens [T, I] of a batch that belong to the sample."""
        first = -self._num_in_lane % self.stride
        self._num_in_lane += len(inputs_TI)
        self._num_seen += len(inputs_TI)
        self._parts.append(inputs_TI[first :: self.stride].clone())
        self._num_kept += len(self._parts[-1])
        self._halve_until_it_fits()

    def end_lane(self, lane: int) -> None:
        """End the lane that runs; the sample is in the order of lanes, whenever they end."""
        if self._parts:
            self._lanes[lane] = self.lane_TI
        self._parts, self._num_in_lane = [], 0

    @property
    def lane_TI(self) -> torch.Tensor:
        """The sample of the lane that runs."""
        return torch.cat(self._parts)

    def join(self, lane: int, inputs_TI: torch.Tensor, stride: int, num_seen: int) -> None:
        """Add the sample of a lane that another worker has taken from `num_seen` tokens."""
        while self.stride < stride:
            self._halve()
        self._lanes[lane] = inputs_TI[:: self.stride // stride].clone()
        self._num_seen += num_seen
        self._num_kept += len(self._lanes[lane])
        self._halve_until_it_fits()

    def _halve_until_it_fits(self) -> None:
        while self._num_kept > NUM_SAMPLED:
            self._halve()

    def _halve(self) -> None:
        self._lanes = {lane: inputs_TI[::2].clone() for lane, inputs_TI in self._lanes.items()}
        self._parts = [self.lane_TI[::2].clone()] if self._parts else []
        self._num_kept = sum(map(len, (*self._lanes.values(), *self._parts)))
        self.stride *= 2

    @property
    def kept_TI(self) -> torch.Tensor:
        """The sample, in the dtype of the inputs."""
        return torch.cat([*(self._lanes[lane] for lane in sorted(self._lanes)), *self._parts])

    @property
    def inputs_TI(self) -> torch.Tensor:
        """The sample, float32."""
        return self.kept_TI.to(torch.float32)

    @property
    def share(self) -> float:
        """The number of tokens that each sampled token represents."""
        return self._num_seen / max(self._num_kept, 1)


def gram_square(rows_RI: torch.Tensor, hessian_II: torch.Tensor) -> float:
    """Compute tr(W H W^T)."""
    return float(gram_squares(rows_RI, hessian_II).sum())


def gram_squares(rows_RI: torch.Tensor, hessian_II: torch.Tensor) -> torch.Tensor:
    """Compute w H w^T of each row, [R] in float64, from the half of the symmetric H above its diagonal.

    H is multiplied in the dtype of the rows, in squares of one size: oneDNN caches a large kernel for each shape.
    """
    side = SQUARE if rows_RI.device.type == "cpu" else _SQUARE_ELSEWHERE
    total_R = rows_RI.new_zeros(len(rows_RI), dtype=torch.float64)
    for left in range(0, len(hessian_II), side):
        panel_RP = rows_RI[:, left : left + side].contiguous()
        for start in range(left, len(hessian_II), side):
            square_SP = hessian_II[start : start + side, left : left + side].to(rows_RI.dtype)
            product_RS = multiplied(panel_RP, square_SP).mul_(rows_RI[:, start : start + side])
            sum_R = product_RS.sum(dim=1, dtype=work_dtype(product_RS))
            total_R.add_(sum_R, alpha=1 if start == left else 2)
    return total_R


def spread_rows(weight_OI: torch.Tensor, most: int) -> torch.Tensor:
    """Return at most so many rows, evenly spread; a view."""
    return weight_OI[:: max(1, -(-len(weight_OI) // most))]


def sample_square(rows_RI: torch.Tensor, inputs_TI: torch.Tensor) -> float:
    """Compute ||W X||^2 from inputs [T, I]."""
    return float(multiplied(rows_RI, inputs_TI).square_().sum(dtype=torch.float64))


def summed(
    weight_OI: torch.Tensor, quantized_OI: torch.Tensor | None, square: Callable[[torch.Tensor], float]
) -> float:
    """Sum `square` over the rows of a weight, or of its difference from a quantized one, a few rows at a time."""
    total = 0.0
    for top in range(0, len(weight_OI), _ROWS):
        rows_RI = weight_OI.detach()[top : top + _ROWS].to(torch.float32)
        if quantized_OI is not None:
            rows_RI = rows_RI - quantized_OI[top : top + _ROWS]
        total += square(rows_RI.contiguous())
    return max(total, 0.0)


def plain_square(rows_RI: torch.Tensor) -> float:
    """Compute ||W||^2, used if no inputs were measured; float32 is precise enough for a row, but has a small range."""
    exact_RI = rows_RI.to(torch.promote_types(rows_RI.dtype, torch.float32))
    total = float(exact_RI.square().sum(dim=1).sum(dtype=torch.float64))
    if not _SMALLEST_SUM < total < _LARGEST_SUM:
        total = float(exact_RI.double().square().sum())
    return total
