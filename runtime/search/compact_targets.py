"""Write the names of many modules as a few targets of a recipe."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from runtime.formats.targets import matches_name


class _NamePlace(NamedTuple):
    """A module, or all modules of a mixture, as parts of a name.

    `head` is what comes before the first number, `parent` and `last` what follows it.
    """

    head: str
    number: str
    parent: str
    last: str
    is_mixture: bool

    @classmethod
    def of(cls, name: str, mixtures: Mapping[str, str]) -> _NamePlace:
        """Split a name, or that of the mixture that the module belongs to."""
        parts = mixtures.get(name, name).split(".")
        first = next((place for place, part in enumerate(parts[:-1]) if part.isdecimal()), -1)
        head, number = (".".join(parts[:first]), parts[first]) if first >= 0 else ("", "")
        return cls(head, number, ".".join(parts[first + 1 : -1]), parts[-1], name in mixtures)


def compact_targets(names: Sequence[str], everything: Collection[str], mixtures: Mapping[str, str]) -> list[str]:
    """Return targets that match these modules and no others.

    The regular expressions begin with the last part of the name before the number of the layer, because readers may
    have another prefix there, such as `language_model.`. Where this would match other modules, the names themselves are
    returned.

    Args:
        names: of modules.
        everything: the names of all modules that a target could match.
        mixtures: for modules of experts the name of their mixture; `names` has all modules of a mixture or none.
    """
    own, known = (_numbers(some, mixtures) for some in (names, everything))
    lasts: dict[tuple[str, str, str, bool], list[str]] = {}
    for place, numbers in own.items():
        layers = r"\d+" if numbers == known[place] else "|".join(numbers)
        lasts.setdefault((place.head, layers, place.parent, place.is_mixture), []).append(place.last)
    wanted, targets = set(names), []
    for (head, layers, parent, is_mixture), found in lasts.items():
        parts = [re.escape(head.rpartition(".")[2]), _one_of(layers.split("|"))] if head else []
        parts += [re.escape(parent)] if parent else []
        inner = r"\.".join((*parts, _one_of([re.escape(last) for last in found])))
        target = f"re:(.*\\.)?{inner}" + (r"\..*" if is_mixture else "$")
        matched = [name for name in everything if matches_name(target, name)]
        listed = [name for name in names if name in set(matched)]
        targets += [target] if set(matched) <= wanted else listed
    return targets


def _numbers(names: Collection[str], mixtures: Mapping[str, str]) -> dict[_NamePlace, list[str]]:
    """Return the numbers of layers in which a place exists; the keys are places without numbers."""
    found: dict[_NamePlace, dict[str, None]] = {}
    for name in names:
        place = _NamePlace.of(name, mixtures)
        found.setdefault(place._replace(number=""), {})[place.number] = None
    return {place: list(numbers) for place, numbers in found.items()}


def _one_of(patterns: Sequence[str]) -> str:
    return patterns[0] if len(patterns) == 1 else f"({'|'.join(patterns)})"
