"""How large a layer's output is, or the error of it: ||W X||^2 over calibration inputs X, without running the layer.

Where there is a Gram matrix H = X X^T, it says so for all tokens:

    ||W X||^2 = tr(W H W^T)

Where there is none, as nobody but the report would need it, a sample of the tokens does: all of them up to
`NUM_SAMPLED`, then every second, every fourth and so on, evenly spread over the data. An error and the size that it is
compared with are always of the same tokens.

Shapes: O out features, I in features, T tokens, R some rows, P some columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from runtime.algorithms.products import multiplied

NUM_SAMPLED = 1024
WIDEST_GRAM = 512  # features: up to here a Gram matrix takes no more memory than a sample
_ROWS = 1024  # that are multiplied at a time
_PANEL = 512  # columns of H that are multiplied at a time


class TokenSample:
    """Inputs of some tokens, evenly spread over all that come, in the dtype that they come in."""

    def __init__(self) -> None:
        self._parts: list[torch.Tensor] = []
        self._stride = 1
        self._num_seen = self._num_kept = 0

    def add(self, inputs_TI: torch.Tensor) -> None:
        """Take what belongs to the sample of these tokens."""
        first = -self._num_seen % self._stride
        self._num_seen += len(inputs_TI)
        part_TI = inputs_TI[first :: self._stride].clone()
        self._parts.append(part_TI)
        self._num_kept += len(part_TI)
        while self._num_kept > NUM_SAMPLED:
            self._parts = [torch.cat(self._parts)[::2].clone()]
            self._num_kept = len(self._parts[0])
            self._stride *= 2

    @property
    def inputs_TI(self) -> torch.Tensor:
        """The sample, float32."""
        return torch.cat(self._parts).to(torch.float32)

    @property
    def share(self) -> float:
        """How many tokens each of the sample stands for."""
        return self._num_seen / max(self._num_kept, 1)


def gram_square(rows_RI: torch.Tensor, hessian_II: torch.Tensor) -> float:
    """tr(W H W^T), of the half of H above its diagonal: H is symmetric."""
    total = 0.0
    for left in range(0, len(hessian_II), _PANEL):
        panel_RP = rows_RI[:, left : left + _PANEL]
        width = panel_RP.shape[1]
        product_RI = multiplied(panel_RP, hessian_II[left:, left : left + _PANEL]).mul_(rows_RI[:, left:])
        total += 2 * float(product_RI.sum(dtype=torch.float64)) - float(product_RI[:, :width].sum(dtype=torch.float64))
    return total


def sample_square(rows_RI: torch.Tensor, inputs_TI: torch.Tensor) -> float:
    """||W X||^2 of inputs that are there."""
    return float(multiplied(rows_RI, inputs_TI).square_().sum(dtype=torch.float64))


def summed(
    weight_OI: torch.Tensor, quantized_OI: torch.Tensor | None, square: Callable[[torch.Tensor], float]
) -> float:
    """The square of a weight, or of what it differs by from a quantized one, a few rows at a time."""
    total = 0.0
    for top in range(0, len(weight_OI), _ROWS):
        rows_RI = weight_OI.detach()[top : top + _ROWS].to(torch.float32)
        if quantized_OI is not None:
            rows_RI = rows_RI - quantized_OI[top : top + _ROWS]
        total += square(rows_RI.contiguous())
    return max(total, 0.0)


def plain_square(rows_RI: torch.Tensor) -> float:
    """||W||^2, where no inputs were measured."""
    return float(rows_RI.double().square().sum())
