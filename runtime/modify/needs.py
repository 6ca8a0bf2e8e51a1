"""What a recipe measures and rescales, module by module: one answer for the run, its plan, and the doctor.

It follows from the artifact and the recipe alone. A checkpoint only says besides which parameters are tensors of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from runtime.errors import RecipeError
from runtime.key_values import KeyValues
from runtime.modify.mappings import Rescaling, rescalings
from runtime.presets import averaging_of
from runtime.schemes import input_parts
from runtime.statistics import AVERAGING_CONSTANT, Needs

if TYPE_CHECKING:
    from runtime.artifact import Artifact
    from runtime.manifest import SubgraphEntry
    from runtime.recipe import Assignment, Recipe
    from runtime.recipe_transforms import Transform
    from runtime.weights import Weights


class RecipeNeeds:
    """What a recipe asks of a model's modules, before any of them is loaded.

    Args:
        artifact: the compiled model.
        source: the checkpoint; None where there is none yet, and the manifest says what it will hold.
        recipe: in order: modifiers that rescale, then those that round.
        jobs: what is done to each module.

    Attributes:
        rescalings: each modifier that rescales, with the groups that it does it to.
        key_values: the cache whose keys and values are measured, or None.
        remarks: what a user should know before it begins, a line each.

    Raises:
        RecipeError: when a modifier finds nothing to do.
    """

    def __init__(
        self, artifact: Artifact, source: Weights | None, recipe: Recipe, jobs: Mapping[str, Assignment]
    ) -> None:
        self.jobs = jobs
        self.remarks: list[str] = []
        self.rescalings: list[tuple[Transform, list[Rescaling]]] = []
        for transform in recipe.transforms:
            found, remarks = rescalings(artifact, source, jobs, transform, recipe.source)
            self.rescalings.append((transform, found))
            self.remarks += remarks
        if recipe.transforms:
            _require_usual_averages(jobs, recipe.source)
        self.key_values = None
        if recipe.cache is not None:
            self.key_values = KeyValues.of(artifact.manifest, recipe.cache, has_queries=bool(recipe.attention))

    def measures(self, names: Sequence[str]) -> bool:
        """Whether batches must run for a step that quantizes these modules."""
        return any(self.of(names).values())

    def measures_cache(self, entry: SubgraphEntry) -> bool:
        """Whether batches must run through a subgraph for the scales of its key-value cache."""
        return bool(self.attentions(entry))

    def of(self, names: Sequence[str]) -> dict[str, Needs]:
        """What is measured of the inputs of each module of a step, those included that are rescaled alone."""
        needs = {name: _needs_of(self.jobs[name]) for name in names}
        for transform, rescaling in self.rescaled(names):
            kind = Needs(hessian=transform.algorithm == "awq", channels=True)
            for name in rescaling.group.modules:
                needs[name] = needs.get(name, Needs()) | kind
        return needs

    def rescaled(self, names: Sequence[str]) -> list[tuple[Transform, Rescaling]]:
        """What is rescaled with a step that quantizes these modules, in order."""
        owned = dict.fromkeys(names)
        return [
            (transform, rescaling)
            for transform, found in self.rescalings
            for rescaling in found
            if next((name for name in rescaling.group.modules if name in self.jobs), None) in owned
        ]

    def attentions(self, entry: SubgraphEntry) -> tuple[str, ...]:
        """The attention modules of a subgraph whose keys and values are rounded."""
        return self.key_values.of_subgraph(entry) if self.key_values is not None else ()


def _require_usual_averages(jobs: Mapping[str, Assignment], source: str) -> None:
    """What is rescaled has its features averaged one by one while it is measured, before anything else is known."""
    for name, job in jobs.items():
        inputs = job.scheme.input_activations
        if input_parts(job.scheme) and averaging_of(inputs) not in (None, AVERAGING_CONSTANT):
            raise RecipeError(
                f"{source}: {name}: the averaging_constant of inputs is not offered beside modifiers that rescale them",
                hint="leave it out, or use the observer static_minmax",
            )


def _needs_of(job: Assignment) -> Needs:
    is_weighed = job.scheme.weights.observer == "imatrix_mse"
    is_measured = job.algorithm == "gptq" or is_weighed or job.clip
    return Needs(hessian=is_measured, channels=bool(input_parts(job.scheme)))
