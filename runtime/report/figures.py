"""Charts as plain dicts for plotly.js. The page's script adds the colors of its theme by each trace's `role`."""

from __future__ import annotations

import html
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.report.errors_by_layer import ErrorMap, ErrorRow
from runtime.report.experts import ExpertTokens
from runtime.report.facts import MeasuredSubgraph, RunFacts

_ROW_HEIGHT, _FRAME_HEIGHT = 24, 110
_LEAST_SPREAD = 10  # the largest value by the median, from which colors are logarithmic
PHASES = ("read weights", "measure", "quantize", "propagate", "write", "replay")
_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


@dataclass(frozen=True, kw_only=True, slots=True)
class PageChart:
    """A chart: the element's name, a description for readers that do not see it, and the figure."""

    name: str
    description: str
    figure: Mapping[str, Any]

    @property
    def height(self) -> int:
        """Its height in pixels."""
        return int(self.figure["layout"]["height"])


def label(text: str, most: int = 60) -> str:
    """Escape a text for plotly, which understands tags in labels, and shorten it in the middle."""
    if len(text) > most:
        text = f"{text[: most * 2 // 3]}…{text[-(most // 4) :]}"
    return html.escape(text, quote=False)


@dataclass(frozen=True, slots=True)
class ColorScale:
    """The range of the colors of a heat map of errors; logarithmic if they spread widely."""

    low: float
    high: float
    is_log: bool

    @classmethod
    def of(cls, values: Sequence[float]) -> ColorScale:
        """Choose the scale for these errors."""
        positive = [value for value in values if value > 0]
        if not positive:
            return cls(0.0, 1.0, False)
        low, high = min(positive), max(positive)
        is_log = high > _LEAST_SPREAD * statistics.median(positive)
        return cls(max(low, high * 1e-5) if is_log else 0.0, high, is_log)


def error_chart(name: str, found: ErrorMap, scale: ColorScale | None = None) -> PageChart:
    """A heat map of errors by layer and kind; `scale` is that of several maps, None for its own."""
    scale = scale or ColorScale.of(found.values)
    low, high = scale.low, scale.high
    figure = _heat_map(found, [row.values for row in found.rows], found.measure)
    trace = figure["data"][0] | {"meta": {"role": "sequential"}}
    if scale.is_log:
        low = min(low, high / 1.01)
        trace["z"] = [[None if v is None else math.log10(max(v, low)) for v in row.values] for row in found.rows]
        trace |= {"zmin": math.log10(low), "zmax": math.log10(high)}
        trace["colorbar"] |= _log_ticks(low, high)
    else:
        trace |= {"zmin": 0.0, "zmax": high}
    figure["data"] = [trace]
    layers = f"{len(found.layers)} layers and {len(found.rows)} rows"
    return PageChart(
        name=name, description=f"Heat map of the {found.measure} by layer and kind: {layers}.", figure=figure
    )


def difference_chart(name: str, found: ErrorMap, other: ErrorMap) -> PageChart:
    """A heat map of the ratio of two errors, as a logarithm of base 2."""
    theirs = {row.kind: dict(zip(other.layers, row.values, strict=True)) for row in other.rows}
    numbers = [
        [
            _ratio(value, theirs.get(row.kind, {}).get(layer))
            for layer, value in zip(found.layers, row.values, strict=True)
        ]
        for row in found.rows
    ]
    reach = max((abs(number) for row in numbers for number in row if number is not None), default=0.0)
    reach = min(max(reach, 0.1), 5.0)
    figure = _heat_map(found, numbers, "error of B / error of A")
    trace = figure["data"][0]
    trace |= {"meta": {"role": "diverging"}, "zmin": -reach, "zmax": reach}
    steps = [-reach, -reach / 2, 0.0, reach / 2, reach]
    trace["colorbar"] |= {"tickvals": steps, "ticktext": [f"×{2**step:.2f}" for step in steps]}
    trace["customdata"] = [
        [[one[0], "no value" if number is None else f"×{2**number:.3f}"] for one, number in zip(row, line, strict=True)]
        for row, line in zip(trace["customdata"], numbers, strict=True)
    ]
    return PageChart(name=name, description="Heat map of the error of run B divided by that of run A.", figure=figure)


def _ratio(first: float | None, second: float | None) -> float | None:
    if first is None or second is None:
        return None
    if first == second:
        return 0.0
    return max(-5.0, min(5.0, math.log2(max(second, 1e-12) / max(first, 1e-12))))


