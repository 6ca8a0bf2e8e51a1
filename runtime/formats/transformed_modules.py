"""Apply the matrices of a `transform_config` while a model runs, as a reader of the checkpoint does.

A module's hooks come first: whatever measures or rounds its inputs gets transformed ones. Modules that receive the same
tensor and have the same matrix, such as the query, key and value projections, get the same transformed tensor, so that
it is computed, and measured, once.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from runtime.algorithms.hadamard import Hadamard
from runtime.errors import ArtifactError
from runtime.formats.transforms import INPUT, OUTPUT, ModuleTransform

# Hooks with this attribute compute a part of the model; others measure or round.
PART_OF_MODEL = "is_part_of_model"


def attach_transforms(
    model: nn.Module, transforms: Iterable[ModuleTransform], matrices: Mapping[tuple[str, int], Hadamard]
) -> None:
    """Make modules transform their inputs and outputs from now on; those of attention are not attached here.

    Args:
        model: the module tree.
        transforms: of its modules.
        matrices: by `ModuleTransform.matrix`.
    """
    shared: dict[tuple[tuple[str, int], bool], _InputTransform] = {}
    for one in transforms:
        key = one.matrix, one.inverse
        made = shared.setdefault(key, _InputTransform(matrices[one.matrix], inverse=one.inverse))
        module = model.get_submodule(one.module)
        if one.location == INPUT:
            module.register_forward_pre_hook(made, with_kwargs=True)
        elif one.location == OUTPUT:
            module.register_forward_hook(_OutputTransform(matrices[one.matrix], inverse=one.inverse))


class _OutputTransform:
    """A hook that transforms the output of a module."""

    def __init__(self, matrix: Hadamard, *, inverse: bool) -> None:
        self._matrix, self._inverse = matrix, inverse

    def __call__(self, module: nn.Module, args: tuple[Any, ...], outputs: Any) -> torch.Tensor:
        return self._matrix.apply(_tensor(outputs), inverse=self._inverse)


@dataclass(slots=True)
class _Last:
    """The last input, its version, and the result."""

    inputs: weakref.ref[torch.Tensor]
    version: int
    result: torch.Tensor


class _InputTransform:
    """A hook that transforms the inputs of several modules; its last result is kept for as long as the input exists."""

    def __init__(self, matrix: Hadamard, *, inverse: bool) -> None:
        self._matrix, self._inverse = matrix, inverse
        self._last: _Last | None = None
        setattr(self, PART_OF_MODEL, True)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if args:
            return (self._transformed(args[0]), *args[1:]), kwargs
        first, *_ = kwargs
        return args, kwargs | {first: self._transformed(kwargs[first])}

    def _transformed(self, value: Any) -> torch.Tensor:
        inputs = _tensor(value)
        # A graph that is captured must contain the computation; inference tensors have no version.
        if inputs.is_inference() or (inputs.is_cuda and torch.cuda.is_current_stream_capturing()):
            return self._matrix.apply(inputs, inverse=self._inverse)
        last = self._last
        if last is None or last.inputs() is not inputs or last.version != inputs._version:
            result = self._matrix.apply(inputs, inverse=self._inverse)
            self._last = last = _Last(weakref.ref(inputs, self._forget), inputs._version, result)
        return last.result

    def _forget(self, reference: weakref.ref[torch.Tensor]) -> None:
        if self._last is not None and self._last.inputs is reference:
            self._last = None


def _tensor(value: Any) -> torch.Tensor:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        raise ArtifactError("a module with a transform receives or returns something else than floating point numbers")
    return value
