"""Determine which channels of an expert can be scaled: of its input, and of the outputs of its first matrices.

The rows of a matrix can be divided, and what reads them multiplied, if everything in between is proportional to them.
Scaling by powers of two is exact, so a program is run on numbers of all magnitudes, and again on the same numbers times
powers of two. Anything that is not proportional (a clamp, an added one, a square) differs for some magnitude.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from seqbuild.manifest.experts.probe import ExpertProbe

_NUM_ROWS = 64
_LARGEST_POWER = 30  # of two: float32 squares it twice without overflow


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """A stacked parameter along the experts' input or output, and its axis along these channels."""

    name: str
    axis: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ProportionalRows:
    """Outputs of an expert's first matrices that the input of its last matrix is proportional to.

    Attributes:
        stack: the stacked parameter whose rows compute them.
        rows: for each input feature of the last matrix the row of an expert's own matrix.
        last: the stacked parameter of the last matrix.
    """

    stack: str
    rows: tuple[int, ...]
    last: str


def input_readings(probe: ExpertProbe) -> tuple[Reading, ...]:
    """Return the stacked parameters that compensate for scaled channels of the experts' input.

    The result is empty if the input has other uses, or if they have no axis of their own for it.
    """
    products, module = probe.products, probe.module
    if not products or module.num_identity:  # experts without weights return their input
        return ()
    width, generator = products[0].num_in, torch.Generator().manual_seed(0)
    states, powers = _wide((4, width), generator), _powers(width, generator)
    one, output = probe.run(states)
    two, same_output = probe.run(states * powers)
    if len(one) != len(products) or len(two) != len(products) or output is None or same_output is None:
        return ()
    pairs = zip(one[:-1], two[:-1], strict=True)
    is_proportional = all(torch.equal(before.states * powers, after.states) for before, after in pairs)
    is_used_up = torch.equal(one[-1].states, two[-1].states) and torch.equal(output, same_output)
    firsts = one[:-1]
    if not is_proportional or not is_used_up or any(p.name in module.flat and p.is_transposed for p in firsts):
        return ()
    return tuple(Reading(name=p.name, axis=1 if p.is_transposed or p.name in module.flat else 2) for p in firsts)


def output_writings(probe: ExpertProbe) -> tuple[Reading, ...]:
    """Return the stacked parameters whose rows compute the channels of the experts' output, a bias included.

    The result is empty if the output is anything else than the last product, with its bias, times routing weights.
    """
    products, module = probe.products, probe.module
    if not products or module.num_identity or products[-1].name in module.flat:
        return ()
    last, bias = products[-1], probe.bias_of(products[-1].name)
    generator = torch.Generator().manual_seed(0)
    made_up = _wide((1, last.num_out), generator)[0]
    added = _wide((1, last.num_out), generator)[0]
    outputs = [*(torch.ones(product.num_out) for product in products[:-1]), made_up]
    plain, shifted = (
        probe.run(products[0].states, outputs, {bias: vector} if bias else {})[1]
        for vector in (torch.zeros_like(added), added)
    )
    if plain is None or shifted is None or not torch.equal(plain, made_up.expand_as(plain)):
        return ()
    if not torch.equal(shifted, (made_up + added if bias else made_up).expand_as(shifted)):
        return ()
    found = Reading(name=last.name, axis=2 if last.is_transposed else 1)
    return (found, Reading(name=bias, axis=1)) if bias else (found,)


def proportional_rows(probe: ExpertProbe) -> ProportionalRows | None:
    """Return the rows of an expert's first matrices that can be scaled instead of its last one's columns, if any."""
    if not probe.products:
        return None
    *firsts, last = probe.products
    half, sizes = last.num_in, [product.num_out for product in firsts]
    everything = torch.arange(sum(sizes))
    layouts = [everything] if len(everything) == half else []
    if len(everything) == 2 * half:
        layouts = [everything[half:], everything[:half], everything[1::2], everything[::2]]
    for rows in layouts:
        if not _is_proportional(probe, sizes, rows):
            continue
        for product, start in zip(firsts, (0, sizes[0]), strict=False):
            own = rows - start
            if bool(((own >= 0) & (own < product.num_out)).all()):
                return ProportionalRows(stack=product.name, rows=tuple(own.tolist()), last=last.name)
    return None


def _is_proportional(probe: ExpertProbe, sizes: Sequence[int], rows: torch.Tensor) -> bool:
    """Return whether the input of the last product is proportional to these outputs of the first ones."""
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(_NUM_ROWS, sum(sizes), generator=generator)
    outputs[:, rows] = _wide((_NUM_ROWS, len(rows)), generator)
    added = torch.randn(sum(sizes), generator=generator)
    powers = _powers(len(rows), generator)
    *firsts, _ = probe.products
    state = firsts[0].states[:1].expand(_NUM_ROWS, -1)
    found = []
    for factor in (torch.ones_like(powers), powers):
        scale = torch.ones(sum(sizes))
        scale[rows] = factor
        values = zip(firsts, torch.split(added * scale, list(sizes)), strict=True)
        vectors = {bias: vector for product, vector in values if (bias := probe.bias_of(product.name))}
        products, _ = probe.run(state, torch.split(outputs * scale, list(sizes), -1), vectors)
        if len(products) != len(firsts) + 1:
            return False
        found.append(products[-1].states)
    before, after = found
    is_used = bool(before.isfinite().all()) and bool(before.ne(0).any(dim=0).all())
    return is_used and torch.equal(before * powers, after)


def _wide(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Draw numbers of both signs and all magnitudes."""
    powers = torch.rand(shape, generator=generator) * (2 * _LARGEST_POWER) - _LARGEST_POWER
    signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return torch.exp2(powers) * signs


def _powers(count: int, generator: torch.Generator) -> torch.Tensor:
    """Draw powers of two other than one."""
    exponents = torch.randint(1, 5, (count,), generator=generator)
    signs = torch.randint(0, 2, (count,), generator=generator) * 2 - 1
    return torch.exp2((exponents * signs).float())
