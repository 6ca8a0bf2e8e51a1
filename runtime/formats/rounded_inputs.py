"""Round the inputs of quantized modules, as a reader of the quantized checkpoint does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from torch import nn

if TYPE_CHECKING:
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

_PARTS = "static_input_parts"  # the name of a module's attribute


def set_input_parts(module: nn.Module, parts: Mapping[str, torch.Tensor]) -> None:
    """Attach the scales of its static inputs to a module, by their name in the checkpoint."""
    device = next(iter(module.parameters())).device
    module.__dict__[_PARTS] = {
        name: tensor if device.type == "meta" else tensor.to(device) for name, tensor in parts.items()
    }


@contextlib.contextmanager
def input_quantization(model: nn.Module, schemes: Mapping[str, QuantizationScheme]) -> Iterator[None]:
    """Round the inputs of modules whose scheme has `input_activations`, while the block runs.

    Args:
        model: the module tree; `set_input_parts` must have been called on modules with static inputs.
        schemes: by dotted module name.
    """
    handles = [
        model.get_submodule(name).register_forward_pre_hook(_rounding(scheme.input_activations), with_kwargs=True)
        for name, scheme in schemes.items()
        if scheme.input_activations is not None
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rounding(args: QuantizationArgs) -> Callable[..., Any]:

    def hook(module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        parts = module.__dict__.get(_PARTS, {})
        if positional:
            return (_rounded(positional[0], args, parts), *positional[1:]), named
        first, *_ = named
        return positional, named | {first: _rounded(named[first], args, parts)}

    return hook


def _rounded(inputs: torch.Tensor, args: QuantizationArgs, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Round inputs; gradients pass as if they were not rounded."""
    rounded = quantize_activation(inputs.detach(), args, parts)
    return rounded if not inputs.requires_grad else inputs + (rounded - inputs.detach())


def quantize_activation(
    inputs: torch.Tensor, args: QuantizationArgs, parts: Mapping[str, torch.Tensor] | None = None
) -> torch.Tensor:
    """Round a Linear's input exactly as a reader of the checkpoint does.

    The strategy "token" has one scale for each index of the first two dimensions: in [batch, sequence, I] one per
    token. An input of [T, I] would have one per number, and gets a single scale for the whole tensor, as in readers.

    Args:
        inputs: any float dtype, normally [batch, sequence, I]; not changed.
        args: the scheme's `input_activations`.
        parts: the tensors that `input_parts` names, for static scales.

    Returns:
        The dequantized inputs, same shape and dtype.
    """
    if inputs.numel() == 0:
        return inputs
    parts = parts or {}
    global_scale = parts.get("input_global_scale")
    if args.dynamic in (True, "local"):
        scale, zero_point = compute_dynamic_scales_and_zp(inputs, args, None, global_scale=global_scale)
    else:
        scale, zero_point = parts["input_scale"], parts.get("input_zero_point")
    rounded: torch.Tensor = fake_quantize(inputs, scale, zero_point, args, global_scale=global_scale)
    return rounded.to(inputs.dtype)
