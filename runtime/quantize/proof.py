"""Check a rescaling that only the recipe names: the subgraph must compute the same before and after."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from runtime.errors import RecipeError
from runtime.weights.parameters import assign
from runtime.workers.agreement import agreed

if TYPE_CHECKING:
    from runtime.quantize.smoothing import Rescaled
    from runtime.streaming.work import Work

TOLERANCE = 0.05  # relative to the largest number; the error of a wrong mapping is as large as its factors


def require_same_output(work: Work, before: Rescaled, after: Rescaled, where: str) -> None:
    """Run the first batch through the subgraph with the parameters before and after the rescaling of a mapping.

    Raises:
        RecipeError: naming the mapping (`where`), when the results differ by more than rounding errors.
    """
    with agreed(work.workers):
        one, two = _outputs(work, before), _outputs(work, after)
        for first, second in zip(one, two, strict=True):
            size = float(first.abs().max()) if first.numel() else 0.0
            if size and float((first - second).abs().max()) > TOLERANCE * size:
                raise RecipeError(
                    f"{where} changes the model's output",
                    hint="smooth_layer must compute the input of balance_layers, and no other module may read it",
                )


def _outputs(work: Work, changed: Rescaled) -> list[torch.Tensor]:
    with assigned(work, changed, changed.changed()):
        outputs: Any = work.run_first()
    return [
        tensor.detach().float()
        for tensor in pytree.tree_leaves(outputs)
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
    ]


@contextlib.contextmanager
def assigned(work: Work, changed: Rescaled, names: Iterable[str]) -> Iterator[None]:
    """Use rescaled parameters in the model while the block runs."""
    kept = {}
    try:
        for name in names:
            owner, _, leaf = name.rpartition(".")
            parameter = work.model.get_submodule(owner).get_parameter(leaf)
            values = changed.rounded(name, parameter.dtype)  # reads the original parameter
            kept[name] = parameter
            assign(work.model, name, values)
        yield
    finally:
        for name, parameter in kept.items():
            assign(work.model, name, parameter.detach())
