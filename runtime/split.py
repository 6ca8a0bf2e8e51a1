"""Take a mixture's stacked experts apart, into Linear modules by the checkpoint's own names.

A checkpoint mostly has a tensor for each matrix of each expert; transformers stacks them when it loads. Calibration
wants them apart: to stream them one by one, to measure and quantize each, and to write them back under their names. So
the tables of an artifact are rewritten: what was one stacked parameter becomes one parameter for each tensor that it is
made from. How it is made is read off the conversion itself, by running it on small numbered tensors.

Where the checkpoint has them stacked, it is read off what an expert does (`runtime.stacked`), and their tensors are
parts of the stacked one (`runtime.held`). Their names are then those of the model's module, the expert's number, and
gate_proj, up_proj and down_proj: what llm-compressor writes, and vLLM reads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from runtime.artifact import Artifact, LoadedSubgraph
from runtime.expert_flow import first_stacks, opened_rows
from runtime.expert_groups import Insides, groups_apart, siblings_apart
from runtime.experts import Mixture, Stack, input_place, input_positions, owner_of, stack_shape
from runtime.held import HeldStack, experts_apart
from runtime.joined import is_by_expert, joined_stack, local_name, program_of
from runtime.leaves import MIXTURES, build_leaf
from runtime.manifest import LeafKind, ParameterEntry
from runtime.stacked import stacks_of
from runtime.weights import spellings

if TYPE_CHECKING:
    from runtime.checkpoint import Checkpoint


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
        experts = _leaf(self.whole, name)
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
            if any(f"{owner}.{owner_of(part)}" in wanted for part in _parts(stacks))
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
        names = [*_parts(stacks), *self.spare.get(name, ())]
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
    understood = _Understood(artifact)
    found: dict[str, _Apart] = {}
    for name, kind in tables.leaves.items():
        if tables.leaf_kinds[kind].kind in MIXTURES and (only is None or name in only):
            apart = understood.module(name, checkpoint)
            if apart is not None:
                found[name] = apart
    if not found:
        return artifact
    replaced = {
        f"{name}.{stacked}": _entries(apart.entries[stacked], name, stack, apart.keys)
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
    manifest = dataclasses.replace(
        tables,
        parameters=parameters,
        scale_groups=groups_apart(tables, stacks, insides),
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
    return SplitArtifact(
        **{**fields, "manifest": manifest, "subgraphs": subgraphs},
        whole=artifact,
        stacks=stacks,
        insides=insides,
        held=tuple(held for apart in found.values() for held in apart.held),
        named_anew=tuple(name for name, apart in found.items() if apart.is_named_anew),
        spare={name: tuple(apart.spare) for name, apart in found.items() if apart.spare},
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Apart:
    """How one module's experts come apart.

    Attributes:
        stacks: by its stacked parameters, how they are made.
        entries: what the tables say of these, with an axis for experts.
        keys: by an expert's own parameters, what the checkpoint calls them.
        held: what the checkpoint holds stacked.
        is_named_anew: whether these names are ours.
        spare: what the tables say of tensors that no expert uses, by the names that these would have.
    """

    stacks: Mapping[str, Stack]
    entries: Mapping[str, ParameterEntry]
    keys: Mapping[str, str]
    held: tuple[HeldStack, ...]
    is_named_anew: bool
    spare: Mapping[str, ParameterEntry]


class _Understood:
    """Finds out how the experts of an artifact's modules come apart; those of one kind do it alike."""

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        self._watched: dict[Any, dict[str, Stack]] = {}
        self._insides: dict[Any, Insides] = {}
        self._by_expert: dict[Any, bool] = {}

    def module(self, name: str, checkpoint: Checkpoint | None) -> _Apart | None:
        """How those of one module do; None where that is not known, or where they are to stay."""
        manifest = self.artifact.manifest
        kind = manifest.leaf_kinds[manifest.leaves[name]]
        stacked = [str(own) for own in kind.options["stacked"]]
        flat = [str(own) for own in kind.options.get("flat", ())]
        whole = {own: manifest.parameters[f"{name}.{own}"] for own in stacked}
        if any(whole[own].conversion >= 0 for own in flat):
            return None  # what it makes has no axis for experts
        entries = {own: _by_expert(entry, _num_experts(kind), own in flat) for own, entry in whole.items()}
        stacks, keys = self._joined(entries), {}
        found = {own: self._held(f"{name}.{own}", entry, checkpoint, stacks) for own, entry in whole.items()}
        held = {own: names for own, names in found.items() if names}
        if held and (len(held) < len(stacked) or (checkpoint is not None and checkpoint.is_quantized)):
            return None
        is_named_anew = not stacks
        if stacks:
            keys = {local_name(key): key for entry in entries.values() for key in entry.sources}
        elif all(self._is_by_expert(entry) for entry in entries.values()):
            stacks = self._watch(name)
            first = held[stacked[0]][0] if held else entries[stacked[0]].sources[0]
            prefix = checkpoint_name(first, f"{name}.{stacked[0].rpartition('.')[2]}")
            keys = {part: f"{prefix}.{part}" for part in _parts(stacks)}
        if not stacks or not _is_whole(stacks):
            return None
        return _Apart(
            stacks=stacks,
            entries=entries,
            keys=keys,
            held=tuple(
                HeldStack(
                    sources=sources,
                    shape=entries[own].shape,
                    stack=stacks[own],
                    keys=keys,
                    program=program_of(self.artifact, whole[own]) if sources[0] in self._spelled(whole[own]) else None,
                    is_flat=own in flat,
                )
                for own, sources in held.items()
            ),
            is_named_anew=is_named_anew,
            spare={} if is_named_anew else self._spare(entries, stacks, checkpoint),
        )

    def _held(
        self, name: str, entry: ParameterEntry, checkpoint: Checkpoint | None, joined: Mapping[str, Stack]
    ) -> tuple[str, ...]:
        """What the checkpoint calls a stacked parameter, or the stacks that it is made of; nothing where these are an
        expert's own.
        """
        if checkpoint is None:
            return ()
        prefix = self.artifact.manifest.model.base_model_prefix
        if len(entry.sources) > 1 and not joined:
            found = [next((key for key in spellings(own, prefix) if key in checkpoint), "") for own in entry.sources]
            if all(found):
                return tuple(found)
        wanted = (*(entry.sources if len(entry.sources) == 1 else ()), name)
        return next(((key,) for own in wanted for key in spellings(own, prefix) if key in checkpoint), ())

    def _spare(
        self, entries: Mapping[str, ParameterEntry], stacks: Mapping[str, Stack], checkpoint: Checkpoint | None
    ) -> dict[str, ParameterEntry]:
        """What of the tensors that are no expert's the checkpoint has."""
        found = _spare(entries, stacks)
        if checkpoint is None:
            return found
        return {part: entry for part, entry in found.items() if any(key in checkpoint for key in self._spelled(entry))}

    def _spelled(self, entry: ParameterEntry) -> list[str]:
        """All names under which a checkpoint may have a parameter's sources."""
        prefix = self.artifact.manifest.model.base_model_prefix
        return [key for own in entry.sources for key in spellings(own, prefix)]

    def _joined(self, entries: Mapping[str, ParameterEntry]) -> dict[str, Stack]:
        """How the stacks are joined of the checkpoint's tensors, if each of these is one expert's."""
        found = {own: joined_stack(self.artifact, entry) for own, entry in entries.items()}
        return {own: stack for own, stack in found.items() if stack is not None} if all(found.values()) else {}

    def _is_by_expert(self, entry: ParameterEntry) -> bool:
        known_by = entry.conversion, entry.shape, len(entry.sources)
        if known_by not in self._by_expert:
            self._by_expert[known_by] = is_by_expert(self.artifact, entry)
        return self._by_expert[known_by]

    def _watch(self, name: str) -> dict[str, Stack]:
        known_by = self._kind_of(name)
        if known_by not in self._watched:
            self._watched[known_by] = stacks_of(*self._runnable(name))
        return self._watched[known_by]

    def insides(self, name: str) -> Insides:
        """What an expert of a module does."""
        known_by = self._kind_of(name)
        if known_by not in self._insides:
            module, shapes = self._runnable(name)
            self._insides[known_by] = Insides(firsts=first_stacks(module, shapes), opened=opened_rows(module, shapes))
        return self._insides[known_by]

    def _kind_of(self, name: str) -> Any:
        return self.artifact.manifest.leaves[name], tuple(_shapes(self.artifact, name).items())

    def _runnable(self, name: str) -> tuple[Mixture, dict[str, tuple[int, ...]]]:
        """The module, and its parameters' shapes with an axis for experts."""
        module, shapes = _leaf(self.artifact, name), _shapes(self.artifact, name, inner=True)
        return module, shapes | {own: stack_shape(shapes[own], module.num_experts) for own in module.flat}