def _heat_map(found: ErrorMap, numbers: Sequence[Sequence[float | None]], title: str) -> dict[str, Any]:
    rows: Sequence[ErrorRow] = found.rows
    texts = [
        [
            [label(name, 90), "no value" if value is None else f"{value:.4g}"]
            for name, value in zip(row.modules, row.values, strict=True)
        ]
        for row in rows
    ]
    trace = {
        "type": "heatmap",
        "x": list(found.layers),
        "y": list(range(len(rows))),
        "z": [list(row) for row in numbers],
        "customdata": texts,
        "hovertemplate": "layer %{x}<br>%{customdata[0]}<br><b>%{customdata[1]}</b><extra></extra>",
        "xgap": 1 if len(found.layers) <= 100 else 0,
        "ygap": 1,
        "hoverongaps": False,
        "colorbar": {"title": {"text": label(title.partition(" ‖")[0]), "side": "right"}, "thickness": 12},
    }
    layout = {
        "height": _FRAME_HEIGHT + _ROW_HEIGHT * len(rows),
        "xaxis": {"title": {"text": "layer"}, "constrain": "domain", "showgrid": False, "zeroline": False},
        "yaxis": {
            "tickvals": list(range(len(rows))),
            "ticktext": [label(row.label, 40) for row in rows],
            "autorange": "reversed",
            "automargin": True,
            "showgrid": False,
            "zeroline": False,
        },
    }
    if len(found.layers) <= 12:
        layout["xaxis"] |= {"tickvals": list(found.layers)}  # type: ignore[operator]
    return {"data": [trace], "layout": layout}


