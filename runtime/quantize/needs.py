"""Determine what a recipe measures and rescales, module by module; used by the run, its plan and the doctor.

This follows from the artifact and the recipe. A checkpoint only adds which parameters it stores unchanged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from runtime.errors import RecipeError
from runtime.experts.split import expert_of
from runtime.formats.compressed import input_parts
from runtime.formats.key_values import KeyValues
from runtime.formats.presets import AVERAGING_CONSTANT, averaging_of
from runtime.quantize.mappings import Rescaling, rescalings
from runtime.quantize.statistics import Needs

SOLVED_FROM_STATISTICS = ("rtn", "gptq")  # algorithms that never run the model

if TYPE_CHECKING:
    from runtime.artifact.manifest import ScaleGroup, SubgraphEntry
    from runtime.chain import Artifact
    from runtime.recipe.recipe import Assignment, Recipe
    from runtime.recipe.rescaling_modifiers import Transform
    from runtime.weights.origins import ParameterSource


class RecipeNeeds:
    """The measurements and rescalings that a recipe requires; `source` has the origins of the parameters.

    Attributes:
        rescalings: each modifier that rescales, with the groups that it rescales.
        experts: for each module of a split expert, the mixture's name and the expert's number.
        mixture_sizes: the number of experts of each mixture.
        key_values: the cache whose keys and values are measured, or None.
        remarks: messages to print before the run.

    Raises:
        RecipeError: when a modifier finds nothing to do.
    """

    def __init__(
        self, artifact: Artifact, source: ParameterSource, recipe: Recipe, jobs: Mapping[str, Assignment]
    ) -> None:
        self.jobs = jobs
        self.remarks: list[str] = []
        self.experts = expert_of(artifact)
        self.mixture_sizes = Counter(mixture for mixture, _ in dict.fromkeys(self.experts.values()))
        self.rescalings: list[tuple[Transform, list[Rescaling]]] = []
        for transform in recipe.transforms:
            found, remarks = rescalings(artifact, source, jobs, transform, recipe.source)
            self.rescalings.append((transform, found))
            self.remarks += remarks
        self._by_owner: dict[str, list[tuple[int, Transform, Rescaling]]] | None = None
        if recipe.transforms:
            _require_default_averages(jobs, recipe.source)
        self.key_values: KeyValues | None = None
        rotations = source.transforms.attention
        if recipe.cache is not None or rotations:
            self.key_values = KeyValues.of(
                artifact.manifest, recipe.cache, has_queries=bool(recipe.attention), rotations=rotations
            )

    def require_no_forward(self, source: str) -> None:
        """Reject a recipe that cannot be solved from saved statistics alone.

        Raises:
            RecipeError: naming what needs a forward.
        """
        hint = "pass --data instead of --statistics"
        for name, job in self.jobs.items():
            if job.algorithm not in SOLVED_FROM_STATISTICS:
                what = f"{source}: {job.algorithm} of {name} runs the model's layers"
                raise RecipeError(f"{what}, so it cannot start from saved statistics", hint=hint)
        cached = tuple(f"{module}." for module in (self.key_values.all_modules() if self.key_values else ()))
        for transform, found in self.rescalings:
            for rescaling in found:
                producer = rescaling.group.producer
                if rescaling.is_unproven:
                    what = (
                        f"{source}:{transform.line}: the mapping of {producer.removesuffix('.weight')} is checked by "
                    )
                    raise RecipeError(f"{what}running the model, which saved statistics do not allow", hint=hint)
                if producer.startswith(cached) and cached:
                    what = f"{source}:{transform.line}: {transform.name} rescales {producer.removesuffix('.weight')}"
                    consequence = "whose outputs enter the quantized key-value cache and must be measured again"
                    raise RecipeError(f"{what}, {consequence}", hint=hint)

    def measures(self, names: Sequence[str]) -> bool:
        """Whether batches must run for a step that quantizes these modules."""
        return any(self.of(names).values())

    def compares(self, names: Sequence[str]) -> bool:
        """Whether inputs or outputs of these modules or their block are compared with those of the original model."""
        return any(self.jobs[name].is_error_aware or self.jobs[name].is_tuned for name in names)

    def measures_cache(self, entry: SubgraphEntry) -> bool:
        """Whether batches must run through a subgraph for the scales of its key-value cache."""
        return bool(self.attentions(entry))

    def of(self, names: Sequence[str], *, all_tokens: bool = True) -> dict[str, Needs]:
        """Return what is measured of the inputs of each module of a step, including modules that are only rescaled.

        Args:
            names: the modules that are quantized with the step.
            all_tokens: whether experts are measured on all tokens, so that one of them can represent all that read the
                same tensor; otherwise the representative is measured separately (`representatives`).
        """
        needs = {name: _needs_of(self.jobs[name]) for name in names}
        for transform, rescaling in self.rescaled(names):
            for name in self._measured(rescaling.group, with_expert=all_tokens):
                needs[name] = needs.get(name, Needs()) | _needs_to_rescale(transform)
        return needs

    def representatives(self, names: Sequence[str]) -> dict[str, Needs]:
        """Return the expert modules that are measured on all tokens for all modules that read the same tensor."""
        needs: dict[str, Needs] = {}
        for transform, rescaling in self.rescaled(names):
            for name in self._measured(rescaling.group, with_expert=True):
                if name in self.experts and not self.is_inside(rescaling):
                    needs[name] = needs.get(name, Needs()) | _needs_to_rescale(transform)
        return needs

    def rescaled_modules(self) -> list[str]:
        """List all modules whose inputs are rescaled, quantized or not."""
        return list(dict.fromkeys(name for _, own in self.rescalings for entry in own for name in entry.group.modules))

    def is_inside(self, rescaling: Rescaling) -> bool:
        """Whether a rescaling only involves modules of one expert."""
        return rescaling.group.producer.rpartition(".")[0] in self.experts

    def _measured(self, group: ScaleGroup, *, with_expert: bool) -> list[str]:
        """List the modules whose inputs are measured for a group: of a mixture's experts, which all read one tensor,
        the first, and none where another module reads the tensor.
        """
        others = [name for name in group.modules if name not in self.experts]
        if others or group.producer.rpartition(".")[0] in self.experts:
            return others or list(group.modules)
        return list(group.modules[:1]) if with_expert else []

    def rescaled(self, names: Sequence[str]) -> list[tuple[Transform, Rescaling]]:
        """Return the rescalings of a step that quantizes these modules, in order."""
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
        """Return the attention modules of a subgraph whose keys and values are quantized."""
        return self.key_values.of_subgraph(entry) if self.key_values is not None else ()


def changed_parameters(group: ScaleGroup) -> list[str]:
    """List the parameters that rescaling a group changes."""
    names = [group.producer, group.bias, *(f"{name}.weight" for name in group.modules)]
    return [name for name in (*names, *(other.name for other in group.others)) if name]


def _require_default_averages(jobs: Mapping[str, Assignment], source: str) -> None:
    """Reject other averaging constants: inputs that are rescaled later are averaged feature by feature with 0.01."""
    for name, job in jobs.items():
        inputs = job.scheme.input_activations
        if input_parts(job.scheme) and averaging_of(inputs) not in (None, AVERAGING_CONSTANT):
            raise RecipeError(
                f"{source}: {name}: averaging_constant cannot be combined with SmoothQuant or AWQ",
                hint="remove averaging_constant, or use the observer static_minmax",
            )


def _needs_to_rescale(transform: Transform) -> Needs:
    return Needs(hessian=transform.algorithm == "awq", channels=True)


def _needs_of(job: Assignment) -> Needs:
    is_weighed = job.scheme.weights.observer == "imatrix_mse"
    is_measured = job.algorithm != "rtn" or is_weighed or job.clip
    return Needs(hessian=is_measured, channels=bool(input_parts(job.scheme)), drift=job.is_error_aware)
