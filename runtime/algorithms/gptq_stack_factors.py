"""The factorization of the Hessians of a stack: problems of one shape that a GPU solves at the same time.

torch queues the work of a GPU and goes on. As soon as Python reads a number, it waits until the queue is empty, and the
GPU waits for Python to fill it again. So nothing here depends on a number, and one read at the end tells which Hessians
are finite, not zero, and positive definite. Those that are not positive definite are factored again, with more
dampening.

cuBLAS and cuSOLVER may choose other algorithms for other shapes. So a stack has as many problems as its shape allows
(`num_stacked`), and one that has fewer is padded with copies of the last: the bits of a result do not depend on the
problems beside it.

Shapes: E problems of a stack, I in features, K and N sizes of square parts. See `runtime.algorithms.gptq`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from runtime.algorithms import gptq_options
from runtime.algorithms.drift import corrections
from runtime.algorithms.gptq_factors import Factored
from runtime.algorithms.gptq_options import MAX_DAMPING, all_zero, not_definite, not_finite
from runtime.errors import QuantizationError

_MOST_STACKED, _STACK_BYTES = 16, 2**28  # of problems, and of their factors
_SMALL, _SMALL_IN_STACK = 2048, 512  # side of a block that the device's library factorizes; alone it may be larger
_ROWS = 2048  # rows of a product that are added at a time: half of the largest ones is above the diagonal


def num_stacked(num_in: int, num_experts: int) -> int:
    """The number of problems of a full stack, 1 if their solves alone occupy a GPU.

    Args:
        num_in: I.
        num_experts: of the mixture that the problems belong to. Eight workers fill a stack each.
    """
    fitting = min(_MOST_STACKED, _STACK_BYTES // (4 * max(num_in, 1) ** 2), num_experts // 8)
    return 1 << max(fitting.bit_length() - 1, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class FactorStack:
    """The factors of E problems; see `Factored`.

    Args:
        order_EI, diagonal_EI, lower_EII, pivot_EI, added_EI: the factors, stacked. Meaningless where there is an error.
        dampings: the dampening of each problem.
        errors: why a problem has no factors, or None.
        correction_EII: what `drift.corrections` returns for each problem, if the targets are error-aware.
    """

    order_EI: torch.Tensor
    diagonal_EI: torch.Tensor
    lower_EII: torch.Tensor
    pivot_EI: torch.Tensor
    added_EI: torch.Tensor
    dampings: Sequence[float]
    errors: Sequence[QuantizationError | None]
    correction_EII: torch.Tensor | None = None

    @classmethod
    def of(cls, found: Factored) -> FactorStack:
        """Return a stack of one problem."""
        return cls(
            order_EI=found.order_I[None],
            diagonal_EI=found.diagonal_I[None],
            lower_EII=found.lower_II[None],
            pivot_EI=found.pivot_I[None],
            added_EI=found.added_I[None],
            dampings=[found.damping],
            errors=[None],
            correction_EII=None if found.correction_II is None else found.correction_II[None],
        )

    def only(self) -> Factored:
        """Return the factors of a stack of one problem.

        Raises:
            QuantizationError: if there are none.
        """
        if self.errors[0] is not None:
            raise self.errors[0]
        return Factored(
            order_I=self.order_EI[0],
            diagonal_I=self.diagonal_EI[0],
            lower_II=self.lower_EII[0],
            pivot_I=self.pivot_EI[0],
            added_I=self.added_EI[0],
            damping=self.dampings[0],
        )

    def corrected(self, drifts: Sequence[torch.Tensor], strength: float) -> FactorStack:
        """Return the same factors with the corrections by these drifts; padding gets that of the last problem."""
        if not strength:
            return self
        found = [
            corrections(drift_II, self.order_EI[place], self.lower_EII[place], self.pivot_EI[place], strength)
            for place, drift_II in enumerate(drifts)
        ]
        missing = len(self.order_EI) - len(found)
        return replace(self, correction_EII=torch.stack([*found, *[found[-1]] * missing]))


def factored_stack(
    hessians: Sequence[torch.Tensor],
    shapes: Sequence[Sequence[int]],
    actorder: str | None,
    dampening_frac: float,
    dtype: torch.dtype,
    *,
    num_problems: int = 1,
) -> FactorStack:
    """Factor Hessians of one shape, each as `gptq_factors.factored`.

    Args:
        hessians: [I, I] each, not changed.
        shapes: of a weight of each, for messages.
        actorder: see `gptq_factors.column_order`.
        dampening_frac: the value first added to the diagonals, as a fraction of their means.
        dtype: of the factors.
        num_problems: E, at least the number of Hessians; the results of padding are the last ones.
    """
    stack, usable = _tried(_padded(hessians, num_problems), actorder, dampening_frac, dtype)
    errors: list[QuantizationError | None] = [None] * len(hessians)
    for place, (is_finite, has_input, _) in enumerate(usable[: len(hessians)]):
        if not is_finite or not has_input:
            errors[place] = not_finite(shapes[place]) if not is_finite else all_zero(shapes[place])
    dampings = [dampening_frac] * len(hessians)
    damping = dampening_frac
    failed = [place for place, error in enumerate(errors) if error is None and not usable[place][2]]
    while failed and damping < MAX_DAMPING:
        damping = min(damping * 10, MAX_DAMPING)
        again, usable = _tried(_padded([hessians[place] for place in failed], num_problems), actorder, damping, dtype)
        done = [place for place, (_, _, is_factored) in zip(failed, usable, strict=False) if is_factored]
        for place in done:
            stack.lower_EII[place] = again.lower_EII[failed.index(place)]
            stack.pivot_EI[place] = again.pivot_EI[failed.index(place)]
            stack.added_EI[place] = again.added_EI[failed.index(place)]
            dampings[place] = damping
        failed = [place for place in failed if place not in done]
    for place in failed:
        errors[place] = not_definite(len(hessians[0]), damping)
    missing = num_problems - len(hessians)
    return FactorStack(
        order_EI=stack.order_EI,
        diagonal_EI=stack.diagonal_EI,
        lower_EII=stack.lower_EII,
        pivot_EI=stack.pivot_EI,
        added_EI=stack.added_EI,
        dampings=[*dampings, *[0.0] * missing],
        errors=[*errors, *[None] * missing],
    )


def _padded(hessians: Sequence[torch.Tensor], num_problems: int) -> torch.Tensor:
    """Stack Hessians, [E, I, I]; a view of a single one."""
    if num_problems == 1:
        return hessians[0].detach()[None]
    return torch.stack([*hessians, *[hessians[-1]] * (num_problems - len(hessians))]).detach()


def _tried(
    hessian_EII: torch.Tensor, actorder: str | None, damping: float, dtype: torch.dtype
) -> tuple[FactorStack, list[list[bool]]]:
    """Factor with this dampening; also tell whether each Hessian is finite, is not zero, and has been factored."""
    diagonal_EI = hessian_EII.diagonal(dim1=1, dim2=2)
    if actorder is None:
        order_EI = torch.arange(diagonal_EI.shape[1], device=diagonal_EI.device).repeat(len(diagonal_EI), 1)
        lower_EII = hessian_EII.to(dtype, copy=True)
    else:
        order_EI = torch.argsort(diagonal_EI, dim=1, descending=True, stable=True)
        problem_E = torch.arange(len(order_EI), device=order_EI.device)
        lower_EII = hessian_EII[problem_E[:, None, None], order_EI[:, :, None], order_EI[:, None, :]].to(dtype)
    sorted_EI = diagonal_EI.gather(1, order_EI).to(dtype)
    is_dead_EI = sorted_EI == 0
    mean_E1 = sorted_EI.sum(dim=1, keepdim=True) / (~is_dead_EI).sum(dim=1, keepdim=True)
    added_EI = damping * mean_E1 + mean_E1 * is_dead_EI
    lower_EII.diagonal(dim1=1, dim2=2).add_(added_EI)
    is_factored_E = _factorize_(lower_EII)
    root_EI = lower_EII.diagonal(dim1=1, dim2=2).clone()
    lower_EII.div_(root_EI[:, :, None])
    low_E, high_E = torch.aminmax(hessian_EII.flatten(1), dim=1)
    is_finite_E = torch.isfinite(low_E) & torch.isfinite(high_E)
    verdicts: list[list[bool]] = gptq_options.awaited(
        torch.stack((is_finite_E, ~is_dead_EI.all(dim=1), is_factored_E), dim=1)
    )
    stack = FactorStack(
        order_EI=order_EI,
        diagonal_EI=diagonal_EI.to(dtype, copy=True),
        lower_EII=lower_EII,
        pivot_EI=root_EI.square(),
        added_EI=added_EI,
        dampings=[damping] * len(order_EI),
        errors=[None] * len(order_EI),
    )
    return stack, verdicts


def _factorize_(matrix_ENN: torch.Tensor) -> torch.Tensor:
    """Replace matrices by the lower triangular L with L^T L the matrix, as `products.factorize_`.

    Returns:
        Whether each is positive definite, [E], not read.
    """
    middle = _middle(matrix_ENN)
    if not middle:
        # Transposed so that the lower triangle is read: the values above the diagonal may be outdated.
        lower_ENN, info_E = torch.linalg.cholesky_ex(matrix_ENN.mT.flip(1, 2))
        matrix_ENN.copy_(lower_ENN.flip(1, 2).mT)
        is_definite_E: torch.Tensor = torch.isfinite(matrix_ENN.diagonal(dim1=1, dim2=2)).all(dim=1) & (info_E == 0)
        return is_definite_E
    first_EII, second_EKK = matrix_ENN[:, :middle, :middle], matrix_ENN[:, middle:, middle:]
    between_EKI = matrix_ENN[:, middle:, :middle]
    is_second_E = _factorize_(second_EKK)
    between_EKI.copy_(torch.linalg.solve_triangular(second_EKK.mT, between_EKI, upper=True))
    for top in range(0, middle, _ROWS):
        bottom = min(top + _ROWS, middle)
        first_EII[:, top:bottom, :bottom].baddbmm_(
            between_EKI[:, :, top:bottom].mT, between_EKI[:, :, :bottom], alpha=-1
        )
    is_first_E = _factorize_(first_EII)
    return is_first_E & is_second_E


def _middle(matrix_ENN: torch.Tensor) -> int:
    """The index at which to cut matrices in two, the second part being a multiple of the small size; 0 if small."""
    num_problems, size, _ = matrix_ENN.shape
    small = _SMALL if num_problems == 1 else _SMALL_IN_STACK
    return 0 if size <= small else size - (size // 2 + small - 1) // small * small