def _shapes(artifact: Artifact, name: str, *, inner: bool = False) -> dict[str, tuple[int, ...]]:
    """The shapes of a module's own parameters, and of those in it."""
    parameters = artifact.manifest.parameters
    below = [own.removeprefix(f"{name}.") for own in parameters if own.startswith(f"{name}.")]
    stacked = _kind(artifact, name).options["stacked"]
    return {own: parameters[f"{name}.{own}"].shape for own in below if inner or "." not in own or own in stacked}


def _kind(artifact: Artifact, name: str) -> LeafKind:
    return artifact.manifest.leaf_kinds[artifact.manifest.leaves[name]]


def _num_experts(kind: LeafKind) -> int:
    return int(kind.options["num_experts"][0])


def _by_expert(entry: ParameterEntry, num_experts: int, is_flat: bool) -> ParameterEntry:
    """What the tables say of a stacked parameter, as one whose first axis is the expert: those with weights."""
    shape = stack_shape(entry.shape, num_experts) if is_flat else (num_experts, *entry.shape[1:])
    num_bytes = entry.bytes * torch.Size(shape).numel() // max(1, torch.Size(entry.shape).numel())
    return dataclasses.replace(entry, shape=shape, bytes=num_bytes)


def _leaf(artifact: Artifact, name: str) -> Mixture:
    """The module of experts that the host builds for this name, all of them stacked."""
    kind = _kind(artifact, name)
    module = build_leaf(kind, name, _shapes(artifact, name), artifact.leaf_programs.get(kind.program))
    assert isinstance(module, Mixture), "its kind says so"
    return module


