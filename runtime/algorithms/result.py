"""What every quantization algorithm returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedWeight:
    """A quantized weight, with what is needed to pack it and to judge it.

    Args:
        weight_OI: the dequantized weight, float32, equal to `(q - zero_point) * scale` to the bit.
        scale: in the dtype the checkpoint stores, and the very numbers the weight was rounded with; shape
            [1] for strategy tensor, [O, 1] for channel, [O, G] for group, [O/b, I/c] for block.
        zero_point: int8, in the scale's shape; `None` for a symmetric grid.
        loss: `tr((W-Q) H (W-Q)^T)`. With H = sum of x x^T it is the squared error of the layer's output,
            summed over the calibration tokens. Round-to-nearest knows no H and takes the identity.
        damping: the dampening that was used, as a fraction of H's mean diagonal; 0 without a Hessian.
    """

    weight_OI: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    loss: float
    damping: float
