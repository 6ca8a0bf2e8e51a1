"""Take a mixture's stacked experts apart, into Linear modules by the checkpoint's own names.

A checkpoint mostly has a tensor for each matrix of each expert; transformers stacks them when it loads. Calibration
wants them apart: to stream them one by one, to measure and quantize each, and to write them back under their names. So
the tables of an artifact are rewritten: what was one stacked parameter becomes one parameter for each tensor that it is
made from. How it is made is read off the conversion itself, by running it on small numbered tensors.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from runtime.artifact import Artifact, LoadedSubgraph
from runtime.experts import Experts, Stack, input_place, owner_of
from runtime.manifest import ParameterEntry
from runtime.program import Run

if TYPE_CHECKING:
    from runtime.checkpoint import Checkpoint

# `experts.3.gate_proj.weight`: the expert's number, the module's name, and the parameter's.
_KEY = re.compile(r"\.(\d+)\.([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)\.(weight|bias)\Z")
_SMALL = {
    3: (2, 3),
    2: (3,),
}  # shapes for one expert's tensors on which a conversion is tried, by the stack's dimensions


@dataclass(kw_only=True)
class SplitArtifact(Artifact):
    """An artifact whose tables have experts apart.

    Attributes:
        whole: the artifact as it was read.
        stacks: by the name of a module of experts, how its stacked parameters are made.
    """

    whole: Artifact
    stacks: Mapping[str, Mapping[str, Stack]] = field(default_factory=dict)

    def empty_model(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The module tree, with a Linear module for each matrix of each expert."""
        model = self.whole.empty_model(dtype)
        for name, stacks in self.stacks.items():
            experts = model.get_submodule(name)
            assert isinstance(experts, Experts), "the leaf table says so"
            experts.split(stacks, dict(self._linears(name, stacks, dtype)))
        return model

    def are_apart(self, names: Iterable[str]) -> bool:
        """Whether any of these modules is one that an expert has for itself."""
        owners = tuple(f"{name}." for name in self.stacks)
        return any(name.startswith(owners) for name in names)

    def inputs(self, *, all_tokens: bool) -> dict[str, tuple[str, int, int]]:
        """For each module of an expert, what it is called with: modules of one input have one value.

        Args:
            all_tokens: whether experts are called with all tokens, so that the layer's input is one for all of them.
        """
        found: dict[str, tuple[str, int, int]] = {}
        for name, stacks in self.stacks.items():
            for position, stack in enumerate(stacks.values()):
                for expert in range(len(stack.parts)):
                    place = input_place(position, expert, all_tokens=all_tokens)
                    found.update({f"{name}.{owner}": (name, position, place) for owner in stack.modules(expert)})
        return found

    def _linears(
        self, name: str, stacks: Mapping[str, Stack], dtype: torch.dtype | None
    ) -> Iterator[tuple[str, nn.Linear]]:
        names = [part for stack in stacks.values() for parts in stack.parts for part in parts]
        biases = {owner_of(part) for part in names if part.endswith(".bias")}
        for part in names:
            owner, _, own = part.rpartition(".")
            if own == "weight":
                rows, columns = self.manifest.parameters[f"{name}.{part}"].shape
                yield owner, nn.Linear(columns, rows, bias=owner in biases, device="meta", dtype=dtype)


def split_experts(artifact: Artifact, checkpoint: Checkpoint | None = None) -> Artifact:
    """The artifact with its experts apart, as far as the checkpoint has them so.

    Args:
        artifact: a portable one, or one without experts of the host's own: then it is returned as it is.
        checkpoint: experts that are stacked there stay so; None for one that has them as transformers writes them.
    """
    tables = artifact.manifest
    stacks: dict[str, dict[str, Stack]] = {}
    for name, kind in tables.leaves.items():
        if tables.leaf_kinds[kind].kind == "Experts":
            options = tables.leaf_kinds[kind].options
            own = _stacks(artifact, name, [str(stacked) for stacked in options["stacked"]], checkpoint)
            if own:
                stacks[name] = own
    if not stacks:
        return artifact
    replaced = {
        f"{name}.{stacked}": _entries(tables.parameters[f"{name}.{stacked}"], name, stack)
        for name, own in stacks.items()
        for stacked, stack in own.items()
    }
    parameters = {
        new: entry
        for old, found in tables.parameters.items()
        for new, entry in (replaced[old].items() if old in replaced else [(old, found)])
    }
    manifest = dataclasses.replace(
        tables,
        parameters=parameters,
        subgraphs=tuple(
            dataclasses.replace(
                entry, parameters=tuple(new for old in entry.parameters for new in replaced.get(old, {old: None}))
            )
            for entry in tables.subgraphs
        ),
    )
    subgraphs: tuple[LoadedSubgraph, ...] = tuple(
        dataclasses.replace(subgraph, entry=entry)
        for subgraph, entry in zip(artifact.subgraphs, manifest.subgraphs, strict=True)
    )
    fields = {entry.name: getattr(artifact, entry.name) for entry in dataclasses.fields(Artifact)}
    return SplitArtifact(**{**fields, "manifest": manifest, "subgraphs": subgraphs}, whole=artifact, stacks=stacks)


