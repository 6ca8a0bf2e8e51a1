"""Collect the remarks printed before a run: modules that are not quantized, readers that do not load the result."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn

from runtime.artifact.manifest import MIXTURES
from runtime.errors import RecipeError
from runtime.experts.split import SplitArtifact
from runtime.formats.key_values import latent_attention
from runtime.quantize.assignments import transposed
from runtime.quantize.fused_layers import mixed_layers
from runtime.quantize.reader_limits import (
    CACHE,
    EXPERT,
    RENAMED_EXPERT,
    SEPARATE_EXPERT,
    UNQUANTIZED_EXPERT,
    reader_limits,
)
from runtime.quantize.transform_limits import transform_limits
from runtime.recipe.recipe import some

if TYPE_CHECKING:
    from runtime.artifact.manifest import Manifest
    from runtime.chain import Artifact
    from runtime.formats.transforms import ModelTransforms
    from runtime.quantize.preparation import Prepared
    from runtime.recipe.recipe import Assignment, Recipe

_ABOUT_EXPERTS = re.compile(r"expert|moe|mlp|ffn|feed_forward|(in|out)put_linear")


def source_remarks(prepared: Prepared) -> Iterator[str]:
    """Yield the warnings about the weights that a run starts from."""
    form = prepared.weights.checkpoint.quantization
    if form:
        yield (
            f"warning: the weights of the source are quantized ({form}) and dequantized when they are read; "
            "errors and perplexities are relative to these weights"
        )
    yield from prepared.weights.remarks


def make_remarks(
    artifact: Artifact,
    model: nn.Module,
    recipe: Recipe,
    jobs: Mapping[str, Assignment],
    unreached: Sequence[str],
    transforms: ModelTransforms,
) -> Iterator[str]:
    """Yield the remarks, one line each; `unreached` are the modules that the recipe targets and no subgraph uses, and
    `transforms` the rotations that stay in the model.
    """
    kept = transposed(model)
    if kept:
        yield (
            f"warning: {len(kept)} Conv1D modules are not quantized ({some(kept)}): readers only load quantized "
            "weights of Linear modules"
        )
    tables = targeted_tables(model, recipe, jobs)
    if tables:
        yield (
            f"warning: the embeddings {some(tables)} are not quantized: a target that also matches Linear modules does "
            "not apply to embeddings; name them in a target of their own"
        )
    packed = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding) and name in jobs]
    if packed:
        yield (
            f"warning: quantized embeddings ({some(packed)}) are loaded by vLLM 0.32, and by transformers 5.24 or "
            "newer with CompressedTensorsConfig(dequantize=True) if all modules have the same scheme"
        )
    idle = recipe.idle_ignores({name: type(module) for name, module in model.named_modules()})
    if idle:
        yield f"ignore entries that match no module: {some(idle)} (seqbuild inspect shows module names)"
    if unreached:
        yield f"left unchanged, because the model never calls them: {some(unreached)}"
    stacked = list(_stacked_experts(artifact))
    left: dict[str, list[str]] = {}
    for name in stacked:
        if _is_targeted(recipe, name.rpartition(".")[0]):
            left.setdefault(_why_not(artifact, name), []).append(name)
    for reason, names in left.items():
        yield f"warning: {len(names)} stacked expert weights are not quantized, because {reason}: {some(names)}"
    yield from _reader_remarks(artifact, model, recipe, jobs, stacked, transforms)


def _reader_remarks(
    artifact: Artifact,
    model: nn.Module,
    recipe: Recipe,
    jobs: Mapping[str, Assignment],
    stacked: Sequence[str],
    transforms: ModelTransforms,
) -> Iterator[str]:
    """Yield the remarks about readers that do not load the result, or load it incorrectly."""
    manifest, experts = artifact.manifest, _experts(artifact)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for text in mixed_layers(linears, manifest.scale_groups, experts, jobs):
        yield f"warning: {text}"
    others = {
        UNQUANTIZED_EXPERT: [name for name in stacked if len(manifest.parameters[name].sources) > 1],
        CACHE: _caching(manifest) if recipe.cache is not None else [],
    }
    for text in reader_limits(manifest.model.model_type, _places(artifact, experts), jobs, others):
        yield f"warning: {text}"
    inside = {name for names in experts.values() for name in names}
    for text in transform_limits(transforms, model, inside, has_cache=recipe.cache is not None):
        yield f"warning: {text}"
    latent = latent_attention(artifact.manifest) if recipe.cache is not None else []
    if latent:
        yield (
            f"warning: k_scale and v_scale of {some(latent)} belong to the values that transformers caches, the latent "
            "and the rotary key; vLLM 0.32 ignores them for multi-head latent attention and uses a scale of 1 for both"
        )
    kinds = dict.fromkeys(entry.kind for entry in manifest.cached) if recipe.attention else {}
    odd = [kind for kind in kinds if not kind.endswith("Attention")]
    if odd:
        yield f"warning: vLLM only recognizes attention groups whose class name ends in Attention, not {some(odd)}"


def _caching(manifest: Manifest) -> list[str]:
    """List the attention modules that cache keys and values."""
    return list(dict.fromkeys(entry.module for entry in manifest.cached))


def targeted_tables(model: nn.Module, recipe: Recipe, jobs: Container[str]) -> list[str]:
    """List embeddings that a recipe targets and that are not quantized: readers would assume that they are."""
    tables = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    return [name for name, module in tables if name not in jobs and recipe.means(name, type(module))]


def _experts(artifact: Artifact) -> dict[str, list[str]]:
    """Map each split mixture to the modules of its experts."""
    found: dict[str, list[str]] = {}
    if isinstance(artifact, SplitArtifact):
        for name, (owner, _, _) in artifact.inputs(all_tokens=True).items():
            found.setdefault(owner, []).append(name)
    return found


def _places(artifact: Artifact, experts: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Map experts' modules to the places of `runtime.quantize.reader_limits`."""
    if not isinstance(artifact, SplitArtifact):
        return {}
    manifest, found = artifact.manifest, {}
    for owner, names in experts.items():
        is_stacked = manifest.leaf_kinds[manifest.leaves[owner]].kind == "Experts"
        renamed = EXPERT if artifact.mixtures[owner].is_named else RENAMED_EXPERT
        found.update(dict.fromkeys(names, renamed if is_stacked else SEPARATE_EXPERT))
    return found


