"""The sequential part of GPTQ: round the columns of one block one after the other.

Shapes: B columns of a block, G groups, K columns of a few blocks, O out features, S columns of a strip. See
`runtime.algorithms.gptq`.

For one column, calling torch takes longer than the arithmetic, so this code saves calls: views of buffers are made once
for all blocks, rounding is an addition to a number so large that no fraction is representable, and everything that is
not needed before the block is done is calculated for the whole block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationType

from runtime.algorithms import grid
from runtime.algorithms.gptq_columns_host import HostIntegerGrid
from runtime.algorithms.gptq_tiles import BLOCKS_AT_A_TIME

STRIP_WIDTH = 16  # columns of a block that are solved at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Grids:
    """Each group's scale and zero point, a contiguous row each, in the dtype of the solve.

    Strategies tensor and channel are one group. `scale_GO` holds the stored, already rounded scales; `factor_GO` the
    factors that grid points are multiplied by, which differ from the scales only for NVFP4.
    """

    scale_GO: torch.Tensor
    factor_GO: torch.Tensor
    zero_GO: torch.Tensor | None

    def replaced(self, other: Grids, is_other_O: torch.Tensor) -> Grids:
        """Return these grids, with those of some rows replaced by others."""
        zero_GO = self.zero_GO
        if zero_GO is not None and other.zero_GO is not None:
            zero_GO = torch.where(is_other_O, other.zero_GO, zero_GO)
        return Grids(
            scale_GO=torch.where(is_other_O, other.scale_GO, self.scale_GO),
            factor_GO=torch.where(is_other_O, other.factor_GO, self.factor_GO),
            zero_GO=zero_GO,
        )


class Buffers:
    """Memory that the blocks of a solve use one after the other, with views of its columns.

    Args:
        width: columns of the widest block.
        like_IO: the weights.
    """

    def __init__(self, width: int, like_IO: torch.Tensor) -> None:
        self.strip_width = min(STRIP_WIDTH, width)
        self.targets_KO = like_IO.new_empty(min(width * BLOCKS_AT_A_TIME, len(like_IO)), like_IO.shape[1])
        self.targets = self.targets_KO.unbind()
        self.rounded_BO = like_IO.new_empty(width, like_IO.shape[1])
        self.errors_SO = like_IO.new_empty(self.strip_width, like_IO.shape[1])
        self.inner_SS = like_IO.new_empty(self.strip_width, self.strip_width)
        self.earlier = [(self.errors_SO[:place].t(), self.inner_SS[place, :place]) for place in range(self.strip_width)]


def solve_block_(
    residual_BO: torch.Tensor,
    first: int,
    quantized_BO: torch.Tensor,
    lower_BB: torch.Tensor,
    grids: Grids,
    args: QuantizationArgs,
    group_of_B: Sequence[int],
    buffers: Buffers,
) -> None:
    """Round the columns of one block in strips: column by column within a strip, then the effect of the strip on the
    rest of the block in one product.

    Args:
        residual_BO: w_k on entry, w_k - q_k on return.
        first: the block's first row in `buffers.targets_KO`, which has w_k plus the corrections from earlier blocks on
            entry, and t_k - q_k on return.
        quantized_BO: overwritten with q_k.
        lower_BB: the block of M^T.
        grids: scales and zero points.
        args: bits and symmetry.
        group_of_B: each column's group.
        buffers: for blocks of this width or wider.
    """
    block = slice(first, first + len(residual_BO))
    target_BO = buffers.targets_KO[block]
    if args.type != QuantizationType.INT:
        rounded: _FloatGrid | _IntegerGrid | HostIntegerGrid = _FloatGrid(grids, args, group_of_B)
    elif residual_BO.device.type == "cpu":
        rounded = HostIntegerGrid(grids.factor_GO, grids.zero_GO, args.num_bits, group_of_B)
    else:
        rounded = _IntegerGrid(grids, args, group_of_B)
    with np.errstate(all="ignore"):  # a scale may be too small for its weights
        _round_columns_(residual_BO, target_BO, buffers.targets[block], lower_BB, rounded, buffers)
    rounded.finish_(buffers.rounded_BO[: len(target_BO)], quantized_BO)
    target_BO.sub_(quantized_BO)


def _round_columns_(
    residual_BO: torch.Tensor,
    target_BO: torch.Tensor,
    targets: Sequence[torch.Tensor],
    lower_BB: torch.Tensor,
    rounded: _FloatGrid | _IntegerGrid | HostIntegerGrid,
    buffers: Buffers,
) -> None:
    num_columns, width = len(target_BO), buffers.strip_width
    errors_SO, inner_SS = buffers.errors_SO, buffers.inner_SS
    columns = (target_BO, buffers.rounded_BO[:num_columns], residual_BO, errors_SO)
    rounds, quantized, weights, errors = map(rounded.rows, columns)
    for left in range(0, num_columns, width):
        strip = range(left, min(left + width, num_columns))
        inside, count = slice(left, strip.stop), len(strip)
        inner_SS[:count, :count] = lower_BB[inside, inside]
        for place, column in enumerate(strip):
            if place:
                targets[column].addmv_(*buffers.earlier[place])
            rounded.round_(column, rounds[column], quantized[column], weights[column], errors[place])
        residual_BO[inside] = errors_SO[:count]
        if strip.stop < num_columns:
            target_BO[strip.stop :].addmm_(lower_BB[strip.stop :, inside], errors_SO[:count])


class _IntegerGrid:
    """Rounds to integer grids: q = (n - z) s with n = clamp(round(t / s + z)).

    Adding 1.5 * 2^23 to a float32 of this size drops exactly its fraction, rounded half to even; the sum is clamped,
    and 1.5 * 2^23 is subtracted again, together with z. torch.round gives the same, but wakes all threads for more than
    2048 numbers.
    """

    def __init__(self, grids: Grids, args: QuantizationArgs, group_of_B: Sequence[int]) -> None:
        self.factor_GO, zero_GO = grids.factor_GO, grids.zero_GO
        half = 2 ** (args.num_bits - 1)
        shift = 1.5 * 2.0 ** (52 if self.factor_GO.dtype == torch.float64 else 23)
        self.group_of_B = group_of_B
        self.least, self.most = shift - half, shift + half - 1
        self.factors = self.factor_GO.unbind()
        self.shift_O = torch.full_like(self.factor_GO[0], shift)
        self.zeros = () if zero_GO is None else zero_GO.unbind()
        self.shifts = () if zero_GO is None else (zero_GO + shift).unbind()

    @staticmethod
    def rows(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        """The rows of a tensor as `round_` takes them."""
        return tensor.unbind()

    def round_(
        self,
        column: int,
        target_O: torch.Tensor,
        quantized_O: torch.Tensor,
        weight_O: torch.Tensor,
        error_O: torch.Tensor,
    ) -> None:
        """Overwrite `quantized_O` with n - z of the target, and `error_O` with the weight minus the grid point."""
        group = self.group_of_B[column]
        factor_O = self.factors[group]
        if self.zeros:
            torch.addcdiv(self.zeros[group], target_O, factor_O, out=quantized_O)
            quantized_O.add_(self.shift_O).clamp_(self.least, self.most).sub_(self.shifts[group])
        else:
            torch.addcdiv(self.shift_O, target_O, factor_O, out=quantized_O)
            quantized_O.clamp_(self.least, self.most).sub_(self.shift_O)
        # Not addcmul, which would not round the product, as a reader that computes the grid point does.
        torch.mul(quantized_O, factor_O, out=error_O)
        torch.sub(weight_O, error_O, out=error_O)

    def finish_(self, rounded_BO: torch.Tensor, quantized_BO: torch.Tensor) -> None:
        """Overwrite `quantized_BO` with the integers times their factors."""
        groups_B = torch.tensor(self.group_of_B, device=quantized_BO.device)
        torch.mul(rounded_BO, self.factor_GO.index_select(0, groups_B), out=quantized_BO)


class _FloatGrid:
    """Rounds to grids of small floats."""

    def __init__(self, grids: Grids, args: QuantizationArgs, group_of_B: Sequence[int]) -> None:
        self.grids, self.args, self.group_of_B = grids, args, group_of_B

    @staticmethod
    def rows(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        """The rows of a tensor as `round_` takes them."""
        return tensor.unbind()

    def round_(
        self,
        column: int,
        target_O: torch.Tensor,
        quantized_O: torch.Tensor,
        weight_O: torch.Tensor,
        error_O: torch.Tensor,
    ) -> None:
        """Overwrite `quantized_O` with the target's grid point, and `error_O` with the weight minus that point."""
        group = self.group_of_B[column]
        zero_O = None if self.grids.zero_GO is None else self.grids.zero_GO[group]
        grid.snap_(quantized_O.copy_(target_O), self.grids.factor_GO[group], zero_O, self.args)
        torch.sub(weight_O, quantized_O, out=error_O)

    def finish_(self, rounded_BO: torch.Tensor, quantized_BO: torch.Tensor) -> None:
        """Copy the grid points to `quantized_BO`."""
        quantized_BO.copy_(rounded_BO)
