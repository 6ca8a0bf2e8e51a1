"""Split a mixture's stacked experts into one Linear module for each matrix of each expert.

transformers stacks the matrices of all experts when it loads a checkpoint. Calibration needs them apart: to stream,
measure and quantize each, and to write it under its own name. So one stacked parameter of the artifact's tables becomes
one parameter for each tensor that it is composed of, as the manifest states.

If the checkpoint has stacked tensors, each part is a view of one of them (`runtime.experts.checkpoint_view`), and its
name is that of the model's module, the expert's number, and gate_proj, up_proj or down_proj: the names that
llm-compressor writes. Not all readers know them: see `runtime.quantize.reader_limits`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from runtime.arguments import shown
from runtime.chain import Artifact
from runtime.errors import ArtifactError, UsageError
from runtime.experts.checkpoint_view import split_checkpoint
from runtime.experts.tables import MixtureSplit, split_groups, split_mixture
from runtime.model.experts import Mixture, input_place, owner_of
from runtime.model.leaves import build_leaf

if TYPE_CHECKING:
    from runtime.artifact.manifest import Manifest, ParameterEntry, SubgraphEntry
    from runtime.checkpoint.reader import Checkpoint


@dataclass(kw_only=True)
class SplitArtifact(Artifact):
    """An artifact whose tables have a parameter for each matrix of each expert.

    Attributes:
        whole: the artifact as it was loaded.
        mixtures: how the experts of a module are split, by the module's name.
    """

    whole: Artifact
    mixtures: Mapping[str, MixtureSplit] = field(default_factory=dict)

    @property
    def compiled_parameters(self) -> Mapping[str, ParameterEntry]:
        """The parameter table as compiled."""
        return self.whole.manifest.parameters

    def empty_model(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Build the module tree, with a Linear module for each matrix of each expert."""
        model = self.whole.empty_model(dtype)
        for name, split in self.mixtures.items():
            try:
                self._mixture(model, name).split(split.stacks, dict(self._linears(name, split, dtype)))
            except (KeyError, ValueError, TypeError, AttributeError) as error:
                raise ArtifactError(f"the experts {name} cannot be split: {error}", hint="compile again") from error
        return model

    def _mixture(self, model: nn.Module, name: str) -> Mixture:
        """Find the mixture of this name; in a tree of the model's own classes it replaces theirs."""
        inner = model.get_submodule(name)
        if isinstance(inner, Mixture):
            return inner
        experts = self._build_mixture(name)
        for own, module in inner.named_children():
            experts.add_module(own, module)
        owner, _, own = name.rpartition(".")
        model.get_submodule(owner).add_module(own, experts)
        return experts

    def _build_mixture(self, name: str) -> Mixture:
        manifest = self.whole.manifest
        kind = manifest.leaf_kinds[manifest.leaves[name]]
        stacked = kind.options["stacked"]
        shapes = {
            own: entry.shape
            for key, entry in manifest.parameters.items()
            if key.startswith(f"{name}.") and ("." not in (own := key.removeprefix(f"{name}.")) or own in stacked)
        }
        module = build_leaf(kind, name, shapes, self.whole.leaf_programs.get(kind.program))
        assert isinstance(module, Mixture), "its kind says so"
        return module

    def seen(self, checkpoint: Checkpoint) -> Checkpoint:
        """Adapt the checkpoint: a tensor for each matrix of each expert."""
        stored = [stack for split in self.mixtures.values() for stack in split.stored]
        return split_checkpoint(checkpoint, stored) if stored else checkpoint

    def owners(self, names: Iterable[str]) -> list[str]:
        """List the mixtures that any of these modules is a part of."""
        mixtures = {module: owner for module, (owner, _, _) in self.inputs(all_tokens=False).items()}
        return list(dict.fromkeys(mixtures[name] for name in names if name in mixtures))

    def inputs(self, *, all_tokens: bool) -> dict[str, tuple[str, int, int]]:
        """Return a value for each module of an expert that is equal for modules with the same input.

        Args:
            all_tokens: whether experts are called with all tokens, so that the layer's input is one for all of them.
        """
        return {
            f"{name}.{owner}": (name, stack.input, input_place(stack.input, expert, all_tokens=all_tokens))
            for name, split in self.mixtures.items()
            for stack in split.stacks.values()
            if not stack.is_of_biases
            for expert in range(len(stack.parts))
            for owner in stack.modules(expert)
        }

    def _linears(self, name: str, split: MixtureSplit, dtype: torch.dtype | None) -> Iterator[tuple[str, nn.Linear]]:
        names = [key.removeprefix(f"{name}.") for own in split.entries.values() for key in own]
        names += split.spare
        biases = {owner_of(part) for part in names if part.endswith(".bias")}
        for part in names:
            owner, _, own = part.rpartition(".")
            if own == "weight":
                rows, columns = self.manifest.parameters[f"{name}.{part}"].shape
                linear = _Unfilled(columns, rows, bias=owner in biases, device="meta", dtype=dtype)
                linear.__class__ = nn.Linear  # type: ignore[assignment]
                yield owner, linear


