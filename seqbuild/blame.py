"""Map an error during tracing to a line of the model's code and to advice for the user."""

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
_STEPS = _OURS / "trace" / "record" / "steps.py"
_TRACER = _OURS / "trace" / "record" / "tracer.py"
_TORCH = Path(torch.__file__).resolve().parent
_MOST_WRAPPERS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Function:
    """A function of the model's code that is being executed.

    Attributes:
        name: `Class.method` or `module.path.function`, for messages.
        path: `module:Class.method` or `module:function`, the name format of opaque steps.
        owner: the object whose method it is, or None.
        is_forward: whether it is a module's forward.
    """

    name: str
    path: str
    owner: Any
    is_forward: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Culprit:
    """A line of the model's code that caused an error.

    Attributes:
        name: its function.
        file: its file.
        line: its line number.
        around: the enclosing calls that can be named, innermost first. Functions inside a recorded step are left out,
            because nothing inside a step is recorded.
    """

    name: str
    file: str
    line: int
    around: tuple[Function, ...]


class UntraceableError(TraceError):
    """Model code that cannot be recorded unchanged.

    Args:
        message: as for every error.
        culprit: the line, if known.
        is_refusal: whether that line raised the error itself, that is, the model rejects its input.
        hint: as for every error.

    Attributes:
        earlier: an earlier line that converted the size of an input to a number, if any.
        fixed_by_model: inputs and axes for which the model had already rejected other sizes.
    """

    def __init__(self, message: str, *, culprit: Culprit | None, is_refusal: bool = False, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.culprit = culprit
        self.is_refusal = is_refusal
        self.earlier: Culprit | None = None
        self.fixed_by_model: tuple[tuple[str, int], ...] = ()


def blame(error: BaseException, ancestors: Collection[nn.Module]) -> UntraceableError:
    """Name the model's innermost function on the way to `error`, its file and line, and suggest a remedy.

    The culprit is the innermost frame outside torch and this project. The text of this project's own errors is kept.

    Args:
        error: the error.
        ancestors: modules whose `forward` cannot be one opaque step, because they call the targets.
    """
    walk = list(traceback.walk_tb(error.__traceback__))
    culprit = _culprit(walk)
    if isinstance(error, TraceError):
        hint = error.hint or (advice(culprit, ancestors) if culprit else "")
        where = f" ({culprit.file}, line {culprit.line})" if culprit and culprit.file not in error.message else ""
        return UntraceableError(error.message + where, culprit=culprit, hint=hint)
    reason = (str(error).strip() or "no reason given").splitlines()[0][:300]
    if culprit is None:
        return UntraceableError(f"the model cannot be traced: {type(error).__name__}: {reason}", culprit=None)
    return UntraceableError(
        f"{culprit.name} cannot be traced ({culprit.file}, line {culprit.line}): {type(error).__name__}: {reason}",
        culprit=culprit,
        is_refusal=isinstance(error, (ValueError, AssertionError, RuntimeError)) and _is_raised_by_choice(walk),
        hint=advice(culprit, ancestors),
    )


def specialized_size(size: str, culprit: Culprit | None, ancestors: Collection[nn.Module] = ()) -> UntraceableError:
    """Report that a size of the sample became a constant, so the graph would only be valid for that size."""
    who = f"{culprit.name} ({culprit.file}, line {culprit.line})" if culprit is not None else "the model's code"
    return UntraceableError(
        f"{who} depends on {size}, so the graph would only be valid for that size",
        culprit=culprit,
        hint=advice(culprit, ancestors) if culprit is not None else "",
    )


def unsupported_operator(operator: Any, culprit: Culprit | None, ancestors: Collection[nn.Module]) -> UntraceableError:
    """Report that the model's code calls an operator that an artifact's code must not call."""
    where = f" ({culprit.name}: {culprit.file}, line {culprit.line})" if culprit else ""
    return UntraceableError(
        f"the model's code calls torch.ops.{operator}, which an artifact does not support{where}",
        culprit=culprit,
        hint=advice(culprit, ancestors) if culprit else "",
    )


def find_culprit() -> Culprit | None:
    """Find the innermost line of the model's code that is being executed."""
    return _culprit(list(reversed(list(traceback.walk_stack(None)))))


def _culprit(walk: Iterable[tuple[FrameType, int]]) -> Culprit | None:
    """Find the innermost line of the model's code in `walk`: frames and lines, outermost first."""
    frames: list[tuple[FrameType, int]] = []
    num_outside: int | None = None
    for frame, line in walk:
        if frame.f_code.co_name == "_run" and Path(frame.f_code.co_filename) == _TRACER:
            frames.clear()  # callers of the tracer are not the model's code
        if num_outside is None and Path(frame.f_code.co_filename) == _STEPS:
            num_outside = len(frames)
        if is_models_code(frame.f_code.co_filename):
            frames.append((frame, line))
    if not frames:
        return None
    frame, line = frames[-1]
    outside = reversed(frames[:num_outside])
    return Culprit(
        name=_name(frame),
        file=frame.f_code.co_filename,
        line=line,
        around=tuple(function for outer, _ in outside if (function := _function(outer)) is not None),
    )


def _name(frame: FrameType) -> str:
    owner, module = frame.f_locals.get("self"), inspect.getmodule(frame.f_code)
    prefix = f"{type(owner).__name__}." if owner is not None else f"{module.__name__}." if module is not None else ""
    return prefix + frame.f_code.co_name


def _function(frame: FrameType) -> Function | None:
    """Identify the function of a frame.

    This succeeds if the function can be looked up under its name, directly or through a decorator of a method.
    Functions defined inside other functions cannot be identified.
    """
    owner, name = frame.f_locals.get("self"), frame.f_code.co_name
    if owner is None:
        home: Any = inspect.getmodule(frame.f_code)
        homes = [home, *_classes_of(home)] if home is not None else []
    else:
        homes = [cls for cls in type(owner).__mro__ if name in cls.__dict__]
    for home in homes:
        if _has_code(home.__dict__.get(name), frame):
            return _named(home, name, owner)
    decorated = [
        (cls, method) for cls in type(owner).__mro__ for method, value in vars(cls).items() if _has_code(value, frame)
    ]
    # A decorator has the same code for all methods of a class, so the method cannot be determined.
    return _named(*decorated[0], owner) if owner is not None and len({name for _, name in decorated}) == 1 else None


def _has_code(value: Any, frame: FrameType) -> bool:
    """Return whether the frame executes the function or one that it wraps."""
    value = value.__func__ if isinstance(value, staticmethod) else value
    for _ in range(_MOST_WRAPPERS):
        if getattr(value, "__code__", None) is frame.f_code:
            return True
        value = getattr(value, "__wrapped__", None)
    return False


def _named(home: Any, name: str, owner: Any) -> Function:
    is_class = isinstance(home, type)
    short = f"{type(owner).__name__}." if owner is not None else f"{home.__name__}."
    return Function(
        name=f"{short}{name}",
        path=f"{home.__module__}:{home.__qualname__}.{name}" if is_class else f"{home.__name__}:{name}",
        owner=owner,
        is_forward=name == "forward",
    )


def _classes_of(module: Any) -> list[type]:
    return [
        value
        for value in list(vars(module).values())
        if isinstance(value, type) and value.__module__ == module.__name__
    ]


def advice(culprit: Culprit, ancestors: Collection[nn.Module]) -> str:
    """Suggest what a user can do about a line of the model's code."""
    function = next(iter(culprit.around), None)
    if function is None or (function.is_forward and function.owner in ancestors):
        return "move that line into a separate function and pass that to --ignore"
    return f"make it one opaque step with --ignore {function.name}"


def _is_raised_by_choice(walk: list[tuple[FrameType, int]]) -> bool:
    """Return whether the error was raised explicitly by the model's code or a Python library of torch, not by an
    operator.
    """
    path = Path(walk[-1][0].f_code.co_filename)
    return is_models_code(str(path)) or path.parent in (_TORCH / "distributions", _TORCH / "nn" / "modules")


def is_models_code(filename: str) -> bool:
    """Return whether a file belongs neither to torch nor to this project."""
    path = Path(filename)
    if not path.is_absolute():
        return False
    ours = (_OURS, _TORCH, Path(runtime.errors.__file__).resolve().parent)
    return not any(path.is_relative_to(folder) for folder in ours) and path.name != "contextlib.py"
