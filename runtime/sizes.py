"""Sizes as people write them: 24GiB, 512 MB, 1.5e9 B. A unit is required: 24 could mean bytes or GiB."""

from __future__ import annotations

import re

from runtime.errors import UsageError

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
