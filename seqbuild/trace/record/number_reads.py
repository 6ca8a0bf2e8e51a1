"""Who looks at the attributes that number a layer: a layer whose result may follow from its number is no other's twin.

A number that is handed to a cache which keeps nothing, and goes nowhere else, is not looked at.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import os
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

# Whose looking at all attributes of a module says nothing about the model's code.
# Frames of torch and of `seqbuild.trace` are not the model's.
_OURS = tuple(f"{folder}{os.sep}" for folder in (Path(torch.__file__).parent, Path(__file__).parents[1]))
# Attributes of a class that are compared.
SHARED_KINDS = (bool, int, float, str, list, dict, set, tuple, type(None))

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


@contextlib.contextmanager
def numbers_watched(numbered: Mapping[tuple[type, str], None]) -> Iterator[NumberReads]:
    """Note whenever one of these attributes is looked at, or all attributes at once, through any module of their
    class.
    """
    with contextlib.ExitStack() as stack, NumberReads() as reads:
        for cls, name in numbered:
            setattr(cls, name, _WatchedAttribute(name, reads))
            stack.callback(delattr, cls, name)
        for cls in dict.fromkeys(cls for cls, _ in numbered):
            stack.enter_context(_dictionary_watched(cls, reads))
        yield reads


@contextlib.contextmanager
def _dictionary_watched(cls: Any, reads: NumberReads) -> Iterator[None]:
    """Note whenever a module of this class is asked for `__dict__`, other than by torch or by us."""
    looked_up, own = cls.__getattribute__, vars(cls).get("__getattribute__")

    def watching(module: Any, name: str) -> Any:
        if name == "__dict__" and not sys._getframe(1).f_code.co_filename.startswith(_OURS):
            reads.note(name)
        return looked_up(module, name)

    cls.__getattribute__ = watching
    try:
        yield
    finally:
        if own is None:
            del cls.__getattribute__
        else:
            cls.__getattribute__ = own


class _WatchedAttribute:
    """Stands in a class for an attribute that its objects have: being able to write, it goes before theirs."""

    def __init__(self, name: str, reads: NumberReads) -> None:
        self.name = name
        self.reads = reads

    def __get__(self, owner: Any, cls: type) -> Any:
        reader: types.FrameType | None = sys._getframe(1)
        while reader is not None and reader.f_code.co_filename == __file__:
            reader = reader.f_back
        self.reads.note(self.name, reader)
        if owner is None or self.name not in vars(owner):
            raise AttributeError(self.name)
        return vars(owner)[self.name]

    def __set__(self, owner: Any, value: Any) -> None:
        self.reads.note(self.name)
        vars(owner)[self.name] = value

    def __delete__(self, owner: Any) -> None:
        self.reads.note(self.name)
        del vars(owner)[self.name]
