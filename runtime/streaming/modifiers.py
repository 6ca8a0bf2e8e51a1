"""What is done to the modules of a step: measure, over as many passes of the batches as it takes, then change weights.

A run has a list of modifiers and applies each to every step, in order. One that rescales weights before they are
rounded stands before the one that rounds them, and measures in passes of its own.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from runtime.errors import QuantizationError
from runtime.statistics import collect_hessians

if TYPE_CHECKING:
    import torch

    from runtime.algorithms.gptq import HessianAccumulator
    from runtime.algorithms.result import QuantizedWeight
    from runtime.recipe import Assignment
    from runtime.streaming.work import Work

_NUM_ROWS = 64


class Modifier(Protocol):
    """One thing that is done to the modules of each step."""

    def measures(self, names: Sequence[str]) -> bool:
        """Whether batches must run to do it to these modules."""

    def rewrites(self, names: Sequence[str]) -> Sequence[str]:
        """The parameters, besides the weights of these modules, that it will change with `Work.rewrite`."""

    def apply(self, work: Work) -> None:
        """Do it to the modules of one step."""


class RoundWeights:
    """Quantizes each module by the algorithm that the recipe names.

    Args:
        jobs: what is done to each module.
    """

    def __init__(self, jobs: Mapping[str, Assignment]) -> None:
        self.jobs = jobs

    def measures(self, names: Sequence[str]) -> bool:
        """Hessians are measured."""
        return bool(self._measured(names))

    def rewrites(self, names: Sequence[str]) -> Sequence[str]:
        """Nothing."""
        return ()

    def apply(self, work: Work) -> None:
        """One pass for all Hessians, of which modules with the same input share one, then module by module."""
        hessians: dict[str, HessianAccumulator] = {}
        names = self._measured(work.step.modules)
        if names:
            modules = {name: work.model.get_submodule(name) for name in names}
            hessians = collect_hessians(modules, work.run_batches, work.device)
        for name in work.step.modules:
            start = time.perf_counter()
            hessian = hessians.pop(name, None)
            weight = work.weight(name)
            try:
                result = _solve(weight, self.jobs[name], hessian, work.scale_dtype(name))
            except QuantizationError as error:
                raise QuantizationError(f"{name}: {error.message}", hint=error.hint) from error
            work.quantized(
                name,
                result,
                num_tokens=hessian.num_tokens if hessian is not None else 0,
                error=_relative_error(weight, result, hessian),
                start=start,
            )
            options = self.jobs[name].options
            if options is not None and result.damping > options.dampening_frac:
                work.warnings.append(
                    f"warning: {name} was solved with dampening {result.damping:g}, for its Hessian did not factor "
                    f"with {options.dampening_frac:g}: its inputs are nearly dependent, or too few"
                )

    def _measured(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if self.jobs[name].algorithm == "gptq"]


def make_modifiers(jobs: dict[str, Assignment]) -> list[Modifier]:
    """The modifiers of a run, in the order in which they are applied to each step."""
    return [RoundWeights(jobs)]


def _solve(
    weight: torch.Tensor, job: Assignment, hessian: HessianAccumulator | None, scale_dtype: torch.dtype
) -> QuantizedWeight:
    from runtime.algorithms.gptq import quantize_gptq
    from runtime.algorithms.rtn import quantize_rtn

    if job.algorithm == "rtn":
        return quantize_rtn(weight, job.scheme.weights, scale_dtype=scale_dtype)
    if hessian is None:
        raise QuantizationError(
            "GPTQ was asked for, but no calibration batch reached the module",
            hint="add it to ignore, or quantize it with QuantizationModifier",
        )
    assert job.options is not None, "GPTQ comes with options"
    return quantize_gptq(
        weight,
        hessian.hessian_II,
        job.scheme.weights,
        scale_dtype=scale_dtype,
        dampening_frac=job.options.dampening_frac,
        block_size=job.options.block_size,
        actorder=job.options.actorder,
    )


def _relative_error(weight_OI: torch.Tensor, result: QuantizedWeight, hessian: HessianAccumulator | None) -> float:
    """See `ModuleReport`; all rows would cost as much as the solve."""
    stride = -(-len(weight_OI) // _NUM_ROWS)
    rows_RI = weight_OI.detach()[::stride].float()
    seen_RI = rows_RI if hessian is None else rows_RI @ hessian.hessian_II
    size = float((seen_RI * rows_RI).sum()) * len(weight_OI) / max(len(rows_RI), 1)
    return float(result.loss / size) ** 0.5 if size > 0 and result.loss > 0 else 0.0
