"""Which groups of modules a SmoothQuant or AWQ modifier rescales: those the compiler found, or those a recipe names."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runtime.artifact.manifest import Manifest, ScaledParameter, ScaleGroup
from runtime.errors import RecipeError
from runtime.experts.split import siblings_of
from runtime.quantize.assignments import is_plain
from runtime.recipe.recipe import some

if TYPE_CHECKING:
    from runtime.chain import Artifact
    from runtime.recipe.modifiers import LayerMapping, Transform
    from runtime.weights.parameters import Weights


@dataclass(frozen=True, kw_only=True, slots=True)
class Rescaling:
    """A group, and whether only the recipe names it: what nobody has proven is checked by running it."""

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
    if transform.mappings:
        found = list(_named_rescalings(artifact, transform.mappings, origin))
    else:
        found = [
            Rescaling(group=group, is_named=False)
            for group in _with_all_readers(artifact)
            if group.producer and _is_wanted(group, artifact, transform)
        ]
    tied = {entry.tied_to for entry in artifact.manifest.parameters.values() if entry.tied_to}
    kept: list[Rescaling] = []
    left: dict[str, list[str]] = {}  # by the reason, modules whose inputs stay as they are
    for rescaling in found:
        group = rescaling.group
        if not any(name in wanted for name in group.modules):
            continue
        if _is_ignored(group, transform.ignore):
            left.setdefault("", []).extend(group.modules)
            continue
        fixed = _fixed(group, artifact, source, tied)
        if fixed:
            left.setdefault(fixed, []).extend(group.modules)
        else:
            kept.append(rescaling)
    remarks = [
        f"warning: {transform.name} does not rescale the inputs of {some(names)}: {reason}"
        for reason, names in left.items()
        if reason
    ]
    seen = {name for own in left.values() for name in own} | {n for entry in kept for n in entry.group.modules}
    unmade = [] if transform.mappings else _unmade(artifact, transform, [name for name in wanted if name not in seen])
    if not kept:
        raise _nothing_to_do(artifact, transform, origin, remarks, is_ignored="" in left)
    if unmade:
        remarks.append(
            f"warning: {transform.name} does not rescale the inputs of {some(unmade)}: no norm or Linear makes them "
            f"that could be scaled without changing the model ({len(unmade)} of {len(wanted)} quantized modules)"
        )
    return kept, remarks


def _nothing_to_do(
    artifact: Artifact, transform: Transform, origin: str, remarks: Sequence[str], *, is_ignored: bool
) -> RecipeError:
    """Why a modifier rescales nothing at all."""
    what = f"{origin}:{transform.line}: {transform.name} finds nothing to rescale in this artifact"
    without = f"leave {transform.name} out"
    if artifact.manifest.policy == "target" and not transform.mappings:
        return RecipeError(
            f"{what}: it was compiled down to its targets alone, so what makes their modules' inputs is not known",
            hint="compile with --leaves linear, so that the compiler looks for it, or give mappings",
        )
    if remarks:
        return RecipeError(f"{what}: {remarks[0].partition(': ')[2]}", hint=f"{without}, or give mappings")
    if is_ignored:
        return RecipeError(f"{what}: it ignores all that could be rescaled", hint=f"narrow ignore, or {without}")
    return RecipeError(
        f"{what}: no norm or Linear makes the inputs of a quantized module that could be scaled without changing "
        "the model",
        hint=f"{without}, or give mappings",
    )


def _unmade(artifact: Artifact, transform: Transform, names: Sequence[str]) -> list[str]:
    """Modules among these that a modifier would rescale if anything made their inputs: SmoothQuant those that norms
    mostly make the inputs of, which several modules read.
    """
    if transform.algorithm == "awq":
        return list(names)
    siblings = siblings_of(artifact)
    count = Counter(siblings.values())
    made = {name for group in artifact.manifest.scale_groups if group.producer for name in group.modules}
    return [name for name in names if name not in made and count[siblings.get(name)] > 1]


def _with_all_readers(artifact: Artifact) -> Iterator[ScaleGroup]:
    """The artifact's groups, Linear modules that read the tensor in another shape or times a number among their own."""
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


