"""Round the weights of a step: siblings that see one input and have one scheme together."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from runtime.algorithms import grid
from runtime.algorithms.awq import quantize_clipped
from runtime.algorithms.gptq import quantize_siblings
from runtime.algorithms.output_squares import plain_square, summed
from runtime.algorithms.refine import refine
from runtime.algorithms.rtn import quantize_rtn
from runtime.errors import QuantizationError
from runtime.quantize.solve_batches import may_overwrite, solved_together

if TYPE_CHECKING:
    from runtime.algorithms.result import QuantizedWeight
    from runtime.quantize.statistics import InputStatistics
    from runtime.recipe.recipe import Assignment


@dataclass(frozen=True, kw_only=True, slots=True)
class Rounded:
    """A module's quantized weight.

    Attributes:
        name: of the module.
        result: without scales for inputs.
        algorithm: what was used in the end.
        warning: what a user should know, or "".
        start: the clock (`perf_counter`) when work on the module began.
        size: ||W X||^2 over the measured inputs X, or ||W||^2 where none were measured.
        loss: ||W X - Q X||^2 over the same inputs, or ||W - Q||^2.
    """

    name: str
    result: QuantizedWeight
    algorithm: str
    warning: str
    start: float
    size: float
    loss: float


def round_modules(
    names: Sequence[str],
    jobs: Mapping[str, Assignment],
    weight_of: Callable[[str], torch.Tensor],
    scale_dtype_of: Callable[[str], torch.dtype],
    statistics: Mapping[str, InputStatistics],
    siblings: Mapping[str, Hashable],
    others: Collection[InputStatistics] = (),
) -> Iterator[Rounded]:
    """Quantize modules, in order of execution.

    Args:
        names: the modules.
        jobs: what is done to each.
        weight_of: a module's weight [O, I].
        scale_dtype_of: in what the checkpoint stores its scales.
        statistics: of its inputs, where they were measured. Whoever takes a module that comes out takes its statistics
            out of here: GPTQ works in the memory of a Hessian that no module is left for.
        siblings: something that is equal for modules that read one tensor, as far as that is known.
        others: statistics that are still to be used for other modules than these.

    Raises:
        QuantizationError: naming the module.
    """
    shared = _global_scales(names, jobs, weight_of, siblings)
    # What is solved together has one global scale, too; siblings have the very same tensor.
    inputs = {
        name: (id(statistics[name]), scale_dtype_of(name), id(shared.get(name))) for name in names if name in statistics
    }
    for together in solved_together(names, jobs, inputs):
        # In a frame of its own, so that nothing of one batch is held while the next is solved.
        found = statistics.get(together[0])
        users = [name for name, entry in statistics.items() if entry is found]
        is_free = not any(found is other for other in others) and may_overwrite(jobs[together[0]], together, users)
        del found
        yield from _rounded_together(together, jobs, weight_of, scale_dtype_of, statistics, shared, overwrite=is_free)


def _rounded_together(
    together: Sequence[str],
    jobs: Mapping[str, Assignment],
    weight_of: Callable[[str], torch.Tensor],
    scale_dtype_of: Callable[[str], torch.dtype],
    statistics: Mapping[str, InputStatistics],
    shared: Mapping[str, torch.Tensor],
    *,
    overwrite: bool,
) -> Iterator[Rounded]:
    weights = [weight_of(name) for name in together]
    start = time.perf_counter()
    found = statistics.get(together[0])
    seen = found if found is not None and found.num_tokens else None
    sizes = [_size(weight, seen) for weight in weights]
    results, algorithm, warning = _solve(
        together, weights, jobs, scale_dtype_of, statistics, shared, overwrite=overwrite
    )
    # GPTQ knows its loss, and may have worked in H's own memory. What is not needed any more is not held.
    del found
    left = list(weights) if algorithm == "rtn" else []
    seen = seen if left else None
    del weights
    for name, size in zip(together, sizes, strict=True):
        result = [next(results)]
        loss = _size(left.pop(0), seen, result[0].weight_OI) if left else result[0].loss
        seen = seen if left else None
        yield Rounded(
            name=name, result=result.pop(), algorithm=algorithm, warning=warning, start=start, size=size, loss=loss
        )
        start, warning = time.perf_counter(), ""


def _size(weight_OI: torch.Tensor, found: InputStatistics | None, quantized_OI: torch.Tensor | None = None) -> float:
    """||W X||^2 or ||W X - Q X||^2, without X where nothing was measured."""
    if not weight_OI.numel() or (found is not None and found.num_in_features != weight_OI.shape[-1]):
        return 0.0  # the solve says what is wrong
    if found is None:
        return summed(weight_OI, quantized_OI, plain_square)
    return found.output_square(weight_OI, quantized_OI)


def _global_scales(
    names: Sequence[str],
    jobs: Mapping[str, Assignment],
    weight_of: Callable[[str], torch.Tensor],
    siblings: Mapping[str, Hashable],
) -> dict[str, torch.Tensor]:
    """NVFP4's global scales: engines fuse siblings into one matrix, which has one."""
    groups: dict[Hashable, list[str]] = {}
    for name in names:
        if grid.needs_global_scale(jobs[name].scheme.weights):
            groups.setdefault(siblings.get(name, name), []).append(name)
    return {
        name: scale
        for group in groups.values()
        for scale in [grid.global_scale_of(*(weight_of(name).detach() for name in group))]
        for name in group
    }


