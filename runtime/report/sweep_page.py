"""The page of a sweep: a table of all recipes, with links to the page of each and to its comparison with the first."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from runtime import __version__
from runtime.recipe_sweep import cells_of
from runtime.report.compare_page import write_comparison
from runtime.report.facts import name_of
from runtime.report.html import REPORT, render, write_page
from runtime.report.sources import beside, read_facts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from runtime.recipe_sweep import Sweep, SweptRecipe

PAGE_NAME = "sweep.html"


def write_sweep_pages(folder: Path, model: str, found: Sweep) -> Path:
    """Write the page of a sweep into its directory, and the comparison of each recipe with the first beside it.

    Raises:
        OutputError: one cannot be written.
    """
    first, *others = found.recipes
    links: dict[str, list[tuple[str, str]]] = {}
    for one in found.recipes:
        page = beside(one.path, ".report.html")
        links[one.name] = [("report", quote(page.name))] if page.is_file() else []
    for one in others:
        place = folder / f"{first.name}-{one.name}.compare.html"
        write_comparison(place, read_facts(first.path), read_facts(one.path), names=(first.name, one.name))
        links[one.name].append((f"compared with {name_of(first.name)}", quote(place.name)))
    path = folder / PAGE_NAME
    write_page(path, sweep_page(model, found, [(one, links[one.name]) for one in found.recipes]))
    return path


def sweep_page(model: str, found: Sweep, linked: Sequence[tuple[SweptRecipe, Sequence[tuple[str, str]]]]) -> bytes:
    """Render the page; `linked` has the texts and places of links of each recipe."""
    has_perplexity = any(one.perplexity is not None for one in found.recipes)
    context = {
        "title": f"{name_of(model)}: recipes compared",
        "kind": "comparison of recipes",
        "model": name_of(model),
        "found": found,
        "has_perplexity": has_perplexity,
        "rows": [([name_of(cell) for cell in cells_of(one, has_perplexity)], links) for one, links in linked],
        "seqbuild_version": __version__,
    }
    return render("sweep.html.j2", context, generator=REPORT, data={}, scripts=[])
