"""Compare a forecast with the available memory, and find options with which it fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from runtime.console import human_bytes
from runtime.errors import PlanError
from runtime.planning.forecast import CONTEXT_BYTES, Forecast, Workload

_MOST_ADVICE = 3
_MOST_SCORES_BYTES = 128 * 4 * 2  # for each pair of tokens: as many heads, in float32, before and after the softmax
BATCH, SEQUENCE = "batch", "sequence"


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """The available memory and disk space, in bytes; None if it is unknown or does not matter.

    Attributes:
        device: memory of the accelerator.
        host: memory of the process, including what it has already.
        disk: space for the output, and for values between subgraphs.
    """

    device: int | None = None
    host: int | None = None
    disk: int | None = None


def shortages(plan: Forecast, limits: Limits) -> list[str]:
    """Describe each resource that is too small, a sentence each."""
    needs = [
        ("device memory", None if plan.work.is_cpu else limits.device, plan.device_bytes + CONTEXT_BYTES),
        ("host memory", limits.host, plan.host_bytes),
        ("disk", limits.disk, plan.disk_bytes),
    ]
    return [
        f"{what}: {human_bytes(needed)} needed, {human_bytes(limit)} available"
        for what, limit, needed in needs
        if limit is not None and needed > limit
    ]


def is_ample(plan: Forecast, limits: Limits) -> bool:
    """Whether twice the forecast is available, attention scores included, which a guess does not count."""
    work = plan.work
    tables = work.batch_size * max(work.sizes.values(), default=1) ** 2 * _MOST_SCORES_BYTES
    needs = [(limits.host, plan.host_bytes)]
    if not work.is_cpu:
        needs.append((limits.device, plan.device_bytes + CONTEXT_BYTES))
    return all(limit is None or 2 * (needed + tables) <= limit for limit, needed in needs)


def advice(plan: Forecast, limits: Limits, again: Callable[[Workload], Forecast]) -> list[str]:
    """Find options with which the run fits, each tried by planning with it; the mildest first.

    Args:
        plan: a forecast that does not fit.
        limits: the available memory.
        again: plans another workload of the same run.
    """
    found: list[str] = []
    for option, work in _smaller(plan, limits):
        other = again(work)
        if not shortages(other, limits):
            found.append(f"{option} (device {human_bytes(other.device_bytes)}, host {human_bytes(other.host_bytes)})")
        if len(found) == _MOST_ADVICE:
            break
    return found or [_larger_machine(plan)]


def require_fit(plan: Forecast, limits: Limits, again: Callable[[Workload], Forecast]) -> None:
    """Reject a run that does not fit.

    Raises:
        PlanError: with the shortages, and the options with which it fits.
    """
    missing = shortages(plan, limits)
    if missing:
        raise PlanError(
            f"the run does not fit: {'; '.join(missing)}",
            hint=f"use {'; or '.join(advice(plan, limits, again))}; or run anyway with --force",
        )


def _smaller(plan: Forecast, limits: Limits) -> Iterator[tuple[str, Workload]]:
    """Yield smaller workloads, with the options that request them."""
    work = plan.work
    batches = [with_batch(work, size) for size in _halves(work.batch_size)]
    budget = _budget(plan, limits)
    if budget is not None:
        yield _option(work, budget), replace(work, budget=replace(work.budget, host_bytes=budget))
    for smaller in batches:
        yield f"--batch-size {smaller.batch_size}", smaller
    for smaller in batches if budget is not None else ():
        both = replace(smaller, budget=replace(work.budget, host_bytes=0))
        yield f"--batch-size {smaller.batch_size} {_option(work, 0)}", both
    for samples in _halves(work.num_samples):
        yield f"--samples {samples}", replace(work, num_samples=samples)
    for length in _halves(work.sizes.get(SEQUENCE, 1)):
        same = [name for name, size in work.sizes.items() if size == work.sizes[SEQUENCE]]
        shorter = replace(work, sizes={**work.sizes, **dict.fromkeys(same, length)})
        yield f"--seq-len {length}", shorter
        yield f"--seq-len {length} --batch-size 1", with_batch(shorter, 1)
        if budget is not None:
            least = replace(with_batch(shorter, 1), budget=replace(work.budget, host_bytes=0))
            yield f"--seq-len {length} --batch-size 1 {_option(work, 0)}", least


def with_batch(work: Workload, batch_size: int) -> Workload:
    """The same workload in batches of another size."""
    sizes = {name: batch_size if name == BATCH else size for name, size in work.sizes.items()}
    return replace(work, batch_size=batch_size, sizes=sizes)


def _budget(plan: Forecast, limits: Limits) -> int | None:
    """The host memory left for values between subgraphs, in tenths of a gigabyte; None if a budget does not help."""
    if limits.host is None or plan.host_bytes <= limits.host or not plan.activation_bytes:
        return None
    return max(0, limits.host - (plan.host_bytes - plan.held_bytes)) // 10**8 * 10**8


def _option(work: Workload, budget: int) -> str:
    size = f"{budget / 1e9:g}GB"
    on_device = work.budget.device_bytes
    return f"--activation-memory {f'device={on_device},host={size}' if on_device else size}"


def _halves(size: int) -> Iterator[int]:
    while size > 1:
        size //= 2
        yield size


def _larger_machine(plan: Forecast) -> str:
    step = max(plan.steps, key=lambda step: step.weights + step.statistics + step.solve)
    return (
        f"a larger machine: {step.label} alone needs {human_bytes(step.weights)} for weights, "
        f"{human_bytes(step.statistics)} for statistics and {human_bytes(step.solve)} for a solve"
    )
