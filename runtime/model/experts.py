"""A mixture's experts, as a leaf of the host's own: which token goes where is the same for all; what one expert does is
a program of the artifact.

Their weights are stacked, as the model has them, or apart (`runtime.experts.split`): then each expert's matrices are
Linear modules of their own, that can be measured, quantized and hooked like any others. What is calculated is the
same to the bit, for the program gets the same matrices.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from runtime.artifact.expert_tables import stack_shape
from runtime.errors import ArtifactError
from runtime.language.program import Run

if TYPE_CHECKING:
    from runtime.artifact.manifest import ExpertStack
    from runtime.language.program import Program


# Under this key a module says which of a batch's tokens it is called with: indices [N], while it is called.
ROWS = "rows"


@dataclass(frozen=True, kw_only=True, slots=True)
class Stack:
    """How a stacked parameter is made of its experts' own.

    Attributes:
        parts: for each expert the parameters that make its matrix, by their names below the experts' module.
        axis: along which those of one expert are joined.
        is_transposed: whether each is turned around before.
        is_interleaved: whether their columns (or rows) take turns, and do not follow one after the other.
        input: which of an expert's inputs they multiply; 0 is its own.
    """

    parts: tuple[tuple[str, ...], ...]
    axis: int
    is_transposed: bool
    is_interleaved: bool = False
    input: int = 0

    @classmethod
    def of(cls, entry: ExpertStack, numbers: Sequence[int]) -> Stack:
        """The composition that the manifest states, for experts with these numbers."""
        return cls(
            parts=tuple(tuple(f"{number}.{part}" for part in entry.parts) for number in numbers),
            axis=entry.axis,
            is_transposed=entry.is_transposed,
            is_interleaved=entry.is_interleaved,
            input=entry.input,
        )

    def modules(self, expert: int) -> tuple[str, ...]:
        """The modules that hold an expert's parts, each once, by their names below the experts' module."""
        return tuple(dict.fromkeys(owner_of(part) for part in self.parts[expert]))

    @property
    def is_of_biases(self) -> bool:
        """Whether it is what is added, not what is multiplied."""
        return all(part.endswith(".bias") for part in self.parts[0])

    def part_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of one part of a stacked parameter of this shape, [E, ...]."""
        own = list(shape[1:])
        own[self.axis] //= len(self.parts[0])
        return tuple(reversed(own)) if self.is_transposed else tuple(own)

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """An expert's own part of the stacked parameter, from tensors as they lie in its modules."""
        turned = [part.T for part in parts] if self.is_transposed else list(parts)
        if self.is_interleaved:
            return torch.stack(turned, self.axis + 1).flatten(self.axis, self.axis + 1)
        return torch.cat(turned, self.axis) if len(turned) > 1 or self.is_transposed else turned[0]

    def take(self, own: torch.Tensor, place: int) -> torch.Tensor:
        """The reverse: one part, number `place`, of what an expert has in the stack."""
        count = len(self.parts[0])
        if self.is_interleaved:
            part = own[:, place::count] if self.axis else own[place::count]
        else:
            part = own.chunk(count, self.axis)[place]
        return (part.T if self.is_transposed else part).contiguous()


def owner_of(part: str) -> str:
    """The module that holds a parameter."""
    return part.rpartition(".")[0]


def branch(module: nn.Module, names: Sequence[str]) -> nn.Module:
    """The module of these names below another one; those that are not there are made."""
    for name in names:
        if name not in module._modules:
            module.add_module(name, nn.Module())
        module = module.get_submodule(name)
    return module


def input_place(position: int, expert: int, *, all_tokens: bool) -> int:
    """Which of the inputs of a stack an expert is called with; those of one place are one tensor.

    What the first matrix is multiplied with is the layer's input: called with all tokens, it is one for all experts.

    Args:
        position: `Stack.input`.
        expert: its number.
        all_tokens: whether experts are called with all tokens, or with those that are sent to them.
    """
    return 0 if all_tokens and position == 0 else expert


