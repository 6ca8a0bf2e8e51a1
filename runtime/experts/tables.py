"""How the stacked experts of an artifact's modules come apart: by the checkpoint's names, or by what an expert does."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from runtime.artifact.manifest import LeafKind, ParameterEntry
from runtime.experts.channel_flow import first_stacks, opened_rows
from runtime.experts.checkpoint_view import HeldStack
from runtime.experts.layout_from_conversion import is_by_expert, joined_stack, local_name, program_of
from runtime.experts.layout_from_program import stacks_of
from runtime.experts.scale_groups import Insides
from runtime.model.experts import Mixture, Stack, owner_of, stack_shape
from runtime.model.leaves import build_leaf
from runtime.weights.parameters import spellings

if TYPE_CHECKING:
    from runtime.chain import Artifact
    from runtime.checkpoint.reader import Checkpoint


@dataclass(frozen=True, kw_only=True, slots=True)
class Apart:
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


class Understood:
    """Finds out how the experts of an artifact's modules come apart; those of one kind do it alike."""

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        self._watched: dict[Any, dict[str, Stack]] = {}
        self._insides: dict[Any, Insides] = {}
        self._by_expert: dict[Any, bool] = {}

    def module(self, name: str, checkpoint: Checkpoint | None) -> Apart | None:
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
            keys = {part: f"{prefix}.{part}" for part in part_names(stacks)}
        if not stacks or not _is_whole(stacks):
            return None
        return Apart(
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
        is_stored = len(entry.sources) == 1 and not joined  # otherwise the only expert's own tensor
        wanted = (*(entry.sources if is_stored else ()), name)
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
        module, shapes = mixture_of(self.artifact, name), _shapes(self.artifact, name, inner=True)
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


def mixture_of(artifact: Artifact, name: str) -> Mixture:
    """The module of experts that the host builds for this name, all of them stacked."""
    kind = _kind(artifact, name)
    module = build_leaf(kind, name, _shapes(artifact, name), artifact.leaf_programs.get(kind.program))
    assert isinstance(module, Mixture), "its kind says so"
    return module


def part_names(stacks: Mapping[str, Stack]) -> list[str]:
    """The names of all parameters that stacks are made of, below the experts' module."""
    return [part for stack in stacks.values() for parts in stack.parts for part in parts]


def _is_whole(stacks: Mapping[str, Stack]) -> bool:
    """Whether each matrix is there once, and none but what belongs to one; and an expert's have one number in all."""
    names = part_names(stacks)
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


def part_entries(entry: ParameterEntry, name: str, stack: Stack, keys: Mapping[str, str]) -> dict[str, ParameterEntry]:
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
    used = dict.fromkeys(part_names(stacks))
    found: dict[str, ParameterEntry] = {}
    for own, entry in entries.items():
        left = {local_name(key): key for key in entry.sources if local_name(key) not in used}
        shape = stacks[own].part_shape(entry.shape)
        num_bytes = entry.bytes * torch.Size(shape).numel() // max(1, torch.Size(entry.shape).numel())
        for part, key in left.items():
            found[part] = dataclasses.replace(entry, shape=shape, bytes=num_bytes, sources=(key,), conversion=-1)
    return found
