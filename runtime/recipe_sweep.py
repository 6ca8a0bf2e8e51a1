"""Quantize a model by several recipes, and compare the results.

Without error propagation, the first recipe's run measures the model once and saves the statistics of all inputs; the
others are solved from them without a forward. With error propagation, what later layers see depends on the recipe, so
each recipe runs over the batches by itself.
"""

from __future__ import annotations

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
from runtime.console import human_bytes
from runtime.errors import UsageError
from runtime.experts.split import require_artifact
from runtime.host.publish import disk_errors
from runtime.planned_recipes import (
    STATISTICS,
    PlannedRecipe,
    own_statistics,
    planned_recipes,
    require_possible,
    require_shareable,
)
from runtime.provenance.record import read_record
from runtime.recipe.recipe import Recipe
from runtime.saved_statistics.records import INDEX_NAME
from runtime.streaming.output_place import is_complete, root_of
from runtime.terminal import Column, table_lines
from runtime.workers.start import require_one_process

if TYPE_CHECKING:
    import torch

    from runtime.chain import Artifact
    from runtime.provenance.record import ModuleFacts

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

    def run(self, planned: PlannedRecipe) -> float | None:
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
    require_possible(propagate_error, used, kept, batches)
    planned = planned_recipes(artifact, weights, recipes, folder, batches, used, options)
    require_shareable(planned, kept, used, propagate_error=propagate_error, outside=(artifact.path, Path(weights)))
    own = None if propagate_error or used else own_statistics(folder, kept, planned, batches, options)
    _make(folder)
    runs = _Runs(
        artifact=artifact,
        weights=weights,
        batches=batches,
        statistics=used or own,
        measuring=None if own is None else _measuring(planned, is_kept=kept is not None),
        options={**options, "propagate_error": propagate_error},
        watching=watching,
        finished=finished,
    )
    seconds = {one.name: runs.run(one) for one in planned}
    if used is None and kept is None:
        shutil.rmtree(folder / STATISTICS, ignore_errors=True)
    found = tuple(_measured(one, seconds[one.name], evaluate) for one in planned)
    original = None if evaluate is None else evaluate(weights)
    return Sweep(recipes=found, original=original, seconds=time.perf_counter() - start, num_passes=runs.num_passes)


def _make(folder: Path) -> None:
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)


def _measuring(planned: Sequence[PlannedRecipe], *, is_kept: bool) -> str | None:
    """Return the recipe whose run saves the statistics; None if only one recipe needs them, and nothing is kept."""
    names = [one.name for one in planned if one.needs_data]
    return names[0] if names and (is_kept or len(names) > 1) else None


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
            hint = "pass each recipe once" if found[name] == given else "rename a file"
            raise UsageError(f"the recipes {found[name]} and {given} have the same name {name!r}", hint=hint)
        found[name] = given
    return found


def _measured(planned: PlannedRecipe, seconds: float | None, evaluate: Evaluate | None) -> SweptRecipe:
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
    count = len(found.recipes)
    yield f"{count} recipe{'s' if count != 1 else ''} in {found.seconds:.1f} s; {passes.replace('1 times', 'once')}"


def cells_of(one: SweptRecipe, has_perplexity: bool) -> list[str]:
    """The cells of a recipe's row."""
    cells = [one.name, human_bytes(one.num_bytes), f"{one.bits:.2f}", f"{one.error:.4f}", f"{one.loss:.4g}"]
    if has_perplexity:
        cells.append("-" if one.perplexity is None else f"{one.perplexity:.4f}")
    return [*cells, "-" if one.seconds is None else f"{one.seconds:.1f}"]
