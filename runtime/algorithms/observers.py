"""Observers: choose the range of numbers that a tile's grid spans.

    minmax        from the smallest to the largest number
    percentile    from the (100-p)-th to the p-th percentile of the tile; numbers outside are clamped
    mse           the range [f min, f max] with the least error:   argmin over f of   sum of h |q(w) - w|^n

The factors f of `mse` are 1, 1 - 1/grid, 1 - 2/grid and so on down to 1 - maxshrink, all times `expand`. The search
of a tile ends after `patience` factors without improvement (these fields are llm-compressor's; a large patience
searches all factors). n is `norm`, 2.4 by default: a large error harms a layer's output more than its square. With
fewer than four bits the best range is far smaller than the weights', and the default maxshrink is 0.8.

Three observers search other ranges, with the same fields and other defaults:

    signed_mse           symmetric integers whose scale has the sign of -max |w| (see `grid`): f = 1.1, 1.05, ... 0.3
    nvfp4_expanded_mse   NVFP4 scales of f = 1.8, 1.791, ... 0.8
    fouroversix          NVFP4 scales of f = 1.5 and 1: the largest number of a tile becomes 4 or 6

The last one is Cook et al., "Four Over Six: More Accurate NVFP4 Quantization with Adaptive Block Scaling", arXiv
2512.02010: between 4 and 6 there is no grid point, so numbers close to the largest one lose most, and with the largest
one at 4 there are points at 3 and 2 below it. Left out is the paper's global scale, 256 * 6 over the largest number
instead of 448 * 6: it leaves room for scales times 1.5 in the tiles with the largest numbers of a tensor, which changed
the error by 0.1 %.

GPTQ corrects weights by the errors of others, so that it rounds numbers that spread more than the original weights, by
an amount that is not known before the solve. Ranges with the least error of the original weights are too small for it.
Large powers clip less: `signed_mse` uses the third, and with two bits the fourth.

`imatrix_mse` weighs each column's error by h, the mean square of its input, which is also the diagonal of GPTQ's
Hessian up to a factor; the others use h = 1.

Shapes: R and C rows and columns of tiles, h and w a tile's height and width (see `grid`), I in features.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs

from runtime.algorithms import grid
from runtime.errors import QuantizationError

_NARROW = 32  # numbers of a tile below which torch finds the extremes of many tiles faster than those of one
_NAMES_OF_MSE = ("mse", "memoryless_mse", "nvfp4_expanded_mse", "fouroversix", "imatrix_mse", grid.SIGNED)


def is_searched(args: QuantizationArgs) -> bool:
    """Whether the scheme's observer searches ranges."""
    return str(args.observer) in _NAMES_OF_MSE


def fitted_grid(
    weight_OI: torch.Tensor,
    args: QuantizationArgs,
    *,
    scale_dtype: torch.dtype,
    global_scale: torch.Tensor | None = None,
    importance_I: torch.Tensor | None = None,
    reads: bool = True,
) -> grid.Grid:
    """Fit a grid to a weight with the scheme's observer.

    With min-max, minimum and maximum keep the weight's own dtype, so that a bf16 weight gets the scales that
    compressed-tensors computes for it, bit for bit.

    Args:
        weight_OI: the weight, checked.
        args: the weight's half of a quantization scheme, with `observer` and `observer_kwargs`.
        scale_dtype: the dtype that the checkpoint stores scales in.
        global_scale: NVFP4's [1], if siblings share one, or [O, 1] for each row; by default the weight's own.
        importance_I: the mean square of each input feature, for `imatrix_mse`.
        reads: see `grid.fit`.

    Raises:
        QuantizationError: if a scale cannot be represented, or `imatrix_mse` gets no importance.
    """
    global_scale = grid.shared_global_scale(args, global_scale, [weight_OI])
    name = str(args.observer or "memoryless_minmax")
    if name in _NAMES_OF_MSE:
        weights = _column_weights(name, weight_OI, args, importance_I)
        search = functools.partial(
            _least_error, args=args, scale_dtype=scale_dtype, global_scale=global_scale, weights=weights, reads=reads
        )
        minimum, maximum = _by_rows(weight_OI, args, search)
    elif name == "percentile":
        percentile = float(args.observer_kwargs.get("percentile", 99.9))
        minimum, maximum = _by_rows(weight_OI, args, lambda tiles_RhCw: _percentiles(tiles_RhCw, percentile))
    else:
        minimum, maximum = _extremes(weight_OI, args)
    fitting = functools.partial(grid.fit, args=args, scale_dtype=scale_dtype, reads=reads)
    parts = [
        fitting(minimum[rows], maximum[rows], global_scale=_of_rows(global_scale, rows))
        for rows in grid.parts_of_rows(minimum)
    ]
    zeros = [zero_RC for _, zero_RC in parts if zero_RC is not None]
    return grid.Grid(
        scale_RC=torch.cat([scale_RC for scale_RC, _ in parts]),
        zero_point_RC=torch.cat(zeros) if zeros else None,
        global_scale=global_scale,
    )


