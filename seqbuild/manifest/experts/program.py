"""Derive the layout of stacked experts from the program of one expert.

A checkpoint with one tensor for all experts does not name their matrices, but the program shows what they are. It
multiplies its input by one matrix, whose outputs are the inputs of the last one; the form of the product distinguishes
rows from columns. If the first matrix has twice as many outputs as the last has inputs, it joins a gate and the values
that the gate multiplies. NaN in some outputs shows which of them belong together, and a large negative number shows
which half is the gate, because it switches the other half off. Two matrices that multiply the input before a third are
the two halves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from runtime.artifact.manifest import ExpertStack
from seqbuild.manifest.experts.probe import ExpertProbe

# Names of an expert's modules in a checkpoint that does not name them; llm-compressor writes the same.
GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
_SWITCHED_OFF, _TIMES_SMALLER = -100.0, 50


@dataclass(frozen=True, kw_only=True, slots=True)
class _Halves:
    """The two halves of the outputs of an expert's first matrices.

    Attributes:
        is_interleaved: whether they alternate output by output.
        names: the modules that compute them, in order.
    """

    is_interleaved: bool
    names: tuple[str, str]


def stacks_from_program(probe: ExpertProbe) -> tuple[ExpertStack, ...]:
    """Return the composition of each stacked parameter; empty for a program of another form."""
    products = probe.products
    if {product.name for product in products} != set(probe.matrices) or "" in probe.owners.values():
        return ()
    *firsts, last = products
    modules: list[tuple[str, ...]] = [(UP,), (DOWN,)]
    is_interleaved = False
    if len(firsts) == 2 or firsts[0].num_out != last.num_in:
        halves = _halves(probe)
        if halves is None:
            return ()
        is_interleaved = halves.is_interleaved
        modules = [*([halves.names] if len(firsts) == 1 else [(name,) for name in halves.names]), (DOWN,)]
    of_matrix = {product.name: (product, names) for product, names in zip(products, modules, strict=True)}
    stacks = []
    for name in probe.module.stacked:
        product, names = of_matrix[probe.owners.get(name, name)]
        is_bias = name in probe.owners
        stacks.append(
            ExpertStack(
                name=name,
                parts=tuple(f"{own}.{'bias' if is_bias else 'weight'}" for own in names),
                axis=1 if product.is_transposed and not is_bias else 0,
                is_transposed=product.is_transposed and not is_bias,
                is_interleaved=len(names) > 1 and is_interleaved,
            )
        )
    return tuple(stacks)


def _halves(probe: ExpertProbe) -> _Halves | None:
    *firsts, last = probe.products
    half = last.num_in
    if sum(product.num_out for product in firsts) != 2 * half:
        return None
    if any(product.num_in != firsts[0].num_in or len(product.states) != 2 for product in firsts):
        return None
    if len(firsts) == 2 and (firsts[0].num_out != half or not torch.equal(firsts[0].states, firsts[1].states)):
        return None
    chosen = torch.arange(0, half, 3)
    separate, interleaved = torch.zeros(2, 2 * half).unbind()
    separate[torch.cat([chosen, chosen + half])] = torch.nan
    interleaved[torch.cat([2 * chosen, 2 * chosen + 1])] = torch.nan
    expected = torch.zeros(half, dtype=torch.bool)
    expected[chosen] = True
    arrived = _arrived(probe, torch.stack([separate, interleaved]))
    is_separate, is_interleaved = (torch.equal(row.isnan(), expected) for row in arrived)
    if is_separate == is_interleaved or (is_interleaved and len(firsts) == 2):
        return None
    made_up = torch.ones(2, 2, half)  # [the half that is switched off, half, feature]
    made_up[0, 0] = made_up[1, 1] = _SWITCHED_OFF
    laid_out = made_up.transpose(1, 2) if is_interleaved else made_up
    arrived = _arrived(probe, laid_out.reshape(2, 2 * half))
    first_off, second_off = (float(row.abs().amax()) if row.numel() else 0.0 for row in arrived)
    if max(first_off, second_off) <= _TIMES_SMALLER * min(first_off, second_off):
        return None
    return _Halves(is_interleaved=is_interleaved, names=(GATE, UP) if first_off < second_off else (UP, GATE))


def _arrived(probe: ExpertProbe, outputs: torch.Tensor) -> torch.Tensor:
    """Return the input of the last product if the first ones return `outputs`, concatenated; both [N, ...]."""
    num_firsts = len(probe.products) - 1
    products, _ = probe.run(probe.products[0].states, outputs.chunk(num_firsts, -1))
    return products[-1].states if len(products) == num_firsts + 1 else torch.empty(len(outputs), 0)
