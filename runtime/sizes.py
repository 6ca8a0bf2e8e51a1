"""Sizes as people write them: 24GiB, 512 MB, 1.5e9."""

from __future__ import annotations

import re

from runtime.errors import UsageError

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", start=1)}
_UNITS |= {f"{prefix}IB": 1024**power for power, prefix in enumerate("KMGT", start=1)}
LARGEST = 2**60  # bytes: more than any machine has, and exact in every integer


def optional_bytes(text: str | None, *, option: str) -> int | None:
    """As `parse_bytes`; None for an option that was not given."""
    return None if text is None else parse_bytes(text, option=option)


def parse_bytes(text: str, *, option: str) -> int:
    """The number of bytes that a text states: kB to TB are powers of 1000, KiB to TiB powers of 1024.

    Args:
        text: a number and a unit; without a unit, bytes.
        option: where it was given, for the message.

    Raises:
        UsageError: when it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:[eE]\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise UsageError(f"{option} is {text!r}, which is no size", hint="write it as 24GiB or 500MB")
    number = float(match[1]) * unit
    if number > LARGEST:
        raise UsageError(f"{option} is {text!r}, which is larger than any memory", hint="write it as 24GiB or 500MB")
    return int(number)
