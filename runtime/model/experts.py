"""The experts of a mixture as a module of the host: it routes tokens, and a program of the artifact computes an expert.

The weights are stacked, as in the model, or split (`runtime.experts.split`): then each expert's matrices are Linear
modules that can be measured, quantized and hooked like any others. The result is the same to the bit, because the
program gets the same matrices.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from runtime.artifact.expert_tables import stack_shape
from runtime.errors import ArtifactError
from runtime.language.program import Run
from runtime.model.expert_hooks import HookedProducts, has_hooks, storage

if TYPE_CHECKING:
    from runtime.artifact.manifest import ExpertStack
    from runtime.language.program import Program


@dataclass(frozen=True, kw_only=True, slots=True)
class Stack:
    """The composition of a stacked parameter from single experts' parameters.

    Attributes:
        parts: for each expert the names of its parameters within the mixture, in the order in which they are joined.
        axis: along which they are joined.
        is_transposed: whether each is transposed before.
        is_interleaved: whether their rows (or columns) alternate instead of following one another.
        input: the tensor that they multiply; 0 is the expert's own input.
    """

    parts: tuple[tuple[str, ...], ...]
    axis: int
    is_transposed: bool
    is_interleaved: bool = False
    input: int = 0

    @classmethod
    def of(cls, entry: ExpertStack, numbers: Sequence[int]) -> Stack:
        """Return the composition stated in the manifest, for experts with these numbers."""
        return cls(
            parts=tuple(tuple(f"{number}.{part}" for part in entry.parts) for number in numbers),
            axis=entry.axis,
            is_transposed=entry.is_transposed,
            is_interleaved=entry.is_interleaved,
            input=entry.input,
        )

    def modules(self, expert: int) -> tuple[str, ...]:
        """Return the names within the mixture of the modules that own an expert's parts, each once."""
        return tuple(dict.fromkeys(owner_of(part) for part in self.parts[expert]))

    @property
    def is_of_biases(self) -> bool:
        """Whether the parameter is a bias."""
        return all(part.endswith(".bias") for part in self.parts[0])

    def part_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of one part of a stacked parameter of this shape, [E, ...]."""
        own = list(shape[1:])
        own[self.axis] //= len(self.parts[0])
        return tuple(reversed(own)) if self.is_transposed else tuple(own)

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Join an expert's slice of the stacked parameter from its modules' tensors."""
        joined = [part.T for part in parts] if self.is_transposed else list(parts)
        if self.is_interleaved:
            return torch.stack(joined, self.axis + 1).flatten(self.axis, self.axis + 1)
        return torch.cat(joined, self.axis) if len(joined) > 1 or self.is_transposed else joined[0]

    def take(self, own: torch.Tensor, place: int) -> torch.Tensor:
        """Return part number `place` of an expert's slice; the reverse of `join`."""
        count = len(self.parts[0])
        if self.is_interleaved:
            part = own[:, place::count] if self.axis else own[place::count]
        else:
            part = own.chunk(count, self.axis)[place]
        return (part.T if self.is_transposed else part).contiguous()


def owner_of(part: str) -> str:
    """Return the name of the module that owns a parameter."""
    return part.rpartition(".")[0]


class Branch(nn.Module):
    """A module that only contains others; its computation is in the artifact's code."""


def branch(root: nn.Module, name: str) -> nn.Module:
    """Return the module of this dotted name, and create it if it is missing."""
    module = root
    for part in name.split(".") if name else ():
        if part not in module._modules:
            module.add_module(part, Branch())
        module = module.get_submodule(part)
    return module


def input_place(position: int, expert: int, *, all_tokens: bool) -> int:
    """Return a number that is equal for experts with the same input tensor: called with all tokens, experts share the
    layer's input.

    Args:
        position: `Stack.input`.
        expert: its index.
        all_tokens: whether experts are called with all tokens instead of those that are routed to them.
    """
    return 0 if all_tokens and position == 0 else expert


