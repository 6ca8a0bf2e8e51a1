"""How both command lines speak: one line for an error, exit code 2; a traceback only when asked for."""

from __future__ import annotations

import contextlib
import logging
import re
import reprlib
import sys
from collections.abc import Iterator
from typing import TextIO

from runtime.errors import UsageError
from runtime.standard_output import Output

NOTHING_LEFT = "nothing half-written was left behind"
left_behind = [NOTHING_LEFT]


def tell_when_stopped(text: str) -> None:
    """What to say of a command that was interrupted: typer keeps no exception that could carry it."""
    left_behind[0] = text


def say(line: str = "") -> None:
    """Print a line at once, also into a pipe; a stream that takes none ends no run."""
    _print(printable(line), sys.stdout)


def warn(line: str) -> None:
    """Print a line where it does not mix with results."""
    _print(f"warning: {printable(line)}", sys.stderr)


def _print(line: str, stream: TextIO | Output | None) -> None:
    if stream is not None:
        output = stream if isinstance(stream, Output) else Output(stream)
        output.write(f"{line}\n")
        output.flush()


def shown(value: object) -> str:
    """A value for a message: of one that is large, a beginning."""
    shortener = reprlib.Repr()
    shortener.maxlevel = 2
    return shortener.repr(value)


def printable(text: str) -> str:
    """A text without what terminals obey and people do not see: names come from files that others have written."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() or character in "\n\t" else ascii(character)[1:-1] for character in text
    )


def human_bytes(count: float) -> str:
    """A size in the unit that keeps it short: 1.5 MB is 1 500 000 bytes."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


@contextlib.contextmanager
def quiet(*loggers: str, level: int = logging.ERROR) -> Iterator[None]:
    """Let these loggers, by name, say nothing below `level` while the block runs."""
    found = [logging.getLogger(name) for name in loggers]
    before = [logger.level for logger in found]
    for logger in found:
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, usual in zip(found, before, strict=True):
            logger.setLevel(usual)


_UNITS = {"B": 1}
_UNITS |= {f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", start=1)}
_UNITS |= {f"{prefix}IB": 1024**power for power, prefix in enumerate("KMGT", start=1)}
LARGEST = 2**60  # bytes: more than any machine has, and exact in every integer


def optional_bytes(text: str | None, *, option: str) -> int | None:
    """As `parse_bytes`; None for an option that was not given."""
    return None if text is None else parse_bytes(text, option=option)


def parse_bytes(text: str, *, option: str) -> int:
    """The number of bytes that a text states: kB to TB are powers of 1000, KiB to TiB powers of 1024.

    Args:
        text: a number and a unit.
        option: where it was given, for the message.

    Raises:
        UsageError: when it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:[eE]\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is not None and not match[2]:
        if not float(match[1]):
            return 0  # the same in every unit
        raise UsageError(f"{option} is {text!r}, a size without a unit", hint=f"write {match[1]}GiB or {match[1]}B")
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise UsageError(f"{option} is {text!r}, which is no size", hint="write it as 24GiB or 500MB")
    number = float(match[1]) * unit
    if number > LARGEST:
        raise UsageError(f"{option} is {text!r}, which is larger than any memory", hint="write it as 24GiB or 500MB")
    return int(number)
