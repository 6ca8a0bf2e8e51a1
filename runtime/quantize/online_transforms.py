"""The rotations of a recipe that stay in the model: QuIP's, and SpinQuant's R3 and R4.

One half of such a rotation is computed while the model runs, in this run and by readers of the checkpoint, which find
it in `transform_config`. The other half is fused into the weight: with x' = x V and y = y' U^T a Linear module has

    W' = U^T W V,   b' = U^T b

The model computes the same. W' is rounded, and x' too if the scheme rounds inputs. QuIP (arXiv
2307.13304, section 4) rotates the inputs (v) and outputs (u) of each Linear module. R4 of SpinQuant (arXiv 2405.16406)
rotates inputs that no fused rotation reaches, R3 queries and keys, whose product it does not change.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from runtime.algorithms.hadamard import LARGEST_SIZE, Hadamard, random_signs
from runtime.artifact.cached_values import QUERY
from runtime.artifact.inner_linears import inner_linears
from runtime.errors import RecipeError
from runtime.experts.split import SplitArtifact
from runtime.formats.targets import matches_name
from runtime.formats.transforms import (
    INPUT,
    KEYS,
    OF_ATTENTION,
    OUTPUT,
    QUERIES,
    RANDOM_HADAMARD,
    ModelTransforms,
    ModuleTransform,
    TransformConfigError,
    TransformGroup,
    TransformPlace,
    features_in,
    module_transforms,
)
from runtime.host.regular_files import open_regular
from runtime.recipe.recipe import some
from runtime.recipe.rotation_modifiers import QuIPModifier, Rotation

if TYPE_CHECKING:
    from torch import nn

    from runtime.chain import Artifact
    from runtime.recipe.recipe import Recipe
    from runtime.weights.origins import ParameterSource

_MOST_CONFIG_BYTES = 2**24


def online_transforms(artifact: Artifact, model: nn.Module, source: ParameterSource, recipe: Recipe) -> ModelTransforms:
    """Decide which modules of a model are transformed, and by which matrices.

    Raises:
        RecipeError: if a modifier matches nothing, or a module cannot be transformed.
    """
    groups: list[TransformGroup] = []
    seeds: dict[str, int] = {}
    for modifier in recipe.rotations:
        own = list(_groups(artifact, model, modifier, recipe.source))
        groups += own
        seeds |= {group.name: modifier.seed for group in own}
    if not groups:
        return ModelTransforms()
    modules = {name: type(module) for name, module in model.named_modules()}
    where = f"{recipe.source}:{recipe.rotations[-1].line}"
    try:
        called = {name for subgraph in artifact.subgraphs for name in subgraph.entry.parameters}
        features = features_in(model, called, {entry.module for entry in artifact.manifest.cached})
        transforms = tuple(module_transforms(groups, modules, features))
    except TransformConfigError as error:
        ways = "set transform_block_size to a power of two that divides the features, or use random-hadamard"
        can_ignore = all(isinstance(modifier, QuIPModifier) for modifier in recipe.rotations)  # SpinQuant has no ignore
        hint = f"{ways}, or add the module to ignore" if can_ignore else ways
        raise RecipeError(f"{where}: {error}", hint=hint) from error
    for group in groups:
        if not any(one.group is group for one in transforms):
            hint = "correct its targets and ignore"
            raise RecipeError(f"{where}: the rotation {group.name} matches no module", hint=hint)
    _require_possible(artifact, source, transforms, where)
    matrices = {
        one.matrix: Hadamard(
            size=one.size,
            signs=random_signs(one.size, seeds[one.group.name]) if one.group.kind == RANDOM_HADAMARD else None,
            dtype=getattr(torch, one.group.precision),
        )
        for one in transforms
    }
    return ModelTransforms(groups=tuple(groups), transforms=transforms, matrices=matrices)


def _groups(artifact: Artifact, model: nn.Module, modifier: Rotation, origin: str) -> Iterator[TransformGroup]:
    kind, precision = modifier.transform_type, modifier.precision

    def group(name: str, block: int | None, *places: TransformPlace) -> TransformGroup:
        return TransformGroup(name=name, kind=kind, block=block, precision=precision, places=places)

    online = [name for name in modifier.rotations if name not in ("R1", "R2")]
    where = f"{origin}:{modifier.line}: {modifier.name}"
    if online and kind == "random-matrix":
        raise RecipeError(
            f"{where} has the transform_type random-matrix, and readers do not agree on its scale for {some(online)}",
            hint="use random-hadamard",
        )
    if online and modifier.randomize:
        raise RecipeError(
            f"{where} has randomize, and readers have one matrix for {some(online)} and a size", hint="remove it"
        )
    if isinstance(modifier, QuIPModifier):
        targets, ignore = tuple(map(str, modifier.targets)), tuple(map(str, modifier.ignore))

        def place(location: str, *, inverse: bool = False) -> TransformPlace:
            return TransformPlace(location=location, targets=targets, ignore=ignore, inverse=inverse)

        if "v" in online:
            yield group("v", modifier.transform_block_size, place(INPUT), place("weight_input", inverse=True))
        if "u" in online:
            yield group("u", modifier.transform_block_size, place("weight_output"), place(OUTPUT, inverse=True))
    if "R3" in online:
        attention, size = _attention(artifact, where)
        targets = _patterns(attention, [name for name, _ in model.named_modules()])
        places = [TransformPlace(location=location, targets=targets) for location in (QUERIES, KEYS)]
        yield group("R3", size, *places)
    if "R4" in online:
        chosen = _inner(artifact, where)
        targets = _patterns(chosen, [name for name, _ in model.named_modules()])
        inverse = TransformPlace(location="weight_input", targets=targets, inverse=True)
        yield group("R4", modifier.transform_block_size, TransformPlace(location=INPUT, targets=targets), inverse)


def _attention(artifact: Artifact, where: str) -> tuple[list[str], int]:
    """Return the attention modules, and the size of their heads.

    Raises:
        RecipeError: if queries and keys of some module are unknown, or have no heads.
    """
    entries = artifact.manifest.cached
    modules = list(dict.fromkeys(entry.module for entry in entries))
    parts = {(entry.module, entry.part): entry for entry in entries}
    lacking = [
        name
        for name in modules
        if (name, QUERY) not in parts or not parts[name, QUERY].heads or not parts[name, "k"].heads
    ]
    if not modules or lacking:
        raise RecipeError(
            f"{where}: R3 cannot rotate {some(lacking) or 'attention'}: the artifact lists no queries and keys with "
            "heads",
            hint="remove R3; compile with --leaves linear if the artifact was compiled with --leaves target",
        )
    return modules, _head_size(artifact, where)


def _head_size(artifact: Artifact, where: str) -> int:
    """Return the size of an attention head that the model's config states."""
    try:
        with open_regular(artifact.companions_path / "config.json") as file:
            config: Any = json.loads(file.read(_MOST_CONFIG_BYTES))
        inner = config.get("text_config") or config
        size = inner.get("head_dim") or inner["hidden_size"] // inner["num_attention_heads"]
        if isinstance(size, int) and 0 < size <= LARGEST_SIZE:
            return size
    except (OSError, ValueError, TypeError, AttributeError, KeyError, ArithmeticError, RecursionError):
        pass
    raise RecipeError(f"{where}: the config of the model states no head_dim, which R3 needs", hint="remove R3")


