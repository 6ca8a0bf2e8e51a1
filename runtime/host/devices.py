"""Find the device and the dtype that a run executes in."""

from __future__ import annotations

from typing import Any

import torch

from runtime.arguments import shown
from runtime.errors import DeviceError, UsageError

DTYPES = ("auto", "float32", "bfloat16", "float16")


def resolve_device(name: str) -> torch.device:
    """Find a device by its name.

    Args:
        name: `cpu`, `cuda`, `cuda:N`, `xpu`, `xpu:N`, or `auto` for the first available accelerator, else the CPU.

    Raises:
        DeviceError: if it is not available, listing the available devices.
    """
    available = ["cpu"]
    for kind in ("cuda", "xpu"):
        backend = getattr(torch, kind)
        available += [f"{kind}:{index}" for index in range(backend.device_count() if backend.is_available() else 0)]
    if name == "auto":
        return torch.device(available[1] if len(available) > 1 else "cpu")
    wanted = f"{name}:0" if name in ("cuda", "xpu") else name
    if wanted not in available:
        raise DeviceError(f"device {name!r} is not available", hint=f"available: {', '.join(available)}; or use auto")
    return torch.device(wanted)


def resolve_dtype(name: str) -> torch.dtype | None:
    """Find the dtype of the option `--dtype`; None for `auto`, the model's own.

    Raises:
        UsageError: if the dtype is unsupported.
    """
    if name not in DTYPES:
        raise UsageError(f"--dtype must be one of {', '.join(DTYPES)}; got {name!r}")
    found: torch.dtype | None = None if name == "auto" else getattr(torch, name)
    return found


def as_device(value: Any) -> torch.device:
    """Convert a device argument of the Python API to an available device.

    Raises:
        DeviceError: if the device is not available, or the value is not a device.
    """
    if isinstance(value, (str, torch.device)):
        return resolve_device(str(value))
    raise DeviceError(f"device is {shown(value)}", hint="it must be a str such as 'cpu' or 'cuda:0', or a torch.device")


def as_device_type(value: Any) -> str:
    """Check a device type, which need not be available on this machine; raise DeviceError if it is unsupported."""
    if value in ("cpu", "cuda", "xpu"):
        return str(value)
    raise DeviceError(f"device_type is {shown(value)}", hint="it must be cpu, cuda or xpu")


def as_dtype(value: Any) -> torch.dtype | None:
    """Convert a dtype argument of the Python API; None for the model's own.

    Raises:
        UsageError: if the dtype is unsupported, or the value is not a dtype.
    """
    name = str(value).removeprefix("torch.") if isinstance(value, (str, torch.dtype)) else None
    if value is None:
        return None
    if name not in DTYPES:
        raise UsageError(f"dtype is {shown(value)}", hint=f"it must be one of {', '.join(DTYPES)}, or None")
    return resolve_dtype(str(name))
