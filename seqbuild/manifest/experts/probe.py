"""Run one expert's program on made-up numbers to see which matrices it multiplies.

The matrices have no memory, and the results of products with them are made up, so no weights are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from runtime.artifact.expert_tables import stack_shape
from runtime.language.program import Run, compile_program
from runtime.model.dense_experts import STACKED_PRODUCTS
from runtime.model.expert_hooks import PRODUCTS, storage
from runtime.model.experts import Experts, Mixture
from runtime.model.leaves import build_leaf

if TYPE_CHECKING:
    from runtime.artifact.manifest import LeafKind
    from runtime.language.program import Program


@dataclass(frozen=True, kw_only=True, slots=True)
class Product:
    """A product with an expert's slice of a stacked matrix.

    Attributes:
        name: the stacked parameter.
        is_transposed: whether the slice is [I, O], not [O, I] as in a Linear module.
        num_in: I, its input features.
        num_out: O, its output features.
        states: the values that it multiplies, [N, I].
    """

    name: str
    is_transposed: bool
    num_in: int
    num_out: int
    states: torch.Tensor


class ExpertProbe:
    """Runs one expert of a mixture.

    Args:
        module: the mixture; its weights are not used.
        shapes: the shapes of all its parameters, stacked ones with the expert as the first axis.

    Attributes:
        matrices: the names of the stacked matrices.
        owners: for each stacked bias the matrix that it belongs to, or "" if unknown.
    """

    def __init__(self, module: Mixture, shapes: Mapping[str, Sequence[int]]) -> None:
        self.module = module
        self.shapes = shapes
        self.matrices = [name for name in module.stacked if len(shapes[name]) == 3]
        self.owners = {name: self._owner(name) for name in module.stacked if name not in self.matrices}

    def _owner(self, bias: str) -> str:
        if len(self.shapes[bias]) != 2:
            return ""
        stems = {matrix.removesuffix(".weight"): matrix for matrix in self.matrices}
        return next((stems[stem] for stem in stems if bias in (f"{stem}_bias", f"{stem}.bias")), "")

    def bias_of(self, matrix: str) -> str:
        """Return the stacked bias that belongs to a matrix, or ""."""
        return next((bias for bias, owner in self.owners.items() if owner == matrix), "")

    @cached_property
    def products(self) -> list[Product]:
        """The two or three products of the program, in order; empty if the program has another form."""
        sizes = next((self.shapes[name][1:] for name in self.matrices), ())
        for width in dict.fromkeys(sizes):  # the input has one of these widths
            states = torch.linspace(1, 2, width).repeat(2, 1)  # distinct from the ones that products return
            products, _ = self.run(states)
            if products and products[0].num_in == width == products[-1].num_out:
                return products
        return []

    def run(
        self,
        states: torch.Tensor,
        outputs: Sequence[torch.Tensor] = (),
        vectors: Mapping[str, torch.Tensor] | None = None,
    ) -> tuple[list[Product], torch.Tensor | None]:
        """Run the program.

        Args:
            states: the expert's input, [N, H].
            outputs: the results of the first products; the others return ones.
            vectors: the expert's slice of stacked biases by name; the others are zero.

        Returns:
            Two or three products and the result; nothing for a program of another form.
        """
        module = self.module
        program: Program | Any = module.program
        if isinstance(module, Experts):
            own = {name: _without_memory(self.shapes[name][1:]) for name in module.stacked} | dict(vectors or {})
            others = {name: torch.ones(tuple(shape)) for name, shape in self.shapes.items() if name not in own}
            weights = torch.ones(len(states), 1) if module.is_column else torch.ones(len(states))
            given: list[Any] = [_Parameters(others), states, weights, *own.values()]
        else:
            own = {name: _without_memory(self.shapes[name]) for name in module.stacked}
            given = [_Parameters(own), states.repeat(module.num_experts, 1)]
        run, watch = Run(device=torch.device("cpu"), dtype=torch.float32), _ProductWatch(own, outputs)
        try:
            with torch.no_grad(), watch:
                output = program(*given, run=run)["output"]
        except Exception:  # a program may fail in many ways for other sizes, or without values
            return [], None
        return (watch.seen, output) if len(watch.seen) in (2, 3) else ([], None)


def make_probe(kind: LeafKind, source: str, shapes: Mapping[str, Sequence[int]]) -> ExpertProbe:
    """Build a mixture without weights, and its probe.

    Args:
        kind: describes the mixture.
        source: its program.
        shapes: the shapes of its parameters.
    """
    module = build_leaf(kind, "experts", shapes, compile_program(source, "experts.py"))
    assert isinstance(module, Mixture), "its kind says so"
    sliced = {name: stack_shape(shapes[name], module.num_experts) for name in module.flat}
    return ExpertProbe(module, {**shapes, **sliced})


class _UnusualProductError(Exception):
    """A matrix is used in an unexpected way."""


def _without_memory(shape: Sequence[int]) -> torch.Tensor:
    """Create a matrix on the meta device, or a bias of zeros."""
    return torch.empty(tuple(shape), device="meta") if len(shape) > 1 else torch.zeros(tuple(shape))


@dataclass(frozen=True, slots=True)
class _Parameters:
    """Replaces a module whose program uses its parameters only."""

    parameters: Mapping[str, torch.Tensor]

    def get_parameter(self, name: str) -> torch.Tensor:
        return self.parameters[name]


class _ProductWatch(TorchFunctionMode):
    """Make up the results of products with matrices that have no memory."""

    def __init__(self, own: Mapping[str, torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.own = {storage(tensor): (name, tensor) for name, tensor in own.items() if tensor.is_meta}
        self.outputs = outputs
        self.seen: list[Product] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        place = 0 if func in STACKED_PRODUCTS else PRODUCTS.get(func)
        if place is None or not isinstance(args[place + 1], torch.Tensor) or storage(args[place + 1]) not in self.own:
            return func(*args, **(kwargs or {}))
        states, used = args[place], args[place + 1]
        name, matrix = self.own[storage(used)]
        if name in [product.name for product in self.seen] or used.numel() != matrix.numel():
            raise _UnusualProductError
        is_linear = func is torch.ops.aten.linear.default
        num_out, num_in = used.shape if is_linear else (used.shape[-1], used.shape[-2])
        self.seen.append(
            Product(
                name=name,
                is_transposed=is_linear == (tuple(used.stride()) != tuple(matrix.stride())),
                num_in=num_in,
                num_out=num_out,
                states=(states[0] if states.dim() == 3 else states).clone(),  # all experts get the same states
            )
        )
        made_up = self.outputs[len(self.seen) - 1] if len(self.seen) <= len(self.outputs) else torch.ones(num_out)
        return made_up.expand(*states.shape[:-1], num_out).clone()
