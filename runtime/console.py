"""Text output of both command lines: lines, warnings, quoted values, and sizes in bytes."""

from __future__ import annotations

import contextlib
import logging
import re
import reprlib
import sys
from collections.abc import Callable, Iterator
from typing import TextIO

from runtime.errors import UsageError
from runtime.standard_output import Output
from runtime.status import make_room
from runtime.terminal import flowed, printable

NOTHING_LEFT = "no partial output was left behind"
left_behind = [NOTHING_LEFT]
followers_of_warnings: list[Callable[[str], None]] = []


def tell_when_stopped(text: str) -> None:
    """Set the line that an interrupted command prints; typer discards the exception that could carry it."""
    left_behind[0] = text


def say(line: str = "") -> None:
    """Print a line and flush it; a stream that cannot be written does not end the run."""
    _print(flowed(printable(line), sys.stdout), sys.stdout)


def put(text: str) -> None:
    """Print JSON or source code: as `say`, but the same on a terminal as in a file."""
    _print(printable(text), sys.stdout)


def silent(line: str) -> None:
    """Print nothing: for callers that want no lines."""


def warn(line: str) -> None:
    """Print a warning to standard error."""
    text = f"warning: {line}"
    complain(text)
    for follow in followers_of_warnings:
        follow(text)


def complain(line: str) -> None:
    """Print a line to standard error."""
    _print(flowed(printable(line), sys.stderr), sys.stderr)


def _print(line: str, stream: TextIO | Output | None) -> None:
    make_room()
    if stream is not None:
        output = stream if isinstance(stream, Output) else Output(stream)
        output.write(f"{line}\n")
        output.flush()


def shown(value: object) -> str:
    """Format a value for a message, shortened if it is large."""
    shortener = reprlib.Repr()
    shortener.maxlevel = 2
    return shortener.repr(value)


def human_bytes(count: float) -> str:
    """Format a size in decimal units: 1.5 MB is 1 500 000 bytes."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


@contextlib.contextmanager
def quiet(*loggers: str, level: int = logging.ERROR) -> Iterator[None]:
    """Silence these loggers below `level` while the block runs."""
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
LARGEST = 2**60  # bytes: more than any machine has, and within 64 bits


_SECONDS = {"": 1, "s": 1, "sec": 1, "min": 60, "m": 60, "h": 3600}
_LEAST_S, _MOST_S = 5, 7 * 24 * 3600


def parse_seconds(text: str, *, option: str, least: float = _LEAST_S) -> float:
    """Parse a time in seconds, minutes or hours: 600, 90s, 10min, 2h.

    Args:
        text: a number, and perhaps a unit.
        option: the option's name, for the message.
        least: the least time in seconds.

    Raises:
        UsageError: if the text is not a time, or out of range.
    """
    match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{0,9})?)\s*([a-z]*)\s*", text, re.ASCII)
    if match is None or match[2] not in _SECONDS:
        raise UsageError(f"{option} must be a time; got {text!r}", hint="write it as 90s, 10min or 2h")
    seconds = float(match[1]) * _SECONDS[match[2]]
    if not least <= seconds <= _MOST_S:
        raise UsageError(f"{option} must be between {least:.0f} s and 7 days; got {text!r}")
    return seconds


def optional_bytes(text: str | None, *, option: str) -> int | None:
    """Parse a size as `parse_bytes` does; None for an option that was not given."""
    return None if text is None else parse_bytes(text, option=option)


def parse_bytes(text: str, *, option: str) -> int:
    """Parse a size in bytes: kB to TB are powers of 1000, KiB to TiB powers of 1024.

    Args:
        text: a number and a unit.
        option: the option's name, for the message.

    Raises:
        UsageError: if the text is not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:[eE]\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is not None and not match[2]:
        if not float(match[1]):
            return 0  # the same in every unit
        raise UsageError(f"{option} is {text!r}, a size without a unit", hint=f"write {match[1]}GiB or {match[1]}B")
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise UsageError(f"{option} must be a size; got {text!r}", hint="write it as 24GiB or 500MB")
    number = float(match[1]) * unit
    if number > LARGEST:
        raise UsageError(f"{option} is {text!r}, which is larger than any memory", hint="write it as 24GiB or 500MB")
    return int(number)
