"""Check the recipes of a sweep, and where its outputs and statistics go, before the first recipe runs."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.calibration_request import require_apart, require_no_drift
from runtime.errors import DataError, OutputError, RecipeError, UsageError
from runtime.host.devices import as_device, as_dtype
from runtime.host.publish import require_free, require_outside, require_writable
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
from runtime.streaming.output_place import is_complete

if TYPE_CHECKING:
    from runtime.chain import Artifact

STATISTICS = ".statistics"  # in the directory of the outputs, until all recipes are solved


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedRecipe:
    """A recipe that fits the model."""

    name: str
    recipe: Recipe
    path: Path
    num_weights: int
    needs_data: bool
    needs: RecipeNeeds


def planned_recipes(
    artifact: Artifact,
    weights: Any,
    recipes: Mapping[str, Recipe],
    folder: Path,
    batches: Sequence[Any],
    statistics: Path | None,
    options: Mapping[str, Any],
) -> list[PlannedRecipe]:
    """Check all recipes, their places and the given statistics before the first one runs."""
    require_outside(folder, artifact.path, Path(weights))
    if statistics is not None:
        StatisticsStore.open(statistics)
    has_data = bool(batches) or statistics is not None
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


def require_possible(propagate_error: bool, used: Path | None, kept: Path | None, batches: Sequence[Any]) -> None:
    """Reject options that exclude each other; `used` and `kept` are directories of statistics."""
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
    require_writable(next(iter(places.values())))


def _require_same(planned: PlannedRecipe, artifact: Artifact, batches: Sequence[Any]) -> None:
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


def require_shareable(
    planned: Sequence[PlannedRecipe],
    kept: Path | None,
    used: Path | None,
    *,
    propagate_error: bool,
    outside: Sequence[Path],
) -> None:
    """Reject recipes that cannot be solved from common statistics, and a place for these in or around another one."""
    if kept is not None:
        require_outside(kept, *outside)
        for one in planned:
            require_apart(kept, one.path)
    if propagate_error:
        return
    for one in planned:
        require_no_drift(one.recipe, "--no-propagate-error", hint="remove target, or pass --propagate-error")
    needs_data = [one for one in planned if one.needs_data]
    require_shared([(one.recipe, one.needs) for one in needs_data], is_measured=used is not None)


def own_statistics(
    folder: Path,
    kept: Path | None,
    planned: Sequence[PlannedRecipe],
    batches: Sequence[Any],
    options: Mapping[str, Any],
) -> Path:
    """Return where the sweep saves its statistics; those that another sweep has left are rejected or removed."""
    place = kept or folder / STATISTICS
    if kept is not None and not any(one.needs_data for one in planned):
        raise UsageError("no recipe measures inputs, so there are no statistics to keep", hint="remove the option")
    if not options.get("resume"):
        if kept is not None:
            require_free(place)
        else:
            shutil.rmtree(place, ignore_errors=True)
    elif (place / INDEX_NAME).is_file() and StatisticsStore.open(place).identity.get(DATA) != data_digest(batches):
        raise UsageError(
            f"the statistics in {place} are of other data than this sweep has",
            hint="pass the data that the sweep was started with, or start it again in another directory",
        )
    return place


def _planned(
    artifact: Artifact, weights: Any, name: str, recipe: Recipe, path: Path, options: Mapping[str, Any]
) -> PlannedRecipe:
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
    return PlannedRecipe(
        name=name,
        recipe=recipe,
        path=path,
        num_weights=sum(math.prod(parameters[f"{module}.weight"].shape) for module in prepared.jobs),
        needs_data=needs.measures(list(prepared.jobs)) or needs.key_values is not None,
        needs=needs,
    )
