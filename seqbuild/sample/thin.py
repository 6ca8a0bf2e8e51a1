"""A thin copy of a model: the same architecture made narrow, with random weights, to ask what the model would do.

Only what a sample must fit is the same: sizes of images and patches, factors by which patches are merged, numbers of
queries. A model of 400 B parameters that exists as a config only can so be asked how many tokens an image takes.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from typing import TYPE_CHECKING, Any

import torch

from runtime.console import quiet
from runtime.errors import TraceError
from seqbuild.shrink.config import shrink_table

if TYPE_CHECKING:
    from torch import nn

# A model of up to so many parameters is copied as it is: nothing is gained by making it smaller.
_THIN_ENOUGH = 30_000_000

_copies: weakref.WeakKeyDictionary[nn.Module, nn.Module] = weakref.WeakKeyDictionary()


def thin_copy(model: nn.Module) -> nn.Module:
    """The model's thin copy on the CPU, float32, in eval mode; made once for each model.

    Raises:
        TraceError: when the model has no config, or none of its class can be built from the narrow one.
    """
    if model not in _copies:
        _copies[model] = _build(model)
    return _copies[model]


def random_copy(model: nn.Module) -> nn.Module:
    """Another such copy, with eager attention and with weights that all matter: none is zero, nor one.

    Raises:
        TraceError: likewise.
    """
    copied = _build(model, attention="eager")
    randomize(copied)
    return copied


def randomize(model: nn.Module) -> None:
    """Random weights that make every layer matter: matrices by fan-in, vectors near what they were."""
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
    """The model with attention that holds no matrix of patches by patches, where it can: images have thousands."""
    thin: nn.Module
    try:
        thin = cls._from_config(copy.deepcopy(config), dtype=torch.float32, attn_implementation=attention)
    except (ValueError, ImportError):  # how transformers refuses
        torch.manual_seed(0)
        thin = cls._from_config(config, dtype=torch.float32, attn_implementation="eager")
    return thin


def _build(model: nn.Module, attention: str = "sdpa") -> nn.Module:
    config: Any = getattr(model, "config", None)
    cls: Any = type(model)
    if config is None or not hasattr(cls, "_from_config"):
        raise TraceError(
            f"{cls.__name__} is no model of transformers", hint="bring a sample of its inputs with --sample"
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
            f"a narrow copy of {cls.__name__}, to ask what it takes, cannot be built: {error}",
            hint="bring a sample of its inputs with --sample",
        ) from error
    return thin.eval()
