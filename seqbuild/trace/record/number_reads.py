"""Record reads of attributes with a layer's index: a layer whose result may depend on its index equals no other layer.

Reading the index only to pass it to a cache that stores nothing does not count.
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

# Code of torch and of `seqbuild.trace`, whose reads of all attributes of a module do not count.
_OURS = tuple(f"{folder}{os.sep}" for folder in (Path(torch.__file__).parent, Path(__file__).parents[1]))
# Types of the class attributes that are compared.
SHARED_KINDS = (bool, int, float, str, list, dict, set, tuple, type(None))

# The active recorders, innermost last.
_ACTIVE: list[NumberReads] = []


@dataclass(eq=False)
class NumberReads:
    """Reads in order: the attribute, and the frame and instruction that read it."""

    found: list[tuple[str, int, int]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.found)

    def note(self, name: str, frame: types.FrameType | None = None) -> None:
        """Record a read, with the frame that reads if it is known."""
        self.found.append((name, id(frame) if frame is not None else 0, frame.f_lasti if frame is not None else -1))

    def __enter__(self) -> NumberReads:
        _ACTIVE.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _ACTIVE.remove(self)


def passed_to_cache(frame: types.FrameType) -> None:
    """Discard the last read if its value is only an argument of the call that `frame` is executing."""
    for reads in _ACTIVE:
        if reads.found:
            _, reader, place = reads.found[-1]
            if reader == id(frame) and 0 <= place < frame.f_lasti and _is_direct(frame.f_code, place, frame.f_lasti):
                reads.found.pop()


@functools.cache
def _is_direct(code: types.CodeType, first: int, last: int) -> bool:
    """Return whether nothing is stored, called or branched on between one instruction and the call at another."""
    *between, _ = [step.opname for step in dis.get_instructions(code) if first < step.offset <= last]
    return not any("STORE" in name or "JUMP" in name or name.startswith(("CALL", "COPY", "DUP")) for name in between)


@contextlib.contextmanager
def numbers_watched(numbered: Mapping[tuple[type, str], None]) -> Iterator[NumberReads]:
    """Record reads of these attributes, or of all attributes at once, on any module of their class."""
    with contextlib.ExitStack() as stack, NumberReads() as reads:
        for cls, name in numbered:
            setattr(cls, name, _WatchedAttribute(name, reads))
            stack.callback(delattr, cls, name)
        for cls in dict.fromkeys(cls for cls, _ in numbered):
            stack.enter_context(_dictionary_watched(cls, reads))
        yield reads


@contextlib.contextmanager
def _dictionary_watched(cls: Any, reads: NumberReads) -> Iterator[None]:
    """Record reads of `__dict__` of a module of this class, except by torch and this package."""
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
    """Descriptor that records reads; with `__set__` it takes precedence over the objects' own attributes."""

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
