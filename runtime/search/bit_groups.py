"""Modules that must have one scheme, and the bytes that they take with each candidate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from runtime.experts.split import SplitArtifact, expert_of
from runtime.quantize.fused_layers import fused_layers
from runtime.streaming.schedule import ModuleTensors
from runtime.weights.origins import required_key

if TYPE_CHECKING:
    from runtime.quantize.preparation import Prepared
    from runtime.recipe.recipe import Assignment


@dataclass(frozen=True, kw_only=True, slots=True)
class BitGroup:
    """Modules that must have one scheme.

    Attributes:
        modules: their names, in the order of the model.
        num_weights: of all of them.
        sizes: the bytes of their tensors with each candidate.
    """

    modules: tuple[str, ...]
    num_weights: int
    sizes: tuple[int, ...]


def bit_groups(prepared: Prepared, candidates: Sequence[Mapping[str, Assignment] | None]) -> list[BitGroup]:
    """Group the modules as engines fuse them: query, key and value; gate and up; all experts of a layer.

    Args:
        prepared: the model, and which of its modules are searched.
        candidates: the assignments of each candidate; None for leaving modules as they are.
    """
    names = list(prepared.jobs)
    leaders = {name: name for name in names}

    def leader(name: str) -> str:
        while leaders[name] != name:
            name = leaders[name]
        return name

    for together in _fused(prepared):
        own = [leader(name) for name in together if name in leaders]
        leaders.update(dict.fromkeys(own, min(own, key=names.index, default="")))
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(leader(name), []).append(name)
    tensors = ModuleTensors(prepared.source)
    return [_group(tuple(modules), prepared, tensors, candidates) for modules in groups.values()]


def _fused(prepared: Prepared) -> list[tuple[str, ...]]:
    """List the modules that engines load as one layer."""
    experts: dict[str, list[str]] = {}
    for name, (mixture, _) in expert_of(prepared.artifact).items():
        experts.setdefault(mixture, []).append(name)
    of_experts = {name for names in experts.values() for name in names}
    linears = [name for name, module in prepared.model.named_modules() if isinstance(module, nn.Linear)]
    artifact = prepared.artifact
    tables = artifact.whole.manifest if isinstance(artifact, SplitArtifact) else artifact.manifest
    dense = fused_layers([name for name in linears if name not in of_experts], tables.scale_groups)
    return [*dense, *(tuple(names) for names in experts.values())]


def _group(
    modules: tuple[str, ...],
    prepared: Prepared,
    tensors: ModuleTensors,
    candidates: Sequence[Mapping[str, Assignment] | None],
) -> BitGroup:
    stored = [prepared.source.stored(required_key(prepared.source, f"{name}.weight")) for name in modules]
    sizes = [
        sum(one.num_bytes for one in stored)
        if jobs is None
        else sum(tensor.num_bytes for name in modules for tensor in tensors.of(name, jobs[name]))
        for jobs in candidates
    ]
    num_weights = sum(one.shape[0] * one.shape[1] for one in stored)
    return BitGroup(modules=modules, num_weights=num_weights, sizes=tuple(sizes))