def _stacked_experts(artifact: Artifact) -> Iterator[str]:
    """Yield the parameters with a matrix for each expert."""
    manifest = artifact.manifest
    used = dict.fromkeys(name for entry in manifest.subgraphs for name in entry.parameters)
    flat = {
        f"{owner}.{own}"
        for owner, kind in manifest.leaves.items()
        for own in manifest.leaf_kinds[kind].options.get("flat", ())
    }
    for name in used:
        entry = manifest.parameters[name]
        if name in flat:
            yield name
            continue
        owner = name.rpartition(".")[0]
        kind = manifest.leaves.get(owner)
        is_own = kind is not None and manifest.leaf_kinds[kind].kind not in MIXTURES
        is_stack = len(entry.shape) == 3 and 1 not in entry.shape
        if is_stack and not is_own and any(_ABOUT_EXPERTS.search(text) for text in (name, *entry.sources[:1])):
            yield name


def _is_targeted(recipe: Recipe, owner: str) -> bool:
    """Whether the recipe would quantize an expert's matrix if it were a module."""
    try:
        return bool(recipe.assign({f"{owner}.0.up_proj": nn.Linear}))
    except RecipeError:
        return False


def _why_not(artifact: Artifact, name: str) -> str:
    manifest = artifact.manifest
    if any(name.startswith(f"{owner}.") for owner in manifest.leaves):
        if len(manifest.parameters[name].sources) > 1:
            return "the names of their tensors do not state the expert"
        return "the computation of an expert is not a gated product of an up and a down projection"
    if manifest.policy == "target" and manifest.ingredients.get("leaves") == "target":
        return "the artifact calls the model's own modules (compile without --leaves target)"
    if not manifest.is_portable:
        return "the artifact calls the model's own modules, which could not be traced"
    return "the model's routing code is not supported"