def _solve(
    together: Sequence[str],
    weights: Sequence[torch.Tensor],
    jobs: Mapping[str, Assignment],
    scale_dtype_of: Callable[[str], torch.dtype],
    statistics: Mapping[str, InputStatistics],
    shared: Mapping[str, torch.Tensor],
    *,
    overwrite: bool,
) -> tuple[Iterator[QuantizedWeight], str, str]:
    """The results, one after the other, the algorithm, and a warning or ""."""
    first = together[0]
    job, found, scale_dtype = jobs[first], statistics.get(first), scale_dtype_of(first)
    try:
        if job.algorithm == "rtn":
            return iter([_nearest(first, weights[0], jobs, scale_dtype, found, shared)]), "rtn", ""
        assert job.options is not None, "GPTQ comes with options"
        try:
            if found is None or not found.num_tokens:
                raise QuantizationError("no calibration token reached it")
            if found.is_zero():  # every rounding has the same loss, which the modifier says
                nearest = [
                    _nearest(name, weight, jobs, scale_dtype, found, shared)
                    for name, weight in zip(together, weights, strict=True)
                ]
                return iter(nearest), "rtn", ""
            results = quantize_siblings(
                weights,
                found.take_hessian() if overwrite else found.hessian_II,
                job.scheme.weights,
                scale_dtype=scale_dtype,
                dampening_frac=job.options.dampening_frac,
                block_size=job.options.block_size,
                actorder=job.options.actorder,
                global_scale=shared.get(first),
                overwrite_hessian=overwrite,
            )
            one = next(results)  # if there is one, there will be the others
        except QuantizationError as error:
            if job.options.fallback != "rtn" or not all(grid.is_finite(weight) for weight in weights):
                raise
            nearest = [
                _nearest(name, weight, jobs, scale_dtype, found, shared)
                for name, weight in zip(together, weights, strict=True)
            ]
            return iter(nearest), "rtn", f"warning: {', '.join(together)} rounded to nearest: {error.message}"
    except QuantizationError as error:
        culprit = next((name for name, w in zip(together, weights, strict=True) if not grid.is_finite(w)), "")
        raise QuantizationError(
            f"{culprit or first}: {error.message}",
            hint=error.hint,
            is_resumable=job.algorithm == "gptq" and not culprit,
        ) from error
    used = one.damping
    is_raised = used > job.options.dampening_frac
    raised = f"warning: {', '.join(together)}: the Hessian factored with dampening {used:g} only" if is_raised else ""
    results = _both([one], results)
    del one
    return (_refined(results, weights, job, found) if job.options.refine else results), "gptq", raised


def _both(first: list[QuantizedWeight], others: Iterator[QuantizedWeight]) -> Iterator[QuantizedWeight]:
    """One after the other, as `itertools.chain`, which would hold the first one to the end."""
    yield first.pop()
    yield from others


def _refined(
    results: Iterator[QuantizedWeight], weights: Sequence[torch.Tensor], job: Assignment, found: InputStatistics
) -> Iterator[QuantizedWeight]:
    """The results of a solve, improved."""
    assert job.options is not None, "GPTQ comes with options"
    for weight_OI in weights:
        result = [next(results)]
        result.append(
            refine(
                weight_OI,
                result[0],
                found.hessian_II,
                job.scheme.weights,
                sweeps=job.options.refine,
                dampening_frac=result[0].damping,
            )
        )
        del result[0]
        yield result.pop()  # none is held here while it is worked with


def _nearest(
    name: str,
    weight_OI: torch.Tensor,
    jobs: Mapping[str, Assignment],
    scale_dtype: torch.dtype,
    found: InputStatistics | None,
    shared: Mapping[str, torch.Tensor],
) -> QuantizedWeight:
    args = jobs[name].scheme.weights
    if jobs[name].clip and jobs[name].algorithm == "rtn" and found is not None and found.num_tokens:
        return quantize_clipped(
            weight_OI, found.hessian_II, args, scale_dtype=scale_dtype, global_scale=shared.get(name)
        )
    importance_I = None
    if args.observer == "imatrix_mse" and found is not None and found.num_tokens:
        importance_I = found.hessian_II.diagonal()
    elif args.observer == "imatrix_mse" and jobs[name].algorithm == "gptq":  # a fallback, which has no inputs to go by
        importance_I = torch.ones(weight_OI.shape[1], device=weight_OI.device)
    return quantize_rtn(
        weight_OI, args, scale_dtype=scale_dtype, global_scale=shared.get(name), importance_I=importance_I
    )


def with_inputs(result: QuantizedWeight, parts: Mapping[str, torch.Tensor]) -> QuantizedWeight:
    """A result with the scales of static inputs."""
    return dataclasses.replace(result, inputs=dict(parts))
