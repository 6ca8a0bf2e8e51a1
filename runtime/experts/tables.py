"""Apply an expert layout of the manifest to a checkpoint: names, table entries and scale groups of single experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from runtime.artifact.expert_tables import by_expert, part_shape, resized
from runtime.artifact.manifest import ExpertPair, Manifest, ParameterEntry, ScaledParameter, ScaleGroup
from runtime.artifact.scale_groups import numbers_of
from runtime.checkpoint.names import checkpoint_name, spellings
from runtime.experts.checkpoint_view import StoredStack
from runtime.model.experts import Stack

if TYPE_CHECKING:
    from runtime.chain import Artifact
    from runtime.checkpoint.reader import Checkpoint


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtureSplit:
    """How the experts of one mixture are split.

    Attributes:
        numbers: the experts' numbers in names.
        is_named: whether the original checkpoint names the experts' matrices.
        pair: modules of each expert that can be scaled against each other, if any.
        stacks: the composition of each stacked parameter, by its name in the mixture.
        entries: by stacked parameter, the table entries of its parts, by their names in the model.
        spare: entries of the tensors that are stacked too, and that no expert with weights uses.
        stored: the tensors that the checkpoint has stacked.
    """

    numbers: Sequence[int]
    is_named: bool
    pair: ExpertPair | None
    stacks: dict[str, Stack] = field(default_factory=dict)
    entries: dict[str, dict[str, ParameterEntry]] = field(default_factory=dict)
    spare: dict[str, ParameterEntry] = field(default_factory=dict)
    stored: list[StoredStack] = field(default_factory=list)


def split_mixture(artifact: Artifact, name: str, checkpoint: Checkpoint | None) -> MixtureSplit | None:
    """Split the experts of a mixture by the manifest's layout.

    Args:
        artifact: states the layout.
        name: of the mixture.
        checkpoint: None for one that has the tensors stated in the manifest.

    Returns:
        None for a checkpoint that has only some parameters stacked, or is quantized and has stacks: their experts are
        not quantized.
    """
    manifest = artifact.manifest
    place, options = manifest.mixtures[name], manifest.leaf_kinds[manifest.leaves[name]].options
    layout, flat = manifest.expert_layouts[place.layout], options.get("flat", ())
    whole = {stack.name: manifest.parameters[f"{name}.{stack.name}"] for stack in layout.stacks}
    tensors = _Tensors(checkpoint, manifest.model.base_model_prefix)
    keys = {
        own: tensors.stacked(f"{name}.{own}", () if layout.is_named else entry.sources) for own, entry in whole.items()
    }
    is_stacked = any(keys.values())
    if is_stacked and (not all(keys.values()) or (checkpoint is not None and checkpoint.is_quantized)):
        return None
    prefix = place.prefix
    if is_stacked and not layout.is_named:  # the checkpoint may use another spelling than the manifest
        first = layout.stacks[0].name
        prefix = checkpoint_name(keys[first][0], f"{name}.{first.rpartition('.')[2]}")
    numbers = numbers_of(layout.numbers)
    split = MixtureSplit(numbers=numbers, is_named=layout.is_named, pair=layout.pairs[0] if layout.pairs else None)
    for stack in layout.stacks:
        own, entry = stack.name, whole[stack.name]
        sliced = by_expert(entry, int(options["num_experts"][0]), is_flat=own in flat)
        part = dataclasses.replace(resized(sliced, part_shape(stack, sliced.shape)), conversion=-1, tied_to="")
        split.stacks[own] = Stack.of(stack, numbers)
        sources = {name: f"{prefix}.{name}" for names in split.stacks[own].parts for name in names}
        split.entries[own] = {f"{name}.{p}": dataclasses.replace(part, sources=(key,)) for p, key in sources.items()}
        used = set(sources.values()) if layout.is_named else set(entry.sources)
        for key in (key for key in entry.sources if key not in used and tensors.may_have(key)):
            split.spare[key.removeprefix(f"{prefix}.")] = dataclasses.replace(part, sources=(key,))
        if is_stacked:
            is_made = entry.conversion >= 0 and keys[own][0] in tensors.spelled(entry.sources[0])
            split.stored.append(
                StoredStack(
                    sources=keys[own],
                    shape=sliced.shape,
                    stack=split.stacks[own],
                    prefix=prefix,
                    program=artifact.conversions[entry.conversion] if is_made else None,
                    is_flat=own in flat,
                )
            )
    return split


@dataclass(frozen=True, slots=True)
class _Tensors:
    """The names of a checkpoint's tensors, with the base model's prefix or without."""

    checkpoint: Checkpoint | None
    base: str

    def spelled(self, source: str) -> tuple[str, ...]:
        return spellings(source, self.base)

    def may_have(self, source: str) -> bool:
        return self.checkpoint is None or bool(self._find(source))

    def stacked(self, name: str, sources: Sequence[str]) -> tuple[str, ...]:
        """The stacks that a parameter is made from, or the one under its own name; nothing if it has neither."""
        found = tuple(self._find(source) for source in sources)
        if found and all(found):
            return found
        own = self._find(name)
        return (own,) if own else ()

    def _find(self, source: str) -> str:
        if self.checkpoint is None:
            return ""
        return next((key for key in self.spelled(source) if key in self.checkpoint), "")


def split_groups(manifest: Manifest, splits: Mapping[str, MixtureSplit]) -> tuple[ScaleGroup, ...]:
    """Return the scale groups with modules of experts in the place of stacked parameters, and those inside experts.

    Args:
        manifest: the artifact's own tables.
        splits: the mixtures that are split.
    """
    owners = {f"{name}.{own}": (name, stack) for name, split in splits.items() for own, stack in split.stacks.items()}
    found = [_split_group(group, owners) for group in (*manifest.scale_groups, *manifest.mixture_groups)]
    users = {name: index for index, entry in reversed(list(enumerate(manifest.subgraphs))) for name in entry.parameters}
    for name, split in splits.items():
        subgraph = users.get(f"{name}.{next(iter(split.stacks))}")
        if split.pair is not None and subgraph is not None:
            found += _inside_groups(name, split, split.pair, subgraph)
    return tuple(group for group in found if group.modules)


def _split_group(group: ScaleGroup, owners: Mapping[str, tuple[str, Stack]]) -> ScaleGroup:
    modules, others = dict.fromkeys(group.modules), list[ScaledParameter]()
    for other in group.others:
        if other.name not in owners:
            others.append(other)
            continue
        name, stack = owners[other.name]
        for expert in range(len(stack.parts)):
            modules.update(dict.fromkeys(f"{name}.{owner}" for owner in stack.modules(expert)))
    if len(modules) == len(group.modules):
        return group
    return dataclasses.replace(group, modules=tuple(modules), others=tuple(others))


def _inside_groups(name: str, split: MixtureSplit, pair: ExpertPair, subgraph: int) -> Iterator[ScaleGroup]:
    """Yield for each expert the group of the module whose columns can be scaled."""
    for number in split.numbers:
        inside = f"{name}.{number}."
        yield ScaleGroup(
            subgraph=subgraph,
            modules=(inside + pair.module,),
            producer=f"{inside}{pair.producer}.weight",
            bias=inside + pair.bias if pair.bias else "",
            channels=pair.channels,
        )