class Mixture(nn.Module):
    """Experts whose weights are stacked: the first axis of each is the expert.

    Args:
        num_experts: how many there are, E.
        stacked: names of the parameters of which each expert has its own part.
        flat: those of them whose rows are one axis for all experts: [E * R, ...], not [E, R, ...].

    Attributes:
        num_identity: how many there are besides that hand on their tokens.
        stacks: how these are made, where experts are apart.
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
        """Take the parameters of single experts in the place of stacked ones.

        Args:
            stacks: by the names of the stacked parameters, which are dropped.
            modules: the new modules, by their names below this one.
        """
        for name in stacks:
            owner, _, own = name.rpartition(".")
            del self.get_submodule(owner)._parameters[own]
        self.stacks = dict(stacks)
        for name, module in modules.items():
            *branches, own = name.split(".")
            branch(self, branches).add_module(own, module)

    def own(self, name: str, expert: int) -> torch.Tensor:
        """An expert's own part of a stacked parameter, laid out as it is in the stack."""
        if name not in self.stacks:
            stacked = self.get_parameter(name)
            return (stacked.view(stack_shape(stacked.shape, self.num_experts)) if name in self.flat else stacked)[
                expert
            ]
        stack = self.stacks[name]
        return stack.join([self.get_parameter(part).detach() for part in stack.parts[expert]])

    def watched(self, expert: int) -> dict[str, list[nn.Module]]:
        """By the name of a stack, an expert's modules of which any has hooks."""
        modules = {
            name: [self.get_submodule(owner) for owner in stack.modules(expert)]
            for name, stack in self.stacks.items()
            if not stack.is_of_biases
        }
        return {name: own for name, own in modules.items() if any(module._forward_pre_hooks for module in own)}


