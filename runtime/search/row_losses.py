"""The loss of each row of a weight with each candidate scheme, from the Gram matrix of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from runtime.algorithms import grid
from runtime.algorithms.gptq import factor_siblings, solve_tiles
from runtime.algorithms.gptq_options import SolveOptions
from runtime.algorithms.gptq_tiles import tiles_of
from runtime.algorithms.output_squares import gram_squares
from runtime.errors import QuantizationError
from runtime.quantize.nearest import round_to_nearest

if TYPE_CHECKING:
    from runtime.algorithms.gptq_factors import Factored
    from runtime.quantize.statistics import InputStatistics
    from runtime.recipe.recipe import Assignment

RowLosses = dict[str, list[torch.Tensor]]  # of each module, for each candidate [O] in float32, on the host
_ROWS = 1024  # whose errors are multiplied with the Gram matrix at a time


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredStep:
    """The modules of a step whose inputs were measured.

    Attributes:
        weight_of: returns a module's weight [O, I].
        scale_dtype_of: returns the dtype in which the checkpoint stores a module's scales.
        statistics: input statistics of the modules; modules with the same inputs have the same object.
        candidates: the assignments of each candidate.
    """

    weight_of: Callable[[str], torch.Tensor]
    scale_dtype_of: Callable[[str], torch.dtype]
    statistics: Mapping[str, InputStatistics]
    candidates: Sequence[Mapping[str, Assignment]]

    def row_losses(self, names: Sequence[str]) -> RowLosses:
        """Compute e H eᵀ for each row e of the error of each weight, with each candidate.

        Modules that no token reaches, and those whose inputs are all zero, lose nothing.

        Raises:
            QuantizationError: naming the modules that cannot be quantized.
        """
        losses: RowLosses = {}
        for together in self._siblings(names):
            seen = self.statistics.get(together[0])
            if seen is None or not seen.num_tokens or seen.is_zero():
                for name in together:
                    nothing_O = torch.zeros(len(self.weight_of(name)))
                    losses[name] = [nothing_O for _ in self.candidates]
                continue
            try:
                losses.update(self._measured(together, seen))
            except QuantizationError as error:
                error.add_note(f"while comparing schemes of {', '.join(together)}")
                raise
        return losses

    def _siblings(self, names: Sequence[str]) -> Iterator[list[str]]:
        """Yield modules that have the same inputs and dtype of scales."""
        groups: dict[tuple[int, torch.dtype], list[str]] = {}
        for name in names:
            seen = self.statistics.get(name)
            groups.setdefault((id(name if seen is None else seen), self.scale_dtype_of(name)), []).append(name)
        yield from groups.values()

    def _measured(self, names: Sequence[str], seen: InputStatistics) -> RowLosses:
        weights = [self.weight_of(name).detach() for name in names]
        losses: RowLosses = {name: [] for name in names}
        factors: Factored | None = None
        for jobs in self.candidates:
            job, scale_dtype = jobs[names[0]], self.scale_dtype_of(names[0])
            shared = grid.shared_global_scale(job.scheme.weights, None, weights)
            if job.algorithm == "gptq":
                assert job.options is not None, "GPTQ comes with options"
                options = SolveOptions(
                    args=job.scheme.weights,
                    scale_dtype=scale_dtype,
                    dampening_frac=job.options.dampening_frac,
                    block_size=job.options.block_size,
                    actorder=job.options.actorder,
                    global_scale=shared,
                )
                factors = factors or factor_siblings(weights, seen.hessian_II, options)
                found = _solved_losses(weights, seen.hessian_II, factors, options)
            else:
                found = [
                    _nearest_losses(weight_OI, job, seen, scale_dtype=scale_dtype, global_scale=shared)
                    for weight_OI in weights
                ]
            for name, loss_O in zip(names, found, strict=True):
                losses[name].append(loss_O.to("cpu", torch.float32))
        return losses


def _solved_losses(
    weights: Sequence[torch.Tensor], hessian_II: torch.Tensor, factors: Factored, options: SolveOptions
) -> list[torch.Tensor]:
    """Solve weights that share an input, and return the loss of each row."""
    found = [torch.zeros(len(weight_OI), dtype=torch.float64, device=weight_OI.device) for weight_OI in weights]
    tiles = tiles_of([weight.shape for weight in weights], options.args, weights[0].device.type)
    for solved in solve_tiles(weights, tiles, factors, options):
        piece = solved.piece
        found[piece.weight][piece.rows] = _squares(weights[piece.weight][piece.rows], solved.rows.weight_OI, hessian_II)
    return found


def _nearest_losses(
    weight_OI: torch.Tensor,
    job: Assignment,
    seen: InputStatistics,
    *,
    scale_dtype: torch.dtype,
    global_scale: torch.Tensor | None,
) -> torch.Tensor:
    """Round a weight to nearest, and return the loss of each row."""
    parts = round_to_nearest(weight_OI, job, seen, scale_dtype=scale_dtype, global_scale=global_scale)
    quantized_OI = torch.cat([part.weight_OI for part in parts])
    return _squares(weight_OI, quantized_OI, seen.hessian_II)


def _squares(weight_OI: torch.Tensor, quantized_OI: torch.Tensor, hessian_II: torch.Tensor) -> torch.Tensor:
    """Compute e H eᵀ for each row e of W - Q, float64."""
    parts = [
        gram_squares((part_RI.to(torch.float32) - other_RI).contiguous(), hessian_II)
        for part_RI, other_RI in zip(torch.split(weight_OI, _ROWS), torch.split(quantized_OI, _ROWS), strict=True)
    ]
    return torch.cat(parts).clamp_(min=0)
