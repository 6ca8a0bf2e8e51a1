"""How stacked experts come apart, found out by watching what one expert does.

Some checkpoints have a tensor for all experts at once, and then nothing in their names says what is in it. But the
program of one expert does. It multiplies its input by one matrix, whose outputs are the next one's inputs; the way in
which it multiplies tells rows from columns. Where the first has twice as many outputs as the second has inputs, it is a
gate and what is gated: which outputs belong together is seen by making some of them not a number and looking where
that arrives, and which half is the gate by what a large negative number switches off. Where two matrices multiply the
input before a third, these are the two halves.

Nothing is multiplied for it: results of the first product are made up, the matrices have no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from runtime.language.program import Run
from runtime.model.dense_experts import STACKED_PRODUCTS
from runtime.model.experts import FIRST, LAST, PRODUCTS, Experts, Mixture, Stack, storage

if TYPE_CHECKING:
    from runtime.language.program import Program

(GATE, UP), DOWN = FIRST, LAST
_SWITCHED_OFF, _TIMES_SMALLER = -100.0, 50
_MOST_FEATURES = 2**20  # of an expert's matrices; what is multiplied by them has memory


@dataclass(frozen=True, kw_only=True, slots=True)
class Matrix:
    """A stacked matrix, as an expert's program uses it.

    Attributes:
        name: of the stacked parameter.
        is_transposed: whether an expert's own is [I, O], not [O, I] as a Linear module has it.
        num_in: I, features of its input.
        num_out: O, features of its output.
    """

    name: str
    is_transposed: bool
    num_in: int
    num_out: int


def stacks_of(module: Mixture, shapes: Mapping[str, Sequence[int]]) -> dict[str, Stack]:
    """How each stacked parameter is made of an expert's own.

    Args:
        module: has the program.
        shapes: of the module's parameters; of stacked ones the first axis is the expert.

    Returns:
        By the parameter's name; none where the program does something else than what is said above.
    """
    matrices = {name for name in module.stacked if len(shapes[name]) == 3}
    biases = {name: owner_of_bias(name, matrices) for name in module.stacked if name not in matrices}
    if not matrices or any(owner is None or len(shapes[name]) != 2 for name, owner in biases.items()):
        return {}
    found = _watch(module, shapes)
    if found is None or {matrix.name for matrix in found.matrices} != matrices:
        return {}
    stacks: dict[str, Stack] = {}
    for matrix, parts in zip(found.matrices, found.parts(), strict=True):
        is_split = len(parts) > 1
        stacks[matrix.name] = Stack(
            parts=_named(parts, "weight", module.num_experts),
            axis=1 if matrix.is_transposed else 0,
            is_transposed=matrix.is_transposed,
            is_interleaved=is_split and found.is_interleaved,
        )
        for name, owner in biases.items():
            if owner == matrix.name:
                stacks[name] = Stack(
                    parts=_named(parts, "bias", module.num_experts),
                    axis=0,
                    is_transposed=False,
                    is_interleaved=is_split and found.is_interleaved,
                )
    return {name: stacks[name] for name in module.stacked}


def _named(parts: Sequence[str], leaf: str, num_experts: int) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(f"{expert}.{part}.{leaf}" for part in parts) for expert in range(num_experts))


def owner_of_bias(bias: str, matrices: set[str]) -> str | None:
    """The matrix that a bias belongs to, by its name."""
    stems = {matrix.removesuffix(".weight"): matrix for matrix in sorted(matrices)}
    return next((stems[stem] for stem in stems if bias in (f"{stem}_bias", f"{stem}.bias")), None)


@dataclass(kw_only=True)
class _FoundProducts:
    """What was seen: the matrices in order, and how the first one's outputs are laid out."""

    matrices: list[Matrix]
    is_split: bool = False
    is_interleaved: bool = False
    is_gate_first: bool = True

    def parts(self) -> list[tuple[str, ...]]:
        """For each matrix the modules that it is made of, by their last names."""
        halves = (GATE, UP) if self.is_gate_first else (UP, GATE)
        if len(self.matrices) == 3:
            return [(halves[0],), (halves[1],), (DOWN,)]
        return [halves if self.is_split else (UP,), (DOWN,)]


