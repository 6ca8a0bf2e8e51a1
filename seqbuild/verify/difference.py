"""Measure the difference between two outputs of a model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """The largest difference between two outputs.

    Attributes:
        absolute: the largest difference; infinite if structure, shape or dtype differ, or only one number is NaN.
        relative: the largest difference divided by the largest magnitude in its tensor (at least 1).
        output: the field of the output with the largest relative difference; empty if there is none.
    """

    absolute: float = 0.0
    relative: float = 0.0
    output: str = ""


def difference(got: Mapping[str, Any], wanted: Mapping[str, Any]) -> Difference:
    """Compare two outputs, field by field.

    Args:
        got: nested tensors by name.
        wanted: nested tensors by name, from which the magnitudes are taken.
    """
    if list(got) != list(wanted):
        odd = [name for name in (*got, *wanted) if name not in got or name not in wanted]
        return Difference(absolute=math.inf, relative=math.inf, output=odd[0] if odd else "order of the outputs")
    worst = Difference()
    for name in wanted:
        absolute, relative = _largest(tensors(got[name]), tensors(wanted[name]))
        output = name if relative > worst.relative else worst.output
        worst = Difference(
            absolute=max(absolute, worst.absolute), relative=max(relative, worst.relative), output=output
        )
    return worst


def tensors(output: Any) -> list[torch.Tensor]:
    """Return all tensors of a nested output, with fields sorted by name, because a chain returns plain dictionaries."""
    if isinstance(output, torch.Tensor):
        return [output]
    parts: Iterable[Any] = ()
    if isinstance(output, Mapping):
        parts = [output[key] for key in sorted(output, key=str)]
    elif isinstance(output, (tuple, list)):
        parts = output
    elif dataclasses.is_dataclass(output):
        parts = [getattr(output, field.name) for field in dataclasses.fields(output)]
    return [tensor for part in parts for tensor in tensors(part)]


def _largest(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> tuple[float, float]:
    if len(got) != len(wanted):
        return math.inf, math.inf
    pairs = [_of_tensors(ours, theirs) for ours, theirs in zip(got, wanted, strict=True)]
    return max((absolute for absolute, _ in pairs), default=0.0), max((relative for _, relative in pairs), default=0.0)


def _of_tensors(got: torch.Tensor, wanted: torch.Tensor) -> tuple[float, float]:
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return math.inf, math.inf
    if torch.equal(got, wanted):
        return 0.0, 0.0
    if got.is_complex():
        got, wanted = torch.view_as_real(got), torch.view_as_real(wanted)
    is_same = (got == wanted) | (got.isnan() & wanted.isnan())
    apart = (got.double() - wanted.double()).abs().masked_fill(is_same, 0.0)
    absolute = apart.nan_to_num(nan=math.inf, posinf=math.inf).max().item()
    magnitude = wanted.double().abs().nan_to_num(nan=0.0, posinf=0.0).max().item()
    return absolute, absolute / max(1.0, magnitude)
