"""Make the plain recipe of a run: search if its recipe asks for it, once for a run and those that resume it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.checkpoint.dequantize import open_checkpoint
from runtime.errors import UsageError
from runtime.host.publish import flush_one
from runtime.host.regular_files import read_text
from runtime.recipe.recipe import Recipe
from runtime.search.find import find_bits
from runtime.search.options import BitSearch
from runtime.search.plain_recipe import plain_text
from runtime.status import doing
from runtime.streaming.identity import run_digest, run_identity
from runtime.streaming.output_place import root_of

if TYPE_CHECKING:
    from runtime.calibration_request import CalibrationRequest

_NAME = "choice.json"  # in the directory of a run


def plain_recipe_of(run: CalibrationRequest) -> Recipe:
    """Return the recipe of a run, or if it asks for a search the plain recipe that the search finds.

    A resumed run takes the choice that the interrupted one has left, if it has searched for the same.

    Raises:
        UsageError: for several workers.
        SeqbuildError: as `find_bits`.
    """
    recipe, options = run.recipe, run.options
    if recipe.search is None:
        return recipe
    if options.statistics is not None:
        raise UsageError(
            "AutoBitsModifier needs data for gradients, and a run from saved statistics has none",
            hint=f"run search --statistics {options.statistics} first, and calibrate with the recipe that it writes",
        )
    if run.workers.size > 1:
        raise UsageError(
            f"AutoBitsModifier chooses schemes in one process, and this run has {run.workers.size}",
            hint="run the command search in one process, and calibrate with the recipe that it writes",
        )
    identity = run_identity(
        artifact=run.artifact,
        checkpoint=open_checkpoint(run.weights, plain=True),
        recipe=recipe,
        batches=run.batches,
        options={"dtype": run.artifact.run_dtype(options.dtype), "device": options.device.type},
    )
    digest = run_digest(identity)
    targets = _left_by(root_of(run.out) / _NAME, digest, recipe) if options.resume else None
    if targets is None:
        search = BitSearch(
            artifact=run.artifact,
            weights=run.weights,
            batches=run.batches,
            recipe=recipe,
            device=options.device,
            dtype=options.dtype,
            activation_memory=options.activation_memory,
            progress=lambda line: doing(f"choosing schemes: {line}"),
        )
        found = find_bits(search)
        targets = {name: list(own) for name, own in found.targets.items()}
    made = Recipe.from_text(plain_text(recipe, recipe.search, targets), recipe.source)
    return replace(made, choice=json.dumps({"search": digest, "targets": targets}, indent=1))


def keep_choice(root: Path, recipe: Recipe) -> None:
    """Write the choice of a search into the directory of a run, for a process that resumes it."""
    if recipe.choice and not (root / _NAME).exists():
        (root / _NAME).write_text(recipe.choice, encoding="utf-8")
        flush_one(root / _NAME)


def _left_by(path: Path, digest: str, recipe: Recipe) -> dict[str, list[str]] | None:
    """Read the choice of an interrupted run; None if there is none, or another search made it."""
    try:
        kept = json.loads(read_text(path))
        targets = kept["targets"] if kept["search"] == digest else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    assert recipe.search is not None, "only searches are kept"
    known = recipe.search.candidates
    is_sound = isinstance(targets, dict) and all(
        name in known and isinstance(own, list) and all(isinstance(target, str) for target in own)
        for name, own in targets.items()
    )
    return targets if is_sound else None
