"""Prepare an in-memory model for running layer by layer: weights stay on the CPU, layers run on the accelerator."""

from __future__ import annotations

from typing import TypeVar

import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from torch import nn

from runtime.arguments import shown
from runtime.errors import UsageError
from runtime.host.devices import resolve_device

_Module = TypeVar("_Module", bound=nn.Module)


def dispatch_for_sequential(model: _Module) -> _Module:
    """Offload a model to the CPU and have each module execute on the accelerator, if there is one.

    Hooks that accelerate has put there before are removed; weights that they had moved away come back first.

    Args:
        model: changed in place.

    Returns:
        The same model.

    Raises:
        UsageError: for what is no module.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"model is {shown(model)}", hint="it must be a torch.nn.Module")
    remove_hook_from_module(model, recurse=True)
    if not any(parameter.is_meta for parameter in model.parameters()):
        model.to("cpu")
    device = resolve_device("auto")
    if device.type != "cpu":
        cpu_offload(model, execution_device=torch.device(device))
    return model
