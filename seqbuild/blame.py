"""From what went wrong inside a trace to the one line that tells a user what to do."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

import runtime.errors
from runtime.errors import TraceError

_OURS = Path(__file__).resolve().parent
_TORCH = Path(torch.__file__).resolve().parent


def blame(error: BaseException, ancestors: Collection[nn.Module]) -> TraceError:
    """Name the model's innermost function on the way to `error`, its file and line, and what helps.

    The innermost frame that belongs neither to torch nor to this project is taken. Args: `ancestors`, whose `forward`
    cannot be one opaque step, because the targets are called in it.
    """
    culprit = _innermost(traceback.walk_tb(error.__traceback__))
    reason = (str(error).strip() or "no reason given").splitlines()[0][:300]
    if culprit is None:
        return TraceError(f"the model cannot be traced: {type(error).__name__}: {reason}")
    return TraceError(
        f"{culprit.name} cannot be traced ({culprit.file}, line {culprit.line}): {type(error).__name__}: {reason}",
        hint=_advice(culprit, culprit.is_forward and culprit.owner in ancestors),
    )


def burnt_in(size: str, culprit: Culprit | None) -> TraceError:
    """A size of the sample became a number in the graph, so that the chain would be right for that size alone."""
    if culprit is None:
        return TraceError(f"{size} is burnt in: the model's code decided by it or looped over it")
    return TraceError(
        f"{size} is burnt in: {culprit.name} ({culprit.file}, line {culprit.line}) decided by it or looped over it",
        hint=_advice(culprit, culprit.is_forward),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Culprit:
    """A line of the model's code.

    Attributes:
        name: its function.
        file: where it is.
        line: likewise.
        ignorable: the innermost function around it that `--ignore` can name.
        owner: the object whose method that is, or None.
        is_forward: whether that is a module's forward.
    """

    name: str
    file: str
    line: int
    ignorable: str
    owner: Any
    is_forward: bool


def find_culprit() -> Culprit | None:
    """The innermost line of the model's code that is being executed."""
    return _innermost(reversed(list(traceback.walk_stack(None))))


def _innermost(walk: Iterable[tuple[FrameType, int]]) -> Culprit | None:
    frames = [(frame, line) for frame, line in walk if _is_models(frame.f_code.co_filename)]
    if not frames:
        return None
    frame, line = frames[-1]
    nameable = next((outer for outer, _ in reversed(frames) if _can_be_named(outer)), frame)
    return Culprit(
        name=_name(frame),
        file=frame.f_code.co_filename,
        line=line,
        ignorable=_name(nameable),
        owner=nameable.f_locals.get("self"),
        is_forward=nameable.f_code.co_name == "forward",
    )


def _name(frame: FrameType) -> str:
    """`Class.method` or `module.path.function`, as `--ignore` takes it."""
    owner, module = frame.f_locals.get("self"), inspect.getmodule(frame.f_code)
    prefix = f"{type(owner).__name__}." if owner is not None else f"{module.__name__}." if module is not None else ""
    return prefix + frame.f_code.co_name


def _can_be_named(frame: FrameType) -> bool:
    """Whether the function is found under its name: one that was made inside another is not."""
    owner = frame.f_locals.get("self")
    home = type(owner) if owner is not None else inspect.getmodule(frame.f_code)
    found = inspect.unwrap(getattr(home, frame.f_code.co_name, None) or _name)
    return getattr(found, "__code__", None) is frame.f_code


def _advice(culprit: Culprit, is_ancestor: bool) -> str:
    if is_ancestor:
        return "move that line into a function of its own and name it with --ignore"
    return f"make it one opaque step with --ignore {culprit.ignorable}"


def _is_models(filename: str) -> bool:
    path = Path(filename)
    if not path.is_absolute():
        return False
    ours = (_OURS, _TORCH, Path(runtime.errors.__file__).resolve().parent)
    return not any(path.is_relative_to(folder) for folder in ours) and path.name != "contextlib.py"
