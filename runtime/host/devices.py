"""Find the device and the dtype that a run executes in."""

from __future__ import annotations

from typing import Any

import torch

from runtime.arguments import shown
from runtime.errors import DeviceError, UsageError

DTYPES = ("auto", "float32", "bfloat16", "float16")


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


def resolve_dtype(name: str) -> torch.dtype | None:
    """The dtype of a name; None for `auto`, which is the model's own.

    Raises:
        UsageError: when it is none that a run can have.
    """
    if name not in DTYPES:
        raise UsageError(f"--dtype is {name!r}", hint=f"it can be {', '.join(DTYPES)}")
    found: torch.dtype | None = None if name == "auto" else getattr(torch, name)
    return found


def as_device(value: Any) -> torch.device:
    """A device that is there.

    Raises:
        DeviceError: for one that is not, and for what is no device at all.
    """
    if isinstance(value, (str, torch.device)):
        return resolve_device(str(value))
    raise DeviceError(f"device is {shown(value)}", hint="it must be a str such as 'cpu' or 'cuda:0', or a torch.device")


def as_device_type(value: Any) -> str:
    """The kind of a device that need not be here.

    Raises:
        DeviceError: for what is no kind of device.
    """
    if value in ("cpu", "cuda", "xpu"):
        return str(value)
    raise DeviceError(f"device_type is {shown(value)}", hint="it must be cpu, cuda or xpu")


def as_dtype(value: Any) -> torch.dtype | None:
    """A dtype that a model can run in; None for the model's own.

    Raises:
        UsageError: for any other, and for what is no dtype at all.
    """
    import torch

    name = str(value).removeprefix("torch.") if isinstance(value, (str, torch.dtype)) else None
    if value is None or name == "auto":
        return None
    if name not in DTYPES:
        raise UsageError(f"dtype is {shown(value)}", hint=f"it must be {', '.join(DTYPES)} or None")
    found: torch.dtype = getattr(torch, str(name))
    return found
