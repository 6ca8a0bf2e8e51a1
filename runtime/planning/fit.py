"""Whether a plan fits, and what would make it fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from runtime.console import human_bytes
from runtime.errors import PlanError
from runtime.planning.forecast import Forecast
from runtime.planning.workload import CONTEXT_BYTES, Workload

_MOST_ADVICE = 3
_MOST_SCORES_BYTES = 128 * 4 * 2  # for each pair of tokens: as many heads, in float32, before and after the softmax
SEQUENCE = "sequence"


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What there is, in bytes; None where it is not known or does not matter.

    Attributes:
        device: memory of the accelerator.
        host: what the process may have in all.
        disk: room for the output, and for values that are put there.
    """

    device: int | None = None
    host: int | None = None
    disk: int | None = None


def shortages(plan: Forecast, limits: Limits) -> list[str]:
    """What does not fit, a sentence each."""
    is_cpu = plan.work.device_type == "cpu"
    needs = [
        ("device memory", None if is_cpu else limits.device, plan.device_bytes + CONTEXT_BYTES),
        ("host memory", limits.host, plan.host_bytes),
        ("disk", limits.disk, plan.disk_bytes),
    ]
    return [
        f"{what}: {human_bytes(needed)} are needed, there are {human_bytes(limit)}"
        for what, limit, needed in needs
        if limit is not None and needed > limit
    ]


def is_ample(plan: Forecast, limits: Limits) -> bool:
    """Whether there is twice what a plan wants, and tables of all attention scores, which a guess does not see."""
    work = plan.work
    tables = work.batch_size * max(work.sizes.values(), default=1) ** 2 * _MOST_SCORES_BYTES
    needs = [(limits.host, plan.host_bytes)]
    if work.device_type != "cpu":
        needs.append((limits.device, plan.device_bytes + CONTEXT_BYTES))
    return all(limit is None or 2 * (needed + tables) <= limit for limit, needed in needs)


def advice(plan: Forecast, limits: Limits, again: Callable[[Workload], Forecast]) -> list[str]:
    """Options that make a plan fit, each tried by planning with it; the mildest first.

    Args:
        plan: one that does not fit.
        limits: what there is.
        again: plans other work of the same kind.
    """
    found: list[str] = []
    for option, work in _milder(plan, limits):
        other = again(work)
        if not shortages(other, limits):
            found.append(f"{option} (device {human_bytes(other.device_bytes)}, host {human_bytes(other.host_bytes)})")
        if len(found) == _MOST_ADVICE:
            break
    return found or [_hopeless(plan)]


def require_fit(plan: Forecast, limits: Limits, again: Callable[[Workload], Forecast]) -> None:
    """Refuse a run that does not fit.

    Raises:
        PlanError: naming what is short, with the options that would make it fit.
    """
    missing = shortages(plan, limits)
    if missing:
        raise PlanError(
            f"the run does not fit: {'; '.join(missing)}",
            hint=f"what would: {'; or '.join(advice(plan, limits, again))}; or go on with --force",
        )


def _milder(plan: Forecast, limits: Limits) -> Iterator[tuple[str, Workload]]:
    """Work that takes less, with the options that ask for it."""
    work = plan.work
    batches = [with_batch(work, size) for size in _halves(work.batch_size)]
    budget = _budget(plan, limits)
    if budget is not None:
        yield _spelled(work, budget), replace(work, budget=replace(work.budget, host_bytes=budget))
    for smaller in batches:
        yield f"--batch-size {smaller.batch_size}", smaller
    for smaller in batches if budget is not None else ():
        both = replace(smaller, budget=replace(work.budget, host_bytes=0))
        yield f"--batch-size {smaller.batch_size} {_spelled(work, 0)}", both
    for samples in _halves(work.num_samples):
        yield f"--samples {samples}", replace(work, num_samples=samples)
    for length in _halves(work.sizes.get(SEQUENCE, 1)):
        same = [name for name, size in work.sizes.items() if size == work.sizes[SEQUENCE]]
        shorter = replace(work, sizes={**work.sizes, **dict.fromkeys(same, length)})
        yield f"--seq-len {length}", shorter
        yield f"--seq-len {length} --batch-size 1", with_batch(shorter, 1)
        if budget is not None:
            least = replace(with_batch(shorter, 1), budget=replace(work.budget, host_bytes=0))
            yield f"--seq-len {length} --batch-size 1 {_spelled(work, 0)}", least


def with_batch(work: Workload, batch_size: int) -> Workload:
    """The same work in other batches."""
    sizes = {name: batch_size if name == "batch" else size for name, size in work.sizes.items()}
    return replace(work, batch_size=batch_size, sizes=sizes)


def _budget(plan: Forecast, limits: Limits) -> int | None:
    """What may be left in memory of the values between subgraphs, in whole tenths of a gigabyte; None where that does
    not help.
    """
    if limits.host is None or plan.host_bytes <= limits.host or not plan.activation_bytes:
        return None
    return max(0, limits.host - (plan.host_bytes - plan.held_bytes)) // 10**8 * 10**8


def _spelled(work: Workload, budget: int) -> str:
    size = f"{budget / 1e9:g}GB"
    on_device = work.budget.device_bytes
    return f"--activation-memory {f'device={on_device},host={size}' if on_device else size}"


def _halves(size: int) -> Iterator[int]:
    while size > 1:
        size //= 2
        yield size


def _hopeless(plan: Forecast) -> str:
    step = max(plan.steps, key=lambda step: step.weights + step.statistics + step.solve)
    return (
        f"a larger machine, for {step.label} alone has {human_bytes(step.weights)} of weights, "
        f"{human_bytes(step.statistics)} of statistics and a solve of {human_bytes(step.solve)}"
    )
