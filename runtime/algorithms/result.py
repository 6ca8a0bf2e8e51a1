"""The result of a quantization algorithm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedWeight:
    """A quantized weight with its scales and its loss.

    Args:
        weight_OI: the dequantized weight, float32, equal to `(q - zero_point) * scale` to the bit, where the scale is
            divided by the global scale if there is one.
        scale: in the dtype that the checkpoint stores, the exact numbers the weight was rounded with; shape
            [1] for strategy tensor, [O, 1] for channel, [O, G] for group, [O/b, I/c] for block. If the format stores
            scales in 8 bits (NVFP4, MXFP), float32 numbers that are exact in those 8 bits.
        zero_point: int8, in the scale's shape; `None` for a symmetric grid.
        global_scale: float32 [1], for NVFP4: scales are stored multiplied by it.
        loss: `tr((W-Q) H (W-Q)^T)`. With H = sum of x x^T it is the squared error of the layer's output,
            summed over the calibration tokens. Round-to-nearest, which has no H, uses the identity.
        damping: the dampening that was used, as a fraction of H's mean diagonal; 0 without a Hessian.
        inputs: the scales of static inputs by their name in the checkpoint, such as `input_scale` [1].
    """

    weight_OI: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    loss: float
    damping: float
    global_scale: torch.Tensor | None = None
    inputs: Mapping[str, torch.Tensor] = field(default_factory=dict)
