"""Validate inputs passed to the Python API: a sample to trace with, and inputs of a subgraph."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from runtime.arguments import shown
from runtime.errors import DataError, UsageError


def require_module(model: Any) -> None:
    """Reject a value that is not a module, such as a name or a path.

    Raises:
        UsageError: naming the value's type.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"model is {shown(model)}", hint="it must be a torch.nn.Module; seqbuild.compile_model takes names"
        )


def require_sample(model: nn.Module, sample: Any) -> None:
    """Reject a sample that the model's forward does not accept.

    Args:
        model: the model to be called.
        sample: tensors, of which shape and dtype matter, and other arguments, by name.

    Raises:
        DataError: naming the input and the expected value.
    """
    parameters = inspect.signature(model.forward).parameters
    takes = ", ".join(parameters)
    if not isinstance(sample, Mapping) or not sample:
        what = "is empty" if isinstance(sample, Mapping) else f"is {shown(sample)}"
        raise DataError(f"the sample {what}", hint=f"give a dict from input names to tensors; forward takes {takes}")
    is_open = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    for name, value in sample.items():
        if not isinstance(name, str) or (name not in parameters and not is_open):
            raise DataError(f"the sample has {name!r}, which {type(model).__name__}.forward does not take", hint=takes)
        _require_value(name, value, str(parameters[name].annotation) if name in parameters else "")
    usual = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    for name, parameter in parameters.items():
        if name not in sample and parameter.default is inspect.Parameter.empty and parameter.kind in usual:
            raise DataError(
                f"the sample has no {name}, which {type(model).__name__}.forward requires", hint=f"it takes {takes}"
            )
    for prefix in ("", "decoder_"):
        _require_mask_of_tokens(model, sample, prefix)


def _require_mask_of_tokens(model: nn.Module, sample: Mapping[str, Any], prefix: str) -> None:
    """Reject a mask whose length differs from the tokens; it may be longer with a cache or code that adds tokens."""
    ids, mask = sample.get(f"{prefix}input_ids"), sample.get(f"{prefix}attention_mask")
    if not isinstance(ids, torch.Tensor) or not isinstance(mask, torch.Tensor) or mask.dim() != 2 or ids.dim() != 2:
        return
    has_cache = any(sample.get(name) is not None for name in ("past_key_values", "cache"))
    may_be_longer = has_cache or not type(model).__module__.startswith("transformers.")
    if len(mask) != len(ids) or mask.shape[1] < ids.shape[1] or (mask.shape[1] > ids.shape[1] and not may_be_longer):
        raise DataError(
            f"{prefix}attention_mask of the sample has the shape {list(mask.shape)} for {list(ids.shape)} tokens",
            hint="give one number for each token",
        )


def _require_value(name: str, value: Any, annotation: str) -> None:
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided or not value.numel():
            what = f"of layout {value.layout}" if value.numel() else f"of shape {list(value.shape)}, which is empty"
            raise DataError(f"{name} of the sample is a tensor {what}", hint="give a dense tensor with elements")
        if name.endswith("input_ids") and (value.dim() < 2 or value.is_floating_point()):
            raise DataError(
                f"{name} of the sample is {value.dtype} {list(value.shape)}", hint="give token ids [batch, sequence]"
            )
        return
    is_of_numbers = hasattr(value, "__array__") or (isinstance(value, (list, tuple, str)) and "Tensor" in annotation)
    if is_of_numbers:
        raise DataError(
            f"{name} of the sample is {shown(value)}", hint="give a tensor, such as torch.as_tensor(values)"
        )


def require_subgraph_inputs(graph: fx.Graph, names: Sequence[str], inputs: Mapping[str, Any]) -> None:
    """Reject values that a subgraph does not accept.

    Raises:
        DataError: naming the input and the expected value.
    """
    takes = f"it takes {', '.join(names)}"
    for name in names:
        if name not in inputs:
            raise DataError(f"the subgraph's input {name!r} is missing", hint=takes)
    for name in inputs:
        if name not in names:
            raise DataError(f"the subgraph has no input {name!r}", hint=takes)
    for node in graph.find_nodes(op="placeholder"):
        expected, value = node.meta.get("val"), inputs[str(node.target)]
        if not isinstance(expected, torch.Tensor):
            continue
        if not isinstance(value, torch.Tensor):
            raise DataError(
                f"the subgraph's input {node.target} is {shown(value)}", hint=f"give a tensor of {_described(expected)}"
            )
        if value.dim() != expected.dim() or value.is_floating_point() != expected.is_floating_point():
            raise DataError(
                f"the subgraph's input {node.target} is {value.dtype} {list(value.shape)}",
                hint=f"expected {_described(expected)}",
            )


def _described(expected: torch.Tensor) -> str:
    shape: Sequence[Any] = expected.shape
    sizes = [str(size) if type(size) is int else "*" for size in shape]
    return f"{expected.dtype} [{', '.join(sizes)}]"
