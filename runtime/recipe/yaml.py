"""YAML whose every value knows its line, so that a message can say where."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import yaml

from runtime.console import shown
from runtime.errors import RecipeError
from runtime.patterns import fault

_MERGE = "tag:yaml.org,2002:merge"


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """A value in a YAML text.

    Args:
        node: as PyYAML composes it.
        line: where its key stands, or where it begins itself; the first line is 1.
        origin: the file's name, for messages.
        name: its key, for messages.
    """

    node: yaml.Node
    line: int
    origin: str
    name: str

    @classmethod
    def parse(cls, text: str, *, origin: str) -> Value:
        """Compose a text of one YAML document.

        Raises:
            RecipeError: when it is empty or no YAML.
        """
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.YAMLError as error:
            raise _from_yaml(error, origin) from error
        except RecursionError as error:
            raise RecipeError(f"{origin}: not valid YAML: it is nested too deeply") from error
        if node is None:
            raise RecipeError(f"{origin}: the file is empty")
        return cls(node=node, line=node.start_mark.line + 1, origin=origin, name="the file")

    def error(self, message: str, *, hint: str = "") -> RecipeError:
        """An error that begins with the file and the line."""
        return RecipeError(f"{self.origin}:{self.line}: {message}", hint=hint)

    def mapping(self) -> dict[str, Value]:
        """The entries, in the file's order; merge keys (`<<`) are resolved.

        Raises:
            RecipeError: when this is no mapping, or a key is there twice or is no string.
        """
        if not isinstance(self.node, yaml.MappingNode):
            raise self.error(f"{self.name} must be a mapping, not {_kind(self.node)}")
        written: dict[str, int] = {}
        for key_node, _ in self.node.value:
            key = "<<" if key_node.tag == _MERGE else self._at(key_node, "a key").text()
            line = key_node.start_mark.line + 1
            if key in written:
                raise RecipeError(f"{self.origin}:{line}: {key!r} is here twice, first on line {written[key]}")
            written[key] = line
        return {
            key_node.value: Value(
                node=value_node, line=key_node.start_mark.line + 1, origin=self.origin, name=key_node.value
            )
            for key_node, value_node in self._merged(self.node)
        }

    def items(self) -> list[Value]:
        """The elements of a list; a value that is no list counts as its only element."""
        if not isinstance(self.node, yaml.SequenceNode):
            return [self]
        return [self._at(node, f"an element of {self.name}") for node in self.node.value]

    def plain(self) -> Any:
        """The value as Python has it.

        Raises:
            RecipeError: when it has a tag that is not plain YAML.
        """
        try:
            return yaml.SafeLoader("").construct_document(copy.deepcopy(self.node))
        except yaml.YAMLError as error:
            raise _from_yaml(error, self.origin) from error
        except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
            # A date that is none, an integer of thousands of digits, a tag of a type that the text is not of.
            raise self.error(f"{self.name} cannot be read: {error}") from error

    def text(self) -> str:
        """The value, which must be a string.

        Raises:
            RecipeError: when it is anything else.
        """
        value = self.plain()
        if not isinstance(value, str):
            raise self.error(f"{self.name} must be a string, not {shown(value)}")
        return value

    def pattern(self) -> str:
        """The value, which must be a name or `re:` with a regular expression.

        Raises:
            RecipeError: when it is not.
        """
        text = self.text()
        if text.startswith("re:"):
            wrong = fault(text.removeprefix("re:"))
            if wrong:
                raise self.error(f"{text[:200]!r} is no regular expression: {wrong}")
        if not text.removeprefix("re:"):
            raise self.error(f"{self.name} is an empty pattern")
        return text

    def unknown(self, what: str, valid: Iterable[str]) -> RecipeError:
        """An error for a key that means nothing, with the nearest that does."""
        known = list(valid)
        near = difflib.get_close_matches(self.name, known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"valid are {', '.join(known)}"
        return self.error(f"unknown {what} {self.name!r}", hint=hint)

    def _at(self, node: yaml.Node, name: str) -> Value:
        return Value(node=node, line=node.start_mark.line + 1, origin=self.origin, name=name)

    def _merged(self, node: yaml.MappingNode) -> list[tuple[yaml.Node, yaml.Node]]:
        """The entries with merge keys resolved; PyYAML does that in place, and so is given a copy."""
        copied = copy.deepcopy(node)
        try:
            yaml.SafeLoader("").flatten_mapping(copied)
        except yaml.YAMLError as error:
            raise _from_yaml(error, self.origin) from error
        return list(copied.value)


def _kind(node: yaml.Node) -> str:
    return "a list" if isinstance(node, yaml.SequenceNode) else shown(node.value)


def _from_yaml(error: yaml.YAMLError, origin: str) -> RecipeError:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    return RecipeError(f"{origin}:{mark.line + 1 if mark else 1}: not valid YAML: {problem}")
