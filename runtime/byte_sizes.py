"""Sizes in bytes, as people write them: `24GiB`, `500 MB`, `1e9`."""

from __future__ import annotations

import re

from runtime.errors import UsageError

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{letter}{tail}": 1000**power for power, letter in enumerate("KMGT", 1) for tail in ("", "B")}
_UNITS |= {f"{letter}IB": 1024**power for power, letter in enumerate("KMGT", 1)}
_PATTERN = re.compile(r"(\d+(?:\.\d*)?(?:[eE]\d+)?)\s*([A-Za-z]*)")


def parse_bytes(text: str, option: str, *, least: int = 1) -> int:
    """The number of bytes that a size stands for; `GB` is 1000^3, `GiB` 1024^3, a bare number bytes.

    Args:
        text: the size.
        option: what it was given for, for the message.
        least: the smallest size that can be.

    Raises:
        UsageError: when it is no size, or less.
    """
    match = _PATTERN.fullmatch(text.strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise UsageError(
            f"{option} is {text!r}, which is no size", hint="write it as 24GiB, 500MB or a number of bytes"
        )
    size = int(float(match[1]) * unit)
    if size < least:
        raise UsageError(f"{option} is {text!r}, which is too little")
    return size
