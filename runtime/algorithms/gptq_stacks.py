"""GPTQ on a GPU: solve a stack of tiles, which have one shape, at the same time and without waiting for the device.

The algorithm is that of `runtime.algorithms.gptq`. Products of all problems are one batched product, and the columns of
a block are one launch of `gptq_cuda` for all problems and rows, which also adds up the loss. So a block of 128 columns
takes two or three launches. Numbers are read once, when everything is queued: losses and sizes, which are finite only
if weights and scales are.

Without Triton, in float64 and for blocks wider than the kernel supports, blocks are solved as on a CPU.

Shapes: E problems of a stack, O rows of a tile, I in features, G groups, S columns of blocks that share a product, B of
a block, P of a panel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from runtime.algorithms import gptq_cuda, gptq_options, grid
from runtime.algorithms.drift import corrected_rows
from runtime.algorithms.gptq_columns import Buffers, Grids, solve_block_
from runtime.algorithms.gptq_factors import weighed
from runtime.algorithms.gptq_grids import Fitting
from runtime.algorithms.gptq_options import SolvedPiece, SolveOptions, check_options, corrected
from runtime.algorithms.gptq_stack_factors import FactorStack, factored_stack
from runtime.algorithms.gptq_stack_grids import PANEL, Problem, StackedGrids, fitted_problems, fitted_to_targets
from runtime.algorithms.gptq_tiles import BLOCKS_AT_A_TIME, Tile
from runtime.algorithms.products import float32_products
from runtime.algorithms.result import QuantizedWeight
from runtime.errors import QuantizationError


def solve_together(
    weights: Sequence[Sequence[torch.Tensor]],
    hessians: list[torch.Tensor],
    tiles: Sequence[Tile],
    options: Sequence[SolveOptions],
    num_problems: int,
    drifts: Sequence[torch.Tensor] = (),
) -> list[list[SolvedPiece] | QuantizationError]:
    """Factor Hessians of one shape, and solve all tiles of the weights that `gptq.require_solvable` accepts.

    Args:
        weights: the siblings of each Hessian; their shapes are those of the others.
        hessians: not changed; removed from the list when they are factored, to free their memory.
        tiles: `gptq_tiles.tiles_of` the siblings of one Hessian.
        options: of each; equal but for the global scales.
        num_problems: of a full stack.
        drifts: of the inputs of each Hessian, for error-aware targets.

    Returns:
        For each Hessian the pieces of all tiles, or its error.
    """
    for one in options:
        check_options(one)
    found: list[list[SolvedPiece] | QuantizationError] = [[] for _ in hessians]
    with float32_products():
        shapes, dtype = [list(own[0].shape) for own in weights], grid.work_dtype(*weights[0], *hessians)
        how = options[0].actorder, options[0].dampening_frac, dtype
        factors = factored_stack(hessians, shapes, *how, num_problems=num_problems)
        hessians.clear()
        if drifts:
            factors = factors.corrected(drifts, options[0].strength)
        fittings = [
            Fitting.of(own, diagonal_I, one)
            for own, diagonal_I, one in zip(weights, factors.diagonal_EI, options, strict=False)
        ]
        for tile in tiles:
            problems = [
                Problem(weights=own, tile=tile, fitting=fitting) for own, fitting in zip(weights, fittings, strict=True)
            ]
            for place, result in enumerate(solve_stack(problems, factors, options[0])):
                before = found[place]
                if isinstance(result, QuantizationError):
                    found[place] = result
                elif not isinstance(before, QuantizationError):
                    before.extend(result)
    return found


def solve_stack(
    problems: Sequence[Problem], factors: FactorStack, options: SolveOptions
) -> list[list[SolvedPiece] | QuantizationError]:
    """Solve problems of one shape.

    Args:
        problems: at most as many as the stack has; the others are padding.
        factors: of the problems.
        options: of all problems; global scales are those of `Problem.fitting`.

    Returns:
        For each problem the pieces of its tile, or its error.
    """
    tile, problems = problems[0].tile, _corrected(problems, factors)
    padded = [*problems, *[problems[-1]] * (len(factors.order_EI) - len(problems))]
    grids = fitted_problems(padded)
    problem_E1 = torch.arange(len(padded), device=factors.order_EI.device)[:, None]
    rows_EOI = torch.stack([problem.rows_OI().to(factors.lower_EII.dtype) for problem in padded])
    residual_EIO = rows_EOI.mT.contiguous()[problem_E1, factors.order_EI]
    del rows_EOI
    size_EO = _output_squares(residual_EIO, factors)
    quantized_EIO, loss_EO = _solve_(residual_EIO, factors, grids, padded, options)
    if options.range_passes > 1:
        others = fitted_to_targets(residual_EIO, quantized_EIO, factors, padded)
        residual_EIO += quantized_EIO  # the weights
        again_EIO, again_EO = _solve_(residual_EIO, factors, others, padded, options)
        is_worse_E1O = (again_EO >= loss_EO)[:, None]
        quantized_EIO = torch.where(is_worse_E1O, quantized_EIO, again_EIO)
        grids, loss_EO = others.replaced(grids, is_worse_E1O), torch.minimum(again_EO, loss_EO)
        del again_EIO
    del residual_EIO
    quantized_EOI = quantized_EIO[problem_E1, torch.argsort(factors.order_EI, dim=1)].mT.contiguous().float()
    del quantized_EIO
    heights = problems[0].heights
    sums = [part.sum(dim=-1) for part in torch.split(torch.stack((loss_EO, size_EO)), heights, dim=-1)]
    numbers = gptq_options.awaited(torch.stack(sums))  # by piece, loss or size, and problem
    found: list[list[SolvedPiece] | QuantizationError] = []
    for place, problem in enumerate(problems):
        losses, sizes = ([part[which][place] for part in numbers] for which in (0, 1))
        error = factors.errors[place] or _unsound(problem, grids.scale_EGO[place], [*losses, *sizes])
        if error is not None:
            found.append(error)
            continue
        rows = _results(problem, quantized_EOI[place], grids.one(place), losses, factors.dampings[place], options)
        given = zip(tile, rows, sizes, strict=True)
        found.append([SolvedPiece(piece=piece, rows=part, size=max(size, 0.0)) for piece, part, size in given])
    return found


def _corrected(problems: Sequence[Problem], factors: FactorStack) -> Sequence[Problem]:
    """The problems of the corrected rows, which are their weights (`runtime.algorithms.drift`)."""
    if factors.correction_EII is None:
        return problems
    found = []
    for problem, correction_II in zip(problems, factors.correction_EII, strict=False):
        parts = [problem.weights[piece.weight].detach()[piece.rows] for piece in problem.tile]
        rows = [corrected_rows(part, correction_II) for part in parts]
        found.append(problem.with_rows(rows))
    return found


def _results(
    problem: Problem,
    quantized_OI: torch.Tensor,
    grids: Grids,
    losses: Sequence[float],
    damping: float,
    options: SolveOptions,
) -> list[QuantizedWeight]:
    """The result of each piece."""
    found, first = [], 0
    for height, loss in zip(problem.heights, losses, strict=True):
        rows = slice(first, first + height)
        zero_GO = None if grids.zero_GO is None else grids.zero_GO[:, rows]
        result = QuantizedWeight(
            weight_OI=quantized_OI[rows],
            scale=problem.fitting.stored(grids.scale_GO[:, rows], options.piece_scale_dtype),
            zero_point=None if zero_GO is None else problem.fitting.stored(zero_GO, torch.int8),
            global_scale=problem.fitting.global_scale,
            loss=max(loss, 0.0),
            damping=damping,
        )
        found.append(result)
        first = rows.stop
    return found


def _unsound(problem: Problem, scale_GO: torch.Tensor, numbers: Sequence[float]) -> QuantizationError | None:
    """Return the error that a CPU would have raised before the solve, if the problem's losses and sizes show one."""
    if all(map(math.isfinite, numbers)):
        return None
    try:
        for piece in problem.tile:
            grid.check_numbers(problem.weights[piece.weight])
        problem.fitting.reading().grids_of(problem.tile)
    except QuantizationError as error:
        return error
    if not bool(torch.isfinite(scale_GO).all()):  # of a group that was fitted during the solve
        return QuantizationError(f"a scale of corrected weights overflows {problem.fitting.scale_dtype}")
    return None