class Mixture(nn.Module):
    """Experts whose weights are stacked, with the expert as the first axis.

    Args:
        num_experts: number of experts with weights, E.
        stacked: names of the stacked parameters.
        flat: those of them without an axis for experts: [E * R, ...], not [E, R, ...].

    Attributes:
        num_identity: number of further experts, which return their tokens.
        stacks: the composition of stacked parameters that have been split.
        sees_all: whether hooks of experts' modules see all tokens.
    """

    def __init__(self, *, num_experts: int, stacked: Sequence[str], flat: Sequence[str] = ()) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.stacked = tuple(stacked)
        self.flat = tuple(flat)
        self.num_identity = 0
        self.stacks: Mapping[str, Stack] = {}
        self.sees_all = False
        self.__dict__["program"] = None

    def split(self, stacks: Mapping[str, Stack], modules: Mapping[str, nn.Linear]) -> None:
        """Replace stacked parameters by modules of single experts.

        Args:
            stacks: the composition of each stacked parameter, by its name.
            modules: the new modules, by their names within this one.
        """
        for name in stacks:
            owner, _, own = name.rpartition(".")
            del self.get_submodule(owner)._parameters[own]
        self.stacks = dict(stacks)
        for name, module in modules.items():
            owner, _, own = name.rpartition(".")
            branch(self, owner).add_module(own, module)

    def own(self, name: str, expert: int) -> torch.Tensor:
        """Return an expert's slice of a stacked parameter."""
        if name in self.stacks:
            stack = self.stacks[name]
            parts = [self.get_parameter(part) for part in stack.parts[expert]]
            return stack.join(parts if torch.is_grad_enabled() else [part.detach() for part in parts])
        whole = self.get_parameter(name)
        return (whole.view(stack_shape(whole.shape, self.num_experts)) if name in self.flat else whole)[expert]

    def watched(self, expert: int, *, of_model: bool | None = None) -> dict[str, list[nn.Module]]:
        """Return an expert's modules by stack, for the stacks with a hooked module.

        Args:
            expert: its index.
            of_model: whether only hooks that are a part of the model count, or only others; None for all.
        """
        modules = {
            name: [self.get_submodule(owner) for owner in stack.modules(expert)]
            for name, stack in self.stacks.items()
            if not stack.is_of_biases
        }
        return {name: own for name, own in modules.items() if any(has_hooks(module, of_model) for module in own)}


