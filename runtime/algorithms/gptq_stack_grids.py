"""The problems of a stack of solves, and the grids of all of them.

Shapes: E problems of a stack, O rows of a tile, I in features, G groups, P columns of a panel. See
`runtime.algorithms.gptq_stacks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from runtime.algorithms import grid
from runtime.algorithms.gptq_columns import Grids
from runtime.algorithms.gptq_grids import Fitting
from runtime.algorithms.gptq_stack_factors import FactorStack
from runtime.algorithms.gptq_tiles import Piece, Tile

PANEL = 1024  # columns of M that are multiplied at a time for sizes of outputs and targets, and whose squares are added


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A tile of one problem of a stack.

    Args:
        weights: [O, I] each, siblings.
        tile: the rows to solve, of the same heights in all problems of a stack.
        fitting: fits the grids of these weights.
        rows: the rows of the tile, if they are others than those of the weights.
    """

    weights: Sequence[torch.Tensor]
    tile: Tile
    fitting: Fitting
    rows: Sequence[torch.Tensor] = ()

    @property
    def heights(self) -> list[int]:
        """The number of rows of each piece."""
        return [piece.stop - piece.start for piece in self.tile]

    def with_rows(self, rows: Sequence[torch.Tensor]) -> Problem:
        """The same problem for other numbers, a tensor for each piece; a single scale of a weight stays the same."""
        if grid.strategy_of(self.fitting.args) == "tensor":
            return replace(self, rows=rows)
        tile = tuple(Piece(weight=place, start=0, stop=len(part)) for place, part in enumerate(rows))
        return Problem(weights=rows, tile=tile, fitting=self.fitting.like(rows, self.fitting.global_scale))

    def rows_OI(self) -> torch.Tensor:
        """The rows of the tile, in the weights' dtype."""
        parts = list(self.rows) or [self.weights[piece.weight].detach()[piece.rows] for piece in self.tile]
        return torch.cat(parts) if len(parts) > 1 else parts[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class StackedGrids:
    """The `Grids` of all problems."""

    scale_EGO: torch.Tensor
    factor_EGO: torch.Tensor
    zero_EGO: torch.Tensor | None

    def one(self, place: int) -> Grids:
        """Return a problem's grids, as views."""
        zero_GO = None if self.zero_EGO is None else self.zero_EGO[place]
        return Grids(scale_GO=self.scale_EGO[place], factor_GO=self.factor_EGO[place], zero_GO=zero_GO)

    def replaced(self, other: StackedGrids, is_other_E1O: torch.Tensor) -> StackedGrids:
        """Return these grids, with those of some rows replaced by others."""
        zero_EGO = self.zero_EGO
        if zero_EGO is not None and other.zero_EGO is not None:
            zero_EGO = torch.where(is_other_E1O, other.zero_EGO, zero_EGO)
        return StackedGrids(
            scale_EGO=torch.where(is_other_E1O, other.scale_EGO, self.scale_EGO),
            factor_EGO=torch.where(is_other_E1O, other.factor_EGO, self.factor_EGO),
            zero_EGO=zero_EGO,
        )


def fitted_problems(problems: Sequence[Problem]) -> StackedGrids:
    """Fit the grids of all problems, at once where rows do not depend on each other or on the problem."""
    first, num_problems = problems[0], len(problems)
    if num_problems > 1 and _is_joint(problems):
        rows_OI = torch.cat([problem.rows_OI() for problem in problems])
        height = len(rows_OI) // num_problems
        scales = [problem.fitting.global_scale for problem in problems]
        rows_of_scales = [one.expand(height) for one in scales if one is not None]
        scale_O1 = torch.cat(rows_of_scales)[:, None] if rows_of_scales else None
        joint = first.fitting.like([rows_OI], scale_O1).grids_of((Piece(0, 0, len(rows_OI)),))

        def stacked(parts_GO: torch.Tensor) -> torch.Tensor:
            return parts_GO.view(len(parts_GO), num_problems, -1).transpose(0, 1).contiguous()

        return StackedGrids(
            scale_EGO=stacked(joint.scale_GO),
            factor_EGO=stacked(joint.factor_GO),
            zero_EGO=None if joint.zero_GO is None else stacked(joint.zero_GO),
        )
    each = [problem.fitting.grids_of(problem.tile) for problem in problems]
    zeros = [one.zero_GO for one in each if one.zero_GO is not None]
    return StackedGrids(
        scale_EGO=torch.stack([one.scale_GO for one in each]),
        factor_EGO=torch.stack([one.factor_GO for one in each]),
        zero_EGO=torch.stack(zeros) if zeros else None,
    )


def fitted_to_targets(
    residual_EIO: torch.Tensor, quantized_EIO: torch.Tensor, factors: FactorStack, problems: Sequence[Problem]
) -> StackedGrids:
    """Fit the grids of all problems to the targets of a solve, see `gptq_factors.targets_of`."""
    targets_EIO = quantized_EIO.clone()
    for start in range(0, targets_EIO.shape[1], PANEL):
        panel = slice(start, start + PANEL)
        # The values above the diagonal may be anything.
        targets_EIO[:, panel].baddbmm_(factors.lower_EII[:, panel, panel].tril(), residual_EIO[:, panel])
        if start:
            targets_EIO[:, panel].baddbmm_(factors.lower_EII[:, panel, :start], residual_EIO[:, :start])
    problem_E1 = torch.arange(len(problems), device=factors.order_EI.device)[:, None]
    targets_EOI = targets_EIO[problem_E1, torch.argsort(factors.order_EI, dim=1)].mT.contiguous().float()
    tile = (Piece(weight=0, start=0, stop=targets_EOI.shape[1]),)
    return fitted_problems(
        [
            Problem(weights=[rows_OI], tile=tile, fitting=problem.fitting.of_targets(rows_OI))
            for problem, rows_OI in zip(problems, targets_EOI, strict=True)
        ]
    )


def _is_joint(problems: Sequence[Problem]) -> bool:
    """Whether the grid of a row depends only on the row and its global scale."""
    args = problems[0].fitting.args
    if len({problem.weights[piece.weight].dtype for problem in problems for piece in problem.tile}) > 1:
        return False
    if grid.needs_global_scale(args):
        return "mse" not in str(args.observer)  # the search takes some rows at a time
    return grid.strategy_of(args) in ("channel", "group") and args.observer != "imatrix_mse"
