"""A model without its weights: every parameter and buffer a fake tensor, for as long as a trace takes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode


@contextlib.contextmanager
def fake_parameters(model: nn.Module, fake_mode: FakeTensorMode, dtype: torch.dtype | None) -> Iterator[None]:
    """Give every module of `model` fake parameters and buffers on the CPU, and put the real ones back afterwards.

    Whole dictionaries are exchanged, never their entries: an offloaded model's dictionaries move data when they are
    read or written. Hooks that accelerate has put around a forward would fetch weights, so they are bypassed too.

    Args:
        model: any module tree.
        fake_mode: the mode that owns the fake tensors.
        dtype: floating point parameters become this dtype, except those that the model keeps in float32;
            None keeps all dtypes.
    """
    fakes: dict[int, torch.Tensor] = {}
    keep = kept_in_float32(model) if dtype is not None else ()

    def fake(name: str, tensor: torch.Tensor | None, is_parameter: bool) -> torch.Tensor | None:
        if tensor is None:
            return None
        if id(tensor) not in fakes:
            new_dtype = tensor.dtype
            if dtype is not None and is_parameter and tensor.is_floating_point():
                new_dtype = torch.float32 if any(part in name for part in keep) else dtype
            with fake_mode:
                value = torch.empty(tensor.shape, dtype=new_dtype, device="cpu")
            fakes[id(tensor)] = nn.Parameter(value, requires_grad=False) if is_parameter else value
        return fakes[id(tensor)]

    with contextlib.ExitStack() as stack:
        for module_name, module in model.named_modules():
            for kind in ("_parameters", "_buffers"):
                originals = module.__dict__[kind]
                stack.callback(module.__dict__.__setitem__, kind, originals)
                module.__dict__[kind] = {
                    name: fake(f"{module_name}.{name}", tensor, kind == "_parameters")
                    for name, tensor in _resting(originals).items()
                }
            hooked = module.__dict__.get("_hf_hook") is not None and module.__dict__.get("forward")
            if hooked:
                stack.callback(module.__dict__.__setitem__, "forward", hooked)
                module.__dict__["forward"] = module.__dict__["_old_forward"]
        yield


def _resting(tensors: Mapping[str, torch.Tensor | None]) -> Mapping[str, torch.Tensor | None]:
    """The tensors where they rest: compressed-tensors' offload caches load a tensor when it is looked up."""
    resting: Any = getattr(tensors, "offloaded_values", None)
    return resting if isinstance(resting, Mapping) else tensors


@contextlib.contextmanager
def fake_friendly_experts(model: nn.Module) -> Iterator[None]:
    """Let fused experts run as one batched product meanwhile: the grouped kernel refuses fake float32 tensors, and
    the eager loop depends on data. Only the shape of their output is looked at.
    """
    with contextlib.ExitStack() as stack:
        for config in {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values():
            if hasattr(config, "_experts_implementation"):
                stack.callback(setattr, config, "_experts_implementation", config._experts_implementation)
                config._experts_implementation = "batched_mm"
        yield


def kept_in_float32(model: nn.Module) -> tuple[str, ...]:
    """Name parts of parameters that transformers keeps in float32 whatever dtype is asked for."""
    return tuple(sorted(getattr(model, "_keep_in_fp32_modules_strict", None) or ()))
