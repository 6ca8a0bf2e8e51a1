"""The Hessian H = X X^T of calibration inputs, by which GPTQ and AWQ measure the error of a layer's output.

Inputs come in lanes, whose sums are added in their order, so that the bits of H do not depend on which worker sums up
which lane. One matrix holds both sums. H is symmetric, so a lane is summed up in the panels to the right of the
diagonal only. The total of a panel of rows is kept below the diagonal, in the rows of the opposite panel, where exactly
as many columns are free: rows stay rows, and adding them up is as fast as memory.

    panel 0   lane  lane  lane  lane        the total of panel 0 is in the rows of panel 3,
    panel 1   (2)   lane  lane  lane        that of panel 1 in the rows of panel 2, and so on
    panel 2   (1)   (1)   lane  lane
    panel 3   (0)   (0)   (0)   lane

The blocks on the diagonal have a place of their own, and so has a last panel that is narrower than the others.

On a GPU panels are wider: a product of 128 rows occupies 6 % of an H200, one of 2048 rows all of it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch

from runtime.algorithms.exact_products import add_exact_product_
from runtime.algorithms.lane_sums import SumOverLanes
from runtime.algorithms.products import SQUARE, add_product_

FLOAT32, FLOAT64 = 4, 8

PANEL_WIDTH = 128  # columns of H that are summed up at a time: narrower panels multiply more slowly
_PANEL_WIDTH_OF_GPU = 2048
_MULTIPLE = 128  # of tokens: oneDNN caches a kernel per number of tokens, which for experts differs in every batch


def is_gpu(device_type: str) -> bool:
    """Whether products on this type of device run on a GPU."""
    return device_type in ("cuda", "xpu")


def panel_width(device_type: str) -> int:
    """The number of columns of H that a device sums up at a time, and sends to another worker at a time."""
    return _PANEL_WIDTH_OF_GPU if is_gpu(device_type) else PANEL_WIDTH


def mirror_(upper_II: torch.Tensor, width: int = PANEL_WIDTH) -> None:
    """Copy the panels to the right of the diagonal to below it, so that the matrix becomes symmetric."""
    for left in range(0, len(upper_II), width):
        right = left + width
        upper_II[right:, left:right] = upper_II[left:right, right:].t()


def padded_columns(inputs_TI: torch.Tensor) -> torch.Tensor:
    """Transpose inputs to [I, T] in float32, padded with zeros, which add nothing, to a multiple of tokens."""
    num_tokens, num_in = inputs_TI.shape
    num_columns = -(-num_tokens // _MULTIPLE) * _MULTIPLE
    inputs_IT = torch.empty(num_in, num_columns, dtype=torch.float32, device=inputs_TI.device)
    # Only tensors of one dtype are transposed by blocks; converting on the way takes up to six times as long.
    inputs_IT[:, :num_tokens] = inputs_TI.t().contiguous()
    inputs_IT[:, num_tokens:] = 0
    return inputs_IT


@functools.lru_cache(maxsize=4)
def _triangle(width: int, device: torch.device) -> torch.Tensor:
    """The places in a square block, row by row, on and above its diagonal."""
    rows, columns = torch.triu_indices(width, width, device=device)
    places: torch.Tensor = rows * width + columns
    return places


def _upper_half(panel_PR: torch.Tensor) -> torch.Tensor:
    """Copy the numbers of a panel's first block on and above its diagonal."""
    width = len(panel_PR)
    return panel_PR[:, :width].reshape(-1).index_select(0, _triangle(width, panel_PR.device))


