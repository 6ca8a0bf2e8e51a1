"""Give a model fake parameters and buffers during a trace, and restore everything afterwards, even on failure."""

from __future__ import annotations

import contextlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode


_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


@contextlib.contextmanager
def attributes_restored(model: nn.Module) -> Iterator[None]:
    """Restore all attributes of all modules after the block.

    The model's code may also set attributes, such as a mask, which would contain fake tensors.
    """
    found = [(module, dict(module.__dict__), dict(module._modules)) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes, children in found:
            module._modules.clear()
            module._modules.update(children)
            for name in [name for name in module.__dict__ if name not in attributes]:
                del module.__dict__[name]
            module.__dict__.update(attributes)


@contextlib.contextmanager
def hooks_set_aside(model: nn.Module, is_leaf: Callable[[str, nn.Module], bool]) -> Iterator[None]:
    """Remove the hooks of leaves while the block runs: they run whenever the step is executed, not while recording.

    Hooks with which transformers collects hidden states stay, because they are part of the forward around the leaf.
    Every module gets new dictionaries, so that hooks added during the trace disappear with it.
    """
    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            for kind in _HOOKS:
                hooks = module.__dict__[kind]
                stack.callback(module.__dict__.__setitem__, kind, hooks)
                if is_leaf(name, module) and kind in ("_forward_hooks", "_forward_pre_hooks"):
                    kept = "transformers.utils.output_capturing"
                    hooks = {key: hook for key, hook in hooks.items() if getattr(hook, "__module__", "") == kept}
                module.__dict__[kind] = OrderedDict(hooks)
        yield


def small_tensor(like: torch.Tensor, generator: torch.Generator, shape: Sequence[int] | None = None) -> torch.Tensor:
    """Create a real tensor on the CPU with the dtype of `like`, and its shape unless one is given."""
    sizes = tuple(like.shape) if shape is None else tuple(shape)
    if not like.is_floating_point():
        return torch.zeros(sizes, dtype=like.dtype)
    return torch.empty(sizes, dtype=like.dtype).uniform_(0, 0.1, generator=generator)


@contextlib.contextmanager
def fake_parameters(model: nn.Module, fake_mode: FakeTensorMode, dtype: torch.dtype | None) -> Iterator[None]:
    """Give every module of `model` fake parameters and buffers on the CPU while the block runs.

    Complete dictionaries are replaced, never their entries, because an offloaded model's dictionaries move data on
    access. Hooks of accelerate around a forward would fetch weights, so they are bypassed too.

    Args:
        model: any module tree.
        fake_mode: the mode of the fake tensors.
        dtype: the dtype of the floating-point parameters, except those that the model keeps in float32 or creates in
            a different dtype than most; None keeps all dtypes.
    """
    fakes: dict[int, torch.Tensor] = {}
    place = torch.device("cpu")
    keep = kept_in_float32(model) if dtype is not None else ()
    usual = _usual_dtype(model)

    def fake(name: str, tensor: torch.Tensor | None, is_parameter: bool) -> torch.Tensor | None:
        if tensor is None:
            return None
        if id(tensor) not in fakes:
            new_dtype = tensor.dtype
            if dtype is not None and is_parameter and tensor.dtype == usual:
                new_dtype = torch.float32 if any(part in name for part in keep) else dtype
            # Same result as `torch.empty` and `nn.Parameter` in this mode, but without the dispatcher.
            value: Any = FakeTensor(fake_mode, torch.empty(tensor.shape, dtype=new_dtype, device="meta"), place)
            if is_parameter:
                value._is_param = True
            fakes[id(tensor)] = value
        return fakes[id(tensor)]

    with contextlib.ExitStack() as stack:
        for module_name, module in model.named_modules():
            for kind in ("_parameters", "_buffers"):
                originals = module.__dict__[kind]
                stack.callback(module.__dict__.__setitem__, kind, originals)
                module.__dict__[kind] = {
                    name: fake(f"{module_name}.{name}", tensor, kind == "_parameters")
                    for name, tensor in _offloaded_tensors(originals).items()
                }
            hooked = module.__dict__.get("_hf_hook") is not None and module.__dict__.get("forward")
            if hooked:
                stack.callback(module.__dict__.__setitem__, "forward", hooked)
                module.__dict__["forward"] = module.__dict__["_old_forward"]
        yield


def _offloaded_tensors(tensors: Mapping[str, torch.Tensor | None]) -> Mapping[str, torch.Tensor | None]:
    """Return the offloaded tensors of a compressed-tensors offload cache, which would load a tensor on access."""
    offloaded: Any = getattr(tensors, "offloaded_values", None)
    return offloaded if isinstance(offloaded, Mapping) else tensors


# Config entries for tracing. Caches are for generating text. The grouped kernel for fused experts rejects fake float32
# tensors and the eager loop depends on data; only the shape of their output matters.
TRACING_CONFIG = {"use_cache": False, "_experts_implementation": "batched_mm"}


@contextlib.contextmanager
def configured(model: nn.Module, wanted: Mapping[str, Any]) -> Iterator[None]:
    """Set existing entries of the model's configs while the block runs."""
    configs = {id(c): c for module in model.modules() if (c := getattr(module, "config", None)) is not None}
    places = ((config, name) for config in configs.values() for name in wanted if hasattr(config, name))
    # All values are read before the first is set, because a config may set its parts, too.
    found = [(config, name, getattr(config, name)) for config, name in places]
    try:
        for config, name, _ in found:
            setattr(config, name, wanted[name])
        yield
    finally:
        for config, name, value in found:
            setattr(config, name, value)


def _usual_dtype(model: nn.Module) -> torch.dtype | None:
    """Return the floating-point dtype of most of a model's numbers; the model may fix the dtype of some parameters."""
    sizes: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            sizes[parameter.dtype] += parameter.numel()
    return sizes.most_common(1)[0][0] if sizes else None


def kept_in_float32(model: nn.Module) -> tuple[str, ...]:
    """Return the parts of parameter names that transformers keeps in float32 for any requested dtype."""
    return tuple(sorted(getattr(model, "_keep_in_fp32_modules_strict", None) or ()))
