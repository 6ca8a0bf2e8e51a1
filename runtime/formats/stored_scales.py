"""The last check of scales, zero points and weights, on the values that are stored.

Every tensor that a run produces is checked here before it is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from runtime.errors import QuantizationError

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme

    from runtime.algorithms.result import QuantizedWeight

_NAN_OF_E8M0 = 255
_HINT = "an activation or a weight exceeds the dtype's range: calibrate in a wider dtype, or ignore the module"


def require_sound_scales(owner: str, tensors: Mapping[str, torch.Tensor], *, may_be_negative: bool = False) -> None:
    """Require scales to be finite and above zero in the dtype in which they are stored.

    Args:
        owner: the module, for messages.
        tensors: by their name in the module, or their full name; only names that end in `_scale` are checked.
        may_be_negative: accept scales below zero.

    Raises:
        QuantizationError: naming the module, the tensor and the value.
    """
    for name, scale in tensors.items():
        if not name.endswith("_scale") or not scale.numel():
            continue
        if scale.dtype == torch.uint8:  # the exponent of a power of two, which is never zero
            bad = scale == _NAN_OF_E8M0
            values = torch.where(bad, torch.nan, 1.0)
        else:
            values = scale.detach().to(torch.float32 if scale.dtype.itemsize <= 4 else torch.float64)
            bad = ~(torch.isfinite(values) & ((values.abs() if may_be_negative else values) > 0))
        if bool(bad.any()):
            raise QuantizationError(
                f"{owner}: {name.rpartition('.')[2]} is {float(values[bad].flatten()[0]):g} in {_plain(scale.dtype)}, "
                f"but a scale must be finite and {'other than' if may_be_negative else 'above'} zero",
                hint=_HINT,
            )


def require_sound_weight(
    name: str, result: QuantizedWeight, scheme: QuantizationScheme, stored_dtype: torch.dtype
) -> None:
    """Require zero points inside the grid, and rounded weights that are finite in the dtype that readers use.

    Args:
        name: of the module.
        result: the quantized weight before it is packed.
        scheme: the scheme of the module.
        stored_dtype: the dtype of the weight in the original checkpoint, in which readers compute.

    Raises:
        QuantizationError: naming the module and the value.
    """
    if result.zero_point is not None:
        half = 2 ** (scheme.weights.num_bits - 1)
        low, high = (int(bound) for bound in torch.aminmax(result.zero_point))
        if low < -half or high >= half:
            raise QuantizationError(
                f"{name}: weight_zero_point is {low if low < -half else high}, outside the range {-half} to {half - 1}"
            )
    bounds = torch.stack(torch.aminmax(result.weight_OI.detach()))
    if scheme.weights.scale_dtype is not None:
        bounds = bounds.to(torch.bfloat16)  # the dtype in which readers dequantize such weights
    if not bool(torch.isfinite(bounds.to(stored_dtype)).all()):
        largest = float(result.weight_OI.abs().max())
        raise QuantizationError(
            f"{name}: rounded weights reach {largest:g}, which overflows {_plain(stored_dtype)}",
            hint="add it to ignore, or store the model in bfloat16",
        )


def require_finite(name: str, tensor: torch.Tensor) -> None:
    """Require a rescaled parameter to be finite; raise QuantizationError naming it otherwise."""
    if tensor.is_floating_point() and tensor.numel():
        bounds = torch.stack(torch.aminmax(tensor.detach())).to(torch.float32)
        if not bool(torch.isfinite(bounds).all()):
            raise QuantizationError(
                f"{name} is not finite in {_plain(tensor.dtype)} after rescaling", hint="add its modules to ignore"
            )


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
