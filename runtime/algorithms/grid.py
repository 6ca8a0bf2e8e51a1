"""The grid a weight is rounded to: scales and zero points from minimum and maximum, and the rounding.

A grid point is `(q - zero_point) * scale` with q an integer of `num_bits` bits, or a small float. The strategy decides
how many weights share a scale. Every strategy cuts the weight into tiles with one scale each, so that [O, I] becomes
[R, h, C, w] and all share one implementation:

    strategy              h, w         R, C
    tensor                O, I         1, 1
    channel               1, I         O, 1
    group, tensor_group   1, g         O, I/g
    block                 b, c         ceil(O/b), ceil(I/c)      (the last tiles are padded with zeros)

Scales are rounded to their stored dtype *before* weights are rounded with them, so that the optimization uses the same
numbers as a reader. NVFP4 stores a scale s as the 8 bit float nearest to s*g, with one global scale g for the
tensor (and its siblings); a reader multiplies by that float over g. MX formats store powers of two.

The scales of symmetric integers may have a sign (`signed_mse`). There are 2^(b-1) integers below zero and one less
above it, and a negative scale turns the grid around. So the number of the largest magnitude, whatever its sign, becomes
the outermost integer -2^(b-1), and steps are max |w| / 2^(b-1) instead of max |w| / (2^(b-1) - 1/2): smaller by 25 %
at 2 bits, 12.5 % at 3 and 6.2 % at 4. llama.cpp and AutoRound store such scales.

Small floats are rounded half to even: E2M1 (4 bits, up to 6), E2M3 (6 bits, up to 7.5), E4M3 (8 bits, up to 448).

Shapes: O out features, I in features, R and C rows and columns of tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy, QuantizationType
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

from runtime.errors import QuantizationError

# Small floats by their bits: bits of the mantissa, the smallest normal number, and the largest number.
SMALL_FLOATS = {4: (1, 1.0, 6.0), 6: (3, 1.0, 7.5), 8: (3, 2.0**-6, 448.0)}
_LARGEST_OF_8_BITS = SMALL_FLOATS[8][2]
NUMBERS_IN_CACHE, _NUMBERS_ON_GPU = 2**19, 2**26  # of a weight, that are processed at a time
SIGNED = "signed_mse"  # the observer whose scales have signs
_LARGEST_GLOBAL_SCALE = 2.0**62  # readers multiply the global scales of weight and input, and invert the product


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The scale and, if asymmetric, int8 zero point of each tile, and NVFP4's global scale [1]."""

    scale_RC: torch.Tensor
    zero_point_RC: torch.Tensor | None
    global_scale: torch.Tensor | None = None

    def factor_RC(self, dtype: torch.dtype) -> torch.Tensor:
        """The factors that grid points are multiplied by."""
        return effective(self.scale_RC, self.global_scale).to(dtype)

    def of_rows(self, rows: slice, args: QuantizationArgs) -> Grid:
        """The grid of some rows of the weight, which are whole tiles, or any rows for the strategy tensor."""
        if strategy_of(args) == "tensor":
            return self
        height = tile_height(args)
        tiles = slice(rows.start // height, -(-rows.stop // height))
        zero_point_RC = None if self.zero_point_RC is None else self.zero_point_RC[tiles]
        return Grid(scale_RC=self.scale_RC[tiles], zero_point_RC=zero_point_RC, global_scale=self.global_scale)


def check_weight(
    weight_OI: torch.Tensor, args: QuantizationArgs, *, supported: tuple[str, ...], reads: bool = True
) -> None:
    """Require a weight and a scheme that an algorithm supports.

    Args:
        weight_OI: the weight.
        args: the weight's half of a quantization scheme.
        supported: the strategies that the calling algorithm supports.
        reads: whether to read numbers, which waits for a GPU; otherwise the caller requires finite ones.

    Raises:
        QuantizationError: for an unsupported strategy, type or shape, and for numbers that are not finite.
    """
    strategy = strategy_of(args)
    if strategy not in supported:
        raise QuantizationError(
            f"weight strategy {strategy!r} is not supported here", hint=f"supported: {', '.join(supported)}"
        )
    if strategy == "tensor_group" and args.type == QuantizationType.INT:
        raise QuantizationError("weight strategy 'tensor_group' is not supported for int", hint="use group")
    is_int = args.type == QuantizationType.INT and 2 <= args.num_bits <= 8 and args.scale_dtype is None
    is_float = args.type == QuantizationType.FLOAT and args.num_bits in (4, 6, 8) and args.symmetric
    if not (is_int or is_float) or args.dynamic:
        raise QuantizationError(
            f"a weight cannot be quantized to {args.num_bits} bit {QuantizationType(args.type).value}"
            f" (symmetric={args.symmetric}, dynamic={args.dynamic}, scale_dtype={args.scale_dtype})",
            hint="supported: static int of 2 to 8 bits and symmetric float of 4, 6 and 8 bits",
        )
    shape = list(weight_OI.shape)
    if weight_OI.ndim != 2 or weight_OI.numel() == 0:
        raise QuantizationError(f"a weight must have the shape [O, I], not {shape}")
    if is_grouped(args) and shape[1] % args.group_size:
        raise QuantizationError(
            f"a weight of shape {shape} cannot be cut into groups of {args.group_size} columns",
            hint="choose a group size that divides the number of columns, or ignore this module",
        )
    if reads or not weight_OI.is_floating_point():
        check_numbers(weight_OI)


def check_numbers(weight_OI: torch.Tensor) -> None:
    """Require finite floats; raise QuantizationError otherwise."""
    if not weight_OI.is_floating_point() or not is_finite(weight_OI):
        raise QuantizationError(f"a weight of shape {list(weight_OI.shape)} holds numbers that are not finite floats")


def is_finite(values: torch.Tensor) -> bool:
    """Whether all numbers are finite. Minimum and maximum, which are NaN if any number is, tell without a copy."""
    return values.numel() == 0 or all(bool(torch.isfinite(bound)) for bound in torch.aminmax(values))


def strategy_of(args: QuantizationArgs) -> str:
    """The strategy's name as a plain string; the field may be an enum member or a string."""
    return str(QuantizationStrategy(args.strategy).value)


def is_grouped(args: QuantizationArgs) -> bool:
    """Whether consecutive columns of a row share a scale."""
    return strategy_of(args) in ("group", "tensor_group")


def has_signed_scales(args: QuantizationArgs) -> bool:
    """Whether scales may be negative."""
    return bool(args.observer == SIGNED)


def needs_global_scale(args: QuantizationArgs) -> bool:
    """Whether scales are stored multiplied by a global scale of the tensor, as in NVFP4."""
    return strategy_of(args) == "tensor_group"


def work_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """The dtype to compute in: float64 if a tensor has it, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def tile(weight_OI: torch.Tensor, args: QuantizationArgs) -> torch.Tensor:
    """Cut a weight into the tiles that share a scale.

    Returns:
        [R, h, C, w]; a view of the weight unless it had to be padded with zeros.
    """
    num_out, num_in = weight_OI.shape
    strategy = strategy_of(args)
    heights_widths = {
        "tensor": (num_out, num_in),
        "channel": (1, num_in),
        "group": (1, args.group_size),
        "tensor_group": (1, args.group_size),
        "block": tuple(args.block_structure or ()),
    }
    height, width = heights_widths[strategy]
    missing = (0, -num_in % width, 0, -num_out % height)
    if any(missing):
        weight_OI = torch.nn.functional.pad(weight_OI, missing)
    num_out, num_in = weight_OI.shape
    return weight_OI.reshape(num_out // height, height, num_in // width, width)


def untile(tiles_RhCw: torch.Tensor, *, shape: tuple[int, int]) -> torch.Tensor:
    """Join tiles to a weight, without the padding of `tile`."""
    return tiles_RhCw.flatten(2, 3).flatten(0, 1)[: shape[0], : shape[1]].contiguous()


def parts_of_rows(matrix: torch.Tensor, height: int = 1) -> list[slice]:
    """Split the rows of a matrix into parts of about equal size that a cache can hold, `height` rows together.

    Equal, so that no part has a single row of tiles, which torch may sum up in another order.
    """
    num_rows, num_columns = matrix.shape
    num_parts = -(-num_rows // max(1, numbers_at_a_time(matrix.device.type) // max(num_columns, 1)))
    step = -(-num_rows // max(num_parts, 1) // height) * height
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


def numbers_at_a_time(device_type: str) -> int:
    """The numbers of a weight that a device processes at a time."""
    return NUMBERS_IN_CACHE if device_type == "cpu" else _NUMBERS_ON_GPU


def tile_height(args: QuantizationArgs) -> int:
    """The rows of a tile; 1 for the strategy tensor, whose tile may be cut except where its numbers are summed up."""
    return int(args.block_structure[0]) if strategy_of(args) == "block" else 1


def shared_global_scale(
    args: QuantizationArgs, given: torch.Tensor | None, weights: Sequence[torch.Tensor]
) -> torch.Tensor | None:
    """Return NVFP4's global scale: the given one, or by default that of the weights; None for other schemes."""
    return global_scale_of(*weights) if given is None and needs_global_scale(args) else given


def global_scale_of(*weights: torch.Tensor) -> torch.Tensor:
    """Compute the NVFP4 global scale [1], float32, that weights share: 448 * 6 / max |w|."""
    bounds = torch.stack([torch.stack(torch.aminmax(weight)) for weight in weights])
    return global_scale_for(bounds[:, 0].amin(), bounds[:, 1].amax())


def global_scale_for(minimum: torch.Tensor, maximum: torch.Tensor) -> torch.Tensor:
    """Compute the NVFP4 global scale [1], float32, of a range of numbers; 1 if they are all zero.

    The division uses the range's own dtype, as in compressed-tensors, unless it overflows there, as 448 * 6 over a
    number below 0.04 does in float16.
    """
    largest = torch.maximum(-minimum, maximum).clamp(min=0)
    limits = torch.finfo(largest.dtype)
    product = _LARGEST_OF_8_BITS * SMALL_FLOATS[4][2]
    if bool(largest > 0) and (float(product / largest) > _LARGEST_GLOBAL_SCALE or bool(largest < limits.tiny)):
        exact = (product / largest.double()).clamp(max=_LARGEST_GLOBAL_SCALE)
        return exact.to(torch.float32).reshape(1)
    found: torch.Tensor = generate_gparam(minimum, maximum)
    return found


def fit(
    minimum: torch.Tensor,
    maximum: torch.Tensor,
    args: QuantizationArgs,
    *,
    scale_dtype: torch.dtype,
    global_scale: torch.Tensor | None = None,
    reads: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute the stored scales, and int8 zero points or `None`, of grids that span the given ranges.

    Args:
        minimum: smallest values, any shape.
        maximum: largest values, in the same shape.
        args: the weight's half of a quantization scheme.
        scale_dtype: the dtype that the checkpoint stores scales in; NVFP4 and MX formats have their own.
        global_scale: NVFP4's.
        reads: whether to read numbers, which waits for a GPU; otherwise the caller checks that scales are finite.

    Raises:
        QuantizationError: if a scale cannot be represented in `scale_dtype`.
    """
    own_dtype = args.scale_dtype
    stored_dtype = own_dtype or scale_dtype
    if stored_dtype == torch.uint8:
        return _powers_of_two(minimum, maximum, args, reads=reads), None
    if has_signed_scales(args):
        scale = torch.maximum(-minimum, maximum).clamp(min=0) / 2 ** (args.num_bits - 1)
        zero_point: torch.Tensor = torch.zeros_like(scale, dtype=torch.int8)
    else:
        scale, zero_point = calculate_qparams(minimum, maximum, args, global_scale=global_scale)
    if own_dtype is None:
        scale = scale.to(scale_dtype)
    is_zero = (minimum >= 0) & (maximum <= 0)
    # The scale of a range of only zeros is eps, as in compressed-tensors.
    scale = torch.where(is_zero, torch.finfo(stored_dtype).eps, scale)
    is_lost = ~is_zero & (_is_below(minimum, maximum, args, global_scale, stored_dtype) | ~_finite(scale))
    if not reads or bool(is_lost.any()):
        exact = _spread(minimum.double(), maximum.double(), args, global_scale)
        scale = torch.where(is_lost, _rounded_up(exact, stored_dtype).to(scale.dtype), scale)
        half = 2.0 ** (args.num_bits - 1)
        exact_zero = (-half - minimum.double().clamp(max=0) / scale.double()).round().clamp(-half, half - 1)
        zero_point = torch.where(is_lost, exact_zero.to(zero_point.dtype), zero_point)
    if reads and not bool(_finite(scale).all()):
        span = f"{float(minimum.min()):g} to {float(maximum.max()):g}"
        raise QuantizationError(f"a scale for numbers from {span} overflows {str(stored_dtype).removeprefix('torch.')}")
    if has_signed_scales(args):
        scale = torch.where(maximum > -minimum, -scale, scale)
    # For zeros calculate_qparams divides 0 by 0, and NaN converted to int8 is undefined.
    has_zero = not args.symmetric and own_dtype is None
    return scale if own_dtype is None else scale.to(torch.float32), zero_point.masked_fill(
        is_zero, 0
    ) if has_zero else None


def _finite(scale: torch.Tensor) -> torch.Tensor:
    return torch.isfinite(scale.to(torch.float32))


def _smallest(dtype: torch.dtype) -> float:
    """The smallest scale of a dtype that readers can divide by: its inverse is finite in float32."""
    return max(float(torch.finfo(dtype).tiny) * float(torch.finfo(dtype).eps), float(torch.finfo(torch.float32).tiny))


def _coarse(dtype: torch.dtype) -> float:
    """The size below which a dtype's numbers are so far apart that a scale rounded down would clip the range."""
    return (2 if dtype.itemsize == 1 else 16) * _smallest(dtype)


def _is_below(
    minimum: torch.Tensor,
    maximum: torch.Tensor,
    args: QuantizationArgs,
    global_scale: torch.Tensor | None,
    stored_dtype: torch.dtype,
) -> torch.Tensor:
    """Whether each scale is so small that rounding it to the nearest number makes it zero or far too small."""
    dtype = work_dtype(minimum)
    low, high = minimum.to(dtype), maximum.to(dtype)
    is_below = _spread(low, high, args, global_scale) < _coarse(stored_dtype)
    return is_below | (_spread(low, high, args, None) < _coarse(minimum.dtype))


def _spread(
    minimum: torch.Tensor, maximum: torch.Tensor, args: QuantizationArgs, global_scale: torch.Tensor | None
) -> torch.Tensor:
    """Compute the scales before they are rounded to their stored dtype."""
    low, high = minimum.clamp(max=0), maximum.clamp(min=0)
    is_int = args.type == QuantizationType.INT
    steps = (2.0**args.num_bits - 1) / 2 if is_int else SMALL_FLOATS[args.num_bits][2]
    steps = 2.0 ** (args.num_bits - 1) if has_signed_scales(args) else steps
    scale = torch.maximum(-low, high) / steps if args.symmetric else (high - low) / (2 * steps)
    found: torch.Tensor = scale if global_scale is None else scale * global_scale.to(scale.dtype)
    return found


def _rounded_up(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Convert scales to their stored dtype: rounded up where its numbers are far apart, and never to zero."""
    step = _smallest(dtype)
    return torch.where(scale < _coarse(dtype), (scale / step).ceil().clamp(min=1) * step, scale).to(dtype)


def _powers_of_two(
    minimum: torch.Tensor, maximum: torch.Tensor, args: QuantizationArgs, *, reads: bool
) -> torch.Tensor:
    """Compute the scales of MX formats, in float32: in float16 small ones would become 0 and then be stored as 1."""
    scale, _ = calculate_qparams(minimum.float(), maximum.float(), args)
    if reads and not bool(_finite(scale).all()):
        raise QuantizationError(
            f"a scale for numbers up to {float(maximum.max()):g} overflows a power of two in 8 bits"
        )
    found: torch.Tensor = scale.clamp(min=torch.finfo(torch.float32).tiny)  # readers may flush a smaller one to zero
    return found


def effective(scale: torch.Tensor, global_scale: torch.Tensor | None) -> torch.Tensor:
    """The factor that grid points are multiplied by, from the stored scales."""
    return scale if global_scale is None else scale / global_scale


def snap_(
    values: torch.Tensor, factor: torch.Tensor, zero_point: torch.Tensor | None, args: QuantizationArgs
) -> torch.Tensor:
    """Replace each value by its nearest grid point, dequantized, in place.

    Args:
        values: float32 or float64; overwritten.
        factor: the factor of grid points (`effective`), in the values' dtype, broadcast against them.
        zero_point: in the values' dtype, broadcast against them, or `None`.
        args: the weight's half of a quantization scheme.

    Returns:
        The values.
    """
    values.div_(factor)
    if zero_point is not None:
        values.add_(zero_point)
    if args.type == QuantizationType.FLOAT:
        _snap_to_float_(values, args.num_bits)
    else:
        half = 2 ** (args.num_bits - 1)
        # Adding 1.5 * 2^23 drops exactly the fraction of a number of this size, rounded half to even. torch.round
        # gives the same, but wakes all threads for more than 2048 numbers, which takes milliseconds on shared cores,
        # and this runs once per column.
        shift = 1.5 * 2.0 ** (52 if values.dtype == torch.float64 else 23)
        values.clamp_(-half, half - 1).add_(shift).sub_(shift)
    if zero_point is not None:
        values.sub_(zero_point)
    return values.mul_(factor)


def _snap_to_float_(values: torch.Tensor, num_bits: int) -> None:
    if num_bits == 8 and (values.dtype == torch.float64 or values.device.type != "cpu"):
        largest = torch.finfo(torch.float8_e4m3fn).max
        values.clamp_(-largest, largest).copy_(values.to(torch.float8_e4m3fn))
        return
    mantissa_bits, smallest, largest = SMALL_FLOATS[num_bits]
    values.clamp_(-largest, largest)
    # On the CPU, torch converts single numbers from float8, which takes longer than this arithmetic of vectors: adding
    # a number of which the last bit is one step of the grid rounds half to even (see `snap_`). The step follows from
    # the power of two below a value, which its exponent's bits are.
    is_double = values.dtype == torch.float64
    bits, exponent = (torch.int64, 0x7FF << 52) if is_double else (torch.int32, 0xFF << 23)
    power = values.view(bits).bitwise_and(exponent).view(values.dtype).clamp_(min=smallest)
    power.mul_(1.5 * 2.0 ** ((52 if is_double else 23) - mantissa_bits))
    rounded = (values + power).sub_(power)
    torch.copysign(rounded, values, out=values)  # the sum loses the sign of zero


def stored(tensor_RC: torch.Tensor, args: QuantizationArgs) -> torch.Tensor:
    """Reshape a scale or zero point to the shape that compressed-tensors stores for the strategy."""
    return tensor_RC.reshape(1) if strategy_of(args) == "tensor" else tensor_RC.contiguous()
