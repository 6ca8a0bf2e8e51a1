"""What a recipe comes to for one model: which module gets which scheme, and whether that can be done.

Whatever could go wrong when a module's turn comes is looked for here, before anything runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from runtime.errors import RecipeError
from runtime.recipe.recipe import Assignment, Recipe, some
from runtime.recipe.targeting import require_attention, targeted_modules

if TYPE_CHECKING:
    from runtime.chain import Artifact
    from runtime.weights.origins import ParameterSource
    from runtime.weights.parameters import Weights


def assign_jobs(
    artifact: Artifact, model: nn.Module, source: ParameterSource, recipe: Recipe
) -> tuple[dict[str, Assignment], list[str]]:
    """Decide what is done to each module.

    Args:
        artifact: says which modules its subgraphs use.
        model: its module tree; weights are not looked at.
        source: the origins of the parameters.
        recipe: says what is wanted.

    Returns:
        Jobs by module name, and the names of modules that the recipe targets and no subgraph uses.

    Raises:
        RecipeError: naming the module that cannot be quantized as asked, and why.
    """
    wanted, compiled = recipe.sequential_targets, artifact.manifest.target_patterns
    if wanted and sorted(wanted) != sorted(compiled):
        raise RecipeError(
            f"{recipe.source} asks for the sequential targets {', '.join(wanted)}, "
            f"and the artifact was cut at {', '.join(compiled)}",
            hint="compile with --targets, or leave sequential_targets out",
        )
    try:
        assigned = recipe.assign(targeted_modules(model, artifact.manifest, recipe))
    except RecipeError as error:
        kept = transposed(model)
        if not kept:
            raise
        raise RecipeError(
            f"{error.message}; {len(kept)} modules of this model are Conv1D, which cannot be quantized: readers "
            "of the checkpoint load quantized weights of Linear modules alone",
            hint=error.hint or "take a model whose layers are Linear modules",
        ) from error
    require_attention(model, artifact.manifest, recipe)
    if not assigned:  # all that is quantized is the cache
        return {}, []
    jobs, unreached = _split_reached(artifact, model, recipe, assigned)
    _require_possible(artifact, model, source, recipe, jobs)
    return jobs, unreached


def transposed(model: nn.Module) -> list[str]:
    """Modules of transformers' class Conv1D, as in GPT-2: Linear but for a weight that is [in, out].

    compressed-tensors gives quantized weights to Linear and Embedding modules and to no others, so that transformers
    would find no place for the tensors of a quantized Conv1D, and start it at random.
    """
    return [name for name, module in model.named_modules() if type(module).__name__ == "Conv1D"]


def _split_reached(
    artifact: Artifact, model: nn.Module, recipe: Recipe, assigned: Mapping[str, Assignment]
) -> tuple[dict[str, Assignment], list[str]]:
    """What is to be done to modules that some subgraph uses, and the names of the others.

    Raises:
        RecipeError: when nothing is left to do.
    """
    used = dict.fromkeys(name for subgraph in artifact.subgraphs for name in subgraph.entry.parameters)
    tables = dict.fromkeys(name for name, module in model.named_modules() if isinstance(module, nn.Embedding))
    jobs = {
        name: replace(job, clip=job.clip and name not in tables)
        for name, job in assigned.items()
        if f"{name}.weight" in used
    }
    unreached = [name for name in assigned if name not in jobs]
    if not jobs:
        raise RecipeError(
            f"{recipe.source}: the model never calls any module that the recipe targets: {some(unreached)}",
            hint="target the layers that the artifact's subgraphs run; seqbuild inspect shows them",
        )
    return jobs, unreached


def _require_possible(
    artifact: Artifact, model: nn.Module, source: ParameterSource, recipe: Recipe, jobs: Mapping[str, Assignment]
) -> None:
    """Refuse now what could not be quantized when its turn comes."""
    for name, job in jobs.items():
        ignore = f"add {name} to ignore"
        tied = artifact.manifest.parameters[f"{name}.weight"].tied_to or _tied_by(artifact, f"{name}.weight")
        if tied:  # also when the checkpoint has a tensor for each: readers would tie them by the config
            owner = tied.removesuffix(".weight")
            raise RecipeError(f"{recipe.source}: {name} shares its weight with {owner}", hint=ignore)
        if not is_plain(source, f"{name}.weight"):
            raise RecipeError(
                f"{recipe.source}: the weight of {name} is not one tensor of the checkpoint, so it cannot be "
                "quantized under the checkpoint's names",
                hint=ignore,
            )
        key = source.plain_key(f"{name}.weight")
        if key is None or not key.endswith(".weight"):
            raise RecipeError(
                f"{recipe.source}: the checkpoint calls the weight of {name} {key!r}; what belongs to a quantized "
                "weight is called by the name before .weight, and there is none",
                hint=ignore,
            )
        num_in = model.get_submodule(name).get_parameter("weight").shape[1]
        for size in _group_sizes(job):
            if num_in % size:
                raise RecipeError(
                    f"{recipe.source}: {name} has {num_in} input features, which groups of {size} do not divide",
                    hint=f"{ignore}, or choose another group_size",
                )


def is_plain(source: ParameterSource, name: str) -> bool:
    """Whether a parameter equals one tensor of the checkpoint. Stacks of experts that are split are not parameters."""
    return name in source.origins and source.plain_key(name) is not None


def _group_sizes(job: Assignment) -> Iterator[int]:
    """Of weights, and of inputs that are rounded in groups."""
    for args in (job.scheme.weights, job.scheme.input_activations):
        if args is not None and args.strategy in ("group", "tensor_group"):
            yield int(args.group_size)


def least_bytes(source: Weights, jobs: Mapping[str, Assignment]) -> int:
    """What the checkpoint takes on disk, without scales and headers."""
    bits = {source.plain_key(f"{name}.weight"): job.scheme.weights.num_bits for name, job in jobs.items()}
    return sum(source.checkpoint.num_bytes(key, bits=bits.get(key)) for key in source.checkpoint)


def _tied_by(artifact: Artifact, name: str) -> str:
    parameters = artifact.manifest.parameters.items()
    return next((other for other, entry in parameters if entry.tied_to == name), "")
