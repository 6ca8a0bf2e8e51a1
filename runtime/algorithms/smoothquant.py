"""SmoothQuant: make activations easier to round by moving their outlier channels into the weights.

Xiao, Lin, Seznec, Wu, Demouth, Han, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
Models", arXiv 2211.10438. A layer's output does not change when channel j of its input is divided by s_j and column j
of its weight multiplied by it (equation 3):

    Y = (X diag(s)^-1) (diag(s) W^T)

and with (equation 4), over all tokens and all rows of all weights that read X,

    s_j = max |X_j|^a / max |W_j|^(1-a)

both are equally hard to round at a = 1/2; a larger strength a moves more from the activations to the weights. Dividing
X costs nothing, because it is done in the weights of the norm or Linear that produces X, which the scale group names
(`runtime.artifact.scale_groups`).

Features that come from one channel of the producer, as when heads of queries share a head of values, get one factor,
from the largest of their maxima.

Shapes: O out features, I in features.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from runtime.errors import QuantizationError

SMALLEST = 1e-5  # lower bound of maxima: a channel that is always zero would give a factor of zero


def smoothing_factors(
    absmax_I: torch.Tensor,
    weights: Iterable[torch.Tensor],
    *,
    strength: float = 0.5,
    channel_I: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the factors by which inputs are divided and weights' columns multiplied.

    Args:
        absmax_I: the largest magnitude of each input feature.
        weights: [O, I] each, all that read the input; read one after the other.
        strength: a, between 0 and 1.
        channel_I: the producer's channel that each feature is proportional to; by default each has its own.

    Returns:
        s [I], float32, the same for features of one channel.

    Raises:
        QuantizationError: for a strength outside [0, 1], shapes that differ, and numbers that are not finite.
    """
    if not 0 <= strength <= 1:
        raise QuantizationError(f"smoothing_strength must be between 0 and 1, not {strength}")
    if not torch.isfinite(absmax_I).all():
        raise QuantizationError(
            "the inputs to be smoothed are not finite", hint="an activation overflowed: calibrate in a wider dtype"
        )
    columns: list[torch.Tensor] = []
    for weight_OI in weights:
        if weight_OI.shape[1:] != absmax_I.shape:
            columns.clear()
            break
        columns.append(weight_OI.abs().amax(dim=0).to(absmax_I.device, torch.float32))
    if not columns:
        raise QuantizationError(f"inputs have {list(absmax_I.shape)} features, but the weights that read them do not")
    inputs_I = pooled(absmax_I.to(torch.float32), channel_I, "amax").clamp(min=SMALLEST)
    largest_I = pooled(torch.stack(columns).amax(dim=0), channel_I, "amax").clamp(min=SMALLEST)
    return inputs_I.pow(strength) / largest_I.pow(1 - strength)


def pooled(values_I: torch.Tensor, channel_I: torch.Tensor | None, how: str) -> torch.Tensor:
    """Replace the values [I] of features of one channel by their `amax` or `mean`."""
    if channel_I is None:
        return values_I
    channels = channel_I.to(values_I.device)
    table = torch.zeros(int(channels.max()) + 1, dtype=values_I.dtype, device=values_I.device)
    return table.scatter_reduce(0, channels, values_I, how, include_self=False)[channels]
