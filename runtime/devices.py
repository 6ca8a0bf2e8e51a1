"""Find the device that a run executes on."""

from __future__ import annotations

import torch

from runtime.errors import DeviceError


def resolve_device(name: str) -> torch.device:
    """The device of a name.

    Args:
        name: `cpu`, `cuda`, `cuda:N`, `xpu`, `xpu:N`, or `auto` for the first accelerator there is, else the CPU.

    Raises:
        DeviceError: when it is not there, naming those that are.
    """
    available = ["cpu"]
    for kind in ("cuda", "xpu"):
        backend = getattr(torch, kind)
        available += [f"{kind}:{index}" for index in range(backend.device_count() if backend.is_available() else 0)]
    if name == "auto":
        return torch.device(available[1] if len(available) > 1 else "cpu")
    wanted = f"{name}:0" if name in ("cuda", "xpu") else name
    if wanted not in available:
        raise DeviceError(f"device {name!r} is not available", hint=f"there is {', '.join(available)}; or say auto")
    return torch.device(wanted)
