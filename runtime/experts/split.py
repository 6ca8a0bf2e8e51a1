"""Take a mixture's stacked experts apart, into Linear modules by the checkpoint's own names.

A checkpoint mostly has a tensor for each matrix of each expert; transformers stacks them when it loads. Calibration
wants them apart: to stream them one by one, to measure and quantize each, and to write them back under their names. So
the tables of an artifact are rewritten: what was one stacked parameter becomes one parameter for each tensor that it is
made from. How it is made is read off the conversion itself, by running it on small numbered tensors.

Where the checkpoint has them stacked, it is read off what an expert does (`runtime.experts.layout_from_program`), and
their tensors are parts of the stacked one (`runtime.experts.checkpoint_view`). Their names are then those of the
model's module, the expert's number, and gate_proj, up_proj and down_proj: what llm-compressor writes. Not all readers
know them: see `runtime.quantize.reader_limits`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from runtime.arguments import shown
from runtime.artifact.manifest import MIXTURES
from runtime.chain import Artifact, LoadedSubgraph
from runtime.errors import UsageError
from runtime.experts.checkpoint_view import HeldStack, experts_apart
from runtime.experts.scale_groups import Insides, groups_apart, siblings_apart
from runtime.experts.tables import Apart, Understood, mixture_of, part_entries, part_names
from runtime.model.experts import Mixture, Stack, input_place, input_positions, owner_of

if TYPE_CHECKING:
    from runtime.artifact.manifest import ParameterEntry, SubgraphEntry
    from runtime.checkpoint.reader import Checkpoint


@dataclass(kw_only=True)
class SplitArtifact(Artifact):
    """An artifact whose tables have experts apart.

    Attributes:
        whole: the artifact as it was read.
        stacks: by the name of a module of experts, how its stacked parameters are made.
        held: what the checkpoint holds stacked all the same.
        insides: by the same names, what an expert does.
        named_anew: modules whose experts' matrices have no names of their own in the original checkpoint.
        spare: by the name of a module of experts, parameters that a checkpoint has and no expert uses.
    """

    whole: Artifact
    stacks: Mapping[str, Mapping[str, Stack]] = field(default_factory=dict)
    insides: Mapping[str, Insides] = field(default_factory=dict)
    held: tuple[HeldStack, ...] = ()
    named_anew: tuple[str, ...] = ()
    spare: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def compiled_parameters(self) -> Mapping[str, ParameterEntry]:
        """The table before experts were taken apart."""
        return self.whole.manifest.parameters

    def empty_model(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The module tree, with a Linear module for each matrix of each expert."""
        model = self.whole.empty_model(dtype)
        for name, stacks in self.stacks.items():
            self._mixture(model, name).split(stacks, dict(self._linears(name, stacks, dtype)))
        return model

    def _mixture(self, model: nn.Module, name: str) -> Mixture:
        """The module of experts of this name. In a tree of the model's own classes it takes the place of theirs: what
        calls it sees no difference.
        """
        inner = model.get_submodule(name)
        if isinstance(inner, Mixture):
            return inner
        experts = mixture_of(self.whole, name)
        for own, module in inner.named_children():
            experts.add_module(own, module)
        owner, _, own = name.rpartition(".")
        model.get_submodule(owner).add_module(own, experts)
        return experts

    def seen(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint, with a tensor for each matrix of each expert."""
        return experts_apart(checkpoint, self.held) if self.held else checkpoint

    def owners(self, names: Iterable[str]) -> list[str]:
        """The modules of experts that any of these modules is a part of."""
        wanted = dict.fromkeys(names)
        return [
            owner
            for owner, stacks in self.stacks.items()
            if any(f"{owner}.{owner_of(part)}" in wanted for part in part_names(stacks))
        ]

    def inputs(self, *, all_tokens: bool) -> dict[str, tuple[str, int, int]]:
        """For each module of an expert, what it is called with: modules of one input have one value.

        Args:
            all_tokens: whether experts are called with all tokens, so that the layer's input is one for all of them.
        """
        found: dict[str, tuple[str, int, int]] = {}
        for name, stacks in self.stacks.items():
            positions = input_positions(stacks)
            for own, stack in stacks.items():
                position = positions[own]
                if stack.is_of_biases:
                    continue
                for expert in range(len(stack.parts)):
                    place = input_place(position, expert, all_tokens=all_tokens)
                    found.update({f"{name}.{owner}": (name, position, place) for owner in stack.modules(expert)})
        return found

    def _linears(
        self, name: str, stacks: Mapping[str, Stack], dtype: torch.dtype | None
    ) -> Iterator[tuple[str, nn.Linear]]:
        names = [*part_names(stacks), *self.spare.get(name, ())]
        biases = {owner_of(part) for part in names if part.endswith(".bias")}
        for part in names:
            owner, _, own = part.rpartition(".")
            if own == "weight":
                rows, columns = self.manifest.parameters[f"{name}.{part}"].shape
                yield owner, nn.Linear(columns, rows, bias=owner in biases, device="meta", dtype=dtype)


def expert_of(artifact: Artifact) -> dict[str, tuple[str, int]]:
    """For each module of an expert that is apart the mixture's name and the expert's number."""
    if not isinstance(artifact, SplitArtifact):
        return {}
    return {name: (owner, expert) for name, (owner, _, expert) in artifact.inputs(all_tokens=False).items()}


def siblings_of(artifact: Artifact) -> dict[str, Hashable]:
    """For each module that an engine may join with others something that is equal for these: they read one tensor, and
    are of one expert, if of any.
    """
    tables = artifact.whole.manifest if isinstance(artifact, SplitArtifact) else artifact.manifest
    found: dict[str, Hashable] = {
        name: number for number, group in enumerate(tables.scale_groups) for name in group.modules
    }
    if isinstance(artifact, SplitArtifact):
        found |= siblings_apart(artifact.stacks, artifact.insides)
    return found


def _with_parts(
    entries: Sequence[SubgraphEntry], replaced: Mapping[str, Mapping[str, ParameterEntry]]
) -> tuple[SubgraphEntry, ...]:
    """The subgraphs' entries, with the parts of each stacked parameter in its place."""
    return tuple(
        dataclasses.replace(
            entry, parameters=tuple(new for old in entry.parameters for new in replaced.get(old, {old: None}))
        )
        for entry in entries
    )


def split_experts(
    artifact: Artifact, checkpoint: Checkpoint | None = None, *, only: Collection[str] | None = None
) -> Artifact:
    """The artifact with its experts apart.

    Experts that a checkpoint has stacked are taken apart as they are read. In a quantized one they stay as they are:
    nobody has quantized them.

    Args:
        artifact: a portable one, or one without experts of the host's own: then it is returned as it is.
        checkpoint: None for one that has its experts as the artifact's tables say.
        only: the modules of experts to take apart; None for all.
    """
    tables = artifact.manifest
    understood = Understood(artifact)
    found: dict[str, Apart] = {}
    for name, kind in tables.leaves.items():
        if tables.leaf_kinds[kind].kind in MIXTURES and (only is None or name in only):
            apart = understood.module(name, checkpoint)
            if apart is not None:
                found[name] = apart
    if not found:
        return artifact
    replaced = {
        f"{name}.{stacked}": part_entries(apart.entries[stacked], name, stack, apart.keys)
        for name, apart in found.items()
        for stacked, stack in apart.stacks.items()
    }
    parameters = {
        new: entry
        for old, own in tables.parameters.items()
        for new, entry in (replaced[old].items() if old in replaced else [(old, own)])
    }
    for name, apart in found.items():
        parameters.update({f"{name}.{part}": entry for part, entry in apart.spare.items()})
    stacks = {name: apart.stacks for name, apart in found.items()}
    insides = {name: understood.insides(name) for name in found}
    groups = groups_apart(tables, stacks, insides)
    manifest = dataclasses.replace(tables, parameters=parameters, scale_groups=groups)
    manifest = dataclasses.replace(manifest, subgraphs=_with_parts(tables.subgraphs, replaced))
    subgraphs: tuple[LoadedSubgraph, ...] = tuple(
        dataclasses.replace(subgraph, entry=entry)
        for subgraph, entry in zip(artifact.subgraphs, manifest.subgraphs, strict=True)
    )
    fields = {entry.name: getattr(artifact, entry.name) for entry in dataclasses.fields(Artifact)}
    return SplitArtifact(
        **{**fields, "manifest": manifest, "subgraphs": subgraphs},
        whole=artifact,
        stacks=stacks,
        insides=insides,
        held=tuple(held for apart in found.values() for held in apart.held),
        named_anew=tuple(name for name, apart in found.items() if apart.is_named_anew),
        spare={name: tuple(apart.spare) for name, apart in found.items() if apart.spare},
    )


def require_artifact(value: Any) -> Artifact:
    """A loaded artifact.

    Raises:
        UsageError: for anything else, a path for instance.
    """
    from runtime.chain import Artifact

    if isinstance(value, (Artifact, SplitArtifact)):
        return value
    raise UsageError(f"artifact is {shown(value)}", hint="it must be what runtime.load(path) returns")
