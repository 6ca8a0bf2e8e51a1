"""Clipping: round a weight to nearest in ranges that are smaller than those of its groups.

From the code of the authors of AWQ (arXiv 2306.00978, next to section 3.2): for each row and group g the range is
shrunk by the factor, of 1, 1 - 1/n, ... 1/2, with the least error on the group's own block of the inputs' Gram matrix:

    e_g H_gg e_g^T

A weight is searched in parts, some groups of some rows, so that a part's errors stay in the cache for all factors. They
are laid out group by group, because the rows of a group are multiplied by the same block.

Shapes: O out features, I in features, C groups of w columns, R rows of a part, K groups of a part.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from compressed_tensors.quantization import QuantizationArgs

from runtime.algorithms import grid
from runtime.algorithms.output_squares import gram_squares
from runtime.algorithms.products import multiplied
from runtime.algorithms.result import QuantizedWeight
from runtime.errors import QuantizationError

_STEPS = 20
_LEAST_FACTOR = 0.5
_ROWS, _COLUMNS = 1024, 1024  # of a part; a wider group is a part of its own
NUMBERS_OF_A_PART = _ROWS * _COLUMNS
_NARROW = 64  # width of groups below which starting a product for each takes longer than the product


def quantize_clipped(
    weight_OI: torch.Tensor,
    hessian_II: torch.Tensor,
    args: QuantizationArgs,
    *,
    scale_dtype: torch.dtype,
    global_scale: torch.Tensor | None = None,
) -> QuantizedWeight:
    """Round a weight to nearest, with each group's range clipped for the least error on its own inputs.

    Args:
        weight_OI: [O, I], any float dtype; not changed.
        hessian_II: H, the sum of x x^T over the layer's inputs after scaling.
        args: strategy, bits and symmetry; the observer is ignored.
        scale_dtype: the dtype that the checkpoint stores scales in.
        global_scale: NVFP4's [1], if siblings share one.

    Returns:
        The dequantized weight with its scales; `loss` is the sum of e_g H_gg e_g^T over all rows and groups.

    Raises:
        QuantizationError: for an unsupported strategy, type or shape, and numbers that are not finite.
    """
    weight_OI = weight_OI.detach()
    grid.check_weight(weight_OI, args, supported=("channel", "group", "tensor_group"))
    if hessian_II.shape != (weight_OI.shape[1],) * 2 or not grid.is_finite(hessian_II):
        raise QuantizationError(
            f"a Gram matrix of shape {list(hessian_II.shape)} is not finite, or does not match a weight of shape "
            f"{list(weight_OI.shape)}"
        )
    global_scale = grid.shared_global_scale(args, global_scale, [weight_OI])
    tiles_OCw = grid.tile(weight_OI, args)[:, 0]
    num_out, num_groups, width = tiles_OCw.shape
    search = _RangeSearch(
        tiles_OCw=tiles_OCw,
        minimum_OC=tiles_OCw.amin(dim=2),
        maximum_OC=tiles_OCw.amax(dim=2),
        gram_II=hessian_II.to(grid.work_dtype(weight_OI, hessian_II)),
        args=args,
        scale_dtype=scale_dtype,
        global_scale=global_scale,
    )
    best = search.fitted((slice(None), slice(None)), 1)
    quantized_OCw = torch.empty(tiles_OCw.shape, dtype=torch.float32, device=weight_OI.device)
    num_rows, step, loss = min(_ROWS, num_out), min(max(1, _COLUMNS // width), num_groups), 0.0
    buffers = search.gram_II.new_empty(2, step * num_rows * width)
    for top, first in itertools.product(range(0, num_out, num_rows), range(0, num_groups, step)):
        place = slice(top, top + num_rows), slice(first, first + step)
        loss += search.clip_(place, best, quantized_OCw[place], buffers)
    return QuantizedWeight(
        weight_OI=quantized_OCw.flatten(1),
        scale=grid.stored(best.scale_RC, args),
        zero_point=None if best.zero_point_RC is None else grid.stored(best.zero_point_RC, args),
        global_scale=global_scale,
        loss=loss,
        damping=0.0,
    )


_Place = tuple[slice, slice]  # the rows and the groups of a part


@dataclass(frozen=True, kw_only=True, slots=True)
class _RangeSearch:
    """The search for the ranges of a weight; the other attributes are those of `quantize_clipped`."""

    tiles_OCw: torch.Tensor
    minimum_OC: torch.Tensor
    maximum_OC: torch.Tensor
    gram_II: torch.Tensor
    args: QuantizationArgs
    scale_dtype: torch.dtype
    global_scale: torch.Tensor | None

    def fitted(self, place: _Place, factor: float) -> grid.Grid:
        """Fit the grids of a part to its ranges times a factor."""
        low_RK, high_RK = factor * self.minimum_OC[place], factor * self.maximum_OC[place]
        scale_RK, zero_RK = grid.fit(
            low_RK, high_RK, self.args, scale_dtype=self.scale_dtype, global_scale=self.global_scale
        )
        return grid.Grid(scale_RC=scale_RK, zero_point_RC=zero_RK, global_scale=self.global_scale)

    def clip_(self, place: _Place, best: grid.Grid, quantized_RKw: torch.Tensor, buffers: torch.Tensor) -> float:
        """Search the grids of a part, write them to their place, and round the part to them.

        Args:
            place: the part.
            best: the grids of the whole weight.
            quantized_RKw: overwritten with the rounded part.
            buffers: two, each of at least the size of the part.

        Returns:
            The error.
        """
        part_KRw = self.tiles_OCw[place].transpose(0, 1)
        values_KRw, error_KRw = (buffer[: part_KRw.numel()].view(part_KRw.shape) for buffer in buffers)
        values_KRw.copy_(part_KRw)
        blocks_Kww = self._blocks(place[1].start, len(part_KRw))
        own = grid.Grid(
            scale_RC=best.scale_RC[place],
            zero_point_RC=None if best.zero_point_RC is None else best.zero_point_RC[place],
            global_scale=self.global_scale,
        )
        least_KR = values_KRw.new_full(part_KRw.shape[:2], torch.inf, dtype=torch.float64)
        for step in range(int(_STEPS * (1 - _LEAST_FACTOR)) + 1):
            found = self.fitted(place, 1 - step / _STEPS)
            self._round_(error_KRw.copy_(values_KRw), found).sub_(values_KRw)
            loss_KR = _block_squares(error_KRw, blocks_Kww)
            is_better_KR = loss_KR < least_KR
            least_KR = torch.where(is_better_KR, loss_KR, least_KR)
            for known, other in ((own.scale_RC, found.scale_RC), (own.zero_point_RC, found.zero_point_RC)):
                if known is not None and other is not None:
                    known.copy_(torch.where(is_better_KR.t(), other, known))
        quantized_RKw.copy_(self._round_(values_KRw, own).transpose(0, 1))
        return float(least_KR.sum())

    def _blocks(self, first: int, count: int) -> torch.Tensor:
        """The blocks of H of some groups."""
        width = self.tiles_OCw.shape[2]
        edges = range(first * width, (first + count) * width, width)
        return torch.stack([self.gram_II[left : left + width, left : left + width] for left in edges])

    def _round_(self, values_KRw: torch.Tensor, found: grid.Grid) -> torch.Tensor:
        dtype = values_KRw.dtype
        factor_KR1 = found.factor_RC(torch.float32).to(dtype).t().unsqueeze(2)
        zero_KR1 = None if found.zero_point_RC is None else found.zero_point_RC.to(dtype).t().unsqueeze(2)
        return grid.snap_(values_KRw, factor_KR1, zero_KR1, self.args)


def _block_squares(error_KRw: torch.Tensor, blocks_Kww: torch.Tensor) -> torch.Tensor:
    """Compute e_g H_gg e_g^T of each group and row, [K, R] in float64."""
    num_groups, width = blocks_Kww.shape[:2]
    if num_groups == 1:
        return gram_squares(error_KRw[0], blocks_Kww[0])[None]
    if width < _NARROW or error_KRw.device.type != "cpu":
        return torch.bmm(error_KRw, blocks_Kww).mul_(error_KRw).sum(dim=2).double()
    each = zip(error_KRw, blocks_Kww, strict=True)
    return torch.stack([multiplied(one_Rw, block.t()).mul_(one_Rw).sum(dim=1) for one_Rw, block in each]).double()
