"""The Hessian H = X X^T of calibration inputs, by which GPTQ and AWQ measure the error of a layer's output."""

from __future__ import annotations

import torch

from runtime.algorithms.products import SQUARE, add_product_

FLOAT32, FLOAT64 = 4, 8

PANEL_WIDTH = 128  # columns of H that are summed up at a time: narrower panels multiply more slowly
_MULTIPLE = 128  # of tokens: oneDNN caches a kernel per number of tokens, which for experts differs in every batch


def mirror_(upper_II: torch.Tensor) -> None:
    """Copy the panels to the right of the diagonal to below it, so that the matrix becomes symmetric."""
    for left in range(0, len(upper_II), PANEL_WIDTH):
        right = left + PANEL_WIDTH
        upper_II[right:, left:right] = upper_II[left:right, right:].t()


def _padded(inputs_TI: torch.Tensor) -> torch.Tensor:
    """Transpose inputs to [I, T] in float32, padded with zeros, which add nothing, to a multiple of tokens."""
    num_tokens, num_in = inputs_TI.shape
    num_columns = -(-num_tokens // _MULTIPLE) * _MULTIPLE
    inputs_IT = torch.empty(num_in, num_columns, dtype=torch.float32, device=inputs_TI.device)
    inputs_IT[:, :num_tokens] = inputs_TI.t()
    inputs_IT[:, num_tokens:] = 0
    return inputs_IT


class HessianAccumulator:
    """The sum H = X X^T over calibration inputs, in float32.

    A plain sum, neither doubled nor divided by the number of tokens: sums of parts add up to the sum of the
    whole, and the loss is the squared error of the layer's output over all tokens. bf16 and fp16 inputs
    are multiplied without rounding. H is symmetric, so only panels from the diagonal to the right are summed
    up, which saves up to half of the work.

    Args:
        num_in_features: I, the layer's input width.
        device: the device of the sum and of the inputs.

    Attributes:
        num_tokens: the number of inputs in the sum.
    """

    __slots__ = ("_is_whole", "_upper_II", "num_tokens")

    def __init__(self, num_in_features: int, *, device: torch.device | str = "cpu") -> None:
        self._upper_II = torch.zeros(num_in_features, num_in_features, dtype=torch.float32, device=device)
        self._is_whole = True
        self.num_tokens = 0

    def add(self, inputs_TI: torch.Tensor) -> None:
        """Add a batch of inputs, [..., I]; all leading dimensions count as tokens."""
        flat_TI = inputs_TI.detach().reshape(-1, inputs_TI.shape[-1])
        self._is_whole = False
        # Tensor cores multiply bf16 and fp16 exactly and accumulate in float32, many times faster than in float32.
        if flat_TI.is_cuda and flat_TI.dtype in (torch.bfloat16, torch.float16):
            self._add_(flat_TI.t())
        else:
            for part_TI in torch.split(flat_TI, SQUARE):  # for more tokens at a time the product would need a copy
                self._add_(_padded(part_TI))
        self.num_tokens += flat_TI.shape[0]

    def _add_(self, inputs_IT: torch.Tensor) -> None:
        for left in range(0, len(inputs_IT), PANEL_WIDTH):
            panel = slice(left, left + PANEL_WIDTH)
            target_PR, first_PT, second_RT = self._upper_II[panel, left:], inputs_IT[panel], inputs_IT[left:]
            if inputs_IT.dtype == torch.float32:
                add_product_(target_PR, first_PT, second_RT)
            else:
                target_PR.add_(torch.mm(first_PT, second_RT.t(), out_dtype=torch.float32))

    @property
    def hessian_II(self) -> torch.Tensor:
        """The sum so far: the accumulator's own tensor, which a later `add` changes."""
        if not self._is_whole:
            mirror_(self._upper_II)
        self._is_whole = True
        return self._upper_II

    def rescale_(self, scale_I: torch.Tensor) -> None:
        """Divide the summed inputs by these factors, in place because a copy would double the memory."""
        self.hessian_II.div_(scale_I).div_(scale_I[:, None])


def hessian_bytes(num_in: int) -> int:
    """The size of a `HessianAccumulator`: [I, I] in float32."""
    return num_in * num_in * FLOAT32
