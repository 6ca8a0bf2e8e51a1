"""The budget of a search: average bits of the quantized weights, bytes of the checkpoint, or the size of a scheme."""

from __future__ import annotations

import re
from dataclasses import dataclass

from runtime.console import parse_bytes
from runtime.errors import UsageError

_BITS = re.compile(r"(?P<bits>\d+(\.\d+)?) ?bits?", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class BitBudget:
    """The most bytes that a choice may take. One of the three is given.

    Attributes:
        text: as it was given.
        bits: stored bits, scales and zero points included, for each weight of the modules that are searched.
        num_bytes: of all tensors of the checkpoint.
        scheme: the preset with which all searched modules take as many bytes as they may.
    """

    text: str
    bits: float | None = None
    num_bytes: int | None = None
    scheme: str | None = None

    @classmethod
    def parse(cls, text: str, *, option: str = "--budget") -> BitBudget:
        """Parse `3.5bits`, a number of bytes such as `2.1GiB`, or the name of a preset.

        Raises:
            UsageError: for any other text.
        """
        from runtime.formats.presets import PRESETS

        if text.strip().upper() in PRESETS:
            return cls(text=text.strip().upper(), scheme=text.strip().upper())
        match = _BITS.fullmatch(text.strip())
        if match is not None:
            bits = float(match["bits"])
            if not 0 < bits <= 64:
                raise UsageError(f"{option} must be above 0 and at most 64 bits; got {text!r}", hint="such as 3.5bits")
            return cls(text=text.strip(), bits=bits)
        if not re.search("[a-zA-Z]", text):
            raise UsageError(f"{option} must have a unit; got {text!r}", hint="such as 3.5bits, 2.1GiB or W4A16")
        try:
            return cls(text=text.strip(), num_bytes=parse_bytes(text, option=option))
        except UsageError as error:
            raise UsageError(
                f"{option} must be bits, bytes or a preset; got {text!r}", hint="such as 3.5bits, 2.1GiB or W4A16"
            ) from error
