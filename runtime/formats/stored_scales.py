"""The last look at scales and zero points, as they are stored: what a reader would divide or multiply by.

Every tensor that a run makes comes by here on its way to the writer, whoever made it.
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
_HINT = "an activation or a weight is out of the dtype's range: calibrate in a wider dtype, or ignore the module"


def require_sound_scales(owner: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse scales that are not finite and above zero in the dtype that is stored.

    Args:
        owner: the module, for messages.
        tensors: by their name in the module, or with it before; only names that end in `_scale` are looked at.

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
            bad = ~(torch.isfinite(values) & (values > 0))
        if bool(bad.any()):
            raise QuantizationError(
                f"{owner}: {name.rpartition('.')[2]} is {float(values[bad].flatten()[0]):g} in {_plain(scale.dtype)}, "
                "and a scale must be finite and above zero",
                hint=_HINT,
            )


def require_sound_weight(
    name: str, result: QuantizedWeight, scheme: QuantizationScheme, stored_dtype: torch.dtype
) -> None:
    """Refuse zero points outside of the grid, and numbers that a reader's dtype has no room for.

    Args:
        name: of the module.
        result: before it is packed.
        scheme: that it was rounded by.
        stored_dtype: of the weight in the original checkpoint, which readers compute in.

    Raises:
        QuantizationError: naming the module and the value.
    """
    if result.zero_point is not None:
        half = 2 ** (scheme.weights.num_bits - 1)
        low, high = (int(bound) for bound in torch.aminmax(result.zero_point))
        if low < -half or high >= half:
            raise QuantizationError(
                f"{name}: weight_zero_point is {low if low < -half else high}, outside of {-half} to {half - 1}"
            )
    bounds = torch.stack(torch.aminmax(result.weight_OI.detach()))
    if scheme.weights.scale_dtype is not None:
        bounds = bounds.to(torch.bfloat16)  # the dtype that readers make such weights in
    if not bool(torch.isfinite(bounds.to(stored_dtype)).all()):
        largest = float(result.weight_OI.abs().max())
        raise QuantizationError(
            f"{name}: rounded weights reach {largest:g}, which {_plain(stored_dtype)} has no room for",
            hint="add it to ignore, or store the model in bfloat16",
        )


def require_finite(name: str, tensor: torch.Tensor) -> None:
    """Refuse a rewritten parameter that has lost its numbers.

    Raises:
        QuantizationError: naming the parameter.
    """
    if tensor.is_floating_point() and tensor.numel():
        bounds = torch.stack(torch.aminmax(tensor.detach())).to(torch.float32)
        if not bool(torch.isfinite(bounds).all()):
            raise QuantizationError(
                f"{name} is not finite in {_plain(tensor.dtype)} after rescaling", hint="add its modules to ignore"
            )


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
