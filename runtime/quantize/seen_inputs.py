"""Check measured inputs for numbers that are not finite, modules that no token reached, and inputs that are all zero.

The checks run as soon as a subgraph is measured, before any of its weights is quantized.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from runtime.errors import DataError, QuantizationError
from runtime.formats.compressed import input_parts

if TYPE_CHECKING:
    from torch import nn

    from runtime.quantize.statistics import InputStatistics, Needs
    from runtime.recipe.recipe import Assignment
    from runtime.workers.group import Workers

_MORE_DATA = "calibrate with more data, or add it to ignore"


def require_finite_inputs(statistics: Mapping[str, InputStatistics], dtype: torch.dtype) -> None:
    """Reject inputs that are not finite.

    Raises:
        QuantizationError: naming the first module in the order of `statistics` whose inputs are not finite.
    """
    for name, found in statistics.items():
        if found.num_tokens and not found.is_finite():
            narrow = dtype == torch.float16
            plain = str(dtype).removeprefix("torch.")
            raise QuantizationError(
                f"the calibration inputs of {name} are not finite in {plain}",
                hint="activations overflow float16: run with --dtype bfloat16"
                if narrow
                else "check the data and the weights of earlier layers, or run with --dtype float32",
            )


def unreached(needs: Mapping[str, Needs], statistics: Mapping[str, InputStatistics]) -> list[str]:
    """List the modules that should have been measured and that no token has reached."""
    return [
        name for name, need in needs.items() if need and (name not in statistics or not statistics[name].num_tokens)
    ]


def require_inputs(names: Iterable[str], jobs: Mapping[str, Assignment]) -> None:
    """Reject modules that no token has reached and whose quantization needs inputs.

    Raises:
        DataError: naming the module.
    """
    for name in names:
        job = jobs.get(name)
        if job is None:
            continue
        hint = _MORE_DATA
        if input_parts(job.scheme):
            consequence = "its static input scale is undefined"
        elif job.algorithm == "rtn" and job.scheme.weights.observer == "imatrix_mse":
            consequence = "the observer imatrix_mse has no inputs to weight errors with"
        elif job.algorithm == "gptq" and job.options is not None and job.options.fallback != "rtn":
            consequence, hint = "GPTQ cannot quantize it", f"set fallback: rtn in the recipe, {_MORE_DATA}"
        else:
            continue
        raise DataError(f"no calibration token reached {name}, so {consequence}", hint=hint, is_resumable=True)


@contextlib.contextmanager
def reached_modules(model: nn.Module, names: Sequence[str], workers: Workers) -> Iterator[dict[str, None]]:
    """Record which modules are called with tokens, by any worker, while the block runs.

    Every worker enters the block with the same names; the record is complete when the block has ended.
    """
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
    if names:
        reached = workers.exchange([index for index, name in enumerate(names) if name in found])
        found.update((names[index], None) for indices in reached for index in indices)


def only_zeros(statistics: Mapping[str, InputStatistics]) -> list[str]:
    """List the modules whose inputs were all zero: every rounding of their weights has the same error."""
    return [name for name, found in statistics.items() if found.num_tokens and found.is_zero()]
