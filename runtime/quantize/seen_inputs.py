"""What measured inputs are worth: numbers that overflowed, modules that no token reached, inputs of nothing but zeros.

All of it is looked at as soon as a subgraph is measured, before any of its weights is solved.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from runtime.errors import DataError, QuantizationError
from runtime.formats.compressed import input_parts

if TYPE_CHECKING:
    from torch import nn

    from runtime.quantize.statistics import InputStatistics, Needs
    from runtime.recipe.recipe import Assignment

_MORE_DATA = "calibrate with more data, or add it to ignore"


def require_finite_inputs(statistics: Mapping[str, InputStatistics], dtype: torch.dtype) -> None:
    """Refuse what overflowed or was no number on its way.

    Args:
        statistics: in the order in which modules were called.
        dtype: of the run.

    Raises:
        QuantizationError: naming the first module whose inputs are not finite.
    """
    for name, found in statistics.items():
        if found.num_tokens and not found.is_finite():
            narrow = dtype == torch.float16
            plain = str(dtype).removeprefix("torch.")
            raise QuantizationError(
                f"the calibration inputs of {name} are not finite in {plain}",
                hint="activations overflow float16: run with --dtype bfloat16"
                if narrow
                else "check the weights before it and the data, or run with --dtype float32",
            )


def unreached(needs: Mapping[str, Needs], statistics: Mapping[str, InputStatistics]) -> list[str]:
    """Modules that were to be measured and that no token has reached."""
    return [
        name for name, need in needs.items() if need and (name not in statistics or not statistics[name].num_tokens)
    ]


def require_inputs(names: Iterable[str], jobs: Mapping[str, Assignment]) -> None:
    """Refuse modules that cannot do without inputs.

    Args:
        names: those that no token has reached.
        jobs: what is done to each module.

    Raises:
        DataError: naming the module, and what to do.
    """
    for name in names:
        job = jobs.get(name)
        if job is None:
            continue
        if input_parts(job.scheme):
            raise DataError(
                f"no calibration token reached {name}, so its static input scale is undefined",
                hint=_MORE_DATA,
                is_resumable=True,
            )
        if job.algorithm == "rtn" and job.scheme.weights.observer == "imatrix_mse":
            raise DataError(
                f"no calibration token reached {name}, so its observer imatrix_mse has no inputs to weigh errors by",
                hint=_MORE_DATA,
                is_resumable=True,
            )
        if job.algorithm == "gptq" and job.options is not None and job.options.fallback != "rtn":
            raise DataError(
                f"no calibration token reached {name}, so GPTQ has no inputs to judge its rounding by",
                hint=f"set fallback: rtn in the recipe, {_MORE_DATA}",
                is_resumable=True,
            )


@contextlib.contextmanager
def reached_modules(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, None]]:
    """Which modules are called with tokens while the block runs."""
    found: dict[str, None] = {}

    def hook(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if (args[0] if args else next(iter(kwargs.values()))).numel():
                found[name] = None

        return note

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True) for name in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def only_zeros(statistics: Mapping[str, InputStatistics]) -> list[str]:
    """Modules whose inputs were zero in every token: whatever their weights are rounded to, nothing is lost."""
    return [name for name, found in statistics.items() if found.num_tokens and found.is_zero()]
