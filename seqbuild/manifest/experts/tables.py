"""The manifest's tables of how stacked experts split."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from runtime.artifact.expert_tables import by_expert
from runtime.artifact.manifest import MIXTURES, ExpertLayout, ExpertPair, ExpertStack, MixtureEntry, ParameterEntry
from runtime.artifact.scale_groups import runs_of
from runtime.checkpoint.names import checkpoint_name
from seqbuild.manifest.experts.conversion import Conversions
from seqbuild.manifest.experts.probe import ExpertProbe, make_probe
from seqbuild.manifest.experts.program import GATE, UP, stacks_from_program
from seqbuild.manifest.experts.proportional import proportional_rows

if TYPE_CHECKING:
    from seqbuild.manifest.portable import Parts


def expert_tables(
    parts: Parts, parameters: Mapping[str, ParameterEntry], conversions: Sequence[str]
) -> tuple[tuple[ExpertLayout, ...], dict[str, MixtureEntry]]:
    """Return the layouts of stacked experts, and the entries of the modules that they apply to.

    A mixture whose experts cannot be split has no entry.

    Args:
        parts: the leaves and their programs.
        parameters: the manifest's parameter table.
        conversions: the source code of its conversion programs.
    """
    known = Conversions(conversions)
    probes: dict[object, ExpertProbe] = {}
    layouts: dict[ExpertLayout, int] = {}
    mixtures: dict[str, MixtureEntry] = {}
    names = [name for name, kind in parts.leaves.items() if parts.kinds[kind].kind in MIXTURES]
    for name, entries in _owned(names, parameters).items():
        kind = parts.kinds[parts.leaves[name]]
        shapes = {own: entry.shape for own, entry in entries.items()}
        key = parts.leaves[name], tuple(shapes.items())
        if key not in probes:
            probes[key] = make_probe(kind, parts.programs[kind.program], shapes)
        found = _split(name, entries, probes[key], known)
        if found is not None:
            layout, prefix = found
            mixtures[name] = MixtureEntry(layout=layouts.setdefault(layout, len(layouts)), prefix=prefix)
    return tuple(layouts), mixtures


def _owned(names: Sequence[str], parameters: Mapping[str, ParameterEntry]) -> dict[str, dict[str, ParameterEntry]]:
    """Return the parameters inside of each of these modules, by their names within it."""
    found: dict[str, dict[str, ParameterEntry]] = {name: {} for name in names}
    for parameter, entry in parameters.items():
        owner = parameter.rpartition(".")[0]
        while owner and owner not in found:
            owner = owner.rpartition(".")[0]
        if owner:
            found[owner][parameter.removeprefix(f"{owner}.")] = entry
    return found


def _split(
    name: str, entries: Mapping[str, ParameterEntry], probe: ExpertProbe, conversions: Conversions
) -> tuple[ExpertLayout, str] | None:
    """Return the layout of one mixture and the checkpoint's name for it, or None if its experts cannot be split."""
    module = probe.module
    if any(entries[own].conversion >= 0 for own in module.flat):
        return None  # its conversion makes a parameter without an axis for experts
    stacked = {own: by_expert(entries[own], module.num_experts, is_flat=own in module.flat) for own in module.stacked}
    named = conversions.named_experts(stacked)
    if named is not None:
        stacks, numbers, prefix = named.stacks, named.numbers, named.prefix
    elif all(conversions.is_by_expert(entry) for entry in stacked.values()):
        stacks, numbers = stacks_from_program(probe), tuple(range(module.num_experts))
        first = module.stacked[0]
        prefix = checkpoint_name(entries[first].sources[0], f"{name}.{first.rpartition('.')[2]}")
    else:
        return None
    if not _is_complete(stacks) or len(set(numbers)) < len(numbers):
        return None
    layout = ExpertLayout(
        stacks=_with_inputs(stacks, probe),
        numbers=runs_of(numbers),
        is_named=named is not None,
        pairs=tuple(_pairs(stacks, probe)),
    )
    return layout, prefix


def _is_complete(stacks: Sequence[ExpertStack]) -> bool:
    """Return whether each part occurs once, and each bias belongs to a module that has a weight."""
    parts = [part for stack in stacks for part in stack.parts]
    weights = {part.removesuffix(".weight") for part in parts}
    has_weights = all(part.removesuffix(".bias") in weights for part in parts if part.endswith(".bias"))
    return bool(parts) and len(set(parts)) == len(parts) and has_weights


def _with_inputs(stacks: Sequence[ExpertStack], probe: ExpertProbe) -> tuple[ExpertStack, ...]:
    """Add which stacks multiply the same tensor: those that multiply the expert's input, if known, else by name."""
    firsts = [product.name for product in probe.products[:-1]]
    if firsts:
        owners = {stack.name: probe.owners.get(stack.name, stack.name) for stack in stacks}
        return tuple(dataclasses.replace(stack, input=int(owners[stack.name] not in firsts)) for stack in stacks)
    gates = {f"{own}.{kind}" for own in (GATE, UP) for kind in ("weight", "bias")}
    gated = [place for place, stack in enumerate(stacks) if set(stack.parts) <= gates]
    return tuple(
        dataclasses.replace(stack, input=gated[0] if place in gated else place) for place, stack in enumerate(stacks)
    )


def _pairs(stacks: Sequence[ExpertStack], probe: ExpertProbe) -> Iterator[ExpertPair]:
    """Yield the modules of an expert that can be scaled against each other, at most one pair."""
    found, of_name = proportional_rows(probe), {stack.name: stack for stack in stacks}
    if found is None:
        return
    up, down = of_name[found.stack], of_name[found.last]
    count, size = len(up.parts), len(found.rows)
    is_transposed = next(product.is_transposed for product in probe.products if product.name == found.stack)
    if len(down.parts) != 1 or (count > 1 and up.axis != int(is_transposed)):
        return
    if up.is_interleaved:
        split = [(row % count, row // count) for row in found.rows]
    else:
        split = [(row // size, row % size) if count > 1 else (0, row) for row in found.rows]
    if len({place for place, _ in split}) > 1:
        return
    place, bias = split[0][0], probe.bias_of(found.stack)
    yield ExpertPair(
        module=down.parts[0].removesuffix(".weight"),
        producer=up.parts[place].removesuffix(".weight"),
        bias=of_name[bias].parts[place] if bias else "",
        channels=runs_of([row for _, row in split]),
    )
