"""Derive the layout of stacked experts from the program that stacks them when a checkpoint is loaded.

The program runs on small numbered tensors. It either joins tensors of single experts, whose names in the checkpoint
then state the expert and the module, or it converts stacks expert by expert.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from runtime.artifact.manifest import ExpertStack
from runtime.language.program import compile_program, run_conversion

if TYPE_CHECKING:
    from runtime.artifact.manifest import ParameterEntry
    from runtime.language.program import Program

# `model.layers.0.experts.3.gate_proj.weight`: the module of experts, the expert's number, and its parameter.
_KEY = re.compile(r"(.+)\.(\d+)\.([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*\.(?:weight|bias))")
# Shapes to try a conversion on, by the dimensions of a stack: of an expert's own tensor, and of its slice of a stack.
_SMALL = {3: (2, 3), 2: (3,)}
_SMALL_SLICES = {3: (4, 6), 2: (4,)}


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedExperts:
    """Experts whose tensors a checkpoint names one by one.

    Attributes:
        prefix: the checkpoint's name for the module of experts.
        numbers: the number of each expert in its tensors' names.
        stacks: the composition of each stacked parameter.
    """

    prefix: str
    numbers: tuple[int, ...]
    stacks: tuple[ExpertStack, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Join:
    """How a conversion joins single experts' tensors: for each expert the indices of its sources."""

    orders: list[list[int]]
    axis: int
    is_transposed: bool


class Conversions:
    """The conversion programs of an artifact; parameters that are made in the same way are analyzed once.

    Args:
        sources: the programs' source code.
    """

    def __init__(self, sources: Sequence[str]) -> None:
        self._programs = [compile_program(source, "conversion.py") for source in sources]
        self._joins: dict[object, _Join | None] = {}
        self._by_expert: dict[object, bool] = {}

    def named_experts(self, entries: Mapping[str, ParameterEntry]) -> NamedExperts | None:
        """Return the layout of stacked parameters that are all joined from single experts' tensors, else None.

        Args:
            entries: the stacked parameters by name, their first axis the expert.
        """
        stacks: list[ExpertStack] = []
        found: dict[tuple[str, tuple[int, ...]], None] = {}
        for name, entry in entries.items():
            join = self._join(entry)
            named = _names(entry.sources, join.orders) if join is not None else None
            if join is None or named is None:
                return None
            prefix, numbers, parts = named
            found[prefix, numbers] = None
            stacks.append(ExpertStack(name=name, parts=parts, axis=join.axis, is_transposed=join.is_transposed))
        if len(found) != 1:
            return None
        ((prefix, numbers),) = found
        return NamedExperts(prefix=prefix, numbers=numbers, stacks=tuple(stacks))

    def is_by_expert(self, entry: ParameterEntry) -> bool:
        """Return whether a stacked parameter is one tensor, or is made from stacks expert by expert."""
        if entry.conversion < 0:
            return len(entry.sources) == 1
        key = entry.conversion, entry.shape, len(entry.sources)
        if key not in self._by_expert:
            self._by_expert[key] = _is_by_expert(self._programs[entry.conversion], entry)
        return self._by_expert[key]

    def _join(self, entry: ParameterEntry) -> _Join | None:
        num_experts, num_sources, num_dims = entry.shape[0], len(entry.sources), len(entry.shape)
        key = entry.conversion, num_experts, num_sources, num_dims
        if key not in self._joins:
            self._joins[key] = None
            if entry.conversion >= 0 and num_dims in _SMALL:
                program = self._programs[entry.conversion]
                self._joins[key] = _join(program, num_experts, num_sources, _SMALL[num_dims])
        return self._joins[key]


def _is_by_expert(program: Program, entry: ParameterEntry) -> bool:
    small = _SMALL_SLICES.get(len(entry.shape), ())
    for sizes in (small, entry.shape[1:]):  # a program may require the sizes that it was recorded with
        generator = torch.Generator().manual_seed(0)
        stacks = [torch.randint(2**15, (3, *sizes), generator=generator, dtype=torch.int16) for _ in entry.sources]
        try:
            whole, one = (
                run_conversion(program, [stack[rows] for stack in stacks]) for rows in (slice(None), slice(1, 2))
            )
        except (RuntimeError, IndexError, TypeError):
            continue
        return whole.shape[:1] == (3,) and torch.equal(whole[1:2], one)
    return False


def _join(program: Program, num_experts: int, num_sources: int, shape: tuple[int, ...]) -> _Join | None:
    size = torch.Size(shape).numel()
    sources = [torch.arange(size).reshape(shape) + number * size for number in range(num_sources)]
    try:
        made = run_conversion(program, sources)
    except (RuntimeError, IndexError, TypeError):
        return None  # it requires tensors of one size
    if len(made) < num_experts or num_sources % len(made):
        return None
    for axis in range(len(shape)):
        for is_transposed in (False, True) if len(shape) > 1 else (False,):
            orders = [_order(one, sources, axis, num_sources // len(made), is_transposed) for one in made]
            if all(orders[:num_experts]):
                return _Join(orders=orders[:num_experts], axis=axis, is_transposed=is_transposed)
    return None


def _order(one: torch.Tensor, sources: list[torch.Tensor], axis: int, num_parts: int, is_transposed: bool) -> list[int]:
    """Return the sources that one expert's tensor is joined from; empty if it is not."""
    if one.shape[axis] % num_parts:
        return []
    size = sources[0].numel()
    parts = [part.T if is_transposed else part for part in one.chunk(num_parts, axis)]
    order = [int(part.flatten()[0]) // size for part in parts]
    is_joined = len(parts) == num_parts and all(
        torch.equal(part, sources[number]) for part, number in zip(parts, order, strict=True)
    )
    return order if is_joined else []


def _names(keys: Sequence[str], orders: list[list[int]]) -> tuple[str, tuple[int, ...], tuple[str, ...]] | None:
    """Return prefix, numbers and parameters that experts' tensors are named by; None if their names differ in form."""
    numbers: list[int] = []
    found: dict[tuple[str, tuple[str, ...]], None] = {}
    for order in orders:
        matches = [match for place in order if (match := _KEY.fullmatch(keys[place])) is not None]
        owners = dict.fromkeys((match[1], match[2]) for match in matches)
        if len(matches) < len(order) or len(owners) != 1:
            return None
        ((prefix, number),) = owners
        if str(int(number)) != number:
            return None
        numbers.append(int(number))
        found[prefix, tuple(match[3] for match in matches)] = None
    if len(found) != 1:
        return None
    ((prefix, parts),) = found
    return prefix, tuple(numbers), parts
