"""Check that a recipe fits a model and its weights, before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from runtime.quantize.assignments import least_bytes
from runtime.quantize.needs import RecipeNeeds
from runtime.quantize.preparation import prepare

if TYPE_CHECKING:
    import torch

    from runtime.chain import Artifact
    from runtime.checkpoint.reader import Checkpoint
    from runtime.recipe.recipe import Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class Readiness:
    """A recipe that fits a model and its weights.

    Attributes:
        num_modules: number of modules that will be quantized.
        needs_data: whether the recipe measures anything.
        weights_bytes: the size of the weights.
        least_bytes: a lower bound of the size of the result.
    """

    num_modules: int
    needs_data: bool
    weights_bytes: int
    least_bytes: int


def require_fitting(artifact: Artifact, checkpoint: Checkpoint, recipe: Recipe, dtype: torch.dtype) -> Readiness:
    """Prepare a run and discard it.

    Raises:
        RecipeError, WeightsError: as for `prepare`.
    """
    prepared = prepare(artifact, checkpoint, recipe, dtype)
    source, jobs = prepared.weights, prepared.jobs
    needs = RecipeNeeds(prepared.artifact, source, recipe, jobs)
    return Readiness(
        num_modules=len(jobs),
        needs_data=needs.measures(list(jobs)) or recipe.cache is not None,
        weights_bytes=source.checkpoint.total_bytes,
        least_bytes=least_bytes(source, jobs),
    )
