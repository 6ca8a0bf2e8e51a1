"""The Hessian in GPTQ: the order of columns, and the factorization H + damping = M D M^T.

Shapes: I in features. See `runtime.algorithms.gptq`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from runtime.algorithms.hessian import PANEL_WIDTH, mirror_
from runtime.algorithms.products import factorize_, reach
from runtime.errors import QuantizationError

MAX_DAMPING = 1.0
ROWS_OF_A_COPY = 512  # rows that are reordered at a time: they fit into a cache


def column_order(hessian_II: torch.Tensor, actorder: str | None) -> torch.Tensor:
    """Choose the order in which columns are solved; ties keep their order, so that it is the same on all machines."""
    if actorder is None:
        return torch.arange(hessian_II.shape[0], device=hessian_II.device)
    return torch.argsort(hessian_II.diagonal(), descending=True, stable=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """H + diag(added) = M D M^T with the columns in the order of the solve.

    Args:
        lower_II: M^T, unit lower triangular: row k has the coefficients of the earlier errors in column k. Values above
            the diagonal are meaningless.
        pivot_I: D.
        added_I: the values added to the diagonal.
        damping: the dampening, as a fraction of the mean diagonal.
    """

    lower_II: torch.Tensor
    pivot_I: torch.Tensor
    added_I: torch.Tensor
    damping: float


def factors_of(
    hessian_II: torch.Tensor,
    order_I: torch.Tensor,
    dampening_frac: float,
    dtype: torch.dtype,
    *,
    overwrite_hessian: bool = False,
) -> Factors:
    """Factor a Hessian with its columns in this order; while that fails, raise the dampening tenfold, up to 1.

    Args:
        hessian_II: H, symmetric.
        order_I: the columns in the order of the solve.
        dampening_frac: the value first added to the diagonal, as a fraction of its mean.
        dtype: of the factors.
        overwrite_hessian: factor in H's own memory, if it has that dtype.

    Raises:
        QuantizationError: if the Hessian does not factor even with dampening 1.
    """
    diagonal_I = hessian_II.diagonal()[order_I].to(dtype)
    dead_I = diagonal_I == 0
    mean = diagonal_I[~dead_I].mean()
    damping = dampening_frac
    is_inside = overwrite_hessian and hessian_II.dtype == dtype
    fresh = _reordered_in_place(hessian_II, order_I) if is_inside else _copies(hessian_II, order_I, dtype)
    while True:
        added_I = damping * mean + mean * dead_I
        lower_II = next(fresh)
        lower_II.diagonal().add_(added_I)
        if factorize_(lower_II):
            break
        if damping >= MAX_DAMPING:
            raise QuantizationError(
                f"a Hessian of shape {list(hessian_II.shape)} does not factor with dampening {damping:g}",
                hint="calibrate with more data or in a wider dtype, or set fallback: rtn in the recipe",
            )
        damping = min(damping * 10, MAX_DAMPING)
    root_I = lower_II.diagonal().clone()
    for rows in _parts(len(root_I)):
        lower_II[rows, : rows.stop].div_(root_I[rows, None])
    return Factors(lower_II=lower_II, pivot_I=root_I.square(), added_I=added_I, damping=damping)


def _copies(hessian_II: torch.Tensor, order_I: torch.Tensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Yield copies of the lower triangle with the columns in this order, without end."""
    while True:
        copy_II = torch.empty(hessian_II.shape, dtype=dtype, device=hessian_II.device)
        for rows in _parts(len(order_I)):
            chosen_RI = hessian_II.index_select(0, order_I[rows])
            copy_II[rows, : rows.stop] = chosen_RI.index_select(1, order_I[: rows.stop])
        yield copy_II


def _reordered_in_place(hessian_II: torch.Tensor, order_I: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the matrix itself with the columns in this order, restored after each factorization: that leaves values far
    above the diagonal unchanged, and a copy is kept of those near it.
    """
    for _ in range(2):  # reorders columns, transposes, reorders the former rows; the transpose of H is H
        for part_RI in torch.split(hessian_II, ROWS_OF_A_COPY):
            part_RI.copy_(part_RI.index_select(1, order_I))
        _transpose_(hessian_II)
    width = PANEL_WIDTH + reach(hessian_II.device)
    band = [hessian_II[top : top + PANEL_WIDTH, top : top + width] for top in range(0, len(hessian_II), PANEL_WIDTH)]
    kept = [near.clone() for near in band]
    while True:
        yield hessian_II
        for near, before in zip(band, kept, strict=True):
            near.copy_(before)
        mirror_(hessian_II)


def _parts(num_rows: int) -> list[slice]:
    return [slice(top, min(top + ROWS_OF_A_COPY, num_rows)) for top in range(0, num_rows, ROWS_OF_A_COPY)]


def _transpose_(matrix_II: torch.Tensor) -> None:
    parts = _parts(len(matrix_II))
    for index, rows in enumerate(parts):
        for columns in parts[: index + 1]:
            above = matrix_II[columns, rows].clone()
            matrix_II[columns, rows] = matrix_II[rows, columns].t().clone()
            matrix_II[rows, columns] = above.t()