class Experts(Mixture):
    """Experts that get the tokens which are sent to them, one expert after the other.

    Args:
        num_experts: how many there are, E.
        stacked: names of the parameters of which each expert gets its own part.
        inputs: what the model's code calls the three inputs.
        accumulator: the dtype in which results of several experts are summed: `hidden`, `weights` or `float32`.
        is_column: whether an expert gets its routing weights as a column [N, 1] or as a vector [N].
        num_identity: how many there are besides, numbered after the others, that hand on their tokens, times weights.
        num_dims: of the hidden states and of what is returned: 2, or 3 with the tokens in two axes.
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
        """Send tokens through their experts.

        Args:
            args: hidden states [T, H], indices of each token's experts [T, K] (the number after the last one means
                none), and their weights [T, K].
            kwargs: the same by the names that the model's code has for them.

        Returns:
            Sums over each token's experts, in shape and dtype of the hidden states.
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
                if self.watched(expert):  # nothing else comes of it
                    self._expert(expert, hidden_TH, first_TK)
        for expert in used:
            if expert == num_all:
                continue
            places, tokens = torch.where(mask_EKT[expert])
            weights = weight_TK[tokens, places, None] if self.is_column else weight_TK[tokens, places]
            if expert < self.num_experts:
                output_NH = self._expert(expert, hidden_TH[tokens], weights, tokens, is_hooked=not self.sees_all)
            else:
                output_NH = hidden_TH[tokens] * weights
            sum_TH.index_add_(0, tokens, output_NH.to(sum_TH.dtype))
        return sum_TH.to(hidden_TH.dtype).view(hidden.shape)

    def values(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> list[torch.Tensor]:
        """The inputs in order."""
        return [*args, *(kwargs[name] for name in self.inputs[len(args) :])]

    def rows(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states, a row for each token."""
        if hidden.dim() != self.num_dims:
            raise ArtifactError(f"experts get hidden states of {hidden.dim()} dimensions, and take {self.num_dims}")
        return hidden.reshape(-1, hidden.shape[-1]) if self.num_dims > 2 else hidden

    def _expert(
        self,
        expert: int,
        hidden_NH: torch.Tensor,
        weights: torch.Tensor,
        tokens: torch.Tensor | None = None,
        *,
        is_hooked: bool = True,
    ) -> torch.Tensor:
        """What one expert makes of its tokens, [N, H]; `tokens` are their indices, None for all in order."""
        own = [self.own(name, expert) for name in self.stacked]
        run = Run(device=hidden_NH.device, dtype=own[0].dtype)
        program: Program | Any = self.program
        with self._hooked(expert, own, tokens) if is_hooked else contextlib.nullcontext():
            output: torch.Tensor = program(self, hidden_NH, weights, *own, run=run)["output"]
        return output

    def _hooked(
        self, expert: int, own: Sequence[torch.Tensor], tokens: torch.Tensor | None
    ) -> contextlib.AbstractContextManager[Any]:
        """Have the hooks of an expert's modules see what is multiplied by their weights."""
        watched = self.watched(expert)
        matrices = {name: tensor for name, tensor in zip(self.stacked, own, strict=True) if tensor.dim() > 1}
        found = {storage(matrices[name]): modules for name, modules in watched.items() if name in matrices}
        return _Hooked(found, tokens) if found else contextlib.nullcontext()

    def _sum_dtype(self, hidden: torch.Tensor, weights: torch.Tensor) -> torch.dtype:
        return {"hidden": hidden.dtype, "weights": weights.dtype, "float32": torch.float32}[self.accumulator]


@contextlib.contextmanager
def all_tokens_seen(model: nn.Module) -> Iterator[None]:
    """While the block runs, hooks of experts' modules see all tokens, not only those that are sent to their expert. The
    layer's output stays what it was: the sum over the experts that are chosen.
    """
    experts = [module for module in model.modules() if isinstance(module, Mixture)]
    for module in experts:
        module.sees_all = True
    try:
        yield
    finally:
        for module in experts:
            module.sees_all = False


class _Hooked(TorchFunctionMode):
    """Run forward pre-hooks of Linear modules for products with their weights.

    Args:
        modules: by the storage of a matrix, the modules that it is made of.
        tokens: which of the batch's tokens those are, see `ROWS`.
    """

    def __init__(self, modules: Mapping[int, Sequence[nn.Module]], tokens: torch.Tensor | None) -> None:
        super().__init__()
        self.modules = modules
        self.tokens = tokens

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        place = PRODUCTS.get(func)
        if place is not None:
            matrix, values = args[place + 1], args[place]
            values = after_hooks(self.modules.get(storage(matrix), ()), values, self.tokens)
            args = (*args[:place], values, *args[place + 1 :])
        return func(*args, **(kwargs or {}))


# Products of states with a matrix, and where in their arguments the states are; the matrix comes next.
PRODUCTS: dict[Any, int] = {
    torch.ops.aten.linear.default: 0,
    torch.ops.aten.matmul.default: 0,
    torch.ops.aten.mm.default: 0,
    torch.ops.aten.addmm.default: 1,
}


def after_hooks(modules: Sequence[nn.Module], states: torch.Tensor, tokens: torch.Tensor | None) -> torch.Tensor:
    """Show the modules of a matrix what is multiplied by it, and return that after the pre-hooks of the first: they see
    one input, so what its hooks make of it holds for all.

    Args:
        modules: that the matrix is made of.
        states: what is multiplied.
        tokens: which of the batch's tokens those are, see `ROWS`.
    """
    values = states
    for number, module in enumerate(modules):
        module.__dict__[ROWS] = tokens
        changed = _after_hooks(module, states)
        del module.__dict__[ROWS]
        values = changed if number == 0 else values
    return values


def _after_hooks(module: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """The first argument that a module would be called with, after its pre-hooks."""
    args: Any = (states,)
    for number, hook in module._forward_pre_hooks.items():
        if number in module._forward_pre_hooks_with_kwargs:
            result = hook(module, args, {})
            args = args if result is None else result[0]
        else:
            result = hook(module, args)
            args = args if result is None else result if isinstance(result, tuple) else (result,)
    changed: torch.Tensor = args[0]
    return changed


def storage(tensor: torch.Tensor) -> int:
    """What tells the memory of a tensor from that of others; views of one have one."""
    return int(tensor.untyped_storage()._cdata)
