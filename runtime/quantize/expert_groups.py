"""Measure a mixture's experts, on all tokens or on those routed to them, as many at a time as memory allows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from runtime.algorithms.drift import drift_bytes
from runtime.algorithms.hessian import accumulator_bytes
from runtime.errors import DataError
from runtime.formats.compressed import input_parts
from runtime.formats.key_values import of_model
from runtime.model.experts import Mixture, all_tokens_seen, input_place
from runtime.quantize.measuring import collect_statistics
from runtime.quantize.seen_inputs import require_finite_inputs, require_inputs, unreached
from runtime.quantize.statistics import InputStatistics, Needs
from runtime.recipe.recipe import some
from runtime.workers.division import Division

if TYPE_CHECKING:
    from torch import nn

    from runtime.recipe.recipe import Assignment
    from runtime.streaming.work import Work

ALL_TOKENS = "all_tokens"  # the value of `fallback` that measures an expert on all tokens if it received too few


def expert_groups(work: Work, needs: Mapping[str, Needs]) -> list[list[str]]:
    """Divide the experts' modules of a step into groups that are measured and rounded one after the other.

    Experts are independent of each other, so the groups may be processed in any order. All modules of one expert are in
    one group, because they depend on each other.

    Args:
        work: has the module tree and the limit on the bytes of Gram matrices.
        needs: the measurements; modules outside of experts and modules without measurements are omitted.
    """
    groups: list[list[str]] = []
    taken = 0
    for names, num_bytes in _by_expert(work, needs):
        if not groups or (work.statistics_bytes is not None and taken + num_bytes > work.statistics_bytes):
            groups.append([])
            taken = 0
        groups[-1] += names
        taken += num_bytes
    return groups


def _by_expert(work: Work, needs: Mapping[str, Needs]) -> Iterator[tuple[list[str], int]]:
    """Yield each expert's modules, and the bytes of the Gram matrices that they add."""
    for name, module in work.model.named_modules():
        if not isinstance(module, Mixture) or not module.stacks:
            continue
        for expert in range(module.num_experts):
            found: dict[str, None] = {}
            counted: dict[int, None] = {}
            num_bytes = 0
            for stack in module.stacks.values():
                position = stack.input
                owners = [f"{name}.{owner}" for owner in stack.modules(expert)]
                wanted = [owner for owner in owners if needs.get(owner) and owner not in found]
                found.update(dict.fromkeys(wanted))
                is_first = input_place(position, expert, all_tokens=work.all_tokens) == expert
                if is_first and position not in counted and any(needs[owner].hessian for owner in wanted):
                    counted[position] = None
                    width = work.model.get_submodule(wanted[0]).get_parameter("weight").shape[1]
                    num_bytes += accumulator_bytes(width, work.device.type)
                    if work.is_split and any(needs[owner].drift for owner in wanted):
                        num_bytes += drift_bytes(width)
            if found:
                yield list(found), num_bytes


def measure(work: Work, needs: Mapping[str, Needs], jobs: Mapping[str, Assignment]) -> dict[str, InputStatistics]:
    """Measure modules, including experts.

    Raises:
        DataError: when a module received no token or fewer than the recipe's `min_tokens`, and has no `fallback`.
        QuantizationError: when inputs are not finite.
    """
    division = Division(work.workers.size)
    statistics = measure_once(work, needs, all_tokens=work.all_tokens, division=division)
    starved = _starved(needs, jobs, statistics)
    again = [name for name in starved if _fallback(jobs[name]) == ALL_TOKENS]
    if again and not work.all_tokens:
        work.warnings.append(f"warning: {some(again)} received too few tokens and are measured on all tokens")
        wanted = {name: needs[name] for name in again}
        statistics.update(measure_once(work, wanted, all_tokens=True, division=division))
        starved = _starved(needs, jobs, statistics)
    for name, count in starved.items():
        has_scales = bool(input_parts(jobs[name].scheme))
        if _fallback(jobs[name]) != "rtn" or has_scales:
            has_fallback = jobs[name].algorithm == "gptq" and not has_scales
            ways = ["calibrate with more data", "lower min_tokens", "add it to ignore"]
            raise DataError(
                f"{name} received {count} tokens, fewer than the recipe's min_tokens: {jobs[name].min_tokens}",
                hint=f"{', '.join(ways)}{', or set fallback: rtn' if has_fallback else ''}",
                is_resumable=True,
            )
    require_inputs(unreached(needs, statistics), jobs)
    require_finite_inputs(statistics, work.source.dtype)
    for name in starved:
        statistics.pop(name, None)  # it is rounded to nearest, which the summary reports
    return statistics


def measure_once(
    work: Work, needs: Mapping[str, Needs], *, all_tokens: bool, division: Division | None = None
) -> dict[str, InputStatistics]:
    """Run the batches once and measure modules, experts on all tokens or on those routed to them.

    If the step has saved statistics, these are returned, and nothing runs.
    """
    if work.saved is not None:
        widths = {name: work.model.get_submodule(name).get_parameter("weight").shape[1] for name in needs}
        return work.saved.measured(
            needs, widths, all_tokens=all_tokens, device=work.device, workers=work.workers, division=division
        )
    modules: dict[str, nn.Module] = {name: work.model.get_submodule(name) for name in needs}
    if not work.is_split:  # no drift
        needs = {name: replace(need, drift=False) for name, need in needs.items()}
    with all_tokens_seen(work.model) if all_tokens else contextlib.nullcontext():
        return collect_statistics(
            modules,
            needs,
            work.run_batches,
            work.device,
            work.masks,
            may_stop=_may_stop(work, needs),
            workers=work.workers,
            division=division,
        )


def _may_stop(work: Work, names: Iterable[str]) -> bool:
    """Whether a batch may end after the last measured module.

    Code without loops calls its modules in the same order in every batch. Modules that are called by other modules,
    such as experts, may be called in any order. Keys and values are not measured by hooks of modules.
    """
    subgraph, key_values = work.step.subgraph, of_model(work.model)
    has_loops = any(line.lstrip().startswith("for ") for line in subgraph.source.splitlines())
    is_measuring = key_values is not None and key_values.is_measuring
    return work.forgets and not has_loops and not is_measuring and set(names) <= set(subgraph.entry.submodules)


def _starved(
    needs: Mapping[str, Needs], jobs: Mapping[str, Assignment], statistics: Mapping[str, InputStatistics]
) -> dict[str, int]:
    """Map modules that received too few tokens to the number of tokens. The minimum is `min_tokens`, and at least one
    for an expert that can be measured again on all tokens.
    """
    seen = {name: statistics[name].num_tokens if name in statistics else 0 for name in needs if name in jobs}
    least = {name: max(jobs[name].min_tokens, int(_fallback(jobs[name]) == ALL_TOKENS)) for name in seen}
    return {name: count for name, count in seen.items() if count < least[name]}


def measured_again(name: str, jobs: Mapping[str, Assignment]) -> bool:
    """Whether an expert is measured on all tokens if it received too few."""
    return name in jobs and _fallback(jobs[name]) == ALL_TOKENS


def _fallback(job: Assignment) -> str | None:
    return job.options.fallback if job.options is not None else None


def few_tokens(needs: Mapping[str, Needs], statistics: Mapping[str, InputStatistics]) -> Sequence[str]:
    """List modules whose Gram matrix cannot have full rank, because they received fewer tokens than input features."""
    return [
        name
        for name, need in needs.items()
        if need.hessian and name in statistics and statistics[name].num_tokens < statistics[name].num_in_features
    ]
