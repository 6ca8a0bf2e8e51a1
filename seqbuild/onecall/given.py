"""What the caller of one call passes besides the options: objects in memory, and where progress is shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.console import silent

if TYPE_CHECKING:
    import torch

    from runtime.recipe.recipe import Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class Given:
    """Objects that replace the result of a step. None runs the step.

    Attributes:
        artifact: a compiled model.
        weights: the directory of its weights.
        recipe: what to quantize, and how.
        batches: model inputs for the calibration.
        held_out: model inputs for the evaluation.
    """

    artifact: Path | None = None
    weights: Path | None = None
    recipe: Recipe | None = None
    batches: Sequence[Mapping[str, torch.Tensor]] | None = None
    held_out: Sequence[Mapping[str, torch.Tensor]] | None = None


def _unwatched(stack: ExitStack) -> Mapping[str, Any]:
    return {}


@dataclass(frozen=True, kw_only=True, slots=True)
class Show:
    """Where progress is shown.

    Attributes:
        line: called with each line.
        watching: makes the arguments `progress` and `watchers` of `calibrate`; the stack is closed after it.
    """

    line: Callable[[str], None] = silent
    watching: Callable[[ExitStack], Mapping[str, Any]] = _unwatched