class _UnusualExpertError(Exception):
    """The program does not do what it is watched for."""


def _watch(module: Mixture, shapes: Mapping[str, Sequence[int]]) -> _FoundProducts | None:
    products = usual_products(module, shapes)
    if not products:
        return None
    *firsts, (last, _) = products
    states, width = firsts[0][1], firsts[0][0].num_in
    found = _FoundProducts(matrices=[matrix for matrix, _ in products])
    half, num_outputs = last.num_in, sum(matrix.num_out for matrix, _ in firsts)
    if len(firsts) == 1 and num_outputs == half:
        return found
    if num_outputs != 2 * half or any(matrix.num_in != width or len(own) != 2 for matrix, own in firsts):
        return None
    if len(firsts) == 2 and (firsts[0][0].num_out != half or not torch.equal(states, firsts[1][1])):
        return None
    found.is_split = len(firsts) == 1
    chosen = torch.arange(0, half, 3)
    apart, by_turns = torch.zeros(2, 2 * half).unbind()
    apart[torch.cat([chosen, chosen + half])] = torch.nan
    by_turns[torch.cat([2 * chosen, 2 * chosen + 1])] = torch.nan
    arrived = _arrived(module, shapes, states, torch.stack([apart, by_turns]), len(firsts))
    expected = torch.zeros(half, dtype=torch.bool)
    expected[chosen] = True
    is_apart, found.is_interleaved = (torch.equal(row.isnan(), expected) for row in arrived)
    if is_apart == found.is_interleaved or (found.is_interleaved and not found.is_split):
        return None
    made_up = torch.ones(2, 2, half)  # [which half is switched off, half, feature]
    made_up[0, 0] = made_up[1, 1] = _SWITCHED_OFF
    laid_out = made_up.transpose(1, 2) if found.is_interleaved else made_up
    arrived = _arrived(module, shapes, states, laid_out.reshape(2, 2 * half), len(firsts))
    first_off, second_off = (float(row.abs().amax()) if row.numel() else 0.0 for row in arrived)
    if max(first_off, second_off) <= _TIMES_SMALLER * min(first_off, second_off):
        return None
    found.is_gate_first = first_off < second_off
    return found


def usual_products(module: Mixture, shapes: Mapping[str, Sequence[int]]) -> list[tuple[Matrix, torch.Tensor]]:
    """The products of one expert's program with an input of the width that fits; nothing where none fits."""
    sizes = next((shapes[name][1:] for name in module.stacked if len(shapes[name]) == 3), ())
    if max(sizes, default=0) > _MOST_FEATURES:
        return []
    for width in dict.fromkeys(sizes):  # one of them is that of the input
        given = torch.linspace(1, 2, width).repeat(2, 1)  # not what products are said to return
        products = _products(module, shapes, given)
        if products and products[0][0].num_in == width == products[-1][0].num_out:
            return products
    return []


def _arrived(
    module: Mixture, shapes: Mapping[str, Sequence[int]], states: torch.Tensor, outputs: torch.Tensor, num_firsts: int
) -> torch.Tensor:
    """What the last product multiplies, if those before it return this, one after the other; both [N, ...]."""
    products = _products(module, shapes, states, outputs.chunk(num_firsts, -1))
    return products[-1][1] if len(products) == num_firsts + 1 else torch.empty(len(outputs), 0)


def _products(
    module: Mixture,
    shapes: Mapping[str, Sequence[int]],
    states: torch.Tensor,
    outputs: Sequence[torch.Tensor] = (),
) -> list[tuple[Matrix, torch.Tensor]]:
    """The products of `watched_run`."""
    return watched_run(module, shapes, states, outputs)[0]