def _of_rows(global_scale: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    return global_scale if global_scale is None or len(global_scale) == 1 else global_scale[rows]


def _by_rows(
    weight_OI: torch.Tensor,
    args: QuantizationArgs,
    bounds: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the bounds of each tile, a few rows of tiles at a time to limit memory."""
    rows = grid.parts_of_rows(weight_OI, grid.tile_height(args))
    if grid.strategy_of(args) == "tensor":
        rows = [slice(0, len(weight_OI))]
    parts = [bounds(grid.tile(weight_OI[some], args)) for some in rows]
    return torch.cat([minimum for minimum, _ in parts]), torch.cat([maximum for _, maximum in parts])


def _extremes(weight_OI: torch.Tensor, args: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the smallest and the largest number of each tile; in float32 at least, which is exact and faster."""
    dtype = grid.work_dtype(weight_OI)
    found = []
    for rows in grid.parts_of_rows(weight_OI, grid.tile_height(args)):
        tiles_RhCw = grid.tile(weight_OI[rows], args)
        num_rows, height, num_columns, width = tiles_RhCw.shape
        if height * width < _NARROW:
            by_place = tiles_RhCw.transpose(1, 2).reshape(-1, height * width).t()
            by_place = by_place.to(dtype, copy=True, memory_format=torch.contiguous_format)
            low, high = (bound.reshape(num_rows, num_columns) for bound in (by_place.amin(dim=0), by_place.amax(dim=0)))
        else:
            tiles_RhCw = tiles_RhCw.to(dtype)
            low, high = tiles_RhCw.amin(dim=(1, 3)), tiles_RhCw.amax(dim=(1, 3))
        found.append((low, high))
    minimum, maximum = torch.cat([low for low, _ in found]), torch.cat([high for _, high in found])
    if grid.strategy_of(args) == "tensor":
        minimum, maximum = minimum.amin(dim=0, keepdim=True), maximum.amax(dim=0, keepdim=True)
    return minimum.to(weight_OI.dtype), maximum.to(weight_OI.dtype)


def _column_weights(
    name: str, weight_OI: torch.Tensor, args: QuantizationArgs, importance_I: torch.Tensor | None
) -> torch.Tensor | None:
    """The weight h of each column in tiles, [1, 1, C, w]."""
    if name != "imatrix_mse":
        return None
    if importance_I is None:
        raise QuantizationError(
            "the observer imatrix_mse weighs errors by the inputs, but no inputs were measured",
            hint="use it in GPTQModifier or AWQModifier, or use the observer mse",
        )
    row_1I = importance_I.to(weight_OI.device).reshape(1, -1)
    width = grid.tile(weight_OI, args).shape[3]
    missing = -row_1I.shape[1] % width
    return torch.nn.functional.pad(row_1I, (0, missing)).reshape(1, 1, -1, width)


def _percentiles(tiles_RhCw: torch.Tensor, percentile: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the lower and upper percentile of each tile, by linear interpolation."""
    rows, height, columns, width = tiles_RhCw.shape
    values = tiles_RhCw.transpose(1, 2).reshape(rows, columns, height * width).float().sort(dim=-1).values
    place = (height * width - 1) * percentile / 100
    below = min(int(place), height * width - 1)
    above, part = min(below + 1, height * width - 1), place - below
    upper = values[..., below] * (1 - part) + values[..., above] * part
    lower = values[..., -1 - below] * (1 - part) + values[..., -1 - above] * part
    return lower.to(tiles_RhCw.dtype), upper.to(tiles_RhCw.dtype)


def _least_error(
    tiles_RhCw: torch.Tensor,
    args: QuantizationArgs,
    scale_dtype: torch.dtype,
    global_scale: torch.Tensor | None,
    weights: torch.Tensor | None,
    reads: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Search the best range of each tile."""
    options = _options(args)
    dtype = grid.work_dtype(tiles_RhCw)
    values = tiles_RhCw.to(dtype)
    minimum, maximum = tiles_RhCw.amin(dim=(1, 3)), tiles_RhCw.amax(dim=(1, 3))
    best_min, best_max = minimum, maximum
    best = torch.full_like(minimum, torch.inf, dtype=dtype)
    idle = torch.zeros_like(minimum, dtype=torch.int32)
    rounded = torch.empty_like(values)
    for step in range(int(options["maxshrink"] * options["grid"] + 1e-9) + 1):
        factor = options["expand"] * (1 - step / options["grid"])
        low, high = factor * minimum, factor * maximum
        scale_RC, zero_RC = grid.fit(low, high, args, scale_dtype=scale_dtype, global_scale=global_scale, reads=reads)
        spread = grid.effective(scale_RC, global_scale).to(dtype)[:, None, :, None]
        zero = None if zero_RC is None else zero_RC.to(dtype)[:, None, :, None]
        _raise_(grid.snap_(rounded.copy_(values), spread, zero, args).sub_(values).abs_(), options["norm"])
        if weights is not None:
            rounded.mul_(weights.to(dtype))
        error_RC = rounded.sum(dim=(1, 3))
        is_better = (error_RC < best) & (idle < options["patience"])
        best = torch.where(is_better, error_RC, best)
        best_min, best_max = torch.where(is_better, low, best_min), torch.where(is_better, high, best_max)
        idle = torch.where(is_better, 0, idle + 1)
        if reads and bool((idle >= options["patience"]).all()):
            break
    return best_min, best_max


def _raise_(values: torch.Tensor, power: float) -> None:
    """Raise numbers that are not negative to a power, in place; few products take a tenth of the time of `pow`."""
    if power == 4:
        values.square_().square_()
    elif power == 3:
        values.mul_(values.square())
    else:
        values.pow_(power)


def _options(args: QuantizationArgs) -> dict[str, Any]:
    """Return the options of the search, with defaults that depend on the observer's name."""
    is_wide = args.type == "int" and args.num_bits < 4
    options: dict[str, Any] = {"maxshrink": 0.8 if is_wide else 0.2, "patience": 5, "grid": 100.0, "norm": 2.4}
    options |= {"expand": 1.0, "patience": 10_000 if is_wide else 5}
    if args.observer == "nvfp4_expanded_mse":
        options |= {"expand": 1.8, "maxshrink": 1 - 0.8 / 1.8, "grid": 200.0, "patience": 1000}
    elif args.observer == "fouroversix":
        options |= {"expand": 1.5, "maxshrink": 1 / 3, "grid": 3.0, "norm": 2.0}
    elif grid.has_signed_scales(args):
        norm = 4.0 if args.num_bits == 2 else 3.0
        options |= {"expand": 1.1, "maxshrink": 1 - 0.3 / 1.1, "grid": 22.0, "norm": norm, "patience": 1000}
    return options | {key: value for key, value in args.observer_kwargs.items() if key in options}
