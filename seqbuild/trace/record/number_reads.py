"""Who looks at the attributes that number a layer: a layer whose result may follow from its number is no other's twin.

A number that is handed to a cache which keeps nothing, and goes nowhere else, is not looked at.
"""

from __future__ import annotations

import dis
import functools
import types
from dataclasses import dataclass, field

# The reads that are being noted, the innermost last.
_ACTIVE: list[NumberReads]


@dataclass(eq=False)
class NumberReads:
    """Reads in order: the attribute, and which instruction of which frame has read it."""

    found: list[tuple[str, int, int]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.found)

    def note(self, name: str, frame: types.FrameType | None = None) -> None:
        """Note one, by the frame that reads it if that is known."""
        self.found.append((name, id(frame) if frame is not None else 0, frame.f_lasti if frame is not None else -1))

    def __enter__(self) -> NumberReads:
        _ACTIVE.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _ACTIVE.remove(self)


_ACTIVE = []


def handed_over(frame: types.FrameType) -> None:
    """Forget the last read, if it was made for the arguments of the call that `frame` is at, and is kept nowhere."""
    for reads in _ACTIVE:
        if reads.found:
            _, reader, place = reads.found[-1]
            if reader == id(frame) and 0 <= place < frame.f_lasti and _is_direct(frame.f_code, place, frame.f_lasti):
                reads.found.pop()


@functools.cache
def _is_direct(code: types.CodeType, first: int, last: int) -> bool:
    """Whether nothing is stored, decided or called after one instruction and before the call that another is in."""
    *between, _ = [step.opname for step in dis.get_instructions(code) if first < step.offset <= last]
    return not any("STORE" in name or "JUMP" in name or name.startswith(("CALL", "COPY", "DUP")) for name in between)
