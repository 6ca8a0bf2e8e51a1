"""The command `sweep`, which both command lines have. torch is imported only when the command runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import runtime.cli.options as given
from runtime.cli.batches import DEFAULT_BATCH_SIZE, DEFAULT_SAMPLES, BatchOptions, DescribedBatches, described_batches
from runtime.cli.report import RunPage, run_page
from runtime.cli.run import require_output
from runtime.cli.watching import GivenLog, watching
from runtime.console import optional_bytes, put, say, warn
from runtime.data.options import DataOptions
from runtime.errors import SeqbuildError
from runtime.provenance.origin import RunOrigin
from runtime.terminal import width_of

if TYPE_CHECKING:
    from runtime.chain import Artifact
    from runtime.recipe_sweep import Evaluate, Sweep

_RECIPE = "YAML recipe, or a preset such as W4A16; repeatable. Each checkpoint is named after its recipe."
Recipes = Annotated[list[str], typer.Option("--recipe", help=_RECIPE)]
Out = Annotated[Path, typer.Option("--out", "-o", help="Directory for the checkpoints, one for each recipe.")]
Data = Annotated[list[str] | None, typer.Option("--data", metavar="SOURCE", help=f"{given.DATA}.")]
EvalData = Annotated[
    list[str] | None, typer.Option("--eval", metavar="SOURCE", help="Text whose perplexity is measured; as --data.")
]
PropagateError = Annotated[
    bool,
    typer.Option(
        help="Later layers see the outputs of quantized layers: each recipe then passes over the data by itself. "
        "Without, the data is passed once for all recipes."
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Keep the complete checkpoints, and write the others.")]
NoReport = Annotated[bool, typer.Option("--no-report", help="Write no pages.")]


@given.takes_data_options
def sweep(
    artifact: given.ArtifactPath,
    data_options: DataOptions,
    weights: given.WeightsPath,
    recipe: Recipes,
    out: Out,
    data: Data = None,
    eval_data: EvalData = None,
    keep_statistics: given.KeepStatistics = None,
    statistics: given.SavedStatistics = None,
    propagate_error: PropagateError = False,
    moe_calibrate_all_experts: given.AllExperts = True,
    batch_size: given.BatchSize = DEFAULT_BATCH_SIZE,
    tokenizer: given.Tokenizer = None,
    revision: given.Revision = None,
    device: given.Device = "auto",
    dtype: given.Dtype = "auto",
    statistics_memory: given.StatisticsMemory = None,
    solve_products: given.SolveProducts = "float32",
    hash_weights: given.HashWeights = True,
    resume: Resume = False,
    force: given.Force = False,
    log: given.Log = None,
    allow_version_skew: given.Skew = False,
    trust_remote_code: given.Trust = False,
    require_signature: given.Signature = None,
    no_report: NoReport = False,
    as_json: given.SummaryAsJson = False,
) -> None:
    """Quantize a model by several recipes after one pass over the data, and compare the results."""
    given_values = dict(locals())
    require_output()
    events = GivenLog(log, artifact=artifact, weights=weights, data=data, out=out)
    events.require()
    _run(given_values, events)


def _run(values: Mapping[str, Any], events: GivenLog) -> None:
    """Run a sweep with the values of the command line, and show its results."""
    from runtime.cli.imports import prepare
    from runtime.host.hub import resolve_directory
    from runtime.recipe.named import recipe_of
    from runtime.recipe_sweep import names_of, sweep_lines
    from runtime.recipe_sweep import sweep as run

    names = ("moe_calibrate_all_experts", "solve_products", "hash_weights", "resume", "force")
    options: dict[str, Any] = {name: values[name] for name in names}
    options["statistics_memory"] = optional_bytes(values["statistics_memory"], option="--statistics-memory")
    prepare(values["artifact"])
    recipes = {name: recipe_of(text) for name, text in names_of(values["recipe"]).items()}
    directory = resolve_directory(values["weights"], revision=values["revision"], what="weights")
    skew, trust = values["allow_version_skew"], values["trust_remote_code"]
    loaded, options["device"], options["dtype"] = given.load_on(
        values["artifact"], values["device"], values["dtype"], skew, trust, values["require_signature"]
    )
    data, as_json, no_report = tuple(values["data"] or ()), values["as_json"], values["no_report"]
    sources = BatchOptions(
        data=replace(values["data_options"], sources=data, default_samples=DEFAULT_SAMPLES),
        tokenizer=given.directory_of(values["tokenizer"], None, "tokenizer"),
        weights=directory,
        batch_size=values["batch_size"],
        is_calibration=True,
    )
    found = described_batches(loaded, sources, None if as_json else say) if data else DescribedBatches()
    pages: dict[str, RunPage] = {}
    result = run(
        loaded,
        weights=directory,
        recipes=recipes,
        out=values["out"],
        batches=found.batches,
        statistics=values["statistics"],
        keep_statistics=values["keep_statistics"],
        evaluate=_evaluation(loaded, sources, values["eval_data"], options),
        propagate_error=values["propagate_error"],
        watching=_watching(events, pages, no_report, as_json),
        finished=lambda name, done: pages[name].write(done),
        origin=RunOrigin(data=found.description),
        **options,
    )
    _show(result, None if no_report else _page(values["out"], directory.name, result), events, as_json, sweep_lines)


def _watching(events: GivenLog, pages: dict[str, RunPage], no_report: bool, as_json: bool) -> Any:
    """Return what shows the run of a recipe, and makes its page."""

    def of(stack: ExitStack, name: str, path: Path) -> Mapping[str, Any]:
        pages[name] = run_page(None, no_report, path)
        if not as_json:
            say(f"recipe {name}")
        return watching(stack, events, pages[name], as_json=as_json)

    return of


def _evaluation(
    artifact: Artifact, sources: BatchOptions, eval_data: list[str] | None, options: Mapping[str, Any]
) -> Evaluate | None:
    """Return a function that measures the perplexity of a checkpoint; None without text for it."""
    if not eval_data:
        return None
    from runtime.evaluation import evaluate, require_predicting

    require_predicting(artifact.manifest)
    data = replace(sources.data, sources=tuple(eval_data))
    batches = described_batches(artifact, replace(sources, data=data, is_calibration=False)).batches

    def perplexity(weights: Any) -> float:
        chosen = {"device": options["device"], "dtype": options["dtype"]}
        return evaluate(artifact, weights=weights, batches=batches, **chosen).perplexity

    return perplexity


def _page(out: Path, model: str, found: Sweep) -> Path | None:
    """Write the pages, or warn that they cannot be written: the checkpoints are complete."""
    from runtime.report.sweep_page import write_sweep_pages

    try:
        return write_sweep_pages(out, model, found)
    except (SeqbuildError, OSError) as error:
        warn(f"cannot write the pages of the sweep: {error}")
        return None


def _show(found: Sweep, page: Path | None, log: GivenLog, as_json: bool, lines: Callable[..., Any]) -> None:
    if as_json:
        facts = {
            "recipes": [{**asdict(one), "path": str(one.path)} for one in found.recipes],
            "original": found.original,
            "seconds": found.seconds,
            "passes": found.num_passes,
            "report": None if page is None else str(page),
        }
        if not log.takes_summary(facts):
            put(json.dumps(facts))
        return
    for line in lines(found, width_of(sys.stdout)):
        say(line)
    if page is not None:
        say(f"report: {page}")