def _log_ticks(low: float, high: float) -> dict[str, Any]:
    """Ticks of a logarithmic color bar at 1, 2 and 5 times powers of ten."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**power for power in powers for step in ((1, 2, 5) if len(powers) <= 3 else (1,))]
    inside = [tick for tick in ticks if low <= tick <= high] or [low, high]
    texts = [f"{tick:,.0f}" if 1000 <= tick < 1e9 else f"{tick:.3g}" for tick in inside]
    return {"tickvals": [math.log10(tick) for tick in inside], "ticktext": texts}


def expert_chart(name: str, found: ExpertTokens) -> PageChart:
    """A heat map of the tokens of each expert; colors are logarithmic, and those that saw no token have their own."""
    logs = [[None if n is None else math.log10(n) if n else None for n in row] for row in found.counts]
    unused = [[1 if n == 0 else None for n in row] for row in found.counts]
    seen = [value for row in logs for value in row if value is not None]
    low, high = min(seen, default=0.0), max(seen, default=1.0)
    common = {"type": "heatmap", "x": list(found.experts), "y": list(range(len(found.layers))), "hoverongaps": False}
    common |= {"xgap": 1 if len(found.experts) <= 64 else 0, "ygap": 1}
    # Rows are positions, because layers may have gaps, and not every row has a tick.
    common["customdata"] = [
        [[layer, f"{n or 0:,}"] for n in row] for layer, row in zip(found.layers, found.counts, strict=True)
    ]
    counts = {
        **common,
        "z": logs,
        "meta": {"role": "tokens"},
        "zmin": min(low, high - 0.1),
        "zmax": high,
        "hovertemplate": "layer %{customdata[0]}, expert %{x}<br><b>%{customdata[1]} tokens</b><extra></extra>",
        "colorbar": {"title": {"text": "tokens", "side": "right"}, "thickness": 12}
        | _log_ticks(10 ** min(low, high - 0.1), 10**high),
    }
    none = {
        **common,
        "z": unused,
        "meta": {"role": "missing"},
        "showscale": False,
        "hovertemplate": "layer %{customdata[0]}, expert %{x}<br><b>no tokens</b><extra></extra>",
    }
    rows = len(found.layers)
    size = max(8, min(_ROW_HEIGHT, 900 // rows))
    every = max(1, -(-14 // size))
    layout = {
        "height": _FRAME_HEIGHT + size * rows,
        "xaxis": {"title": {"text": "expert"}, "showgrid": False, "zeroline": False},
        "yaxis": {
            "title": {"text": "layer"},
            "tickvals": list(range(0, rows, every)),
            "ticktext": [str(layer) for layer in found.layers[::every]],
            "autorange": "reversed",
            "automargin": True,
            "showgrid": False,
            "zeroline": False,
        },
    }
    if len(found.experts) <= 16:
        layout["xaxis"] |= {"tickvals": list(found.experts)}  # type: ignore[operator]
    description = f"Heat map of the tokens of {len(found.experts)} experts in {rows} layers."
    return PageChart(name=name, description=description, figure={"data": [counts, none], "layout": layout})


def time_chart(name: str, facts: RunFacts) -> PageChart:
    """Bars of the seconds of each subgraph, by phase if known, and the predicted seconds."""
    bars = []
    if any(phase in entry.phases for entry in facts.subgraphs for phase in PHASES):
        for phase in PHASES:
            seconds = [round(entry.phases.get(phase, 0.0), 3) for entry in facts.subgraphs]
            if any(seconds):
                bars.append(_bar(phase, f"phase {PHASES.index(phase)}", facts.subgraphs, seconds))
        rest = [max(0.0, round((one.seconds or 0) - sum(one.phases.values()), 3)) for one in facts.subgraphs]
        if any(number > 0.05 * max(one.seconds or 0, 0.1) for number, one in zip(rest, facts.subgraphs, strict=True)):
            bars.append(_bar("rest", "phase rest", facts.subgraphs, rest))
    else:
        bars.append(_bar("measured", "measured", facts.subgraphs, [one.seconds for one in facts.subgraphs]))
    predicted = [entry for entry in facts.plan if entry.seconds is not None]
    if predicted:
        bars.append(_marks(predicted, [entry.seconds for entry in predicted]))
    layout = _bar_layout("seconds", is_stacked=True)
    return PageChart(
        name=name, description="Bars of the seconds of each subgraph.", figure={"data": bars, "layout": layout}
    )


def memory_chart(name: str, facts: RunFacts, where: str) -> PageChart:
    """Bars of the peak memory of each subgraph on the `host` or the `device`, and the predicted peak."""
    measured = [getattr(entry, f"peak_{where}_bytes") for entry in facts.subgraphs]
    planned = [getattr(entry, where) for entry in facts.plan]
    factor, unit = next((one for one in _UNITS if max([*measured, *planned], default=0) >= one[0]), (1, "B"))
    bars = [_bar("measured", "measured", facts.subgraphs, [round(number / factor, 3) for number in measured])]
    if any(planned):
        bars.append(_marks(facts.plan, [round(number / factor, 3) for number in planned]))
    figure = {"data": bars, "layout": _bar_layout(f"peak memory, {unit}", is_stacked=False)}
    return PageChart(name=name, description=f"Bars of the peak {where} memory of each subgraph.", figure=figure)


def paired_time_chart(name: str, first: RunFacts, second: RunFacts) -> PageChart:
    """Bars of the seconds of each subgraph of two runs."""
    bars = [
        _bar(f"run {letter}", role, facts.subgraphs, [one.seconds for one in facts.subgraphs])
        for letter, role, facts in (("A", "measured", first), ("B", "phase 3", second))
    ]
    layout = _bar_layout("seconds", is_stacked=False) | {"barmode": "group"}
    return PageChart(
        name=name,
        description="Bars of the seconds of each subgraph of both runs.",
        figure={"data": bars, "layout": layout},
    )


def _bar(name: str, role: str, entries: Sequence[MeasuredSubgraph], values: Sequence[float | None]) -> dict[str, Any]:
    return {
        "type": "bar",
        "name": name,
        "x": [entry.index + 1 for entry in entries],
        "y": list(values),
        "customdata": [label(entry.label) for entry in entries],
        "hovertemplate": "%{x}: %{customdata}<br>" + name + " <b>%{y}</b><extra></extra>",
        "meta": {"role": role},
    }


def _marks(entries: Sequence[Any], values: Sequence[float | None]) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "predicted",
        "x": [entry.index + 1 for entry in entries],
        "y": list(values),
        "marker": {"symbol": "line-ew", "size": 22, "line": {"width": 3}},
        "hovertemplate": "%{x}: predicted <b>%{y}</b><extra></extra>",
        "meta": {"role": "predicted"},
    }


def _bar_layout(title: str, *, is_stacked: bool) -> dict[str, Any]:
    return {
        "height": 300,
        "barmode": "stack" if is_stacked else "group",
        "bargap": 0.25,
        "xaxis": {"title": {"text": "subgraph"}, "zeroline": False, "showgrid": False, "tickformat": "d"},
        "yaxis": {"title": {"text": title}, "automargin": True, "rangemode": "tozero", "tickformat": "~g"},
        "legend": {"orientation": "h", "traceorder": "normal", "y": 1.02, "yanchor": "bottom", "x": 0},
        "showlegend": True,
    }
