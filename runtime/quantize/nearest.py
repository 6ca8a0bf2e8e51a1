"""Round weights to nearest, with the observers and the clipping of their assignments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from runtime.algorithms import grid
from runtime.algorithms.clipping import quantize_clipped
from runtime.algorithms.output_squares import plain_square
from runtime.algorithms.rtn import fitted, quantize_rtn, rounded_rows

if TYPE_CHECKING:
    from runtime.algorithms.result import QuantizedWeight
    from runtime.quantize.statistics import InputStatistics
    from runtime.recipe.recipe import Assignment


def round_to_nearest(
    weight_OI: torch.Tensor,
    job: Assignment,
    seen: InputStatistics | None,
    *,
    scale_dtype: torch.dtype,
    global_scale: torch.Tensor | None,
) -> Iterator[QuantizedWeight]:
    """Round a weight [O, I] a few rows at a time, or as a whole if its inputs were measured.

    Args:
        weight_OI: the weight.
        job: its assignment.
        seen: the statistics of its inputs, which are on this worker; None if no token reached it.
        scale_dtype: the dtype in which the checkpoint stores scales.
        global_scale: NVFP4's [1], if siblings share one.

    Raises:
        QuantizationError: before the first rows.
    """
    args = job.scheme.weights
    if job.clip and job.algorithm == "rtn" and seen is not None:
        hessian_II = seen.hessian_II
        return iter([quantize_clipped(weight_OI, hessian_II, args, scale_dtype=scale_dtype, global_scale=global_scale)])
    importance_I = None
    if args.observer == "imatrix_mse" and seen is not None:
        importance_I = seen.diagonal_I
    elif args.observer == "imatrix_mse" and job.algorithm != "rtn":  # a fallback without inputs
        importance_I = torch.ones(weight_OI.shape[1], device=weight_OI.device)
    options: dict[str, Any] = {"scale_dtype": scale_dtype, "global_scale": global_scale, "importance_I": importance_I}
    if seen is not None:
        return iter([quantize_rtn(weight_OI, args, **options)])
    return rounded_rows(weight_OI, fitted(weight_OI, args, **options), args)


def output_size(weight_OI: torch.Tensor, seen: InputStatistics | None) -> float:
    """Compute ||W X||^2 over the measured inputs X, or ||W||^2 if there are none; 0 for an unsuitable weight."""
    if not weight_OI.numel() or (seen is not None and seen.num_in_features != weight_OI.shape[-1]):
        return 0.0  # rounding reports the error
    if seen is not None:
        return seen.output_square(weight_OI)
    return sum(plain_square(weight_OI.detach()[rows]) for rows in grid.parts_of_rows(weight_OI))
