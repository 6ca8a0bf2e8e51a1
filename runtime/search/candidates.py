"""The candidate schemes of a search, each with its assignments of modules."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from runtime.errors import RecipeError
from runtime.quantize.assignments import assign_jobs
from runtime.recipe.recipe import Assignment, Recipe

if TYPE_CHECKING:
    from torch import nn

    from runtime.chain import Artifact
    from runtime.weights.origins import ParameterSource


@dataclass(kw_only=True)
class CandidateJobs:
    """Assigns the scheme of every candidate to the modules that are searched.

    Attributes:
        recipes: a recipe that quantizes all modules with one candidate, by the name of the candidate.
        jobs: the assignments of each candidate, when a model was prepared; none for `unquantized`.
    """

    recipes: dict[str, Recipe]
    jobs: dict[str, dict[str, Assignment]] = field(default_factory=dict)

    def __call__(
        self, artifact: Artifact, model: nn.Module, source: ParameterSource, recipe: Recipe
    ) -> tuple[dict[str, Assignment], list[str]]:
        """Assign all candidates, and return the assignments of the first one; see `runtime.quantize.preparation`."""
        found = {}
        for name, own in self.recipes.items():
            try:
                found[name] = assign_jobs(artifact, model, source, own)
            except RecipeError as error:
                error.add_note(f"while assigning the candidate {name}")
                raise
        self.jobs = {name: jobs for name, (jobs, _) in found.items()}
        return next(iter(found.values()))
