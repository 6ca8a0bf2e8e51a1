"""Build a thin copy of a model: the same architecture with small widths and random weights, to observe its behavior.

Only the properties that a sample must match are kept: sizes of images and patches, merge factors, numbers of queries.
This determines, for example, the number of tokens of an image for a model of 400 B parameters that exists as a config
only.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from typing import TYPE_CHECKING, Any

import torch

from runtime.console import quiet
from runtime.errors import TraceError
from seqbuild.sample.shape import PASS_SAMPLE
from seqbuild.shrink.config import shrink_table

if TYPE_CHECKING:
    from torch import nn

# Models with at most this many parameters are copied without shrinking, which would save nothing.
_THIN_ENOUGH = 30_000_000

_copies: weakref.WeakKeyDictionary[nn.Module, nn.Module] = weakref.WeakKeyDictionary()


def thin_copy(model: nn.Module) -> nn.Module:
    """Build the model's thin copy on the CPU, float32, in eval mode; cached for each model.

    Raises:
        TraceError: if the model has no config, or its class cannot be built from the narrow one.
    """
    if model not in _copies:
        _copies[model] = _build(model)
    return _copies[model]


def random_copy(model: nn.Module) -> nn.Module:
    """Build another thin copy, with eager attention and weights that all affect the result: none is zero or one.

    Raises:
        TraceError: as for `thin_copy`.
    """
    copied = _build(model, attention="eager")
    randomize(copied)
    return copied


def randomize(model: nn.Module) -> None:
    """Set random weights that make every layer affect the result: matrices by fan-in, vectors near their old values."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.dim() > 1:
                    parameter.copy_(noise / max(1, parameter.numel() // max(1, parameter.shape[0])) ** 0.5)
                else:
                    parameter.add_(noise * 0.05)


def _with_attention(cls: Any, config: Any, attention: str) -> nn.Module:
    """Build the model with this attention if it supports it (images have thousands of patches), else with eager."""
    thin: nn.Module
    try:
        thin = cls._from_config(copy.deepcopy(config), dtype=torch.float32, attn_implementation=attention)
    except (ValueError, ImportError):  # raised by transformers for unsupported attention
        torch.manual_seed(0)
        thin = cls._from_config(config, dtype=torch.float32, attn_implementation="eager")
    return thin


def _build(model: nn.Module, attention: str = "sdpa") -> nn.Module:
    config: Any = getattr(model, "config", None)
    cls: Any = type(model)
    if config is None or not hasattr(cls, "_from_config"):
        raise TraceError(
            f"cannot create sample inputs: {cls.__name__} is not a model of transformers", hint=PASS_SAMPLE
        )
    if sum(parameter.numel() for parameter in model.parameters()) <= _THIN_ENOUGH:
        narrow = copy.deepcopy(config)
    else:
        narrow = type(config).from_dict(shrink_table(config.to_dict()))
    try:
        with (
            quiet("transformers"),
            warnings.catch_warnings(),
            torch.random.fork_rng(devices=[]),
            torch.device("cpu"),
            torch.no_grad(),
        ):
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            thin = _with_attention(cls, narrow, attention)
    except Exception as error:
        raise TraceError(
            f"cannot create sample inputs: building a small {cls.__name__} failed: {error}", hint=PASS_SAMPLE
        ) from error
    return thin.eval()
