"""Pack rounded rows for the common formats, in fewer passes over them than the compressors of compressed-tensors take.

    float8   w / s
    E2M1     two numbers of 4 bits in a byte, the first in its lower half      (NVFP4, MXFP4)
    int4     eight numbers w / s + z + 8 of 4 bits in a word, from its lowest bits

The results equal those of the compressors to the bit, because a rounded weight is on its grid: w / s differs from a
point of the grid by less than the last bit, wherever it is rounded. That holds down to scales of the smallest normal
float32, below which `runtime.algorithms.grid` stores none.

Shapes: O out features, I in features; R, h, C and w are those of the tiles in `runtime.algorithms.grid`.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
from compressed_tensors.config import CompressionFormat

from runtime.algorithms import grid

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme

    from runtime.algorithms.result import QuantizedWeight

_LARGEST_FLOAT8 = torch.finfo(torch.float8_e4m3fn).max
_NUMBERS_IN_WORD = 8  # of 4 bits in 32
_HALF = 8  # added to numbers of 4 bits, so that they are not negative


def pack_rows(rows: QuantizedWeight, scheme: QuantizationScheme) -> dict[str, torch.Tensor] | None:
    """Return the tensors of the compressor, in its order and without the shape; None for formats that need it."""
    args, storage = scheme.weights, CompressionFormat(scheme.format)
    if rows.weight_OI.is_meta or sys.byteorder != "little":
        return None
    if storage == CompressionFormat.float_quantized and args.num_bits == 8:
        tiles_RhCw = _divided(rows, scheme).clamp_(-_LARGEST_FLOAT8, _LARGEST_FLOAT8).to(torch.float8_e4m3fn)
        return {"weight_scale": rows.scale, "weight": grid.untile(tiles_RhCw, shape=_shape(rows))}
    if storage == CompressionFormat.nvfp4_pack_quantized and rows.global_scale is not None:
        scale = rows.scale.to(args.scale_dtype or torch.float8_e4m3fn)
        return {"weight_global_scale": rows.global_scale, "weight_packed": _e2m1(rows, scheme), "weight_scale": scale}
    if storage == CompressionFormat.mxfp4_pack_quantized:
        exponent = rows.scale.contiguous().view(torch.int32).bitwise_right_shift(23).to(args.scale_dtype or torch.uint8)
        return {"weight_packed": _e2m1(rows, scheme), "weight_scale": exponent}
    is_int4 = storage == CompressionFormat.pack_quantized and args.num_bits == 4
    if is_int4 and rows.weight_OI.shape[1] % _NUMBERS_IN_WORD == 0:
        zero = {} if rows.zero_point is None else {"weight_zero_point": rows.zero_point}
        return {"weight_scale": rows.scale, **zero, "weight_packed": _int4(rows, scheme)}
    return None


def _shape(rows: QuantizedWeight) -> tuple[int, int]:
    return rows.weight_OI.shape[0], rows.weight_OI.shape[1]


def _divided(rows: QuantizedWeight, scheme: QuantizationScheme) -> torch.Tensor:
    """Divide a weight by its scales, in tiles [R, h, C, w]."""
    factor_RC = grid.effective(rows.scale, rows.global_scale)
    return grid.tile(rows.weight_OI, scheme.weights) / factor_RC.reshape(len(rows.scale), 1, -1, 1)


def _e2m1(rows: QuantizedWeight, scheme: QuantizationScheme) -> torch.Tensor:
    """Pack numbers of E2M1.

    2^-14 times such a number is one of float16 in which only the lowest bits of the exponent and the highest bit of the
    mantissa are used, and they are the bits of E2M1.
    """
    numbers_OI = grid.untile(_divided(rows, scheme), shape=_shape(rows))
    numbers_OI.mul_(2.0**-14).add_(0.0)  # the sum clears the sign of -0, as compressors do
    halves_OI = numbers_OI.to(torch.float16)
    pairs = halves_OI.view(torch.int32)  # of two numbers
    magnitudes = pairs.bitwise_right_shift(9).bitwise_and_(0x0007_0007)
    codes = pairs.bitwise_right_shift_(12).bitwise_and_(0x0008_0008).bitwise_or_(magnitudes)
    return torch.bitwise_right_shift(codes, 12, out=magnitudes).bitwise_or_(codes).to(torch.uint8)


def _int4(rows: QuantizedWeight, scheme: QuantizationScheme) -> torch.Tensor:
    """Pack integers of 4 bits."""
    tiles_RhCw = _divided(rows, scheme)
    if rows.zero_point is not None:
        tiles_RhCw.add_(rows.zero_point.to(tiles_RhCw.dtype).reshape(len(rows.scale), 1, -1, 1))
    numbers_OI = grid.untile(tiles_RhCw.round_().clamp_(-_HALF, _HALF - 1).add_(_HALF), shape=_shape(rows))
    pairs = numbers_OI.to(torch.uint8).view(torch.int16)
    return pairs.bitwise_right_shift(4).bitwise_or_(pairs).to(torch.uint8).view(torch.int32)
