"""Assign a scheme to each module of a model, and reject before the run what could not be quantized."""

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
    """Assign a scheme to each module; `source` has the origins of the parameters.

    Returns:
        Assignments by module name, and the names of modules that the recipe targets and no subgraph uses.

    Raises:
        RecipeError: naming the module that cannot be quantized, and the reason.
    """
    wanted, compiled = recipe.sequential_targets, artifact.manifest.target_patterns
    if wanted and sorted(wanted) != sorted(compiled):
        raise RecipeError(
            f"{recipe.source} has the sequential targets {', '.join(wanted)}, "
            f"but the artifact was compiled with {', '.join(compiled)}",
            hint="compile with --targets, or remove sequential_targets",
        )
    try:
        assigned = recipe.assign(targeted_modules(model, artifact.manifest, recipe))
    except RecipeError as error:
        kept = transposed(model)
        if not kept:
            raise
        raise RecipeError(
            f"{error.message}; {len(kept)} modules of this model are Conv1D, which cannot be quantized: readers "
            "only load quantized weights of Linear modules",
            hint=error.hint or "use a model whose layers are Linear modules",
        ) from error
    require_attention(model, artifact.manifest, recipe)
    if not assigned:  # the recipe quantizes only the cache
        return {}, []
    jobs, unreached = _split_reached(artifact, model, recipe, assigned)
    _require_possible(artifact, model, source, recipe, jobs)
    return jobs, unreached


def transposed(model: nn.Module) -> list[str]:
    """List modules of transformers' class Conv1D, a Linear whose weight is [in, out], as in GPT-2.

    compressed-tensors supports quantized weights only in Linear and Embedding modules. transformers would ignore the
    tensors of a quantized Conv1D and initialize it at random.
    """
    return [name for name, module in model.named_modules() if type(module).__name__ == "Conv1D"]


def _split_reached(
    artifact: Artifact, model: nn.Module, recipe: Recipe, assigned: Mapping[str, Assignment]
) -> tuple[dict[str, Assignment], list[str]]:
    """Return the assignments of modules that some subgraph uses, and the names of the others; reject having none."""
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
            hint="target modules that the subgraphs use; seqbuild inspect lists them",
        )
    return jobs, unreached


def _require_possible(
    artifact: Artifact, model: nn.Module, source: ParameterSource, recipe: Recipe, jobs: Mapping[str, Assignment]
) -> None:
    """Reject modules that could not be quantized when the run reaches them."""
    tied_by = {entry.tied_to: name for name, entry in artifact.manifest.parameters.items()}
    for name in jobs:
        ignore = f"add {name} to ignore"
        entry = artifact.manifest.parameters[f"{name}.weight"]
        tied = entry.tied_to or tied_by.get(f"{name}.weight", "")
        if tied:  # also if the checkpoint stores both: readers tie them because of the config
            owner = tied.removesuffix(".weight")
            raise RecipeError(f"{recipe.source}: {name} shares its weight with {owner}", hint=ignore)
        if not is_plain(source, f"{name}.weight"):
            raise RecipeError(
                f"{recipe.source}: the weight of {name} is not stored as one tensor in the checkpoint, so it cannot "
                "be quantized under the checkpoint's names",
                hint=ignore,
            )
        key = source.plain_key(f"{name}.weight")
        if key is None or not key.endswith(".weight"):
            raise RecipeError(
                f"{recipe.source}: the weight of {name} has the name {key!r} in the checkpoint; the names of its "
                "scales can only be derived from a name that ends in .weight",
                hint=ignore,
            )
    _require_whole_groups(model, recipe, jobs)


def _require_whole_groups(model: nn.Module, recipe: Recipe, jobs: Mapping[str, Assignment]) -> None:
    """Reject groups that do not divide a module's input features, naming all such modules at once."""
    features = {name: model.get_submodule(name).get_parameter("weight").shape[1] for name in jobs}
    uneven = [
        (name, num_in, size) for name, num_in in features.items() for size in _group_sizes(jobs[name]) if num_in % size
    ]
    if not uneven:
        return
    name, num_in, size = uneven[0]
    others = list(dict.fromkeys(other for other, _, _ in uneven if other != name))
    also = f"; the same applies to {some(others)}" if others else ""
    raise RecipeError(
        f"{recipe.source}: {name} has {num_in} input features, which is not a multiple of group_size {size}{also}",
        hint=f"add {'them' if others else name} to ignore, use another group_size, or a scheme without groups such as "
        "W8A8 or FP8_DYNAMIC",
    )


def is_plain(source: ParameterSource, name: str) -> bool:
    """Whether the checkpoint stores a parameter unchanged as one tensor; the stacks of split experts do not."""
    return name in source.origins and source.plain_key(name) is not None


def _group_sizes(job: Assignment) -> Iterator[int]:
    """Yield the group sizes of weights and of inputs."""
    for args in (job.scheme.weights, job.scheme.input_activations):
        if args is not None and args.strategy in ("group", "tensor_group"):
            yield int(args.group_size)


def least_bytes(source: Weights, jobs: Mapping[str, Assignment]) -> int:
    """Compute a lower bound of the size of the quantized checkpoint on disk, without scales and headers."""
    bits = {source.plain_key(f"{name}.weight"): job.scheme.weights.num_bits for name, job in jobs.items()}
    return sum(source.checkpoint.num_bytes(key, bits=bits.get(key)) for key in source.checkpoint)
