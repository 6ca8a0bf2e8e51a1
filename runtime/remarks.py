"""What a user should know about a result before it is made: above all, which experts are not quantized, and why."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn

from runtime.errors import RecipeError
from runtime.jobs import transposed
from runtime.key_values import latent_attention
from runtime.leaves import MIXTURES
from runtime.recipe import some
from runtime.split import SplitArtifact

if TYPE_CHECKING:
    from runtime.artifact import Artifact
    from runtime.recipe import Assignment, Recipe

_ABOUT_EXPERTS = re.compile(r"expert|moe|mlp|ffn|feed_forward|(in|out)put_linear")


def make_remarks(
    artifact: Artifact,
    model: nn.Module,
    recipe: Recipe,
    jobs: Mapping[str, Assignment],
    unreached: Sequence[str],
) -> Iterator[str]:
    """A line each.

    Args:
        artifact: as the run has it, experts apart or not.
        model: its modules.
        recipe: says what is wanted.
        jobs: what is done.
        unreached: modules that the recipe targets and no subgraph uses.
    """
    kept = transposed(model)
    if kept:
        yield (
            f"warning: {len(kept)} Conv1D modules stay as they are ({some(kept)}): readers of the checkpoint load "
            "quantized weights of Linear modules alone"
        )
    tables = targeted_tables(model, recipe, jobs)
    if tables:
        yield (
            f"warning: {some(tables)} stay as they are: targets that match Linear modules, too, do not mean embeddings"
        )
    packed = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding) and name in jobs]
    if packed:
        yield (
            f"warning: vLLM (0.32) loads quantized embeddings ({some(packed)}); transformers does from 5.24 on, with "
            "CompressedTensorsConfig(dequantize=True) and where all modules have one scheme"
        )
    idle = recipe.idle_ignores({name: type(module) for name, module in model.named_modules()})
    if idle:
        yield f"no module is ignored as {some(idle)}, for none has such a name (seqbuild inspect shows names)"
    if unreached:
        yield f"left as they are, for the model never calls them: {some(unreached)}"
    stacked = list(_stacked_experts(artifact))
    left: dict[str, list[str]] = {}
    for name in stacked:
        if _is_wanted(recipe, name.rpartition(".")[0]):
            left.setdefault(_why_not(artifact, name), []).append(name)
    for reason, names in left.items():
        yield f"warning: {len(names)} stacked weights of experts are not quantized, for {reason}: {some(names)}"
    if any(len(artifact.manifest.parameters[name].sources) > 1 for name in stacked) and _has_integers(jobs):
        yield (
            "warning: transformers does not load experts that are not quantized beside integer layers (5.17 starts "
            "them at random, 5.23 refuses)"
        )
    latent = latent_attention(artifact.manifest) if recipe.cache is not None else []
    if latent:
        yield (
            f"warning: k_scale and v_scale of {some(latent)} are those of what transformers caches, the latent and the "
            "rotary key; vLLM (0.32) does not read them for multi-head latent attention, and caches both with a scale "
            "of 1"
        )
    odd = [kind for kind in _attention_classes(artifact) if not kind.endswith("Attention")] if recipe.attention else []
    if odd:
        yield f"warning: vLLM knows a group for attention by a class that ends in Attention, and not {some(odd)}"
    renamed = _unreadable_by_transformers(artifact, jobs)
    if renamed:
        yield (
            f"warning: the checkpoint has the experts of {some(renamed)} stacked; they are written one by one, as "
            "llm-compressor writes them for vLLM, and transformers (5.24) does not load such experts: it starts them "
            "at random"
        )


def _attention_classes(artifact: Artifact) -> Iterator[str]:
    yield from dict.fromkeys(entry.kind for entry in artifact.manifest.cached)


def targeted_tables(model: nn.Module, recipe: Recipe, jobs: Container[str]) -> list[str]:
    """Embeddings that a recipe's targets match and that are not quantized: readers would take them for quantized."""
    tables = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    return [name for name, module in tables if name not in jobs and recipe.means(name, type(module))]


def _unreadable_by_transformers(artifact: Artifact, jobs: Mapping[str, Assignment]) -> list[str]:
    """Modules whose experts are written under names that no rule of transformers takes.

    Dense ones are not among them: of their one class (Llama 4's) it loads the experts one by one.
    """
    if not isinstance(artifact, SplitArtifact):
        return []
    manifest = artifact.manifest
    owners = [name for name in artifact.owners(jobs) if name in artifact.named_anew]
    return [name for name in owners if manifest.leaf_kinds[manifest.leaves[name]].kind == "Experts"]


def _stacked_experts(artifact: Artifact) -> Iterator[str]:
    """Parameters with a matrix for each expert."""
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


def _is_wanted(recipe: Recipe, owner: str) -> bool:
    """Whether the recipe would quantize an expert's matrix, if it were a module."""
    try:
        return bool(recipe.assign({f"{owner}.0.up_proj": nn.Linear}))
    except RecipeError:
        return False


def _why_not(artifact: Artifact, name: str) -> str:
    manifest = artifact.manifest
    if any(name.startswith(f"{owner}.") for owner in manifest.leaves):
        if len(manifest.parameters[name].sources) > 1:
            return "the names of their tensors do not tell whose they are"
        return "what one of them does is no product with a gate, a matrix up and one down"
    if not manifest.is_portable:
        return "the artifact calls the model's own modules (--leaves linear may help)"
    return "the model's code sends tokens to them in a way of its own"


def _has_integers(jobs: Mapping[str, Assignment]) -> bool:
    return any(job.scheme.weights.type == "int" for job in jobs.values())
