"""The page that shows two runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from runtime import __version__
from runtime.report.comparison import RunComparison, compare, compared_verdict
from runtime.report.errors_by_layer import ErrorMap, errors_of
from runtime.report.facts import RunFacts
from runtime.report.figures import ColorScale, PageChart, difference_chart, error_chart, paired_time_chart
from runtime.report.html import REPORT, own_script, plotly_script, render, write_page
from runtime.report.page import figures_json


def write_comparison(path: Path, first: RunFacts, second: RunFacts, names: tuple[str, str]) -> None:
    """Write the page of two runs, which are called by these names.

    Raises:
        OutputError: if it cannot be written, or would replace a file that is not a page.
    """
    write_page(path, comparison_page(first, second, names))


def comparison_page(first: RunFacts, second: RunFacts, names: tuple[str, str]) -> bytes:
    """Render the page of two runs."""
    found = compare(first, second)
    maps = list(_paired_maps(first, second))
    charts = _charts(maps)
    time = paired_time_chart("seconds", first, second) if first.subgraphs and second.subgraphs else None
    drawn = [chart for group in charts for chart, _ in group] + ([time] if time is not None else [])
    model = " and ".join(dict.fromkeys(filter(None, (first.model, second.model)))) or "Two runs"
    context = {
        "title": f"{model}: two runs compared",
        "kind": "comparison of two runs",
        "model": model,
        "names": names,
        "runs": (first, second),
        "found": found,
        "verdict": compared_verdict(first, second, found),
        "charts": charts,
        "time": time,
        "sections": _sections(found, charts, time),
        "seqbuild_version": __version__,
    }
    data = {"figures": figures_json(drawn)}
    scripts = [plotly_script(), own_script("page.js")]
    return render("compare.html.j2", context, generator=REPORT, data=data, scripts=scripts)


def _paired_maps(first: RunFacts, second: RunFacts) -> list[tuple[ErrorMap | None, ErrorMap | None]]:
    """The error maps of both runs by stack and measure."""
    ours, theirs = (
        {(one.stack, one.measure): one for part in errors_of(facts.modules) for one in part.maps}
        for facts in (first, second)
    )
    return [(ours.get(key), theirs.get(key)) for key in dict.fromkeys((*ours, *theirs))]


def _charts(maps: Sequence[tuple[ErrorMap | None, ErrorMap | None]]) -> list[list[tuple[PageChart, str]]]:
    """The charts of each pair of maps: those of both runs with one scale of colors, and the difference."""
    found = []
    for number, (one, other) in enumerate(maps):
        scale = ColorScale.of([value for map_ in (one, other) if map_ is not None for value in map_.values])
        group = []
        for letter, map_ in (("A", one), ("B", other)):
            if map_ is not None:
                where = f", {map_.stack}" if map_.stack else ""
                chart = error_chart(f"errors-{number}-{letter.lower()}", map_, scale)
                group.append((chart, f"{letter}: {map_.measure}{where}"))
        if one is not None and other is not None:
            chart = difference_chart(f"errors-{number}-change", one, other)
            group.append((chart, "Change: the error of B divided by that of A, on a logarithmic scale"))
        found.append(group)
    return found


def _sections(found: RunComparison, charts: Sequence[object], time: object) -> list[tuple[str, str]]:
    titles = {
        "numbers": "Key numbers",
        "errors": "Errors" if charts else "",
        "modules": "Modules",
        "schemes": "Schemes",
        "recipe": "Recipe",
        "time": "Time" if time is not None else "",
        "differences": "Other differences" if found.differing else "",
    }
    return [(name, title) for name, title in titles.items() if title]
