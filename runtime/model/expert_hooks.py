"""Call the hooks of experts' modules for the products of their matrices.

A mixture does not call the Linear modules of its experts: the program of the artifact multiplies by their matrices,
some of which are joined.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from runtime.formats.transformed_modules import PART_OF_MODEL

# While a module is called, this attribute has the indices [N] of the batch's tokens that it is called with.
ROWS = "rows"
# Products of states with a matrix, and the position of the states in their arguments; the matrix follows.
PRODUCTS: dict[Any, int] = {
    torch.ops.aten.linear.default: 0,
    torch.ops.aten.matmul.default: 0,
    torch.ops.aten.mm.default: 0,
    torch.ops.aten.addmm.default: 1,
}


class HookedProducts(TorchFunctionMode):
    """Run forward pre-hooks of Linear modules for products with their weights.

    Args:
        modules: the modules that a matrix is joined from, by its storage.
        tokens: the indices of the batch's tokens that are multiplied, see `ROWS`.
        of_model: whether only hooks that are a part of the model run.
    """

    def __init__(
        self, modules: Mapping[int, Sequence[nn.Module]], tokens: torch.Tensor | None, *, of_model: bool | None
    ) -> None:
        super().__init__()
        self.modules = modules
        self.tokens = tokens
        self.of_model = of_model

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        place = PRODUCTS.get(func)
        if place is None:
            return func(*args, **(kwargs or {}))
        modules = self.modules.get(storage(args[place + 1]), ())
        values = after_hooks(modules, args[place], self.tokens, of_model=self.of_model)
        product = func(*args[:place], values, *args[place + 1 :], **(kwargs or {}))
        if not self.of_model:
            show_product(modules, product, ())
        return product


def after_hooks(
    modules: Sequence[nn.Module],
    states: torch.Tensor,
    tokens: torch.Tensor | None,
    *,
    of_model: bool | None = None,
) -> torch.Tensor:
    """Run the pre-hooks of a matrix's modules, and return the states as those of the first module change them: all get
    the same input.

    Args:
        modules: the modules that the matrix is joined from.
        states: the tensor that it multiplies.
        tokens: the indices of the batch's tokens in it, see `ROWS`.
        of_model: whether only hooks that are a part of the model run.
    """
    values = states
    for number, module in enumerate(modules):
        module.__dict__[ROWS] = tokens
        changed = _after_hooks(module, states, of_model=of_model)
        del module.__dict__[ROWS]
        values = changed if number == 0 else values
    return values


def show_product(modules: Sequence[nn.Module], product: torch.Tensor, index: tuple[int | torch.Tensor, ...]) -> None:
    """Call the forward hooks of a matrix's modules with the product of the whole matrix, whose columns are joined as
    its rows are; hooks cannot replace it.

    Args:
        modules: the modules that the matrix is joined from.
        product: of the states of all tokens, or experts, that are multiplied at once.
        index: of the rows that belong to these modules' expert; the hooks' argument.
    """
    for module in modules:
        for hook in module._forward_hooks.values():
            hook(module, index, product)


def has_hooks(module: nn.Module, of_model: bool | None) -> bool:
    """Whether a module has pre-hooks; with `of_model`, those that are a part of the model, or the others."""
    hooks = module._forward_pre_hooks.values()
    return any(of_model is None or hasattr(hook, PART_OF_MODEL) is of_model for hook in hooks)


def _after_hooks(module: nn.Module, states: torch.Tensor, *, of_model: bool | None) -> torch.Tensor:
    """Return the first argument of a module after its pre-hooks."""
    args: Any = (states,)
    for number, hook in module._forward_pre_hooks.items():
        if of_model and not hasattr(hook, PART_OF_MODEL):
            continue
        if number in module._forward_pre_hooks_with_kwargs:
            result = hook(module, args, {})
            args = args if result is None else result[0]
        else:
            result = hook(module, args)
            args = args if result is None else result if isinstance(result, tuple) else (result,)
    changed: torch.Tensor = args[0]
    return changed


def storage(tensor: torch.Tensor) -> int:
    """Identify the memory of a tensor; its views share it."""
    return int(tensor.untyped_storage()._cdata)
