"""The command `search`, which both command lines have: a scheme for each layer within a budget, as a plain recipe."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import runtime.cli.options as given
from runtime.cli.batches import DEFAULT_BATCH_SIZE, DEFAULT_SAMPLES, BatchOptions, make_batches
from runtime.cli.report import require_page_outside
from runtime.cli.run import require_output
from runtime.console import put, say, warn
from runtime.data.options import DataOptions
from runtime.errors import OutputError, SeqbuildError, UsageError
from runtime.status import doing, done

if TYPE_CHECKING:
    from runtime.chain import Artifact
    from runtime.recipe.recipe import Recipe
    from runtime.search.found_bits import FoundBits

BudgetText = Annotated[
    str | None,
    typer.Option(
        "--budget", help="Stored bits for each weight (3.5bits), bytes of the checkpoint (2.1GiB), or a preset's size."
    ),
]
Candidates = Annotated[
    str | None,
    typer.Option(
        "--candidates",
        metavar="NAME,...",
        help="Presets with 16 bit inputs, and unquantized; default: W2A16, W3A16, W4A16, W5A16, W6A16, W8A16.",
    ),
]
RecipeOut = Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="File for the recipe.")]
AskingRecipe = Annotated[
    Path | None,
    typer.Option("--recipe", help="Recipe with an AutoBitsModifier, instead of --budget and --candidates."),
]
ByAlgorithm = Annotated[
    str | None, typer.Option("--algorithm", help="gptq or rtn: whose errors are compared; default: gptq.")
]
Ignore = Annotated[
    list[str] | None,
    typer.Option("--ignore", metavar="PATTERN", help="Modules that are not quantized; default: lm_head. Repeatable."),
]
Sensitivity = Annotated[
    str | None,
    typer.Option(
        help="How errors are weighed: gradient (default), forward (slower, for code without gradients), or none."
    ),
]
SavedStatistics = Annotated[
    Path | None,
    typer.Option("--statistics", metavar="DIR", help="From calibrate --keep-statistics; --data then weighs errors."),
]
HtmlPage = Annotated[Path | None, typer.Option("--html", metavar="PAGE", help="Also write a page with charts.")]


def _asking_options(
    budget: BudgetText = None,
    candidates: Candidates = None,
    algorithm: ByAlgorithm = None,
    ignore: Ignore = None,
    sensitivity: Sensitivity = None,
    recipe: AskingRecipe = None,
) -> dict[str, Any]:
    """Collect the options that say what is searched, by the names of their options."""
    return {name: value for name, value in dict(locals()).items() if value is not None}


def _takes_asking_options(command: Any) -> Any:
    return given.takes(command, "asked", _asking_options)


@_takes_asking_options
@given.takes_data_options
def search(
    artifact: given.ArtifactPath,
    data_options: DataOptions,
    asked: dict[str, Any],
    weights: given.WeightsPath,
    out: RecipeOut,
    data: given.DataSources,
    html: HtmlPage = None,
    statistics: SavedStatistics = None,
    revision: given.Revision = None,
    device: given.Device = "auto",
    dtype: given.Dtype = "auto",
    batch_size: given.BatchSize = DEFAULT_BATCH_SIZE,
    tokenizer: given.Tokenizer = None,
    activation_memory: given.ActivationMemory = None,
    allow_version_skew: given.Skew = False,
    trust_remote_code: given.Trust = False,
    require_signature: given.Signature = None,
    as_json: given.SummaryAsJson = False,
) -> None:
    """Choose a scheme for each layer within a budget, and write a recipe for calibrate."""
    from runtime.artifact.bundle import artifact_of
    from runtime.cli.imports import prepare
    from runtime.host.publish import write_file

    require_output()
    recipe = _asking(**asked)
    directory = given.directory_of(weights, revision, "weights")
    assert directory is not None, "weights are required"
    inputs = [path for path in (artifact, directory, statistics) if path is not None]
    _require_places(out, html, *inputs)
    prepare(artifact_of(artifact))
    loaded, run_device, run_dtype = given.load_on(
        artifact_of(artifact), device, dtype, allow_version_skew, trust_remote_code, require_signature
    )
    options = BatchOptions(
        data=replace(data_options, sources=tuple(data), default_samples=DEFAULT_SAMPLES),
        tokenizer=given.directory_of(tokenizer, None, "tokenizer"),
        weights=directory,
        batch_size=batch_size,
        is_calibration=True,
    )
    found = _found(
        loaded,
        weights=directory,
        batches=make_batches(loaded, options, None if as_json else say),
        recipe=recipe,
        device=run_device,
        dtype=run_dtype,
        activation_memory=activation_memory,
        statistics=statistics,
    )
    write_file(out, found.recipe_text.encode())
    _tell(found, out, _page(html, found, loaded.manifest.model.class_name), as_json)


def _asking(recipe: Path | None = None, **stated: Any) -> Recipe:
    """Return the recipe that asks for the search: that of a file, or one of the options."""
    from runtime.recipe.auto_bits_modifier import AutoBitsModifier
    from runtime.recipe.recipe import Recipe

    if recipe is not None:
        if stated:
            name = next(iter(stated))
            raise UsageError(f"--{name} and --recipe both say what is searched", hint=f"set {name} in the recipe")
        found = Recipe.from_file(recipe)
        if found.search is None:
            raise UsageError(f"{recipe} has no AutoBitsModifier, so there is nothing to search", hint="pass --budget")
        return found
    if "budget" not in stated:
        raise UsageError("a search needs a budget", hint="pass --budget, such as 3.5bits or 2.1GiB, or --recipe")
    if "candidates" in stated:
        stated["candidates"] = [name.strip() for name in stated["candidates"].split(",") if name.strip()]
    return Recipe.from_modifiers([AutoBitsModifier(**{"ignore": ["lm_head"], **stated})])


def _require_places(out: Path, html: Path | None, *inputs: Path) -> None:
    """Check the files that will be written, before the search."""
    from runtime.host.publish import require_writable
    from runtime.report.html import require_replaceable

    if html is not None and out.resolve() == html.resolve():
        raise UsageError(f"--out and --html are the same file {out}", hint="choose another file for the page")
    for option, path in (("--out", out), ("--html", html)):
        if path is not None:
            require_page_outside(option, path, *inputs)
    _require_own(out)
    require_writable(out)
    if html is not None:
        require_replaceable(html)


def _require_own(out: Path) -> None:
    """Require that the file for the recipe replaces nothing but the recipe of an earlier search."""
    from runtime.host.regular_files import open_regular, reason_of
    from runtime.search.plain_recipe import CHOSEN

    if out.is_dir():
        raise OutputError(f"{out} is a directory", hint="pass a file for the recipe, such as recipe.yaml")
    if not out.is_symlink() and not out.exists():
        return
    start = f"# {CHOSEN}".encode()
    try:
        with open_regular(out) as file:
            is_own = file.read(len(start)) == start
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot read {out}: {reason_of(error)}", hint="choose another file") from error
    if not is_own:
        raise OutputError(
            f"{out} exists and is not a recipe of a search, so it is not replaced",
            hint="choose another file for the recipe, or remove it",
        )


def _found(artifact: Artifact, *, activation_memory: str | None, **values: Any) -> FoundBits:
    from runtime.search.find import find_bits
    from runtime.search.options import BitSearch
    from runtime.streaming.activations import Budget

    memory = None if activation_memory is None else Budget.parse(activation_memory)
    with ExitStack() as stack:
        stack.callback(done)
        search = BitSearch(artifact=artifact, activation_memory=memory, progress=_show_progress, **values)
        return find_bits(search)


def _page(html: Path | None, found: FoundBits, model: str) -> Path | None:
    """Write the page, or warn that it cannot be written: the recipe is complete, and its summary is still shown."""
    if html is None:
        return None
    from runtime.report.search_page import write_search

    try:
        write_search(html, found, model)
    except (SeqbuildError, OSError) as error:
        warn(f"cannot write the page of the search: {error}")
        return None
    return html


def _show_progress(line: str) -> None:
    doing(f"choosing schemes: {line}")


def _tell(found: FoundBits, out: Path, html: Path | None, as_json: bool) -> None:
    from runtime.console import complain

    for remark in found.remarks:
        complain(remark)
    if as_json:
        put(json.dumps(_facts(found, out, html)))
        return
    lines: Sequence[str] = list(found.lines())
    for line in lines:
        say(line)
    say(f"recipe: {out}")
    if html is not None:
        say(f"page: {html}")


def _facts(found: FoundBits, out: Path, html: Path | None) -> dict[str, Any]:
    return {
        "recipe": str(out),
        "page": None if html is None else str(html),
        "bits": found.bits,
        "bytes": found.num_bytes + found.num_other_bytes,
        "loss": found.loss,
        "unit": found.unit,
        "gap": found.gap,
        "groups": [
            {
                "modules": list(group.modules),
                "scheme": found.chosen(index),
                "losses": dict(zip(found.candidates, found.losses[index], strict=True)),
            }
            for index, group in enumerate(found.groups)
        ],
        "uniform": [
            {"scheme": one.candidate, "bits": one.bits, "bytes": one.num_bytes, "loss": one.loss}
            for one in found.uniform()
        ],
    }
