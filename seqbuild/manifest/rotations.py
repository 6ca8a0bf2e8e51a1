"""Derive a chain's rotation spaces: what one orthogonal matrix can rotate without changing the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from runtime.artifact.manifest import SubgraphEntry
from runtime.artifact.rotation_table import FoldedNorm, RotatedParameter, RotationSpace, RotationTable
from seqbuild.manifest.space_flow import Role, SpaceFlow
from seqbuild.manifest.spaces import Gain, Space, SpaceReader
from seqbuild.manifest.untied import untied_head

if TYPE_CHECKING:
    from torch import nn

    from seqbuild.chain.subgraph import Subgraph

_RESIDUAL, _VALUES = "R1", "R2"
_FEW = 3  # sums of fewer parameters that cannot be rotated are not worth a remark


def rotation_table(model: nn.Module, subgraphs: Sequence[Subgraph], entries: Sequence[SubgraphEntry]) -> RotationTable:
    """Return the rotation spaces of a chain.

    Args:
        model: the traced model.
        subgraphs: traced down to Linear modules; none for a trace that stops at the targets.
        entries: their manifest entries.
    """
    if not subgraphs:
        return RotationTable(spaces=(), missing=("the layers were not traced through",))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    flow = SpaceFlow(modules=dict(model.named_modules(remove_duplicate=False)), parameters=parameters)
    flow.follow(subgraphs)
    for entry in entries:  # opaque steps also use parameters of the modules that they receive
        for name in entry.uses:
            flow.uses.setdefault(name, []).append({})
    found = _RotatableSpaces.of(flow.spaces)
    _require_one_use(found, flow.uses)
    untied = _require_tied_alike(found, flow.uses, parameters, untied_head(model))
    return RotationTable(
        spaces=tuple(one.entry() for one in found.valid()), untied=untied, missing=tuple(found.missing())
    )


@dataclass(kw_only=True, eq=False)
class _RotatableSpace:
    """A space that may be rotated; `reason` says why it cannot be."""

    space: Space
    rotation: str
    starts: tuple[int, ...] = (0,)
    block: int = 0
    reason: str = ""

    @classmethod
    def of(cls, space: Space) -> _RotatableSpace | None:
        """Return the candidate of a space, if it is one of the two kinds."""
        if bool(space.summed.any()):
            return cls._of_values(space)
        writers = dict.fromkeys(entry.name.rpartition(".")[0] for entry in space.writers)
        if not space.is_sum or (not space.reason and (len(writers) < 2 or not space.readings)):
            return None
        found = cls(space=space, rotation=_RESIDUAL, block=space.size)
        if bool(space.escaped.any()):
            found.reason = space.reason
        elif len(space.blocks()) > 1:
            found.reason = "its channels are used in parts"
        elif any(reading.channels != tuple(range(space.size)) for reading in space.readings):
            found.reason = "its channels are read in another order"
        return found

    @classmethod
    def _of_values(cls, space: Space) -> _RotatableSpace | None:
        summed = space.summed.tolist()
        blocks = [block for block in space.blocks() if all(summed[channel] for channel in block)]
        found = cls(space=space, rotation=_VALUES, reason=space.reason)
        sizes = dict.fromkeys(map(len, blocks))
        if not blocks or not space.readings:
            found.reason = found.reason or "nothing reads it"
            return found
        if len(sizes) > 1 or 1 in sizes or any(block[-1] - block[0] >= len(block) for block in blocks):
            found.reason = "its heads differ in size or are interleaved"
            return found
        found.block, found.starts, found.reason = len(blocks[0]), tuple(sorted(block[0] for block in blocks)), ""
        covered = {channel for block in blocks for channel in block}
        for reading in space.readings:
            if not covered.isdisjoint(reading.channels) and not found._are_blocks(reading.channels):
                found.reason = f"{reading.name} reads parts of heads"
        return found

    def _are_blocks(self, channels: Sequence[int]) -> bool:
        starts = set(self.starts)
        return len(channels) % self.block == 0 and all(
            channels[place] in starts
            and tuple(channels[place : place + self.block])
            == tuple(range(channels[place], channels[place] + self.block))
            for place in range(0, len(channels), self.block)
        )

    def reads(self, reading: SpaceReader) -> bool:
        """Whether a reading is of rotated channels."""
        return self._are_blocks(reading.channels)

    def entry(self) -> RotationSpace:
        """Return the manifest's entry."""
        readings = [reading for reading in self.space.readings if self.reads(reading)]
        norms = dict.fromkeys(self.space.gains)
        return RotationSpace(
            rotation=self.rotation,
            block=self.block,
            starts=self.starts,
            writers=tuple(
                dict.fromkeys(RotatedParameter(name=entry.name, axis=entry.axis) for entry in self.space.writers)
            ),
            readers=tuple(
                dict.fromkeys(
                    RotatedParameter(name=entry.name, axis=entry.axis, gain=entry.gain.weight if entry.gain else "")
                    for entry in readings
                )
            ),
            norms=tuple(FoldedNorm(weight=gain.weight, bias=gain.bias, offset=gain.offset) for gain in norms),
            keeps_mean=self.space.keeps_mean,
        )


