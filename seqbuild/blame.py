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
    """A line of the model's code: its function as `--ignore` wants it, and the object whose method that is."""

    name: str
    file: str
    line: int
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
    code = frame.f_code
    owner = frame.f_locals.get("self")
    module = inspect.getmodule(code)
    prefix = f"{type(owner).__name__}." if owner is not None else f"{module.__name__}." if module is not None else ""
    return Culprit(
        name=prefix + code.co_name,
        file=code.co_filename,
        line=line,
        owner=owner,
        is_forward=code.co_name == "forward",
    )


def _advice(culprit: Culprit, is_ancestor: bool) -> str:
    if is_ancestor:
        return "move that line into a function of its own and name it with --ignore"
    return f"make it one opaque step with --ignore {culprit.name}"


def _is_models(filename: str) -> bool:
    path = Path(filename)
    if not path.is_absolute():
        return False
    ours = (_OURS, _TORCH, Path(runtime.errors.__file__).resolve().parent)
    return not any(path.is_relative_to(folder) for folder in ours) and path.name != "contextlib.py"