def _is_wanted(group: ScaleGroup, artifact: Artifact, transform: Transform) -> bool:
    """SmoothQuant rescales what norms make, as its paper does; AWQ whatever can be."""
    return transform.algorithm == "awq" or len(artifact.manifest.parameters[group.producer].shape) == 1


def _is_ignored(group: ScaleGroup, ignore: Sequence[str]) -> bool:
    from runtime.formats.targets import matches_name

    names = (*group.modules, group.producer.removesuffix(".weight"))
    return any(matches_name(pattern, name) for pattern in ignore for name in names)


def _fixed(group: ScaleGroup, artifact: Artifact, source: Weights | None, tied: Collection[str]) -> str:
    """Why a group cannot be rescaled: a parameter that the checkpoint has not as it stands, or under several names."""
    weights = [f"{name}.weight" for name in group.modules]
    names = [name for name in (*weights, group.producer, group.bias, *(o.name for o in group.others)) if name]
    parameters = artifact.manifest.parameters
    for name in names:
        if not is_plain(artifact, source, name):
            return f"{name} is not one tensor of the checkpoint, and cannot be rewritten"
        if parameters[name].tied_to or name in tied:
            return f"{name} is used under several names, and cannot be rewritten for one of them"
    return ""


def _named_rescalings(artifact: Artifact, mappings: Sequence[LayerMapping], origin: str) -> Iterator[Rescaling]:
    for mapping in mappings:
        found = list(_matches(artifact, mapping))
        if not found:
            raise RecipeError(
                f"{origin}:{mapping.line}: the mapping of {mapping.smooth_layer!r} to "
                f"{', '.join(map(repr, mapping.balance_layers))} fits no modules",
                hint="smooth_layer and each of balance_layers must match modules of one subgraph; "
                "seqbuild inspect shows their names",
            )
        known: dict[str, list[ScaleGroup]] = {}
        for group in _with_all_readers(artifact):
            known.setdefault(group.producer, []).append(group)
        for group in found:
            yield _completed(artifact, group, known.get(group.producer, ()), f"{origin}:{mapping.line}")


def _matches(artifact: Artifact, mapping: LayerMapping) -> Iterator[ScaleGroup]:
    """One group for each module that is smoothed: with those of its subgraph whose names share most with its own."""
    from runtime.formats.targets import matches_name

    for index, subgraph in enumerate(artifact.manifest.subgraphs):
        modules = [name.removesuffix(".weight") for name in subgraph.parameters if name.endswith(".weight")]
        producers = [name for name in modules if matches_name(mapping.smooth_layer, name)]
        readers = [[name for name in modules if matches_name(pattern, name)] for pattern in mapping.balance_layers]
        for producer in producers if any(readers) else ():
            balanced = [name for own in readers for name in _nearest(producer, own)]
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


def _completed(artifact: Artifact, group: ScaleGroup, known: Sequence[ScaleGroup], where: str) -> Rescaling:
    """A named group with what the compiler knows of its producer, which needs no proof, or each channel its own.

    Raises:
        RecipeError: when shapes do not fit.
    """
    parameters = artifact.manifest.parameters
    for own in known:
        if set(group.modules) <= {*own.modules, *_modules_of(own.others)}:
            return Rescaling(group=own, is_named=False)
    widths = {parameters[f"{name}.weight"].shape[1] for name in group.modules}
    rows = parameters[group.producer].shape[0]
    if widths != {rows}:
        raise RecipeError(
            f"{where}: {group.producer.removesuffix('.weight')} makes {rows} channels, and "
            f"{some(group.modules)} take {', '.join(map(str, sorted(widths)))}",
            hint="which channel feeds which must be known; leave mappings out where the compiler finds them",
        )
    offset = next((own.offset for own in known), 0)
    return Rescaling(group=dataclasses.replace(group, channels=(0, rows), offset=offset), is_named=True)


def _modules_of(others: Iterable[ScaledParameter]) -> Iterator[str]:
    yield from (other.name.removesuffix(".weight") for other in others)
