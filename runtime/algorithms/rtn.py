"""Round-to-nearest: replace each weight by the nearest point of a grid from minimum to maximum.

No paper: the baseline that papers compare with (RTN in the tables of GPTQ, arXiv 2210.17323).

    s = (max - min) / (2^b - 1)       symmetric: 2 max|w| / (2^b - 1),    float8: max|w| / 448
    z = round(-2^(b-1) - min / s)     symmetric: 0
    q = clamp(round(w / s + z))       half to even, to -2^(b-1) .. 2^(b-1) - 1
    Q = (q - z) s

Layout: weight_OI is [O, I] as in `torch.nn.Linear`; one s and z for each tile of it (see `grid`).
Shapes: O out features, I in features, R and C rows and columns of tiles, h and w a tile's height and width.

The range is minimum to maximum unless the scheme's observer chooses a better one (see `observers`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from compressed_tensors.quantization import QuantizationArgs

from runtime.algorithms import grid
from runtime.algorithms.observers import fitted_grid
from runtime.algorithms.output_squares import plain_square
from runtime.algorithms.result import QuantizedWeight

STRATEGIES = ("tensor", "channel", "group", "tensor_group", "block")


def quantize_rtn(
    weight_OI: torch.Tensor,
    args: QuantizationArgs,
    *,
    scale_dtype: torch.dtype,
    global_scale: torch.Tensor | None = None,
    importance_I: torch.Tensor | None = None,
) -> QuantizedWeight:
    """Round a weight to the nearest points of its grid.

    Args:
        weight_OI: [O, I], any float dtype; not changed. In float64 the arithmetic is float64, else float32.
        args: strategy, bits, symmetry and observer.
        scale_dtype: the dtype that the checkpoint stores scales in, e.g. bf16.
        global_scale: NVFP4's [1], if siblings share one.
        importance_I: the mean square of each input feature, for the observer `imatrix_mse`.

    Returns:
        The dequantized weight with its scales; `loss` is the sum of (W-Q)^2.

    Raises:
        QuantizationError: for an unsupported strategy, type or shape, and numbers that are not finite.
    """
    found = fitted(weight_OI, args, scale_dtype=scale_dtype, global_scale=global_scale, importance_I=importance_I)
    quantized_OI = torch.empty(weight_OI.shape, dtype=torch.float32, device=weight_OI.device)
    loss, top = 0.0, 0
    for part in rounded_rows(weight_OI, found, args):
        quantized_OI[top : top + len(part.weight_OI)] = part.weight_OI
        loss, top = loss + part.loss, top + len(part.weight_OI)
    return _result(quantized_OI, found, args, loss)


def fitted(
    weight_OI: torch.Tensor,
    args: QuantizationArgs,
    *,
    scale_dtype: torch.dtype,
    global_scale: torch.Tensor | None = None,
    importance_I: torch.Tensor | None = None,
) -> grid.Grid:
    """Check a weight, and fit a grid to it; arguments and errors are those of `quantize_rtn`."""
    weight_OI = weight_OI.detach()
    grid.check_weight(weight_OI, args, supported=STRATEGIES)
    return fitted_grid(weight_OI, args, scale_dtype=scale_dtype, global_scale=global_scale, importance_I=importance_I)


def rounded_rows(weight_OI: torch.Tensor, found: grid.Grid, args: QuantizationArgs) -> Iterator[QuantizedWeight]:
    """Round a weight a few rows at a time, so that the computation stays in the processor's cache.

    Yields:
        The result of `quantize_rtn` for these rows, which are whole tiles unless one tile is the whole weight.
    """
    for rows in grid.parts_of_rows(weight_OI, grid.tile_height(args)):
        own, part_RI = found.of_rows(rows, args), weight_OI.detach()[rows]
        quantized_RI = rounded(part_RI, own, args)
        loss = plain_square(part_RI.to(quantized_RI.dtype) - quantized_RI)
        yield _result(quantized_RI.to(torch.float32), own, args, loss)


def _result(quantized_OI: torch.Tensor, found: grid.Grid, args: QuantizationArgs, loss: float) -> QuantizedWeight:
    return QuantizedWeight(
        weight_OI=quantized_OI,
        scale=grid.stored(found.scale_RC, args),
        zero_point=None if found.zero_point_RC is None else grid.stored(found.zero_point_RC, args),
        global_scale=found.global_scale,
        loss=loss,
        damping=0.0,
    )


def rounded(weight_OI: torch.Tensor, found: grid.Grid, args: QuantizationArgs) -> torch.Tensor:
    """Round a weight to a grid and dequantize it, in the dtype of the arithmetic."""
    dtype = grid.work_dtype(weight_OI)

    def spread(tensor_RC: torch.Tensor) -> torch.Tensor:
        return tensor_RC.to(dtype)[:, None, :, None]

    tiles_RhCw = grid.snap_(
        grid.tile(weight_OI.to(dtype, copy=True), args),
        spread(found.factor_RC(torch.float32)),
        None if found.zero_point_RC is None else spread(found.zero_point_RC),
        args,
    )
    return grid.untile(tiles_RhCw, shape=(weight_OI.shape[0], weight_OI.shape[1]))
