"""Run a step as the original model does, although modules have been changed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from runtime.formats.key_values import of_model
from runtime.weights.parameters import assign

if TYPE_CHECKING:
    import torch
    from torch import nn


@contextlib.contextmanager
def original_model(model: nn.Module, originals: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Run with the original parameters, and with keys and values that are neither rounded nor measured.

    Args:
        model: the module tree, with the parameters of a step.
        originals: the original values of those that an earlier step has changed.
    """
    key_values = of_model(model)
    before = []
    for name, tensor in originals.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        own: dict[str, Any] = module._parameters if leaf in module._parameters else module._buffers
        before.append((own, leaf, own[leaf]))
        assign(model, name, tensor)
    if key_values is not None:
        key_values.is_paused = True
    try:
        yield
    finally:
        for own, leaf, changed in before:
            own[leaf] = changed
        if key_values is not None:
            key_values.is_paused = False