class _Unfilled(nn.Linear):
    """A Linear module without initial numbers, which take seconds for thousands of modules, even on the meta device."""

    def reset_parameters(self) -> None:
        """Leave the parameters as they are."""


def expert_of(artifact: Artifact) -> dict[str, tuple[str, int]]:
    """Return for each module of a split expert the mixture's name and the expert's index."""
    if not isinstance(artifact, SplitArtifact):
        return {}
    return {name: (owner, expert) for name, (owner, _, expert) in artifact.inputs(all_tokens=False).items()}


def siblings_of(artifact: Artifact) -> dict[str, Hashable]:
    """Return a value for each module that is equal for modules with the same input, of one expert if of any: those that
    an engine may join.
    """
    tables = artifact.whole.manifest if isinstance(artifact, SplitArtifact) else artifact.manifest
    found: dict[str, Hashable] = {
        name: number for number, group in enumerate(tables.scale_groups) for name in group.modules
    }
    return found | artifact.inputs(all_tokens=False) if isinstance(artifact, SplitArtifact) else found


def split_experts(
    artifact: Artifact, checkpoint: Checkpoint | None = None, *, only: Collection[str] | None = None
) -> Artifact:
    """Split the experts of an artifact.

    Experts that a quantized checkpoint has stacked stay stacked: they are not quantized.

    Args:
        artifact: returned as it is if it has no experts that can be split.
        checkpoint: None for one that has the tensors stated in the manifest.
        only: the mixtures to split; None for all.
    """
    tables = artifact.manifest
    wanted = [name for name in tables.mixtures if only is None or name in only]
    found = {name: split for name in wanted if (split := split_mixture(artifact, name, checkpoint)) is not None}
    if not found:
        return artifact
    manifest = _split_tables(tables, found)
    subgraphs = tuple(
        dataclasses.replace(subgraph, entry=entry)
        for subgraph, entry in zip(artifact.subgraphs, manifest.subgraphs, strict=True)
    )
    fields = {entry.name: getattr(artifact, entry.name) for entry in dataclasses.fields(Artifact)}
    return SplitArtifact(**{**fields, "manifest": manifest, "subgraphs": subgraphs}, whole=artifact, mixtures=found)


def _split_tables(tables: Manifest, splits: Mapping[str, MixtureSplit]) -> Manifest:
    """Return the manifest in which each expert's own parameters replace the stacked ones."""
    replaced = {f"{name}.{own}": new for name, split in splits.items() for own, new in split.entries.items()}
    parameters = {
        new: entry for old, own in tables.parameters.items() for new, entry in replaced.get(old, {old: own}).items()
    }
    for name, split in splits.items():
        parameters.update({f"{name}.{part}": entry for part, entry in split.spare.items()})

    def with_parts(entry: SubgraphEntry) -> SubgraphEntry:
        names = (new for old in entry.parameters for new in replaced.get(old, (old,)))
        return dataclasses.replace(entry, parameters=tuple(names))

    return dataclasses.replace(
        tables,
        parameters=parameters,
        scale_groups=split_groups(tables, splits),
        subgraphs=tuple(map(with_parts, tables.subgraphs)),
    )


def require_artifact(value: Any) -> Artifact:
    """Return a loaded artifact.

    Raises:
        UsageError: for anything else, a path for instance.
    """
    if isinstance(value, Artifact):
        return value
    raise UsageError(f"artifact is {shown(value)}", hint="it must be what runtime.load(path) returns")
