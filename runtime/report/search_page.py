"""The page of a search: the bits of each layer, where the loss comes from, and the size and loss of each scheme."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from runtime import __version__
from runtime.console import human_bytes
from runtime.report.errors_by_layer import error_map
from runtime.report.facts import ReportedModule
from runtime.report.figures import ColorScale, PageChart, error_chart, label
from runtime.report.html import SEARCH, own_script, plotly_script, render, write_page
from runtime.report.page import figures_json
from runtime.report.places import places
from runtime.search.found_bits import FoundBits, group_name

BITS, LOSS = "stored bits for each weight", "predicted loss"


def write_search(path: Path, found: FoundBits, model: str) -> None:
    """Write the page of a search.

    Raises:
        OutputError: if it cannot be written, or would replace a file that is not a page.
    """
    write_page(path, search_page(found, model))


def search_page(found: FoundBits, model: str) -> bytes:
    """Render the page of a search."""
    charts = [*_maps(found, "bits", BITS, _bits(found)), *_maps(found, "loss", LOSS, _losses(found))]
    sizes = _sizes_chart(found)
    context = {
        "title": f"{model}: schemes by layer",
        "kind": "choice of schemes",
        "model": model,
        "found": found,
        "whole": human_bytes(found.num_bytes + found.num_other_bytes),
        "size": human_bytes(found.num_bytes),
        "charts": charts,
        "sizes": sizes,
        "rows": list(_rows(found)),
        "uniform": [(one, human_bytes(one.num_bytes)) for one in found.uniform()],
        "seqbuild_version": __version__,
    }
    data = {"figures": figures_json([*(chart for chart, _ in charts), sizes])}
    scripts = [plotly_script(), own_script("page.js")]
    return render("search.html.j2", context, generator=SEARCH, data=data, scripts=scripts)


def _bits(found: FoundBits) -> list[float]:
    return [8 * group.sizes[own] / group.num_weights for group, own in zip(found.groups, found.choice, strict=True)]


def _losses(found: FoundBits) -> list[float]:
    return [own[chosen] for own, chosen in zip(found.losses, found.choice, strict=True)]


def _maps(found: FoundBits, name: str, measure: str, values: Sequence[float]) -> Iterator[tuple[PageChart, str]]:
    """Yield a heat map by layer and kind for each stack of layers. A group with a loss has it at its first module."""
    modules = [
        ReportedModule(name=module, error=value)
        for group, value in zip(found.groups, values, strict=True)
        for module in (group.modules if measure == BITS else group.modules[:1])
    ]
    known = places(module.name for module in modules)
    stacks: dict[str, list[ReportedModule]] = {}
    for module in modules:
        if known[module.name].layer >= 0:
            stacks.setdefault(known[module.name].stack, []).append(module)
    for number, (stack, members) in enumerate(stacks.items()):
        drawn = error_map(stack, measure, members, known)
        rows = [row for row in drawn.rows if not row.kind.endswith(", median")]
        rows = [replace(row, label=row.label.removesuffix(", largest")) for row in rows]
        drawn = replace(drawn, rows=rows)
        scale = ColorScale(0.0, max(drawn.values), False) if measure == BITS else None
        yield error_chart(f"{name}-{number}", drawn, scale), f"{measure}, {stack}"


def _sizes_chart(found: FoundBits) -> PageChart:
    """Bits and predicted losses of each scheme for all modules, and of the choice."""
    uniform = found.uniform()

    def points(name: str, role: str, entries: Sequence[tuple[str, float, float]]) -> dict[str, Any]:
        return {
            "type": "scatter",
            "mode": "markers",
            "name": name,
            "x": [bits for _, bits, _ in entries],
            "y": [loss for *_, loss in entries],
            "customdata": [label(one) for one, *_ in entries],
            "hovertemplate": "%{customdata}<br>%{x:.3f} bits, loss <b>%{y:.4g}</b><extra></extra>",
            "marker": {"size": 10},
            "meta": {"role": role},
        }

    layout = {
        "height": 340,
        "xaxis": {"title": {"text": BITS}, "zeroline": False},
        "yaxis": {"title": {"text": f"{LOSS}, {found.unit}"}, "type": "log", "automargin": True},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "showlegend": True,
    }
    one_scheme = points("one scheme", "measured", [(one.candidate, one.bits, one.loss) for one in uniform if one.loss])
    chosen = points("this choice", "phase 3", [("this choice", found.bits, found.loss)])
    description = "Predicted loss by bits, of each scheme for all modules and of this choice."
    return PageChart(name="sizes", description=description, figure={"data": [one_scheme, chosen], "layout": layout})


def _rows(found: FoundBits) -> Iterator[Mapping[str, Any]]:
    total = found.loss or 1.0
    for index, (group, bits, loss) in enumerate(zip(found.groups, _bits(found), _losses(found), strict=True)):
        yield {
            "name": group_name(group),
            "scheme": found.chosen(index),
            "bits": f"{bits:.2f}",
            "loss": loss,
            "share": f"{loss / total:.1%}",
            "losses": [f"{one:.3g}" for one in found.losses[index]],
        }
