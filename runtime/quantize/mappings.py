"""Select the groups that a SmoothQuant or AWQ modifier rescales: those the compiler found, or the recipe's mappings."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runtime.artifact.manifest import Manifest, ScaleGroup
from runtime.errors import RecipeError
from runtime.experts.split import siblings_of
from runtime.formats.transforms import INPUT, OUTPUT
from runtime.quantize.assignments import is_plain
from runtime.recipe.recipe import some

if TYPE_CHECKING:
    from runtime.chain import Artifact
    from runtime.recipe.rescaling_modifiers import LayerMapping, Transform
    from runtime.weights.origins import ParameterSource


_NO_PRODUCER = "no norm or Linear that can be scaled without changing the model computes"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rescaling:
    """A group that is rescaled; `is_unproven`: only the recipe names it, so the run must check it."""

    group: ScaleGroup
    is_unproven: bool


def rescalings(
    artifact: Artifact, source: ParameterSource, jobs: Iterable[str], transform: Transform, origin: str
) -> tuple[list[Rescaling], list[str]]:
    """Select the groups that a modifier rescales, in order of execution; `origin` is the recipe's name, for messages.

    Returns:
        The groups, and warnings about those that cannot be rescaled.

    Raises:
        RecipeError: when there are none, or a mapping matches nothing.
    """
    wanted = dict.fromkeys(jobs)
    if transform.mappings:
        found = list(_named_rescalings(artifact, transform.mappings, origin))
    else:
        found = [
            Rescaling(group=group, is_unproven=False)
            for group in _with_all_readers(artifact)
            if group.producer and _is_rescaled_by(transform, group, artifact)
        ]
    tied = {entry.tied_to for entry in artifact.manifest.parameters.values() if entry.tied_to}
    kept: list[Rescaling] = []
    left: dict[str, list[str]] = {}  # modules whose inputs are not rescaled, by reason; "" for ignored ones
    for rescaling in found:
        group = rescaling.group
        if not any(name in wanted for name in group.modules):
            continue
        if _is_ignored(group, transform.ignore):
            left.setdefault("", []).extend(group.modules)
            continue
        obstacle = _obstacle(group, artifact, source, tied)
        if obstacle:
            left.setdefault(obstacle, []).extend(group.modules)
        else:
            kept.append(rescaling)
    remarks = [
        f"warning: {transform.name} does not rescale the inputs of {some(names)}: {reason}"
        for reason, names in left.items()
        if reason
    ]
    if not kept:
        raise _nothing_to_rescale(artifact, transform, origin, remarks, is_ignored="" in left)
    seen = {name for own in left.values() for name in own} | {n for entry in kept for n in entry.group.modules}
    rest = [name for name in wanted if name not in seen]
    fixed = [] if transform.mappings else _without_producer(artifact, transform, rest)
    if fixed:
        remarks.append(
            f"warning: {transform.name} does not rescale the inputs of {some(fixed)}: {_NO_PRODUCER} "
            f"them ({len(fixed)} of {len(wanted)} quantized modules)"
        )
    return kept, remarks


def _nothing_to_rescale(
    artifact: Artifact, transform: Transform, origin: str, remarks: Sequence[str], *, is_ignored: bool
) -> RecipeError:
    what = f"{origin}:{transform.line}: {transform.name} has nothing to rescale in this artifact"
    without = f"remove {transform.name}"
    if artifact.manifest.policy == "target" and not transform.mappings:
        return RecipeError(
            f"{what}: it was compiled with --leaves target, so the modules that compute inputs are unknown",
            hint="compile with --leaves linear, or add mappings",
        )
    if remarks:
        return RecipeError(f"{what}: {remarks[0].partition(': ')[2]}", hint=f"{without}, or add mappings")
    if is_ignored:
        return RecipeError(f"{what}: its ignore matches every group", hint=f"narrow ignore, or {without}")
    return RecipeError(f"{what}: {_NO_PRODUCER} the inputs of a quantized module", hint=f"{without}, or add mappings")


def _without_producer(artifact: Artifact, transform: Transform, names: Sequence[str]) -> list[str]:
    """List the modules that a modifier would rescale if a parameter scaled their inputs. For SmoothQuant those are
    modules that share their input, because norms mostly compute such inputs.
    """
    if transform.algorithm == "awq":
        return list(names)
    siblings = siblings_of(artifact)
    count = Counter(siblings.values())
    made = {name for group in artifact.manifest.scale_groups if group.producer for name in group.modules}
    return [name for name in names if name not in made and count[siblings.get(name)] > 1]


def _with_all_readers(artifact: Artifact) -> Iterator[ScaleGroup]:
    """Yield the artifact's groups; their modules include those that read the tensor reshaped or multiplied."""
    manifest = artifact.manifest
    for group in manifest.scale_groups:
        linears = [
            other.name.removesuffix(".weight")
            for other in group.others
            if other.axis == 1 and other.name.endswith(".weight") and _is_linear(manifest, other.name)
        ]
        if not linears:
            yield group
            continue
        rest = tuple(other for other in group.others if other.name.removesuffix(".weight") not in linears)
        yield dataclasses.replace(group, modules=(*group.modules, *linears), others=rest)


