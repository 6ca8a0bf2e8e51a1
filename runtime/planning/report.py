"""Print a forecast as a table, and as JSON."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from runtime.console import human_bytes
from runtime.planning.distribution import Distribution
from runtime.planning.forecast import Forecast, SubgraphForecast
from runtime.terminal import Column, Names, printable, table_lines

# The number is the turn to be left out on a narrow terminal.
_SIZES = {"weights": 5, "working": 3, "statistics": 4, "solve": 2, "activations": 0, "read": 1, "written": 6}
_SIZES |= {"device": 0, "host": 0}
_UNDIVIDED = {
    "lanes": "lanes that do not divide evenly",
    "solves": "waiting for the largest solve",
    "searches": "searches of AWQ",
    "everyone": "what each worker repeats",
    "loading": "loading weights",
}


def plan_lines(plan: Forecast, width: int | None = None) -> Iterator[str]:
    """Yield the table, equal rows in a run as one, and the totals, for a terminal of this width or without a limit."""
    rows: list[Sequence[str | Names]] = []
    sizes = _SIZES | ({} if plan.distribution is None else {"sent": 0})
    columns = (
        Column(heading="subgraph", is_flexible=True, least=18),
        *(Column(heading=name, is_number=True, dropped=turn) for name, turn in sizes.items()),
    )
    for _, group in itertools.groupby(plan.steps, key=lambda step: dataclasses.replace(step, label="")):
        steps = list(group)
        rows.append((_label(steps), *(human_bytes(getattr(steps[0], name)) for name in sizes)))
    yield from table_lines(columns, rows, width)
    yield ""
    for name, value in _totals(plan).items():
        yield f"{name.replace('_', ' ').removesuffix(' bytes'):<18} {human_bytes(value):>9}"
    if plan.distribution is not None:
        yield from _distribution_lines(plan, plan.distribution)
    yield from plan.remarks


def plan_event(plan: Forecast) -> dict[str, Any]:
    """Return the event `plan` of a run: bytes of each subgraph and in total, and seconds where they are predicted."""
    names = ("host", "device", "read", "written")
    steps = [
        {"index": index, "label": step.label, **{name: getattr(step, name) for name in names}, "seconds": None}
        for index, step in enumerate(plan.steps)
    ]
    totals = {"host": plan.host_bytes, "device": plan.device_bytes, "read": plan.read_bytes}
    return {"subgraphs": steps, **totals, "written": plan.output_bytes, "seconds": None}


def _distribution_lines(plan: Forecast, found: Distribution) -> Iterator[str]:
    """Yield the prediction for several workers."""
    lanes, link = found.num_lanes, human_bytes(found.rates.link)
    yield f"{'workers':<18} {found.num_workers:>9}  figures above are of each; the samples are in {lanes} lanes"
    if found.num_workers > lanes:
        yield f"{'':<28}  more than {lanes} workers only share solves and writing"
    most = human_bytes(found.most_sent_bytes)
    yield f"{'sent':<18} {human_bytes(found.sent_bytes):>9}  {most} by the busiest worker; without messages of a few kB"
    name, seconds = max(found.undivided_s.items(), key=lambda entry: entry[1])
    part = f"{seconds / found.alone_s:.1%}: {_UNDIVIDED[name]}"
    yield f"{'serial share':<18} {found.serial_share:>9.1%}  of one worker's time is not divided ({part})"
    device = "cores of a server with AVX-512" if plan.work.is_cpu else "H100"
    yield f"{'speedup':<18} {found.speedup:>9.2f}  predicted with assumed rates: {device}, {link}/s between workers"


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
        "distribution": None if plan.distribution is None else _distribution_facts(plan.distribution),
    }


def _distribution_facts(found: Distribution) -> dict[str, Any]:
    return {
        "workers": found.num_workers,
        "lanes": found.num_lanes,
        "bandwidth": found.rates.link,
        "sent_bytes": found.sent_bytes,
        "most_sent_bytes": found.most_sent_bytes,
        "serial_share": found.serial_share,
        "speedup": found.speedup,
        "seconds": found.seconds,
        "seconds_alone": found.alone_s,
        "seconds_by_phase": found.phase_s,
        "undivided_seconds": found.undivided_s,
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
