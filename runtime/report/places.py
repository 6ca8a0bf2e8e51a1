"""The place of a module in its model, from its name: the stack and number of its layer, its kind, and its expert.

model.layers.12.mlp.experts.37.gate_proj    stack model.layers, layer 12, kind mlp.experts.*.gate_proj, expert 37
model.visual.blocks.3.attn.qkv              stack model.visual.blocks, layer 3, kind attn.qkv
lm_head                                     no layer, kind lm_head
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

_NUMBER = "0"  # stands for any number
_LEAST_EXPERTS = 8  # different numbers after that of the layer: fewer are parts of a layer, as in T5


class ModulePlace(NamedTuple):
    """Where a module is; `layer` and `expert` are -1 for none."""

    stack: str
    layer: int
    kind: str
    expert: int = -1

    @property
    def mixture(self) -> str:
        """The part of the kind that names the mixture."""
        return self.kind.partition(".*")[0]


def places(names: Iterable[str]) -> dict[str, ModulePlace]:
    """Find the place of each module; numbers are understood from all names together."""
    split = {name: name.split(".") for name in names}
    numbers: dict[tuple[str, ...], list[set[str]]] = {}
    patterns = {}
    for name, parts in split.items():
        at = [index for index, part in enumerate(parts) if _is_number(part)]
        pattern = patterns[name] = tuple(_NUMBER if index in at else part for index, part in enumerate(parts))
        seen = numbers.setdefault(pattern, [set() for _ in at])
        for place, index in enumerate(at):
            seen[place].add(parts[index])
    decided = {pattern: _decide(pattern, seen) for pattern, seen in numbers.items()}
    return {name: _place(parts, *decided[patterns[name]]) for name, parts in split.items()}


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdecimal() and len(part) <= 6


def _decide(pattern: Sequence[str], numbers: Sequence[set[str]]) -> tuple[int, int]:
    """Return the positions of the layer's number and of the expert's, -1 for none."""
    at = [index for index, part in enumerate(pattern) if part == _NUMBER]
    is_expert = [index > 0 and "expert" in pattern[index - 1].lower() for index in at]
    candidates = [place for place in range(len(at)) if not is_expert[place]]
    layer = next((place for place in candidates if len(numbers[place]) > 1), candidates[0] if candidates else -1)
    inside = range(layer + 1, len(at))
    many = [place for place in inside if is_expert[place] or len(numbers[place]) >= _LEAST_EXPERTS]
    return (at[layer] if layer >= 0 else -1), (at[many[0]] if many else -1)


def _place(parts: Sequence[str], layer: int, expert: int) -> ModulePlace:
    kind = [("*" if index == expert else part) for index, part in enumerate(parts) if index > layer]
    return ModulePlace(
        stack=".".join(parts[: max(layer, 0)]),
        layer=int(parts[layer]) if layer >= 0 else -1,
        kind=".".join(kind) or ".".join(parts[: max(layer, 0)]) or "without a name",
        expert=int(parts[expert]) if expert >= 0 else -1,
    )


def short_kinds(kinds: Sequence[str]) -> Mapping[str, str]:
    """Return for each kind the shortest ending of its name that no other kind has; experts keep their mixture."""
    found = {}
    split = [kind.split(".") for kind in kinds]
    for kind, parts in zip(kinds, split, strict=True):
        size = next(
            (size for size in range(1, len(parts)) if sum(other[-size:] == parts[-size:] for other in split) == 1),
            len(parts),
        )
        if "*" in parts:
            size = max(size, len(parts) - max(parts.index("*") - 1, 0))
        found[kind] = ".".join(parts[-size:]).replace(".*.", " ")
    return found
