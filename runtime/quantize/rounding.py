"""Quantize the weights of a step; modules that read one input and have one scheme are solved together."""

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
    """The quantized weight of a module.

    Attributes:
        name: the module.
        result: the quantized weight, without input scales.
        algorithm: the algorithm that was used in the end.
        warning: a message for the user, or "".
        start: the time (`perf_counter`) at which work on the module began.
        size: ||W X||^2 over the measured inputs X, or ||W||^2 without inputs.
        loss: ||W X - Q X||^2 over the same inputs, or ||W - Q||^2.
    """

    name: str
    result: QuantizedWeight
    algorithm: str
    warning: str
    start: float
    size: float
    loss: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Rounding:
    """What the quantization of a step needs to know of its modules.

    Attributes:
        jobs: assignment of each module.
        weight_of: returns a module's weight [O, I].
        scale_dtype_of: returns the dtype in which the checkpoint stores a module's scales.
        statistics: input statistics of the measured modules. The caller removes an entry when it has taken the module's
            result: GPTQ overwrites a Hessian that no remaining module needs.
        siblings: equal values for modules that are known to read one tensor.
        others: statistics that are needed later for other modules.
    """

    jobs: Mapping[str, Assignment]
    weight_of: Callable[[str], torch.Tensor]
    scale_dtype_of: Callable[[str], torch.dtype]
    statistics: Mapping[str, InputStatistics]
    siblings: Mapping[str, Hashable]
    others: Collection[InputStatistics] = ()


def round_modules(names: Sequence[str], step: Rounding) -> Iterator[Rounded]:
    """Quantize modules in order of execution.

    Raises:
        QuantizationError: naming the module.
    """
    statistics = step.statistics
    shared = _global_scales(names, step)
    # Modules that are solved together also have one global scale; siblings share the same tensor object.
    inputs = {
        name: (id(statistics[name]), step.scale_dtype_of(name), id(shared.get(name)))
        for name in names
        if name in statistics
    }
    for batch in solved_together(names, step.jobs, inputs):
        # A separate frame, so that no tensor of one batch stays alive while the next is solved.
        found = statistics.get(batch[0])
        users = [name for name, entry in statistics.items() if entry is found]
        is_free = not any(found is other for other in step.others) and may_overwrite(step.jobs[batch[0]], batch, users)
        del found
        yield from _rounded_batch(batch, step, shared, overwrite=is_free)


def _rounded_batch(
    names: Sequence[str], step: Rounding, shared: Mapping[str, torch.Tensor], *, overwrite: bool
) -> Iterator[Rounded]:
    weights = [step.weight_of(name) for name in names]
    start = time.perf_counter()
    found = step.statistics.get(names[0])
    seen = found if found is not None and found.num_tokens else None
    sizes = [_size(weight, seen) for weight in weights]
    results, algorithm, warning = _solve(names, weights, step, shared, overwrite=overwrite)
    # GPTQ reports its loss, and may have overwritten H. Tensors that are no longer needed are released.
    del found
    remaining = list(weights) if algorithm == "rtn" else []
    seen = seen if remaining else None
    del weights
    for name, size in zip(names, sizes, strict=True):
        result = [next(results)]
        loss = _size(remaining.pop(0), seen, result[0].weight_OI) if remaining else result[0].loss
        seen = seen if remaining else None
        yield Rounded(
            name=name, result=result.pop(), algorithm=algorithm, warning=warning, start=start, size=size, loss=loss
        )
        start, warning = time.perf_counter(), ""


def _size(weight_OI: torch.Tensor, found: InputStatistics | None, quantized_OI: torch.Tensor | None = None) -> float:
    """Compute ||W X||^2 or ||W X - Q X||^2, without X where nothing was measured."""
    if not weight_OI.numel() or (found is not None and found.num_in_features != weight_OI.shape[-1]):
        return 0.0  # the solve reports the error
    if found is None:
        return summed(weight_OI, quantized_OI, plain_square)
    return found.output_square(weight_OI, quantized_OI)


def _global_scales(names: Sequence[str], step: Rounding) -> dict[str, torch.Tensor]:
    """Compute NVFP4's global scales: engines fuse siblings into one matrix, which has one global scale."""
    groups: dict[Hashable, list[str]] = {}
    for name in names:
        if grid.needs_global_scale(step.jobs[name].scheme.weights):
            groups.setdefault(step.siblings.get(name, name), []).append(name)
    return {
        name: scale
        for group in groups.values()
        for scale in [grid.global_scale_of(*(step.weight_of(name).detach() for name in group))]
        for name in group
    }


