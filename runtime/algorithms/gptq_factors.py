"""The Hessian in GPTQ: the order of columns, and the factorization H + damping = M D M^T.

The factors also give the size of a layer's output without H:

    ||W X||^2 = tr(W (M D M^T - added) W^T) = sum over k of   D_k |sum over j <= k of w_j M_jk|^2  -  added_k |w_k|^2

Shapes: I in features, O rows of weights, P columns of a panel. See `runtime.algorithms.gptq`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from runtime.algorithms.drift import corrections
from runtime.algorithms.gptq_options import MAX_DAMPING, not_definite
from runtime.algorithms.hessian import PANEL_WIDTH, mirror_
from runtime.algorithms.products import add_product_, factorize_, reach

ROWS_OF_A_COPY = 512  # rows that are reordered at a time: they fit into a cache
_ROWS_OF_A_PERMUTATION = 128  # or columns: as few as keep the calls cheap, because each needs a copy
_PANEL = 256  # columns of M that are multiplied at a time: narrower panels multiply more slowly, wider ones more zeros
_COLUMNS_OF_A_SUM = 128


def column_order(hessian_II: torch.Tensor, actorder: str | None) -> torch.Tensor:
    """Choose the order in which columns are solved; ties keep their order, so that it is the same on all machines."""
    if actorder is None:
        return torch.arange(hessian_II.shape[0], device=hessian_II.device)
    return torch.argsort(hessian_II.diagonal(), descending=True, stable=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Factored:
    """H + diag(added) = M D M^T with the columns in the order of the solve.

    Args:
        order_I: the columns in that order.
        diagonal_I: H's diagonal, in the original order.
        lower_II: M^T, unit lower triangular: row k has the coefficients of the earlier errors in column k. Values above
            the diagonal are meaningless.
        pivot_I: D.
        added_I: the values added to the diagonal.
        damping: the dampening, as a fraction of the mean diagonal.
        correction_II: what `drift.corrections` returns, if the targets are error-aware.
    """

    order_I: torch.Tensor
    diagonal_I: torch.Tensor
    lower_II: torch.Tensor
    pivot_I: torch.Tensor
    added_I: torch.Tensor
    damping: float
    correction_II: torch.Tensor | None = None

    @classmethod
    def empty(
        cls, num_in: int, dtype: torch.dtype, device: torch.device | str, *, is_corrected: bool = False
    ) -> Factored:
        """Allocate factors, whose `parts` and damping are to be filled with those of others."""
        vectors = torch.empty(3, num_in, dtype=dtype, device=device)
        return cls(
            order_I=torch.empty(num_in, dtype=torch.int64, device=device),
            diagonal_I=vectors[0],
            lower_II=torch.empty(num_in, num_in, dtype=dtype, device=device),
            pivot_I=vectors[1],
            added_I=vectors[2],
            damping=0.0,
            correction_II=torch.empty(num_in, num_in, dtype=dtype, device=device) if is_corrected else None,
        )

    def corrected(self, drift_II: torch.Tensor, strength: float) -> Factored:
        """Return the same factors with the correction by this drift, without one for a strength of 0."""
        if not strength:
            return self
        correction_II = corrections(drift_II, self.order_I, self.lower_II, self.pivot_I, strength)
        return replace(self, correction_II=correction_II)

    def parts(self) -> list[torch.Tensor]:
        """All numbers but the damping, as views: the vectors, the correction, then panels of M^T up to the diagonal."""
        correction = [] if self.correction_II is None else [self.correction_II]
        panels = [self.lower_II[rows, : rows.stop] for rows in _parts(len(self.order_I))]
        return [self.order_I, self.diagonal_I, self.pivot_I, self.added_I, *correction, *panels]


def factored(
    hessian_II: torch.Tensor,
    actorder: str | None,
    dampening_frac: float,
    dtype: torch.dtype,
    *,
    overwrite_hessian: bool = False,
) -> Factored:
    """Factor a Hessian; while that fails, raise the dampening tenfold, up to 1.

    Args:
        hessian_II: H, symmetric.
        actorder: see `column_order`.
        dampening_frac: the value first added to the diagonal, as a fraction of its mean.
        dtype: of the factors.
        overwrite_hessian: factor in H's own memory, if it has that dtype.

    Raises:
        QuantizationError: if the Hessian does not factor even with dampening 1.
    """
    order_I = column_order(hessian_II, actorder)
    original_I = hessian_II.diagonal().to(dtype, copy=True)
    diagonal_I = original_I[order_I]
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
            raise not_definite(len(hessian_II), damping)
        damping = min(damping * 10, MAX_DAMPING)
    root_I = lower_II.diagonal().clone()
    for rows in _parts(len(root_I)):
        lower_II[rows, : rows.stop].div_(root_I[rows, None])
    return Factored(
        order_I=order_I,
        diagonal_I=original_I,
        lower_II=lower_II,
        pivot_I=root_I.square(),
        added_I=added_I,
        damping=damping,
    )


def output_squares(columns_IO: torch.Tensor, found: Factored) -> torch.Tensor:
    """Compute ||w X||^2 for each row w of weights, float64, a panel of M's columns at a time.

    Args:
        columns_IO: the weights' columns in the order of the solve.
        found: the factors of X X^T.
    """
    total_O = -weighed(columns_IO, found.added_I)
    for panel in _parts(len(columns_IO), _PANEL):
        product_PO = torch.zeros_like(columns_IO[panel])
        _add_panel_(product_PO, panel, columns_IO, found)
        total_O += weighed(product_PO, found.pivot_I[panel])
    return total_O


def targets_of(residual_IO: torch.Tensor, quantized_IO: torch.Tensor, found: Factored) -> torch.Tensor:
    """Compute the targets t_k = q_k + sum over j <= k of (w_j - q_j) M_jk that a solve has rounded.

    Args:
        residual_IO: w_k - q_k, in the order of the solve.
        quantized_IO: q_k.
        found: the factors.
    """
    targets_IO = quantized_IO.clone()
    for panel in _parts(len(targets_IO), _PANEL):
        _add_panel_(targets_IO[panel], panel, residual_IO, found)
    return targets_IO


def _add_panel_(total_PO: torch.Tensor, panel: slice, columns_IO: torch.Tensor, found: Factored) -> None:
    """Add a panel of the product of M^T with columns."""
    coefficients_PI = found.lower_II[panel, : panel.stop].clone()
    coefficients_PI[:, panel].tril_()  # the values above the diagonal may be anything
    add_product_(total_PO, coefficients_PI, columns_IO[: panel.stop].t())


def weighed(values_IO: torch.Tensor, factor_I: torch.Tensor) -> torch.Tensor:
    """Sum factor times squared value over the columns, for each row; sums of a few columns are added in float64."""
    total_O = torch.zeros(values_IO.shape[1], dtype=torch.float64, device=values_IO.device)
    for start in range(0, len(factor_I), _COLUMNS_OF_A_SUM):
        part = slice(start, start + _COLUMNS_OF_A_SUM)
        total_O += factor_I[part] @ values_IO[part].square()
    return total_O


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
    for rows_RI in torch.split(hessian_II, _ROWS_OF_A_PERMUTATION):
        rows_RI.copy_(rows_RI.index_select(1, order_I))
    for columns_IR in torch.split(hessian_II, _ROWS_OF_A_PERMUTATION, dim=1):
        columns_IR.copy_(columns_IR.index_select(0, order_I))
    width = PANEL_WIDTH + reach(hessian_II.device)
    band = [hessian_II[top : top + PANEL_WIDTH, top : top + width] for top in range(0, len(hessian_II), PANEL_WIDTH)]
    kept = [near.clone() for near in band]
    while True:
        yield hessian_II
        for near, before in zip(band, kept, strict=True):
            near.copy_(before)
        mirror_(hessian_II)


def _parts(num_rows: int, height: int = ROWS_OF_A_COPY) -> list[slice]:
    return [slice(top, min(top + height, num_rows)) for top in range(0, num_rows, height)]
