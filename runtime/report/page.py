"""The report page of one run."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from runtime import __version__
from runtime.report import wording
from runtime.report.errors_by_layer import OUTPUT, errors_of
from runtime.report.experts import ExpertTokens, expert_tokens
from runtime.report.facts import RunFacts
from runtime.report.figures import PageChart, error_chart, expert_chart, memory_chart, time_chart
from runtime.report.html import REPORT, embedded, own_script, plotly_script, render, write_page
from runtime.report.summary import ASSUMED, findings, tiles, verdict


def write_report(path: Path, facts: RunFacts) -> None:
    """Write the page of a run.

    Raises:
        OutputError: if it cannot be written, or would replace a file that is not a page.
    """
    write_page(path, report_page(facts))


def report_page(facts: RunFacts) -> bytes:
    """Render the page of a run."""
    errors, experts, found = errors_of(facts.modules), expert_tokens(facts.modules), findings(facts.modules)
    error_charts = [
        [(error_chart(f"errors-{number}-{place}", one), one) for place, one in enumerate(part.maps)]
        for number, part in enumerate(errors)
    ]
    expert_charts = _expert_charts(experts)
    cost_charts = list(_cost_charts(facts))
    charts = [chart for part in error_charts for chart, _ in part]
    charts += [chart for _, chart in expert_charts if chart is not None]
    charts += [chart for chart, _ in cost_charts]
    context = {
        "title": f"{facts.model or 'Model'}: quantization report",
        "kind": "quantization report",
        "subtitle": _subtitle(facts),
        "facts": facts,
        "verdict": verdict(facts, experts, found),
        "tiles": tiles(facts),
        "before_after": list(_before_after(facts)),
        "errors": list(zip(errors, error_charts, strict=True)),
        "output_measure": OUTPUT,
        "unknown": [module.name for module in facts.modules if module.error is None],
        "experts": expert_charts,
        "findings": found,
        "cost_charts": cost_charts,
        "plan": {entry.index: entry for entry in facts.plan},
        "sections": _sections(facts, experts),
        "seqbuild_version": __version__,
    }
    data = {"facts": embedded(facts), "figures": figures_json(charts)}
    scripts = [plotly_script(), own_script("page.js")]
    return render("run.html.j2", context, generator=REPORT, data=data, scripts=scripts)


def figures_json(charts: list[PageChart]) -> str:
    """The figures of charts by name."""
    return embedded({chart.name: chart.figure for chart in charts})


def _subtitle(facts: RunFacts) -> str:
    parts = [facts.settings["model"]] if "model" in facts.settings else []
    parts += [f"recipe {facts.recipe_name}"] if facts.recipe_name else []
    if facts.device:
        workers = wording.count_text(facts.num_workers, "worker")
        parts.append(f"{workers} on {facts.device}" if facts.num_workers > 1 else f"on {facts.device}")
    if facts.started is not None and facts.started < 2**33:
        parts.append(time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(facts.started)))
    return " · ".join(parts)


def _before_after(facts: RunFacts) -> Iterator[tuple[str, str, str, float, float]]:
    """Yield the title, both values, and both widths of bars in percent."""
    found = facts.perplexity
    if facts.bytes_before and facts.bytes_after:
        before, after = facts.bytes_before, facts.bytes_after
        yield ("Size of the weights", wording.size_text(before), wording.size_text(after), *_shares(before, after))
    if found is not None and found.before is not None and found.after is not None:
        texts = wording.perplexity_text(found.before), wording.perplexity_text(found.after)
        yield ("Perplexity", texts[0], texts[1], *_shares(found.before, found.after))


def _shares(before: float, after: float) -> tuple[float, float]:
    largest = max(before, after) or 1
    return round(100 * before / largest, 2), round(100 * after / largest, 2)


def _expert_charts(experts: list[ExpertTokens]) -> list[tuple[ExpertTokens, PageChart | None]]:
    return [
        (one, None if one.is_same else expert_chart(f"experts-{number}", one)) for number, one in enumerate(experts)
    ]


def _cost_charts(facts: RunFacts) -> Iterator[tuple[PageChart, str]]:
    """Yield the charts of time and memory with their captions."""
    if not facts.subgraphs:
        return
    predicted = " Lines mark the prediction." if any(entry.seconds is not None for entry in facts.plan) else ""
    if predicted and facts.rates == ASSUMED:
        predicted = " Lines mark the prediction for an assumed host; seqbuild plan --measure predicts for this one."
    yield time_chart("time", facts), f"Seconds of each subgraph.{predicted}"
    planned = " Lines mark the plan." if facts.plan else ""
    yield memory_chart("host", facts, "host"), f"Peak memory of the process up to each subgraph.{planned}"
    if facts.peak_device_bytes:
        yield memory_chart("device", facts, "device"), f"Peak memory of the device up to each subgraph.{planned}"


def _sections(facts: RunFacts, experts: list[ExpertTokens]) -> list[tuple[str, str]]:
    """The contents: ids and titles."""
    titles: Mapping[str, Any] = {
        "errors": "Errors",
        "experts": "Experts" if experts else "",
        "findings": "Fallbacks",
        "warnings": f"Warnings ({len(facts.warnings)})" if facts.warnings else "Warnings",
        "cost": "Time and memory",
        "modules": "All modules",
        "origin": "Recipe and versions",
    }
    return [(name, title) for name, title in titles.items() if title]