def _solve(
    names: Sequence[str],
    weights: Sequence[torch.Tensor],
    step: Rounding,
    shared: Mapping[str, torch.Tensor],
    *,
    overwrite: bool,
) -> tuple[Iterator[QuantizedWeight], str, str]:
    """Quantize a batch; return the results one by one, the algorithm, and a warning or ""."""
    first = names[0]
    job, found = step.jobs[first], step.statistics.get(first)
    try:
        if job.algorithm == "rtn":
            return iter(_nearest(names, weights, step, shared)), "rtn", ""
        assert job.options is not None, "GPTQ comes with options"
        try:
            if found is None or not found.num_tokens:
                raise QuantizationError("no calibration token reached it")
            if found.is_zero():  # every rounding has the same loss; the modifier warns of it
                return iter(_nearest(names, weights, step, shared)), "rtn", ""
            results = quantize_siblings(
                weights,
                found.take_hessian() if overwrite else found.hessian_II,
                job.scheme.weights,
                scale_dtype=step.scale_dtype_of(first),
                dampening_frac=job.options.dampening_frac,
                block_size=job.options.block_size,
                actorder=job.options.actorder,
                global_scale=shared.get(first),
                overwrite_hessian=overwrite,
            )
            one = next(results)  # if the first succeeds, the others do
        except QuantizationError as error:
            if job.options.fallback != "rtn" or not all(grid.is_finite(weight) for weight in weights):
                raise
            nearest = _nearest(names, weights, step, shared)
            return iter(nearest), "rtn", f"warning: {', '.join(names)} rounded to nearest: {error.message}"
    except QuantizationError as error:
        culprit = next((name for name, w in zip(names, weights, strict=True) if not grid.is_finite(w)), "")
        raise QuantizationError(
            f"{culprit or first}: {error.message}",
            hint=error.hint,
            is_resumable=job.algorithm == "gptq" and not culprit,
        ) from error
    is_raised = one.damping > job.options.dampening_frac
    warning = f"warning: {', '.join(names)}: the Hessian needed dampening {one.damping:g}" if is_raised else ""
    results = _chained([one], results)
    del one
    return (_refined(results, weights, job, found) if job.options.refine else results), "gptq", warning


def _chained(first: list[QuantizedWeight], others: Iterator[QuantizedWeight]) -> Iterator[QuantizedWeight]:
    """Yield the first result and the others; `itertools.chain` would keep the first one alive to the end."""
    yield first.pop()
    yield from others


def _refined(
    results: Iterator[QuantizedWeight], weights: Sequence[torch.Tensor], job: Assignment, found: InputStatistics
) -> Iterator[QuantizedWeight]:
    """Improve the results of a solve."""
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
        yield result.pop()  # this frame holds no result while the caller works with it


def _nearest(
    names: Sequence[str], weights: Sequence[torch.Tensor], step: Rounding, shared: Mapping[str, torch.Tensor]
) -> list[QuantizedWeight]:
    """Round weights to nearest, with the observers and the clipping of their assignments."""
    return [_round_to_nearest(name, w, step, shared.get(name)) for name, w in zip(names, weights, strict=True)]


def _round_to_nearest(
    name: str, weight_OI: torch.Tensor, step: Rounding, global_scale: torch.Tensor | None
) -> QuantizedWeight:
    job, scale_dtype = step.jobs[name], step.scale_dtype_of(name)
    args, found = job.scheme.weights, step.statistics.get(name)
    seen = found if found is not None and found.num_tokens else None
    if job.clip and job.algorithm == "rtn" and seen is not None:
        return quantize_clipped(weight_OI, seen.hessian_II, args, scale_dtype=scale_dtype, global_scale=global_scale)
    importance_I = None
    if args.observer == "imatrix_mse" and seen is not None:
        importance_I = seen.hessian_II.diagonal()
    elif args.observer == "imatrix_mse" and job.algorithm == "gptq":  # a fallback without inputs
        importance_I = torch.ones(weight_OI.shape[1], device=weight_OI.device)
    return quantize_rtn(weight_OI, args, scale_dtype=scale_dtype, global_scale=global_scale, importance_I=importance_I)


def with_inputs(result: QuantizedWeight, parts: Mapping[str, torch.Tensor]) -> QuantizedWeight:
    """Add the scales of static inputs to a result."""
    return dataclasses.replace(result, inputs=dict(parts))