def _solve_(
    residual_EIO: torch.Tensor,
    factors: FactorStack,
    grids: StackedGrids,
    problems: Sequence[Problem],
    options: SolveOptions,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round all columns, block by block; `residual_EIO` is w_k on entry, and w_k - q_k on return.

    Returns:
        quantized_EIO: q_k.
        loss_EO: the loss of each row, without the dampening, float64.
    """
    num_problems, num_columns, num_rows = residual_EIO.shape
    lower_EII, width = factors.lower_EII, min(options.block_width, num_columns)
    group_EI = (factors.order_EI // options.columns_of_a_scale(num_columns)).to(torch.int32)
    far_dtype = residual_EIO.dtype if residual_EIO.dtype == torch.float64 else options.far_dtype
    quantized_EIO = torch.empty_like(residual_EIO)
    loss_EO = torch.zeros(num_problems, num_rows, dtype=torch.float64, device=residual_EIO.device)
    is_fused = gptq_cuda.is_supported(width, residual_EIO.dtype)
    plain = None if is_fused else _PlainBlocks(group_EI, width, residual_EIO[0])
    for first in range(0, num_columns, width * BLOCKS_AT_A_TIME):
        some = slice(first, min(first + width * BLOCKS_AT_A_TIME, num_columns))
        targets_ESO = residual_EIO[:, some].clone(memory_format=torch.contiguous_format)
        if first and far_dtype == residual_EIO.dtype:
            targets_ESO.baddbmm_(lower_EII[:, some, :first], residual_EIO[:, :first])
        elif first:
            errors_EIO = residual_EIO[:, :first].to(far_dtype)
            targets_ESO.add_(torch.bmm(lower_EII[:, some, :first].to(far_dtype), errors_EIO))
        for start in range(first, some.stop, width):
            block = slice(start, min(start + width, num_columns))
            target_EBO, lower_EBB = targets_ESO[:, start - first : block.stop - first], lower_EII[:, block, block]
            if start > first:
                target_EBO.baddbmm_(lower_EII[:, block, first:start], residual_EIO[:, first:start])
            if options.refits:
                for place, problem in enumerate(problems):
                    group_BO = corrected(residual_EIO[place, block], target_EBO[place], lower_EBB[place])
                    problem.fitting.refit_(grids.one(place), start // width, group_BO)
            values = residual_EIO[:, block], target_EBO, quantized_EIO[:, block], loss_EO
            if plain is not None:
                plain.solve_(*values, lower_EBB, factors.pivot_EI[:, block], grids, block, options)
                continue
            gptq_cuda.solve_block_(
                *values,
                lower_EBB=lower_EBB,
                pivot_EB=factors.pivot_EI[:, block],
                factor_EGO=grids.factor_EGO,
                zero_EGO=grids.zero_EGO,
                group_EB=group_EI[:, block],
                args=options.args,
            )
        del targets_ESO, target_EBO, values  # before the next ones are allocated
    return quantized_EIO, loss_EO - _weighed(residual_EIO, factors.added_EI)


class _PlainBlocks:
    """Solves blocks as on a CPU, one problem after the other."""

    def __init__(self, group_EI: torch.Tensor, width: int, like_IO: torch.Tensor) -> None:
        self.groups: list[list[int]] = gptq_options.awaited(group_EI)
        self.buffers = Buffers(width, like_IO)

    def solve_(
        self,
        residual_EBO: torch.Tensor,
        target_EBO: torch.Tensor,
        quantized_EBO: torch.Tensor,
        loss_EO: torch.Tensor,
        lower_EBB: torch.Tensor,
        pivot_EB: torch.Tensor,
        grids: StackedGrids,
        block: slice,
        options: SolveOptions,
    ) -> None:
        """Round the columns of a block, as `gptq_cuda.solve_block_`."""
        targets_BO = self.buffers.targets_KO[: target_EBO.shape[1]]
        for place, groups in enumerate(self.groups):
            targets_BO.copy_(target_EBO[place])
            solve_block_(
                residual_EBO[place],
                0,
                quantized_EBO[place],
                lower_EBB[place].contiguous(),
                grids.one(place),
                options.args,
                groups[block],
                self.buffers,
            )
            loss_EO[place] += weighed(targets_BO, pivot_EB[place])


def _output_squares(columns_EIO: torch.Tensor, factors: FactorStack) -> torch.Tensor:
    """Compute ||w X||^2 for each row w of weights, float64, as `gptq_factors.output_squares`."""
    total_EO = -_weighed(columns_EIO, factors.added_EI)
    for start in range(0, columns_EIO.shape[1], PANEL):
        panel = slice(start, start + PANEL)
        # The values above the diagonal may be anything.
        product_EPO = torch.bmm(factors.lower_EII[:, panel, panel].tril(), columns_EIO[:, panel])
        if start:
            product_EPO.baddbmm_(factors.lower_EII[:, panel, :start], columns_EIO[:, :start])
        total_EO += _weighed(product_EPO, factors.pivot_EI[:, panel])
    return total_EO


def _weighed(values_EIO: torch.Tensor, factor_EI: torch.Tensor) -> torch.Tensor:
    """Sum factor times squared value over the columns, for each row, in float64."""
    parts = zip(torch.split(values_EIO, PANEL, dim=1), torch.split(factor_EI, PANEL, dim=1), strict=True)
    sums = [torch.bmm(factor_EP.double()[:, None], part_EPO.double().square())[:, 0] for part_EPO, factor_EP in parts]
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum(dim=0)
