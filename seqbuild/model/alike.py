"""Derive the checkpoint tables of identical layers from two of them.

A model with 384 experts in 60 layers is saved as 70,000 tensors. transformers' rules treat layers of one form alike
unless a rule depends on numbers, so the rules are applied to two layers of each form, and the numbers of the other
layers are substituted. The results of the two layers must agree; a rule that mixes or counts layers is detected by
this.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

# The part of a dotted name before the first number, the number, and the rest.
_NAME = re.compile(r"((?:[^.]*\.)*?)([0-9]+)(\..*)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Alike:
    """Layers of one form.

    Attributes:
        prefix: their names up to the number.
        numbers: the layers' numbers, all with the same count of digits, because a rule may require two digits.
        suffixes: the part after the number in the names of their tensors.
    """

    prefix: str
    numbers: tuple[str, ...]
    suffixes: tuple[str, ...]

    def names(self, number: str) -> list[str]:
        """Return the names of the tensors of one layer."""
        return [f"{self.prefix}{number}{suffix}" for suffix in self.suffixes]

    @property
    def left_out(self) -> list[str]:
        """Return the names of the tensors of all layers except the first two."""
        return [name for number in self.numbers[2:] for name in self.names(number)]


def find_alike(kinds: Mapping[str, Any]) -> list[Alike]:
    """Find the forms with more than two layers.

    Args:
        kinds: names of tensors, and a value that must be equal for two tensors to be alike.
    """
    layers: dict[tuple[str, str], list[tuple[str, Any]]] = {}
    for name, kind in kinds.items():
        found = _NAME.fullmatch(name)
        if found is not None:
            layers.setdefault((found[1], found[2]), []).append((found[3], kind))
    forms: dict[Any, list[str]] = {}
    for (prefix, number), content in layers.items():
        forms.setdefault((prefix, len(number), tuple(content)), []).append(number)
    return [
        Alike(prefix=prefix, numbers=tuple(numbers), suffixes=tuple(suffix for suffix, _ in content))
        for (prefix, _, content), numbers in forms.items()
        if len(numbers) > 2
    ]


def fill_in(
    forms: Iterable[Alike], sources: MutableMapping[str, tuple[str, ...]], conversion: MutableMapping[str, int]
) -> bool:
    """Complete two tables that contain the first two layers of each form; return False if those two disagree.

    Args:
        forms: the layers.
        sources: parameter name to checkpoint keys.
        conversion: parameter name to the index of a program, see `seqbuild.model.checkpoint_keys.KeyTable`.
    """
    for form in forms:
        first, second, *others = form.numbers
        for index, (one, other) in enumerate(zip(form.names(first), form.names(second), strict=True)):
            keys, others_keys = sources.get(one), sources.get(other)
            if keys is None and others_keys is None:
                continue
            is_alike = keys is not None and others_keys is not None and len(keys) == len(others_keys)
            if not is_alike or conversion.get(one) != conversion.get(other):
                return False
            templates = [_template(*pair, first, second) for pair in zip(keys or (), others_keys or (), strict=True)]
            if not all(templates):
                return False
            for number in others:
                name = f"{form.prefix}{number}{form.suffixes[index]}"
                sources[name] = tuple([number.join(template) for template in templates])
                if one in conversion:
                    conversion[name] = conversion[one]
    return True


def _template(one: str, other: str, first: str, second: str) -> list[str]:
    """Split a key at the layer's number: the parts before, between and after. Empty if the two keys are ambiguous."""
    parts = list(zip(one.split("."), other.split("."), strict=False))
    if one.count(".") != other.count("."):
        return []
    pieces = [""]
    for index, (ours, theirs) in enumerate(parts):
        dot = "." if index else ""
        if ours == theirs:
            pieces[-1] += dot + ours
        elif (ours, theirs) == (first, second):
            pieces[-1] += dot
            pieces.append("")
        else:
            return []
    return pieces if len(pieces) > 1 else []
