"""The checked arguments of a calibration."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from runtime.arguments import as_path, require_kind, require_methods
from runtime.checkpoint.dequantize import as_weights
from runtime.checkpoint.reader import Checkpoint
from runtime.data.checked_batches import model_batches
from runtime.errors import OutputError, RecipeError, UsageError
from runtime.experts.split import require_artifact
from runtime.host.memory import OWN_THREADS, require_threads
from runtime.host.publish import require_outside
from runtime.provenance.origin import RunOrigin
from runtime.recipe.recipe import Recipe, require_recipe
from runtime.streaming.options import RunOptions
from runtime.streaming.work import StepModifier

if TYPE_CHECKING:
    from runtime.chain import Artifact
    from runtime.planning.machine import Machine
    from runtime.workers.group import Workers


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationRequest:
    """The checked arguments of `runtime.calibrate`."""

    artifact: Artifact
    weights: Path | Checkpoint
    recipe: Recipe
    batches: Sequence[Mapping[str, torch.Tensor]]
    out: Path
    own_modifiers: Sequence[StepModifier]
    origin: RunOrigin
    machine: Machine | None
    options: RunOptions
    workers: Workers

    def facts(self) -> dict[str, Any]:
        """What runs, as facts of an event."""
        source, recipe = self.weights, self.recipe
        return {
            "artifact": str(self.artifact.path),
            "weights": str(source.directory if isinstance(source, Checkpoint) else source),
            "recipe": {"name": recipe.source, "text": recipe.text},
            "out": str(self.out),
            "device": str(self.options.device),
            "dtype": str(self.artifact.run_dtype(self.options.dtype)).removeprefix("torch."),
        }


def checked_request(
    artifact: Artifact,
    weights: str | os.PathLike[str] | Checkpoint,
    recipe: Recipe,
    batches: Sequence[Mapping[str, torch.Tensor]],
    out: str | os.PathLike[str],
    own_modifiers: Sequence[StepModifier],
    origin: RunOrigin,
    machine: Machine | None,
    options: RunOptions,
    workers: Workers,
) -> CalibrationRequest:
    """Check the arguments of a calibration.

    Raises:
        SeqbuildError: naming the one that is invalid.
    """
    if own_modifiers and workers.size > 1:
        hint = "run without torchrun, or with one process"
        raise UsageError(f"own_modifiers see the batches of one worker, and this run has {workers.size}", hint=hint)
    artifact, recipe = require_artifact(artifact), require_recipe(recipe)
    path, source = as_path("out", out), as_weights(weights)
    require_methods("own_modifiers", own_modifiers, "measures")
    require_kind("origin", origin, RunOrigin, "it must be a RunOrigin of runtime.provenance.origin")
    require_threads(torch.get_num_threads() - 1 + OWN_THREADS)
    checked = model_batches(artifact, batches)
    read = [artifact.path, source.directory if isinstance(source, Checkpoint) else source]
    options = _with_statistics(options, path, read, has_batches=bool(checked), has_modifiers=bool(own_modifiers))
    require_outside(path, *read)
    if not options.propagate_error:
        option = "--no-propagate-error" if options.statistics is None else "--statistics"
        require_no_drift(recipe, option, hint=f"remove target, or {option}")
    return CalibrationRequest(
        artifact=artifact,
        weights=source,
        recipe=recipe,
        batches=checked,
        out=path,
        own_modifiers=own_modifiers,
        origin=origin,
        options=options,
        workers=workers,
        machine=machine,
    )


def require_no_drift(recipe: Recipe, option: str, hint: str) -> None:
    """Reject error-aware targets in a run in which no error reaches a later layer.

    Raises:
        RecipeError: naming the modifier's line.
    """
    from runtime.recipe.modifiers import GPTQModifier

    for modifier in recipe.modifiers:
        if isinstance(modifier, GPTQModifier) and modifier.is_error_aware:
            raise RecipeError(
                f"{recipe.source}:{modifier.line}: target: original makes up for the errors of earlier layers, and no "
                f"layer sees any with {option}",
                hint=hint,
            )


def require_apart(kept: Path, out: Path) -> None:
    """Require that neither the directory of new statistics nor that of the output is in the other one.

    Raises:
        OutputError: naming both.
    """
    places = {"statistics": kept, "output": out}
    for (inner, path), (outer, other) in (places.items(), reversed(places.items())):
        if path.resolve().is_relative_to(other.resolve()):
            relation = "the same as" if path.resolve() == other.resolve() else "inside"
            raise OutputError(
                f"the {inner} directory {path} is {relation} the {outer} directory {other}",
                hint="choose another place for one of them",
            )


def _with_statistics(
    options: RunOptions, out: Path, read: Sequence[Path], *, has_batches: bool, has_modifiers: bool
) -> RunOptions:
    """Check the options of saved statistics, and return all options with what follows from them."""
    kept, used = options.keep_statistics, options.statistics
    if kept is None and used is None:
        return options
    name = "--keep-statistics" if used is None else "--statistics"
    if kept is not None and used is not None:
        raise UsageError("--keep-statistics and --statistics exclude each other", hint="pass one of them")
    if has_modifiers:
        raise UsageError(f"own_modifiers change the model that {name} describes", hint="remove own_modifiers")
    if used is not None:
        if has_batches:
            raise UsageError("--statistics replaces the calibration data", hint="pass --data or --statistics")
        require_outside(out, used)
        return replace(options, propagate_error=False)
    assert kept is not None, "one of them was given"
    if options.propagate_error:
        raise UsageError(
            "--keep-statistics saves statistics of the original model, and later layers of this run would see the "
            "outputs of quantized ones",
            hint="pass --no-propagate-error as well",
        )
    if options.parts:
        raise UsageError("--keep-statistics needs a directory that all workers share", hint="remove --parts")
    if not has_batches:
        raise UsageError("--keep-statistics needs calibration data", hint="pass --data")
    require_outside(kept, *read)
    require_apart(kept, out)
    return options
