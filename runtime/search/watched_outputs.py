"""Watch the outputs of modules while a subgraph runs, also those of experts, whose matrices are joined."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from runtime.experts.split import SplitArtifact

if TYPE_CHECKING:
    from torch import nn

    from runtime.chain import Artifact


@dataclass(frozen=True, kw_only=True, slots=True)
class JoinedPlace:
    """The columns of a joined product that are the output of one module.

    Attributes:
        place: of the module's matrix among those that are joined.
        count: of these.
        is_interleaved: whether their columns alternate.
    """

    place: int
    count: int
    is_interleaved: bool

    def columns(self, product: torch.Tensor) -> torch.Tensor:
        """Return the module's columns, a view."""
        if self.is_interleaved:
            return product[..., self.place :: self.count]
        return product.chunk(self.count, dim=-1)[self.place]


def joined_places(artifact: Artifact) -> dict[str, JoinedPlace]:
    """Return the place of each module of a split expert in the product of its stack."""
    if not isinstance(artifact, SplitArtifact):
        return {}
    found = {}
    for mixture, split in artifact.mixtures.items():
        for stack in split.stacks.values():
            if stack.is_of_biases:
                continue
            for expert in range(len(stack.parts)):
                for place, part in enumerate(stack.parts[expert]):
                    owner = f"{mixture}.{part.rpartition('.')[0]}"
                    count = len(stack.parts[expert])
                    found[owner] = JoinedPlace(place=place, count=count, is_interleaved=stack.is_interleaved)
    return found


Index = tuple[Any, ...]
# Gets a module's name, the tensor that contains its output, and the index of its rows there.
OnOutput = Callable[[str, torch.Tensor, Index], "torch.Tensor | None"]


@contextlib.contextmanager
def watched_outputs(
    model: nn.Module, names: Sequence[str], are_joined: Container[str], on_output: OnOutput
) -> Iterator[None]:
    """Call `on_output` for each output of these modules while the block runs; what it returns replaces the output.

    For an expert's module, the tensor is the product of its joined matrices. It cannot be replaced, only changed.
    """
    handles: list[Any] = []
    try:
        for name in names:
            module, is_joined = model.get_submodule(name), name in are_joined
            handles.append(module.register_forward_hook(_hook(name, is_joined, on_output)))
            if is_joined:  # or the mixture does not look for hooks
                handles.append(module.register_forward_pre_hook(lambda module, args: None))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(name: str, is_joined: bool, on_output: OnOutput) -> Callable[..., torch.Tensor | None]:
    def hook(module: nn.Module, args: Index, output: torch.Tensor) -> torch.Tensor | None:
        return on_output(name, output, args if is_joined else ())

    return hook
