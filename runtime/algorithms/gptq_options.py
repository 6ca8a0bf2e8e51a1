"""The options and the result of a solve, and functions that solves on a CPU and in stacks on a GPU share.

Shapes: O out features, I in features, B columns of a block. See `runtime.algorithms.gptq`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs

from runtime.algorithms import grid
from runtime.algorithms.gptq_tiles import Piece
from runtime.algorithms.observers import is_searched
from runtime.algorithms.result import QuantizedWeight
from runtime.errors import QuantizationError

MAX_DAMPING = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SolveOptions:
    """The options of a solve.

    Args:
        args: strategy, bits, symmetry and observer.
        scale_dtype: the dtype that the checkpoint stores scales in, e.g. bf16.
        dampening_frac: added to the diagonal, as a fraction of its live mean; raised tenfold while H does not factor.
        block_size: columns per block; affects only speed. If grids are fitted during the solve, a group is a block.
        actorder: "static" (alias "weight") solves columns by decreasing H_kk; `None` from first to last.
        global_scale: NVFP4's [1], which siblings share; `solve_tiles` requires it there.
        far_dtype: of the products of M with the errors of all blocks but the last few; float64 is not rounded.
        range_passes: 2 to search ranges again, for the targets of the solve, and to solve again.
        strength: of the correction by the drift of the inputs, if that is given; see `drift`.
    """

    args: QuantizationArgs
    scale_dtype: torch.dtype
    dampening_frac: float = 0.01
    block_size: int = 128
    actorder: str | None = "static"
    global_scale: torch.Tensor | None = None
    far_dtype: torch.dtype = torch.float32
    range_passes: int = 1
    strength: float = 1.0

    @property
    def refits(self) -> bool:
        """Whether a group's grid is fitted when the solve reaches it."""
        return grid.is_grouped(self.args) and self.actorder is None

    @property
    def block_width(self) -> int:
        """The number of columns of a block."""
        return int(self.args.group_size) if self.refits else self.block_size

    @property
    def piece_scale_dtype(self) -> torch.dtype:
        """The dtype of a result's scales: float32 if the format stores them in 8 bits."""
        return torch.float32 if self.args.scale_dtype is not None else self.scale_dtype

    def columns_of_a_scale(self, num_columns: int) -> int:
        """The number of consecutive columns that share a scale."""
        if grid.is_grouped(self.args):
            return int(self.args.group_size)
        return int(self.args.block_structure[1]) if self.args.block_structure else num_columns


@dataclass(frozen=True, slots=True, kw_only=True)
class SolvedPiece:
    """The result of a piece of a tile.

    Args:
        piece: the weight and the rows.
        rows: the result of these rows alone.
        size: ||W X||^2 of these rows, to which their loss compares; of many rows an estimate.
    """

    piece: Piece
    rows: QuantizedWeight
    size: float


def check_options(options: SolveOptions) -> None:
    """Require options in their ranges; raise QuantizationError otherwise."""
    if not 0 < options.dampening_frac <= MAX_DAMPING:
        raise QuantizationError(
            f"dampening_frac must be above 0 and at most {MAX_DAMPING:g}, not {options.dampening_frac}"
        )
    if options.range_passes not in (1, 2):
        raise QuantizationError(f"range_passes must be 1 or 2, not {options.range_passes}")
    if options.range_passes > 1 and (options.actorder is None or not may_search_again(options.args)):
        raise QuantizationError(
            f"range_passes {options.range_passes} requires ranges that are searched by group or channel, and static "
            "order",
            hint="set weight_observer: signed_mse and actorder: static, or range_passes: 1",
        )
    if options.block_size < 1:
        raise QuantizationError(f"block_size must be at least 1, not {options.block_size}")
    if options.actorder not in (None, "static", "weight"):
        raise QuantizationError(
            f"actorder {options.actorder!r} is not supported", hint="supported: static, weight and null"
        )


def check_hessian_type(hessian_II: torch.Tensor, shape: Sequence[int]) -> None:
    """Require a square matrix of floats; `shape` is the weight's."""
    if hessian_II.ndim != 2 or hessian_II.shape[0] != hessian_II.shape[1]:
        raise QuantizationError(f"a Hessian has the shape [I, I], not {list(hessian_II.shape)}")
    if not hessian_II.is_floating_point():
        raise not_finite(shape)


def check_hessian_numbers(hessian_II: torch.Tensor, shape: Sequence[int]) -> None:
    """Require finite numbers and an input that is not zero; `shape` is the weight's."""
    if not grid.is_finite(hessian_II):
        raise not_finite(shape)
    if not hessian_II.diagonal().any():
        raise all_zero(shape)


def may_search_again(args: QuantizationArgs) -> bool:
    """Whether ranges can be searched for the targets of a solve."""
    return is_searched(args) and grid.strategy_of(args) in ("group", "channel")


def is_asynchronous(device: torch.device) -> bool:
    """Whether work on a device is queued, so that reading a number waits for it."""
    return device.type == "cuda"


def awaited(numbers: torch.Tensor) -> Any:
    """Read numbers as nested lists; the only function in which a solve waits for a GPU."""
    return numbers.tolist()


def corrected(weight_BO: torch.Tensor, target_BO: torch.Tensor, lower_BB: torch.Tensor) -> torch.Tensor:
    """Compute the weights of a group as algorithm 1 has corrected them when it reaches the group's first column."""
    shift_BO: torch.Tensor = torch.linalg.solve_triangular(
        lower_BB, target_BO - weight_BO, upper=False, unitriangular=True
    )
    return weight_BO + shift_BO


def not_finite(shape: Sequence[int]) -> QuantizationError:
    """Return the error of a Hessian that is not finite, of a weight of this shape."""
    return QuantizationError(
        f"the Hessian of a weight of shape {list(shape)} is not finite",
        hint="an activation overflowed: calibrate in a wider dtype",
    )


def all_zero(shape: Sequence[int]) -> QuantizationError:
    """Return the error of a Hessian that is zero, of a weight of this shape."""
    return QuantizationError(
        f"the Hessian of a weight of shape {list(shape)} is zero: no input reached the module",
        hint="calibrate with more data, or use round-to-nearest for this module in the recipe",
    )


def not_definite(num_in: int, damping: float) -> QuantizationError:
    """Return the error of a Hessian of `num_in` features that does not factor."""
    return QuantizationError(
        f"a Hessian of shape {[num_in] * 2} does not factor with dampening {damping:g}",
        hint="calibrate with more data or in a wider dtype, or set fallback: rtn in the recipe",
    )
