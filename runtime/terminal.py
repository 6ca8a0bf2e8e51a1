"""Fit text and tables to the width of a terminal; text for files and pipes keeps its full length."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TextIO

from runtime.standard_output import Output

_GAP = "  "
_ELLIPSIS = "…"


def is_terminal(stream: TextIO | Output | None) -> bool:
    """Return whether a stream is a terminal that can move its cursor."""
    return _is_tty(stream) and os.environ.get("TERM", "") not in ("", "dumb", "unknown")


def _is_tty(stream: TextIO | Output | None) -> bool:
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # a closed stream
        return False


def width_of(stream: TextIO | Output | None) -> int | None:
    """Return the number of columns of a terminal; None for files and pipes, which have no width."""
    if stream is None or not _is_tty(stream):
        return None
    stated = os.environ.get("COLUMNS", "")
    if stated.isdecimal() and int(stated):
        return int(stated)
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def flowed(text: str, stream: TextIO | Output | None) -> str:
    """Fill rows with spaces where the edge of a terminal would break a word.

    The terminal continues a full row on the next one, so that a path or a command is still copied as one line. The text
    after a name and two or more spaces stays in its column.
    """
    width = width_of(stream) if is_terminal(stream) else None
    return text if width is None else "\n".join(_flowed(line, width) for line in text.split("\n"))


def _flowed(line: str, width: int) -> str:
    if len(line) <= width:  # wide characters take more, and are left to the terminal
        return line
    name = re.match(r"\S+(?: \S+)* {2,}(?=\S)", line)
    indent = len(name[0]) if name is not None and len(name[0]) <= width // 2 else 0
    flow, column = line[:indent], indent
    for index, word in enumerate(line[indent:].split(" ")):
        size = cells(word)
        if index and column + 1 + size > width >= size:
            start = indent if indent + size <= width else 0
            flow, column = flow + " " * (width - column + start), start
        elif index:
            flow, column = f"{flow} ", column + 1
        flow, column = flow + word, column + size
        column -= width * ((column - 1) // width) if column > width else 0
    return flow


def printable(text: str) -> str:
    """Escape non-printable characters: names come from untrusted files and could contain terminal commands."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() or character in "\n\t" else ascii(character)[1:-1] for character in text
    )


def cells(text: str) -> int:
    """Return the number of columns that a text takes on a terminal."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def shortened(text: str, width: int) -> str:
    """Shorten a text in the middle, where names of modules differ the least."""
    if cells(text) <= width:
        return text
    tail = max(width - 1, 0)
    while tail and cells(text[: tail // 2]) + 1 + cells(text[len(text) - (tail - tail // 2) :]) > width:
        tail -= 1
    return text[: tail // 2] + _ELLIPSIS + text[len(text) - (tail - tail // 2) :]


class Names(NamedTuple):
    """A cell with a list of names; a narrow one shows the first names and the number of the others.

    `brief` has shorter forms of the names for it, if there are any.
    """

    names: tuple[str, ...]
    num_more: int = 0
    noun: str = "more"
    brief: tuple[str, ...] = ()

    def __str__(self) -> str:
        more = f" and {self.num_more} {self.noun}" if self.num_more else ""
        return ", ".join(self.names) + more

    def within(self, width: int) -> str:
        """Return the names that fit; the first one is always shown."""
        if cells(str(self)) <= width or not self.names:
            return str(self)
        for count in range(len(self.names), 0, -1):
            rest = len(self.names) - count + self.num_more
            text = ", ".join((self.brief or self.names)[:count])
            more = f" +{rest}" if rest else ""
            if count == 1 or cells(text) + len(more) <= width:
                return shortened(text, width - len(more)) + more
        return ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """A column of a table.

    Attributes:
        heading: its name.
        is_number: whether it is aligned to the right.
        is_flexible: whether its cells are shortened on a narrow terminal.
        least: the width down to which they are.
        dropped: its turn to be left out on a narrow terminal, the lowest first; 0 for never.
    """

    heading: str
    is_number: bool = False
    is_flexible: bool = False
    least: int = 12
    dropped: int = 0


def table_lines(
    columns: Sequence[Column], rows: Sequence[Sequence[str | Names]], width: int | None = None
) -> Iterator[str]:
    """Yield a heading and the rows of a table.

    Args:
        columns: of each row.
        rows: printable cells.
        width: of the terminal: columns are left out until the rest fits with shortened cells. None shows everything.
    """
    natural = [
        max(cells(str(cell)) for cell in (column.heading, *(row[index] for row in rows)))
        for index, column in enumerate(columns)
    ]
    least = [
        min(size, max(len(column.heading), column.least)) if column.is_flexible else size
        for column, size in zip(columns, natural, strict=True)
    ]
    shown = list(range(len(columns)))
    if width is not None:
        for index in sorted((i for i in shown if columns[i].dropped), key=lambda i: columns[i].dropped):
            if _total(least, shown) > width:
                shown.remove(index)
    widths = dict(zip(shown, _grown(least, natural, shown, width), strict=True))
    for row in ([column.heading for column in columns], *rows):
        yield _GAP.join(_fitted(row[index], columns[index], widths[index]) for index in shown).rstrip()
    left_out = [column.heading for index, column in enumerate(columns) if index not in shown]
    if left_out:
        yield f"(not shown at this width: {', '.join(left_out)})"


def _total(sizes: Sequence[int], shown: Sequence[int]) -> int:
    return sum(sizes[index] for index in shown) + len(_GAP) * (len(shown) - 1)


def _grown(least: Sequence[int], natural: Sequence[int], shown: Sequence[int], width: int | None) -> list[int]:
    """Return the width of each shown column: the narrowest of those that need more grows first."""
    if width is None:
        return [natural[index] for index in shown]
    sizes = list(least)
    for _ in range(width - _total(least, shown)):
        growing = [index for index in shown if sizes[index] < natural[index]]
        if not growing:
            break
        sizes[min(growing, key=lambda index: sizes[index])] += 1
    return [sizes[index] for index in shown]


def _fitted(cell: str | Names, column: Column, width: int) -> str:
    text = cell.within(width) if isinstance(cell, Names) else str(cell)
    text = shortened(text, width) if column.is_flexible else text
    space = " " * (width - cells(text))
    return space + text if column.is_number else text + space
