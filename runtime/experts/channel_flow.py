"""What an expert does with the channels of its input, and with those of its first products: found by running it.

A matrix's rows can be divided, and what reads them multiplied, where everything between is proportional to them.
Scaling by powers of two is exact, so that is put to the test: a program is run on numbers of all magnitudes, and again
on the same numbers times powers of two. Whatever is not proportional (a clamp, an added one, a square) shows for some
magnitude. Products with matrices are made up (`runtime.experts.layout_from_program`), so no weights are needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from runtime.experts.layout_from_program import owner_of_bias, usual_products, watched_run

if TYPE_CHECKING:
    from runtime.experts.layout_from_program import Matrix
    from runtime.model.experts import Mixture

_NUM_ROWS = 64
_LARGEST_POWER = 30  # of two: float32 squares it twice without overflow


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """A stacked parameter that the input of every expert meets, and its axis along the input's channels."""

    name: str
    axis: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Opened:
    """The outputs of an expert's first products that the input of its last one is proportional to.

    Attributes:
        stack: the stacked parameter whose rows make them.
        bias: the stacked parameter that is added to them, or "".
        rows: for each input feature of the last matrix the output of an expert's own matrix.
        axis: of an expert's own matrix along its outputs, as it lies in the stack.
        last: the stacked parameter of the last matrix.
    """

    stack: str
    bias: str
    rows: tuple[int, ...]
    axis: int
    last: str


def input_readings(module: Mixture, shapes: Mapping[str, Sequence[int]]) -> tuple[Reading, ...]:
    """The stacked parameters that make up for scaling the channels of the experts' input.

    Args:
        module: has the program; its weights are not looked at.
        shapes: of its parameters, with an axis for experts first.

    Returns:
        Nothing where the input is used for more than products with these, or they have no axis of their own for it.
    """
    usual = usual_products(module, shapes)
    if not usual or module.num_identity:  # such experts hand on their input itself
        return ()
    generator = torch.Generator().manual_seed(0)
    states, powers = _wide((4, usual[0][0].num_in), generator), _powers(usual[0][0].num_in, generator)
    one, output = watched_run(module, shapes, states)
    two, same_output = watched_run(module, shapes, states * powers)
    if len(one) != len(usual) or len(two) != len(usual) or output is None or same_output is None:
        return ()
    is_proportional = all(
        torch.equal(before * powers, after) for (_, before), (_, after) in zip(one[:-1], two[:-1], strict=True)
    )
    is_used_up = torch.equal(one[-1][1], two[-1][1]) and torch.equal(output, same_output)
    found = [matrix for matrix, _ in one[:-1]]
    if not is_proportional or not is_used_up or any(m.name in module.flat and m.is_transposed for m in found):
        return ()
    return tuple(
        Reading(name=matrix.name, axis=1 if matrix.is_transposed or matrix.name in module.flat else 2)
        for matrix in found
    )


def first_stacks(module: Mixture, shapes: Mapping[str, Sequence[int]]) -> tuple[str, ...]:
    """The stacked matrices that multiply an expert's input; nothing where that is not known."""
    return tuple(matrix.name for matrix, _ in usual_products(module, shapes)[:-1])


def opened_rows(module: Mixture, shapes: Mapping[str, Sequence[int]]) -> Opened | None:
    """Which rows of an expert's first matrices can be scaled in the place of its last one's columns; None for none.

    Args:
        module: has the program; its weights are not looked at.
        shapes: of its parameters, with an axis for experts first.
    """
    usual = usual_products(module, shapes)
    if not usual:
        return None
    firsts, last = [matrix for matrix, _ in usual[:-1]], usual[-1][0]
    half, num_outputs = last.num_in, sum(matrix.num_out for matrix in firsts)
    everything = torch.arange(num_outputs)
    layouts = [everything] if num_outputs == half else []
    if num_outputs == 2 * half:
        layouts = [everything[half:], everything[:half], everything[1::2], everything[::2]]
    matrices = {matrix.name for matrix, _ in usual}
    biases = {matrix.name: _bias_of(module, matrix.name, matrices) for matrix in firsts}
    for rows in layouts:
        if _is_proportional(module, shapes, usual[0][1][:1], firsts, biases, rows):
            start = 0
            for matrix in firsts:
                own = rows - start
                if bool(((own >= 0) & (own < matrix.num_out)).all()):
                    return Opened(
                        stack=matrix.name,
                        bias=biases[matrix.name],
                        rows=tuple(own.tolist()),
                        axis=1 if matrix.is_transposed else 0,
                        last=last.name,
                    )
                start += matrix.num_out
    return None


def _is_proportional(
    module: Mixture,
    shapes: Mapping[str, Sequence[int]],
    state: torch.Tensor,
    firsts: Sequence[Matrix],
    biases: Mapping[str, str],
    rows: torch.Tensor,
) -> bool:
    """Whether the input of the last product is proportional to these outputs of the first ones."""
    generator = torch.Generator().manual_seed(0)
    sizes = [matrix.num_out for matrix in firsts]
    outputs = torch.randn(_NUM_ROWS, sum(sizes), generator=generator)
    outputs[:, rows] = _wide((_NUM_ROWS, len(rows)), generator)
    added = torch.randn(sum(sizes), generator=generator)
    powers = _powers(len(rows), generator)
    found = []
    for factor in (torch.ones_like(powers), powers):
        scale = torch.ones(sum(sizes))
        scale[rows] = factor
        parts, vectors = torch.split(outputs * scale, sizes, -1), torch.split(added * scale, sizes)
        values = {biases[matrix.name]: vector for matrix, vector in zip(firsts, vectors, strict=True)}
        values.pop("", None)
        seen, _ = watched_run(module, shapes, state.expand(_NUM_ROWS, -1), parts, values)
        if len(seen) != len(firsts) + 1:
            return False
        found.append(seen[-1][1])
    before, after = found
    is_there = bool(before.isfinite().all()) and bool(before.ne(0).any(dim=0).all())
    return is_there and torch.equal(before * powers, after)


def _bias_of(module: Mixture, matrix: str, matrices: set[str]) -> str:
    others = (name for name in module.stacked if name not in matrices)
    return next((name for name in others if owner_of_bias(name, matrices) == matrix), "")


def _wide(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Numbers of either sign and all magnitudes."""
    powers = torch.rand(shape, generator=generator) * (2 * _LARGEST_POWER) - _LARGEST_POWER
    signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return torch.exp2(powers) * signs


def _powers(count: int, generator: torch.Generator) -> torch.Tensor:
    """Powers of two other than one."""
    exponents = torch.randint(1, 5, (count,), generator=generator)
    signs = torch.randint(0, 2, (count,), generator=generator) * 2 - 1
    return torch.exp2((exponents * signs).float())
