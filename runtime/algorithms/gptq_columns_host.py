"""Rounding columns to integer grids on a CPU, by NumPy.

A column has a few hundred to a few thousand numbers, so that calling an operation takes longer than the operation.
NumPy's element-wise operations are called in a quarter of torch's time, and give the same bits: each is rounded as IEEE
754 states. Arrays share the memory of tensors.

Shapes: B columns of a block, G groups, O out features. See `runtime.algorithms.gptq_columns`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


class HostIntegerGrid:
    """Rounds to integer grids: q = (n - z) s with n = clamp(round(t / s + z)), rounded half to even.

    Args:
        factor_GO: s.
        zero_GO: z, or None.
        num_bits: of the integers.
        group_of_B: each column's group.
    """

    def __init__(
        self, factor_GO: torch.Tensor, zero_GO: torch.Tensor | None, num_bits: int, group_of_B: Sequence[int]
    ) -> None:
        half = 2 ** (num_bits - 1)
        self.group_of_B, self.factor_GO = group_of_B, factor_GO
        self.factors = self.rows(factor_GO)
        self.zeros = [] if zero_GO is None else self.rows(zero_GO)
        self.least_O = np.full_like(self.factors[0], -half)  # a row: for a single number NumPy takes longer
        self.most_O = np.full_like(self.factors[0], half - 1)

    @staticmethod
    def rows(tensor: torch.Tensor) -> Sequence[Any]:
        """The rows of a tensor as `round_` takes them."""
        return list(tensor.numpy())

    def round_(self, column: int, target_O: Any, quantized_O: Any, weight_O: Any, error_O: Any) -> None:
        """Overwrite `quantized_O` with n - z of the target, and `error_O` with the weight minus the grid point."""
        group = self.group_of_B[column]
        factor_O = self.factors[group]
        np.divide(target_O, factor_O, quantized_O)
        if self.zeros:
            np.add(quantized_O, self.zeros[group], quantized_O)
        np.rint(quantized_O, quantized_O)
        np.minimum(quantized_O, self.most_O, out=quantized_O)
        np.maximum(quantized_O, self.least_O, out=quantized_O)
        if self.zeros:
            np.subtract(quantized_O, self.zeros[group], quantized_O)
        np.multiply(quantized_O, factor_O, error_O)
        np.subtract(weight_O, error_O, error_O)

    def finish_(self, rounded_BO: torch.Tensor, quantized_BO: torch.Tensor) -> None:
        """Overwrite `quantized_BO` with the integers times their factors."""
        rounded_BO += 0.0  # makes a negative zero, to which small negative numbers are rounded, a positive one
        groups_B = torch.tensor(self.group_of_B)
        torch.mul(rounded_BO, self.factor_GO.index_select(0, groups_B), out=quantized_BO)