def _parts(stacks: Mapping[str, Stack]) -> list[str]:
    return [part for stack in stacks.values() for parts in stack.parts for part in parts]


def _is_whole(stacks: Mapping[str, Stack]) -> bool:
    """Whether each matrix is there once, and none but what belongs to one; and an expert's have one number in all."""
    names = _parts(stacks)
    weights = {owner_of(part) for part in names if part.endswith(".weight")}
    numbers = [
        dict.fromkeys(part.partition(".")[0] for parts in own for part in parts)
        for own in zip(*(stack.parts for stack in stacks.values()), strict=True)
    ]
    is_numbered = all(len(own) == 1 for own in numbers) and len({next(iter(own)) for own in numbers}) == len(numbers)
    return is_numbered and len(set(names)) == len(names) and all(owner_of(part) in weights for part in names)


def checkpoint_name(key: str, name: str) -> str:
    """What the checkpoint would call the module of a stacked parameter, if it had one.

    Names differ above the layers (`model.language_model` or `language_model.model`) and in what layers hold; as far as
    the layer's number it is the checkpoint's name, and from there on the model's.
    """
    parts, own = key.split("."), name.split(".")[:-1]
    numbers = [[place for place, part in enumerate(names) if part.isdigit()] for names in (parts, own)]
    if not all(numbers):
        return ".".join(own)
    return ".".join([*parts[: numbers[0][-1] + 1], *own[numbers[1][-1] + 1 :]])


def _entries(entry: ParameterEntry, name: str, stack: Stack, keys: Mapping[str, str]) -> dict[str, ParameterEntry]:
    """The tables' entries of the parameters that a stacked one is made of."""
    own = stack.part_shape(entry.shape)
    num_bytes = entry.bytes * torch.Size(own).numel() // max(1, torch.Size(entry.shape).numel())
    return {
        f"{name}.{part}": ParameterEntry(
            shape=own, dtype=entry.dtype, bytes=num_bytes, sources=(keys[part],), conversion=-1, tied_to=""
        )
        for parts in stack.parts
        for part in parts
    }


def _spare(entries: Mapping[str, ParameterEntry], stacks: Mapping[str, Stack]) -> dict[str, ParameterEntry]:
    """Entries of the tensors that are in a stack and are no expert's: it has rows for those without weights, too."""
    used = dict.fromkeys(_parts(stacks))
    found: dict[str, ParameterEntry] = {}
    for own, entry in entries.items():
        left = {local_name(key): key for key in entry.sources if local_name(key) not in used}
        shape = stacks[own].part_shape(entry.shape)
        num_bytes = entry.bytes * torch.Size(shape).numel() // max(1, torch.Size(entry.shape).numel())
        for part, key in left.items():
            found[part] = dataclasses.replace(entry, shape=shape, bytes=num_bytes, sources=(key,), conversion=-1)
    return found
