"""Run a module tree as a reader of the quantized checkpoint would: inputs of quantized modules are rounded."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

_PARTS = "static_input_parts"  # the name of a module's attribute


def set_input_parts(module: nn.Module, parts: Mapping[str, torch.Tensor]) -> None:
    """Give a module the scales of its static inputs, by their name in the checkpoint."""
    device = next(iter(module.parameters())).device
    module.__dict__[_PARTS] = {
        name: tensor if device.type == "meta" else tensor.to(device) for name, tensor in parts.items()
    }


@contextlib.contextmanager
def input_quantization(model: nn.Module, schemes: Mapping[str, QuantizationScheme]) -> Iterator[None]:
    """Round the inputs of modules whose scheme asks for it, while the block runs.

    Args:
        model: the module tree; modules with static inputs have been given their scales by `set_input_parts`.
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
    from runtime.schemes import quantize_activation

    def hook(module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        parts = module.__dict__.get(_PARTS, {})
        if positional:
            return (quantize_activation(positional[0], args, parts), *positional[1:]), named
        first, *_ = named
        return positional, named | {first: quantize_activation(named[first], args, parts)}

    return hook