def watched_run(
    module: Mixture,
    shapes: Mapping[str, Sequence[int]],
    states: torch.Tensor,
    outputs: Sequence[torch.Tensor] = (),
    vectors: Mapping[str, torch.Tensor] | None = None,
) -> tuple[list[tuple[Matrix, torch.Tensor]], torch.Tensor | None]:
    """Run one expert's program: its products with matrices, in order, and the states that each multiplies.

    Args:
        module: the experts.
        shapes: of their parameters.
        states: the expert's input, [N, H].
        outputs: what the first products are said to return; others return ones.
        vectors: values for the expert's part of stacked biases, by name; others are zeros.

    Returns:
        Two or three products, and what the program returns; nothing where there are others, or the program cannot be
        run in this way.
    """
    run = Run(device=torch.device("cpu"), dtype=torch.float32)
    program: Program | Any = module.program
    if isinstance(module, Experts):
        own = {name: _without_memory(shapes[name][1:]) for name in module.stacked} | dict(vectors or {})
        others = {name: torch.ones(tuple(shape)) for name, shape in shapes.items() if name not in own}
        weights = torch.ones(len(states), 1) if module.is_column else torch.ones(len(states))
        given: list[Any] = [_Stand(others), states, weights, *own.values()]
    else:
        own = {name: _without_memory(shapes[name]) for name in module.stacked}
        given = [_Stand(own), states.repeat(module.num_experts, 1)]
    watching = _ProductWatch(own, outputs)
    try:
        with torch.no_grad(), watching:
            output = program(*given, run=run)["output"]
    except Exception:  # whatever it does with other sizes, or without values: no list of errors is complete
        return [], None
    return (watching.seen, output) if len(watching.seen) in (2, 3) else ([], None)


def _without_memory(shape: Sequence[int]) -> torch.Tensor:
    """A matrix on the meta device; what is added to its products has numbers."""
    return torch.empty(tuple(shape), device="meta") if len(shape) > 1 else torch.zeros(tuple(shape))


@dataclass(frozen=True, slots=True)
class _Stand:
    """Stands for a module where its program asks for nothing but its parameters."""

    parameters: Mapping[str, torch.Tensor]

    def get_parameter(self, name: str) -> torch.Tensor:
        return self.parameters[name]


class _ProductWatch(TorchFunctionMode):
    """Make up the results of products with matrices that have no memory."""

    def __init__(self, own: Mapping[str, torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.own = {storage(tensor): (name, tensor) for name, tensor in own.items() if tensor.is_meta}
        self.outputs = outputs
        self.seen: list[tuple[Matrix, torch.Tensor]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        place = 0 if func in STACKED_PRODUCTS else PRODUCTS.get(func)
        if place is None or not isinstance(args[place + 1], torch.Tensor) or storage(args[place + 1]) not in self.own:
            return func(*args, **(kwargs or {}))
        states, used = args[place], args[place + 1]
        name, matrix = self.own[storage(used)]
        is_linear = func is torch.ops.aten.linear.default
        num_out, num_in = used.shape if is_linear else (used.shape[-1], used.shape[-2])
        is_turned = tuple(used.stride()) != tuple(matrix.stride())
        if name in [matrix.name for matrix, _ in self.seen] or used.numel() != matrix.numel():
            raise _UnusualExpertError
        is_transposed = is_linear == is_turned
        self.seen.append(
            (
                Matrix(name=name, is_transposed=is_transposed, num_in=num_in, num_out=num_out),
                (states[0] if states.dim() == 3 else states).clone(),  # of stacks all parts are alike
            )
        )
        if len(self.seen) <= len(self.outputs):
            return self.outputs[len(self.seen) - 1].expand(*states.shape[:-1], num_out).clone()
        return torch.ones(*states.shape[:-1], num_out)
