"""What the conversion of a checkpoint makes of its experts' tensors, read off by running it on small numbered ones.

Either it joins tensors that are an expert's own, or it does something to stacks that it does to each expert by itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from runtime.language.program import Run
from runtime.model.experts import Stack

if TYPE_CHECKING:
    from runtime.artifact.manifest import ParameterEntry
    from runtime.chain import Artifact
    from runtime.language.program import Program

# `experts.3.gate_proj.weight`: the expert's number, the module's name, and the parameter's.
_KEY = re.compile(r"\.(\d+)\.([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)\.(weight|bias)\Z")
# By a stack's dimensions, shapes on which a conversion is tried: of an expert's own tensors, of its part of stacks.
_SMALL = {3: (2, 3), 2: (3,)}
_SMALL_STACKS = {3: (4, 6), 2: (4,)}


def program_of(artifact: Artifact, entry: ParameterEntry) -> Program | None:
    """What makes a parameter of the checkpoint's tensors; None where it is one of these."""
    return artifact.conversions[entry.conversion] if entry.conversion >= 0 else None


def is_by_expert(artifact: Artifact, entry: ParameterEntry) -> bool:
    """Whether what is done to a stack, or to several of them, when they are loaded is done to each expert by itself."""
    program = program_of(artifact, entry)
    if program is None:
        return len(entry.sources) == 1
    small = _SMALL_STACKS.get(len(entry.shape), ())
    for sizes in (small, entry.shape[1:]):  # a program may insist on those that it was recorded with
        generator = torch.Generator().manual_seed(0)
        stacks = [torch.randint(2**15, (3, *sizes), generator=generator, dtype=torch.int16) for _ in entry.sources]
        run = Run(device=torch.device("cpu"), dtype=torch.int16)
        try:
            whole, one = (
                program(None, **{f"source_{place}": own[rows] for place, own in enumerate(stacks)}, run=run)["value"]
                for rows in (slice(None), slice(1, 2))
            )
        except (RuntimeError, IndexError, TypeError):
            continue
        return whole.shape[:1] == (3,) and torch.equal(whole[1:2], one)
    return False


def joined_stack(artifact: Artifact, entry: ParameterEntry) -> Stack | None:
    """How one stacked parameter is made; None when it is not joined of whole tensors of single experts."""
    num_experts, num_sources = entry.shape[0], len(entry.sources)
    if entry.conversion < 0 or len(entry.shape) not in _SMALL:
        return None
    shape = _SMALL[len(entry.shape)]
    size = torch.Size(shape).numel()
    sources = [torch.arange(size).reshape(shape) + number * size for number in range(num_sources)]
    run = Run(device=torch.device("cpu"), dtype=torch.int64)
    program: Callable[..., dict[str, torch.Tensor]] = artifact.conversions[entry.conversion]
    try:
        made = program(None, **{f"source_{number}": source for number, source in enumerate(sources)}, run=run)["value"]
    except (RuntimeError, IndexError, TypeError):
        return None  # it wants tensors of one size only
    if len(made) < num_experts or num_sources % len(made):
        return None
    for axis in range(len(shape)):
        for is_transposed in (False, True) if len(shape) > 1 else (False,):
            orders = [_order(one, sources, axis, num_sources // len(made), is_transposed) for one in made]
            parts = [_names(entry, order) for order in orders[:num_experts]]
            if all(parts):
                return Stack(parts=tuple(parts), axis=axis, is_transposed=is_transposed)
    return None


def _order(one: torch.Tensor, sources: list[torch.Tensor], axis: int, num_parts: int, is_transposed: bool) -> list[int]:
    """Which sources one expert's tensor is joined of; empty when it is not."""
    if one.shape[axis] % num_parts:
        return []
    size = sources[0].numel()
    parts = [part.T if is_transposed else part for part in one.chunk(num_parts, axis)]
    order = [int(part.flatten()[0]) // size for part in parts]
    is_joined = len(parts) == num_parts and all(
        torch.equal(part, sources[number]) for part, number in zip(parts, order, strict=True)
    )
    return order if is_joined else []


def _names(entry: ParameterEntry, order: list[int]) -> tuple[str, ...]:
    """Names of an expert's parameters, after those of the checkpoint's tensors; empty when these do not tell."""
    found = [_KEY.search(entry.sources[number]) for number in order]
    numbers = dict.fromkeys(match[1] if match is not None else "" for match in found)
    if len(numbers) != 1 or "" in numbers:
        return ()
    return tuple(f"{match[1]}.{match[2]}.{match[3]}" for match in found if match is not None)


def local_name(key: str) -> str:
    """What the parameter of a checkpoint's tensor is called below the module of experts."""
    found = _KEY.search(key)
    assert found is not None, "its name was understood before"
    return f"{found[1]}.{found[2]}.{found[3]}"