@dataclass(kw_only=True)
class _RotatableSpaces:
    """All candidates of a chain, by their spaces."""

    by_space: dict[int, _RotatableSpace] = field(default_factory=dict)

    @classmethod
    def of(cls, spaces: Sequence[Space]) -> _RotatableSpaces:
        """Return the candidates among these spaces."""
        roots = {id(space.root): space.root for space in spaces}
        found = {key: one for key, root in roots.items() if (one := _RotatableSpace.of(root)) is not None}
        return cls(by_space=found)

    def find(self, space: Space) -> _RotatableSpace | None:
        """Return the candidate of a space if it can be rotated."""
        found = self.by_space.get(id(space.root))
        return found if found is not None and not found.reason else None

    def valid(self) -> list[_RotatableSpace]:
        """List those that can be rotated."""
        return [one for one in self.by_space.values() if not one.reason]

    def missing(self) -> Iterator[str]:
        """Say for each kind of space which cannot be rotated, and why."""
        for rotation in (_RESIDUAL, _VALUES):
            own = [one for one in self.by_space.values() if one.rotation == rotation]
            failed = sorted((one for one in own if one.reason), key=lambda one: -len(one.space.writers))
            is_found = len(failed) < len(own)
            if failed and (not is_found or rotation == _VALUES or len(failed[0].space.writers) >= _FEW):
                first = failed[0]
                more = f", and {len(failed) - 1} more" if rotation == _VALUES and len(failed) > 1 else ""
                yield f"{rotation}: the output of {first.space.writers[0].name}{more}: {first.reason}"
            elif not is_found:
                what = "no sum of what several modules compute" if rotation == _RESIDUAL else "no sum over tokens"
                yield f"{rotation}: {what} was found"


def _signature(found: _RotatableSpaces, role: Role | None) -> Any:
    """Return how a role changes an axis of its parameter; None if it does not."""
    if role is None:
        return None
    space, use = role
    candidate = found.find(space)
    if candidate is None:
        return None
    if isinstance(use, Gain):
        return ("gain",) if use in candidate.space.gains else ("shift", use.bias, id(space.root))
    if isinstance(use, SpaceReader):
        if not candidate.reads(use):
            return None
        return id(space.root), (0,) if candidate.rotation == _RESIDUAL else None, use.gain
    return id(space.root), candidate.starts, None


def _is_idle(role: Role) -> bool:
    """Whether a parameter was taken for a value and then not used as one."""
    root = role[0].root
    return not isinstance(role[1], (Gain, SpaceReader)) and not root.readings and not root.is_sum and not root.reason


def _changes(found: _RotatableSpaces, uses: Sequence[Mapping[int, Role]]) -> dict[int, dict[Any, list[Space]]]:
    """Return for each axis of a parameter how its uses change it, with the spaces that do."""
    counted = [use for use in uses if not use or not all(map(_is_idle, use.values()))]
    axes = sorted({axis for use in counted for axis in use})
    changes: dict[int, dict[Any, list[Space]]] = {axis: {} for axis in axes}
    for use in counted:
        for axis in axes:
            role = use.get(axis)
            spaces = changes[axis].setdefault(_signature(found, role), [])
            if role is not None:
                spaces.append(role[0])
    return changes


def _require_one_use(found: _RotatableSpaces, uses: Mapping[str, Sequence[Mapping[int, Role]]]) -> None:
    """Exclude spaces of parameters that would have to be changed in several ways, until there are none."""
    is_changed = True
    while is_changed:
        is_changed = False
        for name, own in uses.items():
            for ways in _changes(found, own).values():
                if len(ways) > 1:
                    is_changed |= _exclude(found, ways, f"{name} has several uses")


def _exclude(found: _RotatableSpaces, ways: Mapping[Any, Sequence[Space]], reason: str) -> bool:
    is_changed = False
    for spaces in ways.values():
        for space in spaces:
            candidate = found.find(space)
            if candidate is not None:
                candidate.reason, is_changed = reason, True
    return is_changed


def _require_tied_alike(
    found: _RotatableSpaces,
    uses: Mapping[str, Sequence[Mapping[int, Role]]],
    parameters: Mapping[str, Any],
    head: tuple[str, str] | None,
) -> tuple[str, ...]:
    """Exclude spaces of tied parameters that would have to be changed in different ways, except a head that can be
    untied; return this head's name.
    """
    by_id: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        if name in uses:
            by_id.setdefault(id(parameter), []).append(name)
    untied: dict[str, None] = {}
    is_changed = True
    while is_changed:
        is_changed = False
        untied.clear()
        for first, *others in by_id.values():
            for other in others:
                one, two = (_changes(found, uses[name]) for name in (first, other))
                if _ways(one) == _ways(two):
                    continue
                if head is not None and {first, other} == set(head):
                    untied[head[1]] = None
                    continue
                for ways in (*one.values(), *two.values()):
                    is_changed |= _exclude(found, ways, f"{first} and {other} are tied")
        if is_changed:
            _require_one_use(found, uses)
    return tuple(untied)


def _ways(changes: Mapping[int, Mapping[Any, Any]]) -> dict[int, list[Any]]:
    return {axis: list(ways) for axis, ways in changes.items() if list(ways) != [None]}
