"""Read YAML, keeping the line of every value.

Mappings, lists and strings are of subclasses that know their lines. Aliases are expanded, so that each use has a line
of its own; the number of values is limited, because a few aliases can stand for billions.
"""

from __future__ import annotations

from typing import Any

import yaml

from runtime.console import shown
from runtime.errors import RecipeError

MAX_VALUES = 300_000  # the largest mixtures have some 70,000 modules to name
_MERGE, _MAPPING, _SEQUENCE = (f"tag:yaml.org,2002:{name}" for name in ("merge", "map", "seq"))


class Text(str):
    """A string, and the line of its key, or its own line in a list. The first line is 1."""

    __slots__ = ("line",)
    line: int

    def __new__(cls, text: str, line: int = 0) -> Text:
        """Return `text` with its line."""
        self = super().__new__(cls, text)
        self.line = line
        return self


class Table(dict[str, Any]):
    """A mapping, its key and line in the surrounding one, and the lines of its own keys."""

    name: str
    line: int
    lines: dict[str, int]


class Items(list[Any]):
    """A list, its line, and the lines of its elements."""

    line: int
    lines: list[int]


def parse(text: str, *, origin: str) -> Any:
    """Read one YAML document.

    Args:
        text: the document.
        origin: the name of its file, for messages.

    Raises:
        RecipeError: the text is empty, not YAML, or too large; a key is repeated or not a string.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is None:
            raise RecipeError(f"{origin}: the file is empty")
        return _YamlReader(origin).value(node, "the file", _line(node))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error)
        raise RecipeError(f"{origin}:{mark.line + 1 if mark else 1}: not valid YAML: {problem}") from error
    except RecursionError as error:
        raise RecipeError(f"{origin}: not valid YAML: it is nested too deeply") from error


class _PlainDumper(yaml.SafeDumper):
    """Writes mappings, lists and strings of subclasses, too, and no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_PlainDumper.add_multi_representer(dict, yaml.SafeDumper.represent_dict)
_PlainDumper.add_multi_representer(list, yaml.SafeDumper.represent_list)
_PlainDumper.add_multi_representer(str, yaml.SafeDumper.represent_str)


def in_one_line(value: Any) -> str:
    """Write a value as YAML, in one line.

    Raises:
        RecipeError: it contains an object that YAML cannot represent.
    """
    return _dumped(value, default_flow_style=True).rstrip("\n")


def in_blocks(value: Any) -> str:
    """Write a value as YAML, one line for each key and each element of a list.

    Raises:
        RecipeError: as `in_one_line`.
    """
    return _dumped(value, default_flow_style=False, allow_unicode=True)


def _dumped(value: Any, **style: Any) -> str:
    try:
        text: str = yaml.dump(value, Dumper=_PlainDumper, sort_keys=False, width=2**31, **style)
    except yaml.YAMLError as error:
        raise RecipeError(f"{shown(error.args[-1])} cannot be part of a recipe") from error
    return text


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


class _YamlReader:
    """Constructs values from the nodes of one document."""

    def __init__(self, origin: str) -> None:
        self.origin = origin
        self.scalars = yaml.SafeLoader("")
        self.num_values = 0

    def value(self, node: yaml.Node, name: str, line: int) -> Any:
        """Construct the value of the key `name`, which is on `line`."""
        self._count(line)
        if node.tag == _MAPPING and isinstance(node, yaml.MappingNode):
            entries = self._entries(node)
            table = Table({key: self.value(child, key, at) for key, (at, child) in entries.items()})
            table.name, table.line, table.lines = name, line, {key: at for key, (at, _) in entries.items()}
            return table
        if node.tag == _SEQUENCE and isinstance(node, yaml.SequenceNode):
            items = Items(self.value(child, f"an element of {name}", _line(child)) for child in node.value)
            items.line, items.lines = line, [_line(child) for child in node.value]
            return items
        if not isinstance(node, yaml.ScalarNode):
            raise self._error(line, f"the tag {node.tag!r} of {name} is not supported")
        try:
            value = self.scalars.construct_object(node, deep=True)
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            # An impossible date, an integer of thousands of digits, a tag that does not fit the text.
            raise self._error(line, f"{name} cannot be read: {error}") from error
        return Text(value, line) if isinstance(value, str) else value

    def _entries(self, node: yaml.MappingNode) -> dict[str, tuple[int, yaml.Node]]:
        """Collect the line and the value of each key, those of merge keys (`<<`) first."""
        own: dict[str, tuple[int, yaml.Node]] = {}
        merged: dict[str, tuple[int, yaml.Node]] = {}
        lines: dict[str, int] = {}
        for key_node, child in node.value:
            line = _line(key_node)
            key = "<<" if key_node.tag == _MERGE else self.value(key_node, "a key", line)
            if not isinstance(key, str):
                raise self._error(line, f"a key must be a string, not {shown(key)}")
            if key in lines:
                raise self._error(line, f"{key!r} is repeated, first on line {lines[key]}")
            lines[str(key)] = line
            if key_node.tag != _MERGE:
                own[str(key)] = line, child
                continue
            for source in reversed(child.value) if isinstance(child, yaml.SequenceNode) else [child]:
                self._count(line)
                if not isinstance(source, yaml.MappingNode):
                    raise self._error(line, "not valid YAML: << takes a mapping or a list of mappings")
                merged |= self._entries(source)
        return merged | own

    def _count(self, line: int) -> None:
        self.num_values += 1
        if self.num_values > MAX_VALUES:
            raise self._error(line, f"the file has more than {MAX_VALUES} values, with aliases expanded")

    def _error(self, line: int, message: str) -> RecipeError:
        return RecipeError(f"{self.origin}:{line}: {message}")
