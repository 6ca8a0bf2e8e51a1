"""Rename checkpoint keys as transformers does, fast enough for a hundred thousand keys.

Keys of a large model differ in numbers only: `model.layers.12.mlp.experts.201.up_proj.weight`. The rules are regular
expressions that rarely depend on a number, so keys of one form (equal except for their numbers, which have equal
length) are renamed alike: the rules are applied once per form, and the numbers are substituted.

The text of a rule determines whether it ignores numbers. It does not if it contains a digit, unless letters directly
before the digit bind it to a name (`w1`), if it has a back reference, or if its class overrides renaming. If one rule
depends on numbers, or a form gives unexpected results, transformers' rules are applied to every key.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

# Parts that an expression may contain without depending on numbers: escapes, any digit, classes without digits, `w1`.
_BACK_REFERENCE = re.compile(r"\\[1-9]|\(\?P=|\(\?\(")
_ESCAPE = re.compile(r"\\.")
_HARMLESS = re.compile(r"\[0-9\]|\[\^?[^\]0-9-]*\]|[A-Za-z_][0-9]+")
_TELLING = re.compile(r"[0-9\[\]{]")

Renamed = tuple[str, str | None]


class Renamer:
    """Mapping of a key to its name in the model and to the pattern of the conversion rule that takes it.

    Args:
        renamings: transformers' rules that only rename, in order.
        converters: the rules that compute; at most one applies.
        prefix: of the base model, which transformers adds or removes if that yields a parameter's name.
        known: the names of the model's parameters.
    """

    def __init__(
        self, renamings: Sequence[Any], converters: Sequence[Any], prefix: str, known: Collection[str]
    ) -> None:
        self._renamings = list(renamings)
        self._converters = list(converters)
        self._prefix = prefix
        self._known = dict.fromkeys(known, True)
        self._are_blind = bool(prefix) and all(map(is_blind, (*renamings, *converters)))
        self._forms: dict[tuple[str | int, ...], Renamed | None] = {}

    def rename(self, key: str) -> Renamed:
        """Rename a key as transformers' `rename_source_key` does."""
        parts = key.split(".")
        if not self._are_blind or not key.isascii() or "{" in key or "}" in key:
            return self._ask(key)
        form = tuple([len(part) if part.isdecimal() else part for part in parts])
        if form not in self._forms:
            self._forms[form] = self._learn(form, key)
        template = self._forms[form]
        if template is None:
            return self._ask(key)
        name = template[0].format(*[part for part in parts if part.isdecimal()])
        is_prefixed = name.startswith(self._prefix) and name[len(self._prefix) + 1 :] in self._known
        if is_prefixed or f"{self._prefix}.{name}" in self._known:
            return self._ask(key)
        return name, template[1]

    def _ask(self, key: str) -> Renamed:
        from transformers.core_model_loading import rename_source_key

        renamed: Renamed = rename_source_key(key, self._renamings, self._converters, self._prefix, self._known)
        return renamed

    def _learn(self, form: Sequence[str | int], key: str) -> Renamed | None:
        """Rename a form, with its numbers as `{0}`, `{1}`, ...; None if the keys of the form are not renamed alike."""
        num_numbers = sum(isinstance(part, int) for part in form)
        if num_numbers > 9:
            return None
        probes = [_Probe(form, [str((index + shift) % 9 + 1) for index in range(num_numbers)]) for shift in (0, 1)]
        pattern = None
        for rule in self._renamings:
            for probe in probes:
                probe.apply(rule)
            if not _agree(probes):
                return None
        for rule in self._converters:
            patterns = [probe.apply(rule) for probe in probes]
            if not _agree(probes) or patterns[0] != patterns[1]:
                return None
            pattern = patterns[0]
            if pattern is not None:
                break
        template = probes[0].template()
        numbers = [part for part in key.split(".") if part.isdecimal()]
        is_so = (template.format(*numbers), pattern) == self._ask_rules(key)
        return (template, pattern) if is_so else None

    def _ask_rules(self, key: str) -> Renamed:
        from transformers.core_model_loading import rename_source_key

        renamed: Renamed = rename_source_key(key, self._renamings, self._converters)
        return renamed


class _Probe:
    """A key of a form with distinguishable numbers."""

    def __init__(self, form: Sequence[str | int], digits: Sequence[str]) -> None:
        remaining = iter(digits)
        parts = [next(remaining) * part if isinstance(part, int) else part for part in form]
        self.numbers = {part: f"{{{digits.index(part[0])}}}" for part in parts if part.isdecimal()}
        self.text = ".".join(parts)
        self.is_odd = False

    def apply(self, rule: Any) -> str | None:
        """Apply a rule to the key; return the rule's pattern if it matched."""
        found = rule.compiled_sources.search(self.text)
        if found is not None:
            # A rule replaces the first occurrence of the matched text. Its position must not depend on the numbers.
            text, part = (re.sub("[0-9]", "0", whole) for whole in (self.text, found[0]))
            self.is_odd = self.is_odd or text.find(part) != text.rfind(part)
        pattern: str | None
        self.text, pattern = rule.rename_source_key(self.text)
        return pattern

    def template(self) -> str:
        return ".".join(self.numbers.get(part, part) for part in self.text.split("."))


def _agree(probes: Iterable[_Probe]) -> bool:
    one, other = probes
    return not one.is_odd and not other.is_odd and one.template() == other.template()


def is_blind(rule: Any) -> bool:
    """Return whether a rule of transformers treats keys of one form alike."""
    from transformers.core_model_loading import WeightTransform

    if type(rule).rename_source_key is not WeightTransform.rename_source_key:
        return False
    if getattr(rule, "scope_prefix", None) is not None:
        return False
    pattern = rule.compiled_sources.pattern
    if _BACK_REFERENCE.search(pattern):
        return False
    return _TELLING.search(_HARMLESS.sub("", _ESCAPE.sub("\0", pattern))) is None


def natural_order() -> Callable[[str], list[Any]]:
    """Return the key function by which transformers orders names; it caches parts of names."""
    from transformers.core_model_loading import dot_natural_key

    of_part = functools.cache(lambda part: dot_natural_key(part)[0])
    return lambda name: [of_part(part) for part in name.split(".")]
