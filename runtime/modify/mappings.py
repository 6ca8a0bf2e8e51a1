"""Which groups of modules a SmoothQuant or AWQ modifier rescales: those the compiler found, or those a recipe names."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runtime.errors import RecipeError
from runtime.jobs import is_plain
from runtime.manifest import ScaleGroup
from runtime.recipe import some

if TYPE_CHECKING:
    from runtime.artifact import Artifact
    from runtime.recipe_transforms import Mapping as NamedMapping
    from runtime.recipe_transforms import Transform
    from runtime.weights import Weights


@dataclass(frozen=True, kw_only=True, slots=True)
class Rescaling:
    """A group, and whether the recipe named it: what nobody has proven is checked by running it."""

    group: ScaleGroup
    is_named: bool


def rescalings(
    artifact: Artifact, source: Weights | None, jobs: Iterable[str], transform: Transform, origin: str
) -> tuple[list[Rescaling], list[str]]:
    """The groups that a modifier rescales, in order of execution.

    Args:
        artifact: has the groups that the compiler has found.
        source: says which parameters are tensors of the checkpoint as they stand; None to go by the manifest.
        jobs: modules that are quantized.
        transform: the modifier.
        origin: the recipe's name, for messages.

    Returns:
        The groups, and remarks on those that had to be left out.

    Raises:
        RecipeError: when there are none, or a mapping fits nothing.
    """
    wanted = dict.fromkeys(jobs)
    remarks: list[str] = []
    if transform.mappings:
        found = [Rescaling(group=group, is_named=True) for group in _named_groups(artifact, transform.mappings, origin)]
    else:
        found = [
            Rescaling(group=group, is_named=False)
            for group in artifact.manifest.scale_groups
            if group.producer and _is_wanted(group, artifact, transform)
        ]
    kept = []
    for rescaling in found:
        group = rescaling.group
        if not any(name in wanted for name in group.modules) or _is_ignored(group, transform.ignore):
            continue
        fixed = _fixed(group, artifact, source, wanted)
        if fixed:
            remarks.append(f"{transform.name} leaves {some(group.modules)} alone: {fixed[0]} cannot be rewritten")
        else:
            kept.append(rescaling)
    if not kept:
        raise RecipeError(
            f"{origin}:{transform.line}: {transform.name} finds nothing to rescale in this artifact",
            hint="compile with --leaves linear, so that the compiler looks for it, or give mappings",
        )
    return kept, remarks


def _is_wanted(group: ScaleGroup, artifact: Artifact, transform: Transform) -> bool:
    """SmoothQuant rescales what norms make, as its paper does; AWQ whatever can be."""
    return transform.algorithm == "awq" or len(artifact.manifest.parameters[group.producer].shape) == 1


def _is_ignored(group: ScaleGroup, ignore: Sequence[str]) -> bool:
    from runtime.schemes import matches_name

    names = (*group.modules, group.producer.removesuffix(".weight"))
    return any(matches_name(pattern, name) for pattern in ignore for name in names)


def _fixed(group: ScaleGroup, artifact: Artifact, source: Weights | None, quantized: Mapping[str, None]) -> list[str]:
    """Parameters of a group that the checkpoint has not as they stand, or under several names, and stacks of experts
    that are apart: these are rounded before anything is rescaled.
    """
    weights = [f"{name}.weight" for name in group.modules]
    names = [name for name in (*weights, group.producer, group.bias, *(o.name for o in group.others)) if name]
    parameters = artifact.manifest.parameters
    tied = {entry.tied_to for entry in parameters.values() if entry.tied_to}
    return [name for name in names if not is_plain(artifact, source, name) or parameters[name].tied_to or name in tied]


def _named_groups(artifact: Artifact, mappings: Sequence[NamedMapping], origin: str) -> Iterator[ScaleGroup]:
    for mapping in mappings:
        found = list(_matches(artifact, mapping))
        if not found:
            raise RecipeError(
                f"{origin}:{mapping.line}: the mapping of {mapping.smooth_layer!r} to "
                f"{', '.join(map(repr, mapping.balance_layers))} fits no modules",
                hint="smooth_layer and each of balance_layers must match modules of one subgraph; "
                "seqbuild inspect shows their names",
            )
        for group in found:
            yield _completed(artifact, group, f"{origin}:{mapping.line}")


def _matches(artifact: Artifact, mapping: NamedMapping) -> Iterator[ScaleGroup]:
    """One group for each module that is smoothed: with those of its subgraph whose names share most with its own."""
    from runtime.schemes import matches_name

    for index, subgraph in enumerate(artifact.manifest.subgraphs):
        modules = [name.removesuffix(".weight") for name in subgraph.parameters if name.endswith(".weight")]
        for producer in (name for name in modules if matches_name(mapping.smooth_layer, name)):
            balanced = [
                name
                for pattern in mapping.balance_layers
                for name in _nearest(producer, [name for name in modules if matches_name(pattern, name)])
            ]
            if balanced:
                bias = f"{producer}.bias"
                yield ScaleGroup(
                    subgraph=index,
                    modules=tuple(dict.fromkeys(balanced)),
                    producer=f"{producer}.weight",
                    bias=bias if bias in subgraph.parameters else "",
                )


def _nearest(producer: str, names: Sequence[str]) -> list[str]:
    """Of several modules those that share the longest part of the producer's path."""

    def shared(name: str) -> int:
        parts = zip(producer.split("."), name.split("."), strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], parts))

    most = max((shared(name) for name in names), default=0)
    return [name for name in names if shared(name) == most]


def _completed(artifact: Artifact, group: ScaleGroup, where: str) -> ScaleGroup:
    """A named group with the channels and the offset that the compiler knows, or each channel its own.

    Raises:
        RecipeError: when shapes do not fit.
    """
    parameters = artifact.manifest.parameters
    for known in artifact.manifest.scale_groups:
        if known.producer == group.producer and set(group.modules) <= {*known.modules, *_linears(known)}:
            return known
    widths = {parameters[f"{name}.weight"].shape[1] for name in group.modules}
    rows = parameters[group.producer].shape[0]
    if widths != {rows}:
        raise RecipeError(
            f"{where}: {group.producer.removesuffix('.weight')} makes {rows} channels, and "
            f"{some(group.modules)} take {', '.join(map(str, sorted(widths)))}",
            hint="which channel feeds which must be known; leave mappings out where the compiler finds them",
        )
    offset = next((g.offset for g in artifact.manifest.scale_groups if g.producer == group.producer), 0)
    return dataclasses.replace(group, channels=(0, rows), offset=offset)


def _linears(group: ScaleGroup) -> Iterator[str]:
    yield from (other.name.removesuffix(".weight") for other in group.others)
