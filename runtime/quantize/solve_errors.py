"""Name the module in an error of a solve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from runtime.algorithms import grid
from runtime.errors import QuantizationError
from runtime.quantize.solve_units import GPTQ, Batch

if TYPE_CHECKING:
    import torch


def named_error(error: QuantizationError, batch: Batch, name: str, *, is_resumable: bool = True) -> QuantizationError:
    """Add the module to an error; unless weights are the reason, another recipe may finish a run that GPTQ ends."""
    is_resumable = is_resumable and batch.job.algorithm == GPTQ
    return QuantizationError(f"{name}: {error.message}", hint=error.hint, is_resumable=is_resumable)


def batch_error(
    error: QuantizationError, batch: Batch, names: Sequence[str], weights: Sequence[torch.Tensor]
) -> QuantizationError:
    """Add the module that causes an error of a batch, unless there is a fallback."""
    if batch.has_fallback:
        return error
    # On a GPU only the solve tells that numbers are not finite.
    bad = [name for name, weight in zip(names, weights, strict=True) if not grid.is_finite(weight)]
    return named_error(error, batch, [*bad, names[0]][0], is_resumable=not bad)
