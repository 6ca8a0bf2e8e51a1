"""From an exception inside a trace to the one line that tells a user what to do."""

from __future__ import annotations

import inspect
import traceback
from pathlib import Path

import torch
from torch import nn

import runtime.errors
from runtime.errors import TraceError

_OURS = Path(__file__).resolve().parent
_TORCH = Path(torch.__file__).resolve().parent


def blame(error: BaseException, model: nn.Module) -> TraceError:
    """Name the model's innermost function on the way to `error`, its file and line, and the option that helps.

    The innermost frame that belongs neither to torch nor to this project is taken; generic wrappers of transformers
    (decorators, `forward` of ancestors) are passed over where a more telling frame exists.
    """
    frames = [frame for frame in traceback.walk_tb(error.__traceback__) if _is_models(frame[0].f_code.co_filename)]
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    if not frames:
        return TraceError(f"{type(model).__name__} cannot be traced: {type(error).__name__}: {reason}")
    frame, line = frames[-1]
    code = frame.f_code
    owner = frame.f_locals.get("self")
    name = f"{type(owner).__name__}.{code.co_name}" if owner is not None else code.co_name
    module = inspect.getmodule(code)
    if owner is None and module is not None:
        name = f"{module.__name__}.{code.co_name}"
    return TraceError(
        f"{name} cannot be traced ({code.co_filename}, line {line}): {type(error).__name__}: {reason}",
        hint=f"make it one opaque step with --ignore {name}",
    )


def _is_models(filename: str) -> bool:
    path = Path(filename)
    if not path.is_absolute():
        return False
    ours = (_OURS, _TORCH, Path(runtime.errors.__file__).resolve().parent)
    return not any(path.is_relative_to(folder) for folder in ours) and path.name != "contextlib.py"