def _is_linear(manifest: Manifest, weight: str) -> bool:
    kind = manifest.leaves.get(weight.removesuffix(".weight"))
    return kind is not None and manifest.leaf_kinds[kind].kind == "Linear"


def _is_rescaled_by(transform: Transform, group: ScaleGroup, artifact: Artifact) -> bool:
    """Whether a modifier rescales a group: SmoothQuant only outputs of norms, as in its paper; AWQ all."""
    return transform.algorithm == "awq" or len(artifact.manifest.parameters[group.producer].shape) == 1


def _is_ignored(group: ScaleGroup, ignore: Sequence[str]) -> bool:
    from runtime.formats.targets import matches_name

    names = (*group.modules, group.producer.removesuffix(".weight"))
    return any(matches_name(pattern, name) for pattern in ignore for name in names)


def _obstacle(group: ScaleGroup, artifact: Artifact, source: ParameterSource, tied: Collection[str]) -> str:
    """Return the reason why a group cannot be rescaled: a parameter that cannot be rewritten; "" if it can."""
    weights = [f"{name}.weight" for name in group.modules]
    names = [name for name in (*weights, group.producer, group.bias, *(o.name for o in group.others)) if name]
    parameters = artifact.manifest.parameters
    before, after = source.transforms.at(INPUT), source.transforms.at(OUTPUT)
    for name in group.modules:
        if name in before:
            return f"a transform rotates the inputs of {name}, so no factor of them can be moved into {group.producer}"
    if group.producer.removesuffix(".weight") in after:
        return f"a transform rotates the outputs of {group.producer.removesuffix('.weight')}"
    for name in names:
        if not is_plain(source, name):
            return f"{name} is not stored as one tensor in the checkpoint and cannot be rewritten"
        if parameters[name].tied_to or name in tied:
            return f"{name} is shared with another module and cannot be rewritten"
    return ""


def _named_rescalings(artifact: Artifact, mappings: Sequence[LayerMapping], origin: str) -> Iterator[Rescaling]:
    for mapping in mappings:
        found = list(_matches(artifact, mapping))
        if not found:
            raise RecipeError(
                f"{origin}:{mapping.line}: the mapping of {mapping.smooth_layer!r} to "
                f"{', '.join(map(repr, mapping.balance_layers))} matches no modules",
                hint="smooth_layer and each of balance_layers must match modules of one subgraph; "
                "seqbuild inspect shows their names",
            )
        known: dict[str, list[ScaleGroup]] = {}
        for group in _with_all_readers(artifact):
            known.setdefault(group.producer, []).append(group)
        for group in found:
            yield _completed(artifact, group, known.get(group.producer, ()), f"{origin}:{mapping.line}")


def _matches(artifact: Artifact, mapping: LayerMapping) -> Iterator[ScaleGroup]:
    """Yield a group for each smoothed module: with the matching modules of its subgraph that are closest by name."""
    from runtime.formats.targets import matches_name

    for index, subgraph in enumerate(artifact.manifest.subgraphs):
        modules = [name.removesuffix(".weight") for name in subgraph.parameters if name.endswith(".weight")]
        producers = [name for name in modules if matches_name(mapping.smooth_layer, name)]
        readers = [[name for name in modules if matches_name(pattern, name)] for pattern in mapping.balance_layers]
        for producer in producers if any(readers) else ():
            balanced = [name for own in readers for name in _closest(producer, own)]
            bias = f"{producer}.bias"
            yield ScaleGroup(
                subgraph=index,
                modules=tuple(dict.fromkeys(balanced)),
                producer=f"{producer}.weight",
                bias=bias if bias in subgraph.parameters else "",
            )


def _closest(producer: str, names: Sequence[str]) -> list[str]:
    """Return the modules that share the longest part of the producer's path."""

    def shared(name: str) -> int:
        parts = zip(producer.split("."), name.split("."), strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], parts))

    most = max((shared(name) for name in names), default=0)
    return [name for name in names if shared(name) == most]


def _completed(artifact: Artifact, group: ScaleGroup, known: Sequence[ScaleGroup], where: str) -> Rescaling:
    """Complete a mapping's group with the compiler's group of the same producer, or by assuming equal channels."""
    parameters = artifact.manifest.parameters
    for own in known:
        if set(group.modules) <= {*own.modules, *(other.name.removesuffix(".weight") for other in own.others)}:
            return Rescaling(group=own, is_unproven=False)
    widths = {parameters[f"{name}.weight"].shape[1] for name in group.modules}
    rows = parameters[group.producer].shape[0]
    if widths != {rows}:
        raise RecipeError(
            f"{where}: {group.producer.removesuffix('.weight')} has {rows} output channels, but "
            f"{some(group.modules)} have {', '.join(map(str, sorted(widths)))} input features",
            hint="map modules of equal width, or remove the mappings, so that the compiler's groups are used",
        )
    offset = next((own.offset for own in known), 0)
    return Rescaling(group=dataclasses.replace(group, channels=(0, rows), offset=offset), is_unproven=True)