def _inner(artifact: Artifact, where: str) -> list[str]:
    """Return the Linear modules whose inputs no fused rotation reaches, in order of execution."""
    manifest = artifact.manifest
    linears = {name for name, kind in manifest.leaves.items() if manifest.leaf_kinds[kind].kind == "Linear"}
    found: dict[str, None] = {}
    known: dict[tuple[str, str], list[str]] = {}
    for subgraph in artifact.subgraphs:
        scope = f"{subgraph.entry.scope}." if subgraph.entry.scope else ""
        own = [name.removeprefix(scope) for name in subgraph.entry.submodules if name in linears]
        key = subgraph.entry.file, " ".join(own)
        if key not in known:
            known[key] = inner_linears(subgraph.source, own)
        found.update(dict.fromkeys(f"{scope}{name}" for name in known[key]))
    if isinstance(artifact, SplitArtifact):
        inputs = artifact.inputs(all_tokens=False)
        found.update(dict.fromkeys(name for name, (_, position, _) in inputs.items() if position))
    if not found:
        raise RecipeError(
            f"{where}: R4 finds no Linear module whose input a function of other Linear modules computes",
            hint="remove R4; compile with --leaves linear if the artifact was compiled with --leaves target",
        )
    return list(found)


def _patterns(chosen: Sequence[str], modules: Iterable[str]) -> tuple[str, ...]:
    """Return patterns that match these modules and no others: by the last part of their names if possible."""
    wanted, others = set(chosen), [name for name in modules if name not in set(chosen)]
    patterns: dict[str, None] = {}
    for name in chosen:
        ending = f"re:.*{name.rpartition('.')[2]}$"
        is_shared = ending in patterns or not any(matches_name(ending, other) for other in others)
        patterns[ending if is_shared else name] = None
    assert all(any(matches_name(pattern, name) for pattern in patterns) for name in wanted), "each has a pattern"
    return tuple(patterns)


def _require_possible(
    artifact: Artifact, source: ParameterSource, transforms: Sequence[ModuleTransform], where: str
) -> None:
    """Reject modules whose weights cannot be changed, and experts that cannot be run."""
    parameters = artifact.manifest.parameters
    tied_by = {entry.tied_to: name for name, entry in parameters.items() if entry.tied_to}
    inputs = {one.module: one.matrix for one in transforms if one.location == INPUT}
    experts = artifact.inputs(all_tokens=False) if isinstance(artifact, SplitArtifact) else {}
    matrices: dict[tuple[str, int, int], tuple[str, int] | None] = {}
    for name, place in experts.items():
        if matrices.setdefault(place, inputs.get(name)) != inputs.get(name):
            raise RecipeError(
                f"{where}: {name} must be transformed like the other modules of its expert that have the same input",
                hint="add all of them or none to ignore",
            )
    for one in transforms:
        if one.location in OF_ATTENTION:
            continue
        weight = f"{one.module}.weight"
        tied = parameters[weight].tied_to or tied_by.get(weight, "")
        ignore = f"add {one.module} to ignore"
        if tied:
            raise RecipeError(
                f"{where}: {one.module} shares its weight with {tied.removesuffix('.weight')}, which is not "
                "transformed",
                hint=ignore,
            )
        names = [weight, *([f"{one.module}.bias"] if one.location == OUTPUT else ())]
        if any(name in source.origins and source.plain_key(name) is None for name in names):
            raise RecipeError(
                f"{where}: the weight of {one.module} is not stored as one tensor in the checkpoint, so it cannot be "
                "transformed",
                hint=ignore,
            )
        if one.location == OUTPUT and one.module in experts:
            raise RecipeError(
                f"{where}: outputs of experts ({one.module}) cannot be transformed", hint="remove u from rotations"
            )