def _stacks(artifact: Artifact, name: str, stacked: list[str], checkpoint: Checkpoint | None) -> dict[str, Stack]:
    """How the stacked parameters of one module are made; none, unless all of its matrices can be taken apart."""
    found: dict[str, Stack] = {}
    for own in stacked:
        entry = artifact.manifest.parameters[f"{name}.{own}"]
        is_stacked = checkpoint is not None and f"{name}.{own}" in checkpoint
        stack = None if is_stacked else _stack(artifact, entry)
        if stack is None:
            return {}
        found[own] = stack
    names = [part for stack in found.values() for parts in stack.parts for part in parts]
    weights = {owner_of(part) for part in names if part.endswith(".weight")}
    is_whole = len(set(names)) == len(names) and all(owner_of(part) in weights for part in names)
    return found if is_whole else {}


def _stack(artifact: Artifact, entry: ParameterEntry) -> Stack | None:
    """How one stacked parameter is made; None when it is not joined of whole tensors of single experts."""
    num_experts, num_sources = entry.shape[0], len(entry.sources)
    if entry.conversion < 0 or num_sources % num_experts or len(entry.shape) not in _SMALL:
        return None
    shape = _SMALL[len(entry.shape)]
    size = torch.Size(shape).numel()
    sources = [torch.arange(size).reshape(shape) + number * size for number in range(num_sources)]
    run = Run(device=torch.device("cpu"), dtype=torch.int64)
    program: Callable[..., dict[str, torch.Tensor]] = artifact.conversions[entry.conversion]
    try:
        made = program(None, **{f"source_{number}": source for number, source in enumerate(sources)}, run=run)["value"]
    except (RuntimeError, IndexError, TypeError):
        return None  # it wants tensors of one size only
    for axis in range(len(shape)):
        for is_transposed in (False, True) if len(shape) > 1 else (False,):
            orders = [_order(one, sources, axis, num_sources // num_experts, is_transposed) for one in made]
            parts = [_names(entry, order, expert) for expert, order in enumerate(orders)]
            if len(made) == num_experts and all(parts):
                return Stack(parts=tuple(parts), axis=axis, is_transposed=is_transposed)
    return None


def _order(one: torch.Tensor, sources: list[torch.Tensor], axis: int, num_parts: int, is_transposed: bool) -> list[int]:
    """Which sources one expert's tensor is joined of; empty when it is not."""
    if one.shape[axis] % num_parts:
        return []
    size = sources[0].numel()
    parts = [part.T if is_transposed else part for part in one.chunk(num_parts, axis)]
    order = [int(part.flatten()[0]) // size for part in parts]
    is_joined = len(parts) == num_parts and all(
        torch.equal(part, sources[number]) for part, number in zip(parts, order, strict=True)
    )
    return order if is_joined else []


def _names(entry: ParameterEntry, order: list[int], expert: int) -> tuple[str, ...]:
    """Names of an expert's parameters, after those of the checkpoint's tensors; empty when these do not tell."""
    names = []
    for number in order:
        found = _KEY.search(entry.sources[number])
        if found is None or int(found[1]) != expert:
            return ()
        names.append(f"{found[1]}.{found[2]}.{found[3]}")
    return tuple(names)


def _entries(entry: ParameterEntry, name: str, stack: Stack) -> dict[str, ParameterEntry]:
    """The tables' entries of the parameters that a stacked one is made of."""
    sources = {_local(key): key for key in entry.sources}
    shape = list(entry.shape[1:])
    shape[stack.axis] //= len(stack.parts[0])
    own = tuple(reversed(shape)) if stack.is_transposed else tuple(shape)
    num_bytes = entry.bytes * torch.Size(own).numel() // max(1, torch.Size(entry.shape).numel())
    return {
        f"{name}.{part}": ParameterEntry(
            shape=own, dtype=entry.dtype, bytes=num_bytes, sources=(sources[part],), conversion=-1, tied_to=""
        )
        for parts in stack.parts
        for part in parts
    }


def _local(key: str) -> str:
    found = _KEY.search(key)
    assert found is not None, "its name was understood before"
    return f"{found[1]}.{found[2]}.{found[3]}"
