"""The grids that GPTQ rounds the rows of a tile to.

Shapes: G groups, O rows of a tile, B columns of a group, I in features, R and C rows and columns of a `grid.Grid`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch.overrides import TorchFunctionMode

from runtime.algorithms import gptq_options, grid
from runtime.algorithms.gptq_columns import Grids
from runtime.algorithms.gptq_options import SolveOptions
from runtime.algorithms.gptq_tiles import Piece, Tile
from runtime.algorithms.observers import fitted_grid

_NORM_OF_TARGETS = 2.4


class _FilledNumbers(TorchFunctionMode):
    """Fills a tensor with a number where a library would copy the number to a GPU and wait for the copy."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.tensor and kwargs and kwargs.get("device") and isinstance(args[0], (int, float)):
            return torch.full((), args[0], **kwargs)
        return func(*args, **(kwargs or {}))


class Fitting:
    """Fits grids to the rows of weights.

    Args:
        weights: [O, I] each.
        args: strategy, bits, symmetry and observer.
        scale_dtype: the dtype that the checkpoint stores scales in.
        global_scale: NVFP4's [1].
        diagonal_I: H's diagonal.
        reads: whether errors of scales are raised at once; reading a number waits for a GPU.
    """

    def __init__(
        self,
        weights: Sequence[torch.Tensor],
        args: QuantizationArgs,
        scale_dtype: torch.dtype,
        global_scale: torch.Tensor | None,
        diagonal_I: torch.Tensor,
        *,
        reads: bool = True,
    ) -> None:
        assert global_scale is not None or not grid.needs_global_scale(args), "rows alone have another global scale"
        self.weights, self.args, self.diagonal_I = weights, args, diagonal_I
        self.scale_dtype, self.global_scale, self.reads = scale_dtype, global_scale, reads
        self._whole: dict[int, grid.Grid] = {}  # by weight: with strategy tensor all of its rows share one grid

    @classmethod
    def of(cls, weights: Sequence[torch.Tensor], diagonal_I: torch.Tensor, options: SolveOptions) -> Fitting:
        """Return the fitting for the weights of a solve, given their Hessian's diagonal."""
        reads = not gptq_options.is_asynchronous(diagonal_I.device)
        return cls(weights, options.args, options.scale_dtype, options.global_scale, diagonal_I, reads=reads)

    def like(self, weights: Sequence[torch.Tensor], global_scale: torch.Tensor | None) -> Fitting:
        """Return a fitting for other weights, with a global scale [1], or [O, 1] for each row."""
        return Fitting(weights, self.args, self.scale_dtype, global_scale, self.diagonal_I, reads=self.reads)

    def reading(self) -> Fitting:
        """Return a fitting that raises errors of scales."""
        return Fitting(self.weights, self.args, self.scale_dtype, self.global_scale, self.diagonal_I)

    def of_targets(self, targets_OI: torch.Tensor) -> Fitting:
        """Return a fitting for the rows that a solve has rounded; these need no margin for the errors of others."""
        options = {"norm": _NORM_OF_TARGETS, **self.args.observer_kwargs}
        args = self.args.model_copy(update={"observer_kwargs": options})
        how = self.scale_dtype, self.global_scale, self.diagonal_I
        return Fitting([targets_OI], args, *how, reads=self.reads)

    def grids_of(self, tile: Tile) -> Grids:
        """Fit all grids of a tile at once, to the original weights."""
        if grid.strategy_of(self.args) == "tensor":
            for index in {piece.weight: None for piece in tile if piece.weight not in self._whole}:
                self._whole[index] = self._fitted(self.weights[index], self.diagonal_I)
            found = [self._whole[piece.weight] for piece in tile]
        else:
            found = [self._fitted(self.weights[piece.weight][piece.rows], self.diagonal_I) for piece in tile]
        height = self.args.block_structure[0] if self.args.block_structure else 1
        dtype = self.diagonal_I.dtype

        def columns(parts: Sequence[torch.Tensor]) -> torch.Tensor:
            sizes = [piece.stop - piece.start for piece in tile]
            tall = [part.repeat_interleave(height, dim=0)[:size] for part, size in zip(parts, sizes, strict=True)]
            spread = [part.t().to(dtype).expand(-1, size) for part, size in zip(tall, sizes, strict=True)]
            return torch.cat(spread, dim=1).contiguous()

        zeros = [entry.zero_point_RC for entry in found if entry.zero_point_RC is not None]
        return Grids(
            scale_GO=columns([entry.scale_RC for entry in found]),
            factor_GO=columns([entry.factor_RC(torch.float32) for entry in found]),
            zero_GO=columns(zeros) if zeros else None,
        )

    def corrected_grids_of(self, tile: Tile, rows: Sequence[torch.Tensor]) -> Grids:
        """Fit the grids of a tile to corrected rows, one tensor for each piece (`runtime.algorithms.drift`).

        A weight with one scale has the grid of its original numbers: all of its rows would have to be corrected first.
        """
        if grid.strategy_of(self.args) == "tensor":
            return self.grids_of(tile)
        pieces = tuple(Piece(weight=place, start=0, stop=len(part)) for place, part in enumerate(rows))
        return self.like(rows, self.global_scale).grids_of(pieces)

    def refit_(self, grids: Grids, group: int, weight_BO: torch.Tensor) -> None:
        """Fit a group's grid to its weights as corrected when the solve reaches it, and store it in the group's row."""
        width = len(weight_BO)
        found = self._fitted(weight_BO.t(), self.diagonal_I[group * width : (group + 1) * width])
        grids.scale_GO[group] = found.scale_RC[:, 0]
        grids.factor_GO[group] = found.factor_RC(torch.float32)[:, 0]
        if grids.zero_GO is not None and found.zero_point_RC is not None:
            grids.zero_GO[group] = found.zero_point_RC[:, 0]

    def _fitted(self, weight_OI: torch.Tensor, diagonal_I: torch.Tensor) -> grid.Grid:
        with contextlib.nullcontext() if self.reads else _FilledNumbers():
            return fitted_grid(
                weight_OI,
                self.args,
                scale_dtype=self.scale_dtype,
                global_scale=self.global_scale,
                importance_I=diagonal_I,
                reads=self.reads,
            )

    def stored(self, tensor_GO: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Convert rows of scales or zero points to the checkpoint's shape and dtype."""
        if grid.strategy_of(self.args) == "tensor":
            return tensor_GO[0, :1].to(dtype)
        height = self.args.block_structure[0] if self.args.block_structure else 1
        return tensor_GO.t()[::height].to(dtype).contiguous()