class HessianAccumulator(SumOverLanes):
    """The sum H = X X^T over calibration inputs, in float32.

    A plain sum, neither doubled nor divided by the number of tokens: sums of parts add up to the sum of the
    whole, and the loss is the squared error of the layer's output over all tokens. bf16 and fp16 inputs
    are multiplied without rounding. H is symmetric, so only panels from the diagonal to the right are summed
    up, which saves up to half of the work.

    Args:
        num_in_features: I, the layer's input width.
        device: the device of the sum and of the inputs.

    Attributes:
        num_tokens: the number of inputs that were added here.
    """

    __slots__ = ("_diagonal", "_is_whole", "_upper_II", "num_tokens")

    def __init__(self, num_in_features: int, *, device: torch.device | str = "cpu") -> None:
        super().__init__(panel_width(torch.device(device).type))
        self._upper_II = torch.empty(num_in_features, num_in_features, dtype=torch.float32, device=device)
        self._diagonal = torch.empty(0, device=device)  # the total of each block on the diagonal, its upper half
        self._is_whole = False
        self.num_tokens = 0

    @classmethod
    def of_sum(cls, hessian_II: torch.Tensor, num_tokens: int) -> HessianAccumulator:
        """Return the accumulator that has a sum which was computed before: `hessian_II` itself, not a copy."""
        found = cls(0, device=hessian_II.device)
        found._upper_II, found.num_tokens = hessian_II, num_tokens
        found.has_lane = found._is_whole = True
        return found

    def add(self, inputs_TI: torch.Tensor) -> None:
        """Add a batch of inputs, [..., I], to the lane; all leading dimensions count as tokens."""
        flat_TI = inputs_TI.detach().reshape(-1, inputs_TI.shape[-1])
        self._is_whole = False
        if is_gpu(flat_TI.device.type):
            self._add_(flat_TI if flat_TI.stride(1) == 1 else flat_TI.contiguous())
        else:
            for part_TI in torch.split(flat_TI, SQUARE):  # for more tokens at a time the product would need a copy
                self._add_(padded_columns(part_TI).t())
        self.num_tokens += flat_TI.shape[0]

    def _add_(self, inputs_TI: torch.Tensor) -> None:
        is_next = self.has_lane and self._is_ended
        is_new = is_next or not self.has_lane
        for left in self.panels():
            target_PR, first_TP, second_TR = (
                self.lane_panel(left),
                inputs_TI[:, left : left + self.width],
                inputs_TI[:, left:],
            )
            if is_next:  # the earlier lane's panel comes into the cache for both
                self.fold_(left, target_PR)
            if is_gpu(inputs_TI.device.type):
                add_exact_product_(target_PR, first_TP, second_TR, is_new=is_new)
            else:
                add_product_(target_PR, first_TP.t(), second_TR.t(), is_new=is_new)
        self.has_total |= is_next
        self.has_lane, self._is_ended = True, False

    @property
    def size(self) -> int:
        """I."""
        return len(self._upper_II)

    def lane_panel(self, left: int) -> torch.Tensor:
        """The rows of a panel from the diagonal to the right, [P, I - left]: the lane's sum, not a copy."""
        return self._upper_II[left : left + self.width, left:]

    def fold_(self, left: int, lane: torch.Tensor, *, is_first: bool | None = None) -> None:
        """Add a lane's sum to the total of a panel, see `SumOverLanes`."""
        is_first = not self.has_total if is_first is None else is_first
        half = _upper_half(lane)
        if not len(self._diagonal):
            self._diagonal = self._upper_II.new_empty(_diagonal_shape(len(self._upper_II), self.width))
        parts = [(self._diagonal[left // self.width, : len(half)], half)]
        parts += [(total, lane[:, own]) for total, own in self._places(left)]
        for total, part in parts:
            if is_first:
                total.copy_(part)
            else:
                total.add_(part)

    def _places(self, left: int) -> Iterator[tuple[torch.Tensor, slice]]:
        """Where the total of a panel is, and which of the panel's columns, without those on the diagonal."""
        size = len(self._upper_II)
        full = size // self.width * self.width
        right, width = left + self.width, full - left - self.width
        if width > 0:
            yield self._upper_II[width : width + self.width, :width], slice(self.width, self.width + width)
        if full < size and left < full:
            yield self._upper_II[full:, left:right].t(), slice(full - left, None)

    def _complete_(self) -> None:
        """Put the sum of all lanes into the panels, and copy it to below the diagonal."""
        if not self.has_total and not self.has_lane:
            self._upper_II.zero_()
        for left in self.panels():
            panel_PR = self.lane_panel(left)
            width = len(panel_PR)
            upper_PP = panel_PR[:, :width].triu()
            if self.has_total:
                if self.has_lane:
                    self.fold_(left, panel_PR)
                places = _triangle(width, panel_PR.device)
                upper_PP = upper_PP.view(-1).index_copy_(0, places, self._diagonal[left // self.width, : len(places)])
                upper_PP = upper_PP.view(width, width)
                for total, own in self._places(left):
                    panel_PR[:, own] = total
            panel_PR[:, :width] = upper_PP + upper_PP.triu(1).t()
        mirror_(self._upper_II, self.width)
        self._diagonal = self._diagonal.new_empty(0)
        self.has_lane, self.has_total, self._is_ended = True, False, False

    @property
    def hessian_II(self) -> torch.Tensor:
        """The sum so far: the accumulator's own tensor, which a later `add` changes."""
        if not self._is_whole:
            self._complete_()
        self._is_whole = True
        return self._upper_II

    def rescale_(self, scale_I: torch.Tensor) -> None:
        """Divide the summed inputs by these factors, in place because a copy would double the memory."""
        self.hessian_II.div_(scale_I).div_(scale_I[:, None])


def _diagonal_shape(num_in: int, panel: int) -> tuple[int, int]:
    """The number of blocks on the diagonal, and of the numbers in the upper half of each."""
    width = min(panel, num_in)
    return -(-num_in // panel), width * (width + 1) // 2


def hessian_bytes(num_in: int) -> int:
    """The size of H: [I, I] in float32."""
    return num_in * num_in * FLOAT32


def accumulator_bytes(num_in: int, device_type: str = "cpu") -> int:
    """The size of a `HessianAccumulator` of several lanes: H, and the total of its blocks on the diagonal."""
    return hessian_bytes(num_in) + math.prod(_diagonal_shape(num_in, panel_width(device_type))) * FLOAT32
