"""Prepare an in-memory model to run layer by layer: weights stay on the CPU, layers run on the accelerator."""

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
    """Offload a model to the CPU and make each module execute on the accelerator, if there is one.

    Existing hooks of accelerate are removed, after their offloaded weights are moved back.

    Args:
        model: changed in place.

    Returns:
        The same model.

    Raises:
        UsageError: if it is not a `torch.nn.Module`.
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