class Experts(Mixture):
    """Experts that are called one after the other with the tokens that are routed to them.

    Args:
        num_experts: see `Mixture`.
        stacked: see `Mixture`.
        inputs: the names of the three inputs in the model's code.
        accumulator: the dtype in which the results of experts are summed: `hidden`, `weights` or `float32`.
        is_column: whether an expert gets its routing weights as a column [N, 1] or as a vector [N].
        num_identity: number of experts, numbered after the others, that return their tokens times the routing weights.
        num_dims: dimensions of the hidden states and the result: 2, or 3 with tokens in two axes.
        flat: see `Mixture`.
    """

    def __init__(
        self,
        *,
        num_experts: int,
        stacked: Sequence[str],
        inputs: Sequence[str],
        accumulator: str,
        is_column: bool,
        num_identity: int = 0,
        num_dims: int = 2,
        flat: Sequence[str] = (),
    ) -> None:
        super().__init__(num_experts=num_experts, stacked=stacked, flat=flat)
        self.inputs = tuple(inputs)
        self.accumulator = accumulator
        self.is_column = is_column
        self.num_identity = num_identity
        self.num_dims = num_dims

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        """Route tokens to their experts.

        Args:
            args: hidden states [T, H], the indices of each token's experts [T, K] (one after the last means none), and
                their weights [T, K].
            kwargs: the same by their names in the model's code.

        Returns:
            Sums over each token's experts, in the shape and dtype of the hidden states.
        """
        hidden, index_TK, weight_TK = self.values(*args, **kwargs)
        hidden_TH = self.rows(hidden)
        sum_TH = torch.zeros_like(hidden_TH, dtype=self._sum_dtype(hidden_TH, weight_TK))
        num_all = self.num_experts + self.num_identity
        mask_EKT = F.one_hot(index_TK, num_classes=num_all + 1).permute(2, 1, 0)
        used = torch.greater(mask_EKT.sum(dim=(-1, -2)), 0).nonzero().flatten().tolist()
        if self.sees_all:
            first_TK = weight_TK[:, :1] if self.is_column else weight_TK[:, 0]
            for expert in range(self.num_experts):
                if self.watched(expert, of_model=False):  # the result is not used
                    self._expert(expert, hidden_TH, first_TK)
        for expert in used:
            if expert == num_all:
                continue
            places, tokens = torch.where(mask_EKT[expert])
            weights = weight_TK[tokens, places, None] if self.is_column else weight_TK[tokens, places]
            if expert < self.num_experts:
                of_model = True if self.sees_all else None
                output_NH = self._expert(expert, hidden_TH[tokens], weights, tokens, of_model=of_model)
            else:
                output_NH = hidden_TH[tokens] * weights
            sum_TH.index_add_(0, tokens, output_NH.to(sum_TH.dtype))
        return sum_TH.to(hidden_TH.dtype).view(hidden.shape)

    def values(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> list[torch.Tensor]:
        """Return the inputs in order."""
        return [*args, *(kwargs[name] for name in self.inputs[len(args) :])]

    def rows(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return hidden states with a row for each token."""
        if hidden.dim() != self.num_dims:
            raise ArtifactError(
                f"hidden states of experts must have {self.num_dims} dimensions, got {hidden.dim()}",
                hint="compile the model again",
            )
        return hidden.reshape(-1, hidden.shape[-1]) if self.num_dims > 2 else hidden

    def _expert(
        self,
        expert: int,
        hidden_NH: torch.Tensor,
        weights: torch.Tensor,
        tokens: torch.Tensor | None = None,
        *,
        of_model: bool | None = None,
    ) -> torch.Tensor:
        """Compute one expert, [N, H]; `tokens` are the indices of its tokens, None for all in order."""
        own = [self.own(name, expert) for name in self.stacked]
        run = Run(device=hidden_NH.device, dtype=own[0].dtype)
        program: Program | Any = self.program
        with self._hooked(expert, own, tokens, of_model=of_model):
            output: torch.Tensor = program(self, hidden_NH, weights, *own, run=run)["output"]
        return output

    def _hooked(
        self, expert: int, own: Sequence[torch.Tensor], tokens: torch.Tensor | None, *, of_model: bool | None
    ) -> contextlib.AbstractContextManager[Any]:
        """Run the hooks of an expert's modules on the tensors that their weights multiply."""
        watched = self.watched(expert, of_model=of_model)
        matrices = {name: tensor for name, tensor in zip(self.stacked, own, strict=True) if tensor.dim() > 1}
        found = {storage(matrices[name]): modules for name, modules in watched.items() if name in matrices}
        return HookedProducts(found, tokens, of_model=of_model) if found else contextlib.nullcontext()

    def _sum_dtype(self, hidden: torch.Tensor, weights: torch.Tensor) -> torch.dtype:
        return {"hidden": hidden.dtype, "weights": weights.dtype, "float32": torch.float32}[self.accumulator]


@contextlib.contextmanager
def all_tokens_seen(model: nn.Module) -> Iterator[None]:
    """Let hooks of experts' modules see all tokens instead of those that are routed to their expert. The layer's output
    does not change.
    """
    experts = [module for module in model.modules() if isinstance(module, Mixture)]
    for module in experts:
        module.sees_all = True
    try:
        yield
    finally:
        for module in experts:
            module.sees_all = False
