"""The Hessian's part of GPTQ: the order of columns, and H + damping = M D M^T.

Shapes: I in features. See `runtime.algorithms.gptq`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from runtime.algorithms.products import factorize_
from runtime.errors import QuantizationError

MAX_DAMPING = 1.0
ROWS_OF_A_COPY = 512  # that are put in another order at a time: they fit a cache


def column_order(hessian_II: torch.Tensor, actorder: str | None) -> torch.Tensor:
    """The order in which columns are solved; ties stay in place, so that it is the same everywhere."""
    if actorder is None:
        return torch.arange(hessian_II.shape[0], device=hessian_II.device)
    return torch.argsort(hessian_II.diagonal(), descending=True, stable=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """H + diag(added) = M D M^T with the columns in the order of the solve.

    Args:
        lower_II: M^T, unit lower triangular: row k holds what column k takes of each earlier error. What is above the
            diagonal means nothing.
        pivot_I: D.
        added_I: what was added to the diagonal.
        damping: the dampening, as a fraction of the mean diagonal.
    """

    lower_II: torch.Tensor
    pivot_I: torch.Tensor
    added_I: torch.Tensor
    damping: float


def factors_of(hessian_II: torch.Tensor, order_I: torch.Tensor, dampening_frac: float, dtype: torch.dtype) -> Factors:
    """Factor a Hessian with its columns in this order; dampening is raised tenfold as long as that fails, up to 1.

    Raises:
        QuantizationError: for one that does not factor even with dampening 1.
    """
    diagonal_I = hessian_II.diagonal()[order_I].to(dtype)
    dead_I = diagonal_I == 0
    mean = diagonal_I[~dead_I].mean()
    damping = dampening_frac
    while True:
        added_I = damping * mean + mean * dead_I
        lower_II = torch.empty(hessian_II.shape, dtype=dtype, device=hessian_II.device)
        parts = torch.split(lower_II, ROWS_OF_A_COPY), torch.split(order_I, ROWS_OF_A_COPY)
        for part_RI, part_R in zip(*parts, strict=True):
            part_RI.copy_(hessian_II.index_select(0, part_R).index_select(1, order_I))
        lower_II.diagonal().add_(added_I)
        if factorize_(lower_II):
            break
        if damping >= MAX_DAMPING:
            raise QuantizationError(
                f"a Hessian of shape {list(hessian_II.shape)} does not factor with dampening {damping:g}",
                hint="it is no sum of x x^T; calibrate with more data or in a wider dtype",
            )
        damping = min(damping * 10, MAX_DAMPING)
    root_I = lower_II.diagonal().clone()
    return Factors(lower_II=lower_II.div_(root_I[:, None]), pivot_I=root_I.square(), added_I=added_I, damping=damping)
