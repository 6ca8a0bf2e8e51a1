"""Scale groups of experts that are apart: which of their modules read one tensor, and which makes another's input.

An artifact's groups name stacked parameters. Where these are apart, every expert's own matrix takes their place. Within
an expert, the rows of the matrix up can be divided and the columns of the matrix down multiplied, where what is
between them is proportional (`runtime.experts.channel_flow`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from runtime.artifact.manifest import Manifest, ScaledParameter, ScaleGroup
from runtime.artifact.scale_groups import runs_of
from runtime.experts.channel_flow import Opened
from runtime.model.experts import Stack, input_positions, owner_of

Stacks = Mapping[str, Stack]


@dataclass(frozen=True, kw_only=True, slots=True)
class Insides:
    """What a mixture's experts do.

    Attributes:
        firsts: the stacked parameters that multiply their input, as far as that is known.
        opened: what their last matrix's input is proportional to, if to anything.
    """

    firsts: tuple[str, ...]
    opened: Opened | None


def groups_apart(
    manifest: Manifest, stacks: Mapping[str, Stacks], insides: Mapping[str, Insides]
) -> tuple[ScaleGroup, ...]:
    """All scale groups, with modules of experts in the place of stacked parameters that are apart.

    Args:
        manifest: the artifact's own tables.
        stacks: by the name of a module of experts, how its parameters are made of single experts'.
        insides: by the same names.
    """
    owners = {f"{name}.{own}": (name, stack) for name, together in stacks.items() for own, stack in together.items()}
    found = [_apart(group, owners) for group in manifest.scale_groups]
    found += [_apart(group, owners) for group in manifest.mixture_groups]
    users = {name: index for index, entry in reversed(list(enumerate(manifest.subgraphs))) for name in entry.parameters}
    for name, own in stacks.items():
        inside = insides[name]
        if inside.opened is not None and f"{name}.{inside.opened.stack}" in users:
            found += _pairs(name, own, inside.opened, users[f"{name}.{inside.opened.stack}"])
    return tuple(group for group in found if group.modules)


def _apart(group: ScaleGroup, owners: Mapping[str, tuple[str, Stack]]) -> ScaleGroup:
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


def _pairs(name: str, stacks: Stacks, opened: Opened, subgraph: int) -> Iterator[ScaleGroup]:
    """For each expert the group of its last matrix."""
    up, down = stacks[opened.stack], stacks[opened.last]
    count = len(up.parts[0])
    if len(down.parts[0]) != 1 or (count > 1 and up.axis != opened.axis):
        return
    size = len(opened.rows)  # of one part, where there are several
    if count == 1:
        split = [(0, row) for row in opened.rows]
    elif up.is_interleaved:
        split = [(row % count, row // count) for row in opened.rows]
    else:
        split = [(row // size, row % size) for row in opened.rows]
    place, rows = split[0][0], [row for _, row in split]
    if any(own != place for own, _ in split):
        return
    for expert, parts in enumerate(up.parts):
        bias = stacks[opened.bias].parts[expert][place] if opened.bias else ""
        yield ScaleGroup(
            subgraph=subgraph,
            modules=(f"{name}.{owner_of(down.parts[expert][0])}",),
            producer=f"{name}.{parts[place]}",
            bias=f"{name}.{bias}" if bias else "",
            channels=runs_of(rows),
        )


def siblings_apart(stacks: Mapping[str, Stacks], insides: Mapping[str, Insides]) -> dict[str, tuple[str, int, int]]:
    """For each module of an expert what it shares with its siblings: those that read the expert's own input, or another
    tensor within it.
    """
    found: dict[str, tuple[str, int, int]] = {}
    for name, own in stacks.items():
        positions = input_positions(own) | dict.fromkeys(insides[name].firsts, 0)
        for stacked, stack in own.items():
            if not stack.is_of_biases:
                for expert in range(len(stack.parts)):
                    key = (name, expert, positions[stacked])
                    found.update({f"{name}.{owner}": key for owner in stack.modules(expert)})
    return found
