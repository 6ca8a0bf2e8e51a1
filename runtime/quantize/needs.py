"""What a recipe measures and rescales, module by module: one answer for the run, its plan, and the doctor.

It follows from the artifact and the recipe alone. A checkpoint only says besides which parameters are tensors of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from runtime.errors import RecipeError
from runtime.experts.split import expert_of
from runtime.formats.compressed import input_parts
from runtime.formats.key_values import KeyValues
from runtime.formats.presets import AVERAGING_CONSTANT, averaging_of
from runtime.quantize.mappings import Rescaling, rescalings
from runtime.quantize.statistics import Needs

if TYPE_CHECKING:
    from runtime.artifact.manifest import ScaleGroup, SubgraphEntry
    from runtime.chain import Artifact
    from runtime.recipe.modifiers import Transform
    from runtime.recipe.recipe import Assignment, Recipe
    from runtime.weights.parameters import Weights


class RecipeNeeds:
    """What a recipe asks of a model's modules, before any of them is loaded.

    Args:
        artifact: the compiled model.
        source: the checkpoint; None where there is none yet, and the manifest says what it will hold.
        recipe: in order: modifiers that rescale, then those that round.
        jobs: what is done to each module.

    Attributes:
        rescalings: each modifier that rescales, with the groups that it does it to.
        experts: for each module of an expert that is apart the mixture's name and the expert's number.
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
        self.experts = expert_of(artifact)
        self.rescalings: list[tuple[Transform, list[Rescaling]]] = []
        for transform in recipe.transforms:
            found, remarks = rescalings(artifact, source, jobs, transform, recipe.source)
            self.rescalings.append((transform, found))
            self.remarks += remarks
        self._by_owner: dict[str, list[tuple[int, Transform, Rescaling]]] | None = None
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

    def of(self, names: Sequence[str], *, all_tokens: bool = True) -> dict[str, Needs]:
        """What is measured of the inputs of each module of a step, those included that are rescaled alone.

        Args:
            names: the modules that are quantized with the step.
            all_tokens: whether experts are measured on all tokens, so that one of them can stand for those that read
                the same tensor; otherwise it is measured besides (`witnesses`).
        """
        needs = {name: _needs_of(self.jobs[name]) for name in names}
        for transform, rescaling in self.rescaled(names):
            for name in self._measured(rescaling.group, with_witness=all_tokens):
                needs[name] = needs.get(name, Needs()) | _needs_to_rescale(transform)
        return needs

    def witnesses(self, names: Sequence[str]) -> dict[str, Needs]:
        """Modules of experts that are measured on all tokens, for all modules that read the same tensor."""
        needs: dict[str, Needs] = {}
        for transform, rescaling in self.rescaled(names):
            for name in self._measured(rescaling.group, with_witness=True):
                if name in self.experts and not self.is_inside(rescaling):
                    needs[name] = needs.get(name, Needs()) | _needs_to_rescale(transform)
        return needs

    def rescaled_modules(self) -> list[str]:
        """All modules whose inputs are rescaled, quantized or not."""
        return list(dict.fromkeys(name for _, own in self.rescalings for entry in own for name in entry.group.modules))

    def is_inside(self, rescaling: Rescaling) -> bool:
        """Whether all of a rescaling lies inside of one expert."""
        return rescaling.group.producer.rpartition(".")[0] in self.experts

    def _measured(self, group: ScaleGroup, *, with_witness: bool) -> list[str]:
        """The modules of a group whose inputs are measured for it. A mixture's experts are many and see one tensor: the
        first is enough, and none is needed where another module reads it as well.
        """
        others = [name for name in group.modules if name not in self.experts]
        if others or group.producer.rpartition(".")[0] in self.experts:
            return others or list(group.modules)
        return list(group.modules[:1]) if with_witness else []

    def rescaled(self, names: Sequence[str]) -> list[tuple[Transform, Rescaling]]:
        """What is rescaled with a step that quantizes these modules, in order."""
        if self._by_owner is None:
            self._by_owner = {}
            order = 0
            for transform, found in self.rescalings:
                for rescaling in found:
                    owner = next((name for name in rescaling.group.modules if name in self.jobs), None)
                    if owner is not None:
                        self._by_owner.setdefault(owner, []).append((order, transform, rescaling))
                        order += 1
        own = [entry for name in dict.fromkeys(names) for entry in self._by_owner.get(name, ())]
        return [(transform, rescaling) for _, transform, rescaling in sorted(own, key=lambda entry: entry[0])]

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


def _needs_to_rescale(transform: Transform) -> Needs:
    return Needs(hessian=transform.algorithm == "awq", channels=True)


def _needs_of(job: Assignment) -> Needs:
    is_weighed = job.scheme.weights.observer == "imatrix_mse"
    is_measured = job.algorithm == "gptq" or is_weighed or job.clip
    return Needs(hessian=is_measured, channels=bool(input_parts(job.scheme)))
