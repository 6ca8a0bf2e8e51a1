"""Print a forecast as a table, and as JSON."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from runtime.console import human_bytes
from runtime.planning.distribution import Distribution
from runtime.planning.forecast import Forecast, SubgraphForecast
from runtime.planning.rates import ASSUMED
from runtime.planning.seconds import RunSeconds, event_seconds
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
    if plan.seconds.origin != ASSUMED:
        yield from _seconds_lines(plan.seconds)
    yield from plan.remarks


def _seconds_lines(seconds: RunSeconds) -> Iterator[str]:
    """Yield the predicted time, in total and by phase; with assumed rates it would be too rough."""
    yield f"{'time':<18} {clock(seconds.total):>9}  {seconds.origin}"
    parts = [f"{phase} {clock(value)}" for phase, value in seconds.phases.items() if value >= 0.05]
    yield f"{'':<18} {'':>9}  {', '.join(parts)}"


def clock(seconds: float) -> str:
    """Write seconds in words, with two digits or more."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 100 else f"{minutes} min"


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
    rates = f"assumed rates: {device}" if found.rates.origin == ASSUMED else f"rates {found.rates.origin}"
    yield f"{'speedup':<18} {found.speedup:>9.2f}  predicted with {rates}, {link}/s between workers"


def plan_event(plan: Forecast) -> dict[str, Any]:
    """Return the event `plan` of a run: bytes and seconds of each subgraph and in total.

    `rates` says where the rates behind the seconds are from, and `phases` are the seconds of a subgraph by the names
    that other events have for its phases.
    """
    names = ("host", "device", "read", "written")
    steps = [
        {
            "index": index,
            "label": step.label,
            **{name: getattr(step, name) for name in names},
            "seconds": sum(step.seconds.values()),
            "phases": event_seconds(step.seconds),
        }
        for index, step in enumerate(plan.steps)
    ]
    totals = {"host": plan.host_bytes, "device": plan.device_bytes, "read": plan.read_bytes}
    seconds = plan.seconds
    return {
        "subgraphs": steps,
        **totals,
        "written": plan.output_bytes,
        "seconds": seconds.total,
        "rates": seconds.origin,
    }


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
        "seconds": seconds_facts(plan.seconds),
        "subgraphs": [dataclasses.asdict(step) for step in plan.steps],
        "remarks": list(plan.remarks),
        "distribution": None if plan.distribution is None else _distribution_facts(plan.distribution),
    }


def seconds_facts(seconds: RunSeconds) -> dict[str, Any]:
    """Return the predicted seconds of a run as JSON values; `rates` says what they are from."""
    return {"total": seconds.total, "phases": seconds.phases, "rates": seconds.origin}


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
        **({"kept_statistics_bytes": plan.saved_bytes} if plan.saved_bytes else {}),
    }


def _label(steps: Sequence[SubgraphForecast]) -> Names:
    first = printable(f"{steps[0].label}{' (a guess)' if steps[0].is_estimated else ''}")
    return Names(tuple(first.split(", ")), len(steps) - 1, "more like it")
