"""Find the values of parameters that transformers computes, so that a checkpoint may lack them.

Examples are Marian's position table and a bias of zero. The model's class declares these parameters. Their values are
those of the buffer as built, or those that the class initializes the parameter with, if they are the same each time.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

_MOST_NUMBERS = 2**24  # in an initialized module, and in a tensor stored in an artifact


def default_values(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the values of the parameters and saved buffers that may be missing from a checkpoint, by name."""
    tensors = model.state_dict(keep_vars=True)
    found = {name: _value(model, name, tensors[name]) for name in _may_be_missing(model, tensors)}
    return {name: value for name, value in found.items() if value is not None}


def _may_be_missing(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Iterator[str]:
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    patterns = {pattern for part in parts for pattern in part._keys_to_ignore_on_load_missing or ()}
    return (name for name in tensors if any(re.search(pattern, name) for pattern in sorted(patterns)))


def _value(model: nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor | None:
    if tensor.numel() > _MOST_NUMBERS:
        return None
    if not tensor.is_meta:
        return tensor.detach().clone()
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if sum(parameter.numel() for parameter in module.parameters()) > _MOST_NUMBERS:
        return None
    one, other = (_filled(model, module, leaf, seed) for seed in range(2))
    return one if torch.equal(one, other) else None  # NaN, which marks values that were not set, is not equal to itself


def _filled(model: Any, module: nn.Module, leaf: str, seed: int) -> torch.Tensor:
    """Return a parameter after the class has initialized a copy of its module, in float32."""
    fresh = copy.deepcopy(module).to_empty(device="cpu").float()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for parameter in fresh.parameters():
            parameter._is_hf_initialized = False  # type: ignore[attr-defined]
            parameter.fill_(torch.nan)
        model._init_weights(fresh)
    return fresh.get_parameter(leaf).detach()
