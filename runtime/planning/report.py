"""Print a forecast as a table, and as JSON."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from runtime.console import human_bytes
from runtime.planning.forecast import Forecast, SubgraphForecast

_COLUMNS = ("weights", "working", "statistics", "solve", "activations", "read", "written", "device", "host")


def plan_lines(plan: Forecast) -> Iterator[str]:
    """Yield the table, equal rows in a run as one, and the totals."""
    rows: list[tuple[str, ...]] = [("subgraph", *_COLUMNS)]
    for _, group in itertools.groupby(plan.steps, key=lambda step: dataclasses.replace(step, label="")):
        steps = list(group)
        sizes = (human_bytes(getattr(steps[0], column)) for column in _COLUMNS)
        rows.append((_label(steps), *sizes))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        first, *rest = (cell.ljust(widths[0]) if not i else cell.rjust(widths[i]) for i, cell in enumerate(row))
        yield "  ".join((first, *rest)).rstrip()
    yield ""
    for name, value in _totals(plan).items():
        yield f"{name.replace('_', ' ').removesuffix(' bytes'):<18} {human_bytes(value):>9}"
    yield from plan.remarks


def plan_facts(plan: Forecast) -> dict[str, Any]:
    """Return the forecast as JSON values."""
    work = plan.work
    return {
        "work": {
            "samples": work.num_samples,
            "batch_size": work.batch_size,
            "sizes": dict(work.sizes),
            "dtype": str(work.dtype).removeprefix("torch."),
            "device": work.device_type,
            "activation_memory": work.budget.host_bytes,
            "process_bytes": work.process_bytes,
        },
        "total": _totals(plan),
        "subgraphs": [dataclasses.asdict(step) for step in plan.steps],
        "remarks": list(plan.remarks),
    }


def _totals(plan: Forecast) -> dict[str, int]:
    return {
        "peak_device_bytes": plan.device_bytes,
        "peak_host_bytes": plan.host_bytes,
        "read_bytes": plan.read_bytes,
        "written_bytes": plan.output_bytes + plan.spilled_bytes,
        "activation_bytes": plan.activation_bytes,
        "spilled_bytes": plan.spilled_bytes,
        "statistics_bytes": plan.statistics_bytes,
        "output_bytes": plan.output_bytes,
    }


def _label(steps: Sequence[SubgraphForecast]) -> str:
    first = f"{steps[0].label}{' (a guess)' if steps[0].is_estimated else ''}"
    return first if len(steps) == 1 else f"{first} and {len(steps) - 1} more like it"
