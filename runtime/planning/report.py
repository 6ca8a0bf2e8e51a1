"""Print a forecast as a table, and as JSON."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from runtime.console import human_bytes
from runtime.planning.forecast import Forecast, SubgraphForecast
from runtime.terminal import Column, Names, printable, table_lines

# The number is the turn to be left out on a narrow terminal.
_SIZES = {"weights": 5, "working": 3, "statistics": 4, "solve": 2, "activations": 0, "read": 1, "written": 6}
_SIZES |= {"device": 0, "host": 0}
_COLUMNS = (
    Column(heading="subgraph", is_flexible=True, least=18),
    *(Column(heading=name, is_number=True, dropped=turn) for name, turn in _SIZES.items()),
)


def plan_lines(plan: Forecast, width: int | None = None) -> Iterator[str]:
    """Yield the table, equal rows in a run as one, and the totals, for a terminal of this width or without a limit."""
    rows: list[Sequence[str | Names]] = []
    for _, group in itertools.groupby(plan.steps, key=lambda step: dataclasses.replace(step, label="")):
        steps = list(group)
        rows.append((_label(steps), *(human_bytes(getattr(steps[0], name)) for name in _SIZES)))
    yield from table_lines(_COLUMNS, rows, width)
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


def _label(steps: Sequence[SubgraphForecast]) -> Names:
    first = printable(f"{steps[0].label}{' (a guess)' if steps[0].is_estimated else ''}")
    return Names(tuple(first.split(", ")), len(steps) - 1, "more like it")
