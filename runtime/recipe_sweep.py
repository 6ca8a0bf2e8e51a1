"""Quantize a model by several recipes, and compare the results.

Without error propagation, the first recipe's run measures the model once and saves the statistics of all inputs; the
others are solved from them without a forward. With error propagation, what later layers see depends on the recipe, so
each recipe runs over the batches by itself.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.arguments import as_path
from runtime.calibration import Calibration, calibrate
from runtime.calibration_request import require_no_drift
from runtime.console import human_bytes
from runtime.errors import DataError, OutputError, RecipeError, UsageError
from runtime.experts.split import require_artifact
from runtime.host.devices import as_device, as_dtype
from runtime.host.publish import require_free, require_outside
from runtime.provenance.complete_recipe import complete_recipe
from runtime.provenance.facts import artifact_facts
from runtime.provenance.record import read_record
from runtime.quantize.needs import RecipeNeeds
from runtime.quantize.preparation import prepare
from runtime.recipe.recipe import Recipe, require_recipe
from runtime.saved_statistics.records import INDEX_NAME
from runtime.saved_statistics.run import require_shared
from runtime.saved_statistics.store import DATA, StatisticsStore
from runtime.streaming.identity import data_digest
from runtime.streaming.output_place import is_complete, root_of
from runtime.terminal import Column, table_lines
from runtime.workers.start import require_one_process

if TYPE_CHECKING:
    import torch

    from runtime.chain import Artifact
    from runtime.provenance.record import ModuleFacts

STATISTICS = ".statistics"  # in the directory of the outputs, until all recipes are solved
_UNUSUAL = re.compile(r"[^A-Za-z0-9._-]+")
Watching = Callable[[ExitStack, str, Path], Mapping[str, Any]]
Finished = Callable[[str, Calibration], Any]
Evaluate = Callable[[str | os.PathLike[str]], float]


@dataclass(frozen=True, kw_only=True, slots=True)
class SweptRecipe:
    """The result of one recipe.

    Attributes:
        name: of the recipe, and of its directory.
        path: the checkpoint.
        num_bytes: size of its tensors.
        bits: average bits of a quantized weight, scales and zero points included.
        error: ‖WX-QX‖ / ‖WX‖ over all modules together.
        loss: the sum of ‖WX-QX‖² of all modules.
        perplexity: over the evaluation's text; None if it was not measured.
        seconds: time of the run; None if an earlier process has finished it.
    """

    name: str
    path: Path
    num_bytes: int
    bits: float
    error: float
    loss: float
    perplexity: float | None
    seconds: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """The results of all recipes.

    Attributes:
        recipes: in the order of the call.
        original: the perplexity of the original model; None if it was not measured.
        seconds: of everything.
        num_passes: how often the model was measured.
    """

    recipes: tuple[SweptRecipe, ...]
    original: float | None
    seconds: float
    num_passes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _PlannedRecipe:
    """A recipe that fits the model."""

    name: str
    recipe: Recipe
    path: Path
    num_weights: int
    needs_data: bool
    needs: RecipeNeeds


@dataclass(kw_only=True)
class _Runs:
    """The runs of a sweep: `measuring` is the recipe that keeps statistics, `options` are those of `calibrate`."""

    artifact: Artifact
    weights: Any
    batches: Sequence[Mapping[str, torch.Tensor]]
    statistics: Path | None
    measuring: str | None
    options: Mapping[str, Any]
    watching: Watching
    finished: Finished
    num_passes: int = field(default=0)

    def run(self, planned: _PlannedRecipe) -> float | None:
        """Quantize by one recipe, unless an earlier process has; returns the seconds."""
        if self.options.get("resume") and is_complete(planned.path):
            return None
        given: dict[str, Any] = {"batches": self.batches} if planned.needs_data else {}
        if planned.needs_data and self.statistics is not None:
            is_begun = planned.name == self.measuring and root_of(planned.path).is_dir()  # and has kept statistics
            if (self.statistics / INDEX_NAME).is_file() and not is_begun:
                given = {"statistics": self.statistics}
            elif self.measuring is not None:
                given["keep_statistics"] = self.statistics
        self.num_passes += "batches" in given
        with ExitStack() as stack:
            shown = self.watching(stack, planned.name, planned.path)
            done = calibrate(
                self.artifact,
                weights=self.weights,
                recipe=planned.recipe,
                out=planned.path,
                **given,
                **shown,
                **self.options,
            )
        self.finished(planned.name, done)
        return done.seconds


def sweep(
    artifact: Artifact,
    *,
    weights: str | os.PathLike[str],
    recipes: Mapping[str, Recipe],
    out: str | os.PathLike[str],
    batches: Sequence[Mapping[str, torch.Tensor]] = (),
    statistics: str | os.PathLike[str] | None = None,
    keep_statistics: str | os.PathLike[str] | None = None,
    evaluate: Evaluate | None = None,
    propagate_error: bool = False,
    watching: Watching = lambda stack, name, path: {},
    finished: Finished = lambda name, done: None,
    **options: Any,
) -> Sweep:
    """Quantize a model by several recipes and write a checkpoint for each.

    Args:
        artifact: the compiled model.
        weights: directory of its checkpoint.
        recipes: by the name of the directory of its checkpoint.
        out: the directory that contains these.
        batches: the model's inputs.
        statistics: a directory of saved statistics, instead of batches.
        keep_statistics: where the statistics stay; None to remove them at the end.
        evaluate: returns the perplexity of a checkpoint; None to measure none.
        propagate_error: run each recipe over the batches by itself; later layers see the outputs of quantized ones.
        watching: returns further arguments of `runtime.calibrate` for a recipe, such as watchers.
        finished: called with the name and the result of each run.
        options: of `runtime.calibrate`; with `resume`, checkpoints that are complete are not written again.

    Raises:
        SeqbuildError: before anything runs for what can be known then; checkpoints that are complete stay.
    """
    start = time.perf_counter()
    require_one_process("a sweep")
    artifact, folder = require_artifact(artifact), as_path("out", out)
    used = None if statistics is None else as_path("statistics", statistics)
    kept = None if keep_statistics is None else as_path("keep_statistics", keep_statistics)
    _require_possible(propagate_error, used, kept, batches)
    is_resumed = bool(options.get("resume"))
    require_outside(folder, artifact.path, Path(weights))
    if kept is not None:
        require_outside(kept, artifact.path, Path(weights), *(folder / name for name in recipes))
        require_outside(folder, kept)
    if used is not None:
        StatisticsStore.open(used)
    planned = _checked(artifact, weights, recipes, folder, batches, options, has_data=bool(batches) or used is not None)
    needs_data = [one for one in planned if one.needs_data]
    if not propagate_error:
        for one in planned:
            require_no_drift(one.recipe, "--no-propagate-error", hint="remove target, or pass --propagate-error")
        require_shared([(one.recipe, one.needs) for one in needs_data], is_measured=used is not None)
    if kept is not None and not needs_data:
        raise UsageError("no recipe measures inputs, so there are no statistics to keep", hint="remove the option")
    place = None if propagate_error else used or kept or folder / STATISTICS
    folder.mkdir(parents=True, exist_ok=True)
    if used is None and place is not None:
        _require_own(place, batches, is_resumed=is_resumed, is_kept=kept is not None)
    runs = _Runs(
        artifact=artifact,
        weights=weights,
        batches=batches,
        statistics=place,
        measuring=needs_data[0].name if used is None and (kept is not None or len(needs_data) > 1) else None,
        options={**options, "propagate_error": propagate_error},
        watching=watching,
        finished=finished,
    )
    seconds = {one.name: runs.run(one) for one in planned}
    if used is None and kept is None:
        shutil.rmtree(folder / STATISTICS, ignore_errors=True)
    found = tuple(_measured(one, seconds[one.name], evaluate) for one in planned)
    original = None if evaluate is None else evaluate(weights)
    total = time.perf_counter() - start
    return Sweep(recipes=found, original=original, seconds=total, num_passes=runs.num_passes)


def _checked(
    artifact: Artifact,
    weights: Any,
    recipes: Mapping[str, Recipe],
    folder: Path,
    batches: Sequence[Any],
    options: Mapping[str, Any],
    *,
    has_data: bool,
) -> list[_PlannedRecipe]:
    """Check all recipes and their places before the first one runs."""
    is_resumed = bool(options.get("resume"))
    places = {name: folder / name for name in recipes}
    planned = [_planned(artifact, weights, name, recipes[name], places[name], options) for name in recipes]
    _require_places(folder, places, is_resumed=is_resumed)
    for one in planned if is_resumed else ():
        _require_same(one, artifact, batches)
    without = next((one for one in planned if one.needs_data and not has_data), None)
    if without is not None:
        raise DataError(f"{without.recipe.source} needs calibration data", hint="pass --data")
    return planned


def names_of(recipes: Sequence[str]) -> dict[str, str]:
    """Name each recipe after its file or preset; returns the recipes by name.

    Raises:
        UsageError: two have one name.
    """
    found: dict[str, str] = {}
    for given in recipes:
        name = _UNUSUAL.sub("-", Path(given).stem if given.lower().endswith((".yaml", ".yml")) else Path(given).name)
        name = name.strip(".-") or "recipe"
        if name in found:
            raise UsageError(f"the recipes {found[name]} and {given} have the same name {name!r}", hint="rename a file")
        found[name] = given
    return found


def _require_possible(propagate_error: bool, used: Path | None, kept: Path | None, batches: Sequence[Any]) -> None:
    if propagate_error and (used is not None or kept is not None):
        raise UsageError(
            "with error propagation, each recipe has statistics of its own",
            hint="remove --propagate-error, or --statistics and --keep-statistics",
        )
    if used is not None and kept is not None:
        raise UsageError("--keep-statistics and --statistics exclude each other", hint="pass one of them")
    if used is not None and batches:
        raise UsageError("--statistics replaces the calibration data", hint="pass --data or --statistics")


def _require_places(folder: Path, places: Mapping[str, Path], *, is_resumed: bool) -> None:
    if not places:
        raise UsageError("a sweep needs recipes", hint="pass --recipe at least once")
    for name, path in places.items():
        if name != Path(name).name or name.startswith("."):
            raise UsageError(f"{name!r} is not the name of a directory", hint="name each recipe by letters and digits")
        if path.exists() and not is_resumed and (not path.is_dir() or any(path.iterdir())):
            raise OutputError(f"output directory {path} is not empty", hint="choose another --out, or pass --resume")
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is not a directory", hint="choose another output")


def _require_same(planned: _PlannedRecipe, artifact: Artifact, batches: Sequence[Any]) -> None:
    """Reject a complete checkpoint that a resumed sweep would write otherwise."""
    if not is_complete(planned.path):
        return
    record = read_record(planned.path)
    text = complete_recipe(planned.recipe)
    differing = {
        "recipe": record.recipe.sha256 != hashlib.sha256(text.encode()).hexdigest(),
        "artifact": record.artifact != artifact_facts(artifact.manifest),
        "data": record.data is not None and bool(batches) and record.data.inputs_sha256 != data_digest(batches),
    }
    names = [name for name, is_different in differing.items() if is_different]
    if names:
        raise OutputError(
            f"{planned.path} was written with another {' and another '.join(names)} than this sweep has",
            hint="remove it, or choose another --out",
        )


def _require_own(place: Path, batches: Sequence[Any], *, is_resumed: bool, is_kept: bool) -> None:
    """Reject or remove statistics that another sweep has left."""
    if not is_resumed:
        if is_kept:
            require_free(place)
        else:
            shutil.rmtree(place, ignore_errors=True)
    elif (place / INDEX_NAME).is_file() and StatisticsStore.open(place).identity.get(DATA) != data_digest(batches):
        raise UsageError(
            f"the statistics in {place} are of other data than this sweep has",
            hint="pass the data that the sweep was started with, or start it again in another directory",
        )


def _planned(
    artifact: Artifact, weights: Any, name: str, recipe: Recipe, path: Path, options: Mapping[str, Any]
) -> _PlannedRecipe:
    """Check that a recipe fits the model, before the first one runs."""
    from runtime.checkpoint.dequantize import as_weights, open_checkpoint

    checkpoint = open_checkpoint(as_weights(weights), plain=True)
    dtype = artifact.run_dtype(as_dtype(options.get("dtype")))
    recipe = require_recipe(recipe)
    if recipe.search is not None:
        what = f"the recipe {name!r} leaves the choice of schemes to a search"
        raise RecipeError(what, hint="run the command search, and sweep the recipe that it writes")
    prepared = prepare(artifact, checkpoint, recipe, dtype, as_device(options.get("device", "cpu")))
    needs = RecipeNeeds(prepared.artifact, prepared.source, recipe, prepared.jobs)
    parameters = prepared.artifact.manifest.parameters
    return _PlannedRecipe(
        name=name,
        recipe=recipe,
        path=path,
        num_weights=sum(math.prod(parameters[f"{module}.weight"].shape) for module in prepared.jobs),
        needs_data=needs.measures(list(prepared.jobs)) or needs.key_values is not None,
        needs=needs,
    )


def _measured(planned: _PlannedRecipe, seconds: float | None, evaluate: Evaluate | None) -> SweptRecipe:
    """Read the results of a recipe from the record in its checkpoint, and evaluate it."""
    record = read_record(planned.path)
    error, loss = total_error(record.modules)
    return SweptRecipe(
        name=planned.name,
        path=planned.path,
        num_bytes=record.output.bytes,
        bits=8 * sum(module.num_bytes for module in record.modules) / max(planned.num_weights, 1),
        error=error,
        loss=loss,
        perplexity=None if evaluate is None else evaluate(planned.path),
        seconds=seconds,
    )


def total_error(modules: Sequence[ModuleFacts]) -> tuple[float, float]:
    """Return the relative error of all modules together, and the sum of their losses."""
    known = [(one.error, one.loss) for one in modules if one.error is not None and one.loss is not None]
    loss = sum(loss for _, loss in known)
    size = sum(loss / error**2 for error, loss in known if error > 0)
    return math.sqrt(loss / size) if size > 0 else 0.0, loss


def sweep_lines(found: Sweep, width: int | None = None) -> Iterator[str]:
    """Yield the table of all recipes, for a terminal of this width or without a limit."""
    columns = [Column(heading="recipe", is_flexible=True, least=12)]
    columns += [Column(heading=name, is_number=True) for name in ("size", "bits", "error", "loss")]
    has_perplexity = any(one.perplexity is not None for one in found.recipes)
    columns += [Column(heading=name, is_number=True) for name in (["perplexity"] if has_perplexity else [])]
    columns += [Column(heading="seconds", is_number=True)]
    yield from table_lines(columns, [cells_of(one, has_perplexity) for one in found.recipes], width)
    if found.original is not None:
        yield f"perplexity of the original model: {found.original:.4f}"
    passes = "no pass over the data" if not found.num_passes else f"the data was passed {found.num_passes} times"
    yield f"{len(found.recipes)} recipes in {found.seconds:.1f} s; {passes.replace('1 times', 'once')}"


def cells_of(one: SweptRecipe, has_perplexity: bool) -> list[str]:
    """The cells of a recipe's row."""
    cells = [one.name, human_bytes(one.num_bytes), f"{one.bits:.2f}", f"{one.error:.4f}", f"{one.loss:.4g}"]
    if has_perplexity:
        cells.append("-" if one.perplexity is None else f"{one.perplexity:.4f}")
    return [*cells, "-" if one.seconds is None else f"{one.seconds:.1f}"]
