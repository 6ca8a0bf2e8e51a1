"""The block of a step as a function of the weights of some modules, with gradients.

The artifact's own code runs with autograd. Meanwhile parameters are in float32, so a block in 16 bits takes three times
the memory; parameters of other modules have no gradients. Products may be computed in bf16 by autocast.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from runtime.algorithms.exact_products import HALVES
from runtime.algorithms.products import has_quick_bfloat16
from runtime.language.program import run_dtype

if TYPE_CHECKING:
    from runtime.data.masks import TokenMask
    from runtime.streaming.work import Work


@dataclass(frozen=True, kw_only=True, slots=True)
class TunedBlock:
    """A block whose parameters are in float32; see `opened`.

    Attributes:
        work: the step.
        weights: the weights with gradients, by module.
        inputs_of: copies the inputs of a batch.
    """

    work: Work
    weights: Mapping[str, nn.Parameter]
    inputs_of: Callable[[int], dict[str, Any]]

    @property
    def num_batches(self) -> int:
        """The number of batches."""
        return len(self.work.masks)

    def outputs(self, batch: int, *, mixed: bool = False) -> list[torch.Tensor]:
        """Run a batch, and return all floating point tensors of the outputs, in order.

        Args:
            batch: its number.
            mixed: multiply the weights with gradients in bf16. Everything else, such as attention and routers, is
                computed in float32, as are the values between modules.
        """
        inputs = {name: pytree.tree_map_only(torch.Tensor, _widened, v) for name, v in self.inputs_of(batch).items()}
        modules = [self.work.model.get_submodule(name) for name in self.weights] if mixed else []
        with _multiplied_in_bfloat16(modules, self.work.device.type):
            return floating(self.work.step.subgraph.forward(self.work.model, **inputs))


@contextlib.contextmanager
def _multiplied_in_bfloat16(modules: Sequence[nn.Module], device_type: str) -> Iterator[None]:
    """Let modules compute with autocast to bf16, and return float32, while a block runs."""
    kept = [module.__dict__.get("forward") for module in modules]

    def mixed(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with torch.autocast(device_type, torch.bfloat16):
                return pytree.tree_map_only(torch.Tensor, _widened, forward(*args, **kwargs))

        return run

    for module in modules:
        module.__dict__["forward"] = mixed(module.forward)
    try:
        yield
    finally:
        for module, before in zip(modules, kept, strict=True):
            del module.__dict__["forward"]
            if before is not None:
                module.__dict__["forward"] = before


@contextlib.contextmanager
def _widened_embeddings(work: Work) -> Iterator[None]:
    """Let the embeddings of a step return float32; their tables, which are large, keep their dtype."""
    owners = dict.fromkeys(name.rpartition(".")[0] for name in work.step.subgraph.entry.parameters)
    found = [module for module in map(work.model.get_submodule, owners) if isinstance(module, nn.Embedding)]
    handles = [module.register_forward_hook(lambda module, args, output: _widened(output)) for module in found]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bf16 in less time than float32."""
    if device.type == "cpu":
        return has_quick_bfloat16()
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def floating(outputs: Any) -> list[torch.Tensor]:
    """List the floating point tensors of nested containers, in order."""
    leaves = pytree.tree_leaves(outputs)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


@contextlib.contextmanager
def opened(work: Work, tuned: Collection[str], weight_of: Callable[[str], torch.Tensor]) -> Iterator[TunedBlock]:
    """Hold the parameters of a step in float32, and let the weights of some modules have gradients, while a block runs.

    Args:
        work: the step.
        tuned: the modules whose weights have gradients.
        weight_of: returns the values of these weights, which the parameter takes over if they are in float32.
    """
    model, kept = work.model, {}
    stated = model.__dict__.get("run_dtype")
    weights: dict[str, nn.Parameter] = {}
    try:
        for name in work.step.subgraph.entry.parameters:
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            before = module._parameters.get(leaf)
            if before is None or not before.is_floating_point() or isinstance(module, nn.Embedding):
                continue
            is_tuned = leaf == "weight" and owner in tuned
            values = weight_of(owner) if is_tuned else before.detach()
            kept[name] = before
            module._parameters[leaf] = made = nn.Parameter(_widened(values.detach()), requires_grad=is_tuned)
            if is_tuned:
                weights[owner] = made
        if run_dtype(model) in HALVES:
            model.__dict__["run_dtype"] = torch.float32
        with work.by_hand() as inputs_of, _widened_embeddings(work):
            yield TunedBlock(work=work, weights=weights, inputs_of=inputs_of)
    finally:
        for name, parameter in kept.items():
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner)._parameters[leaf] = parameter
        model.__dict__["run_dtype"] = stated


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.float32) if tensor.dtype in HALVES else tensor


def squared_error(outputs: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], mask: TokenMask) -> torch.Tensor:
    """Sum up the squared errors of the tokens that count, in float32."""
    total = outputs[0].new_zeros(())
    for output, target in zip(outputs, targets, strict=True):
        error = output - target.to(output.device, output.dtype)
        counted = _counted(error, mask)
        if counted is not None:
            error = torch.where(counted, error, 0)
        total = total + error.square().sum()
    return total


def _counted(values: torch.Tensor, mask: TokenMask) -> torch.Tensor | None:
    """Whether each token counts, broadcast against values; None if all do, or the mask does not fit them."""
    for part in mask if isinstance(mask, tuple) else (mask,):
        if part is None or part.numel() == 0:
            continue
        if values.shape[: part.dim()] == part.shape:
            shape = part.shape
        elif values.dim() > 1 and values.shape[0] == part.numel():
            shape = torch.Size((part.numel(),))
        else:
            continue
        return part.to(values.device, torch.bool).reshape(*shape, *(1,) * (values.dim() - len(shape)))
    return None
