"""Checkpoints of ModelOpt: small numbers in `weight`, and their scales in `weight_scale` and `weight_scale_2`.

The format of a module is taken from the dtypes and shapes of its tensors, so that a checkpoint may have several. A
stack of experts X has `X_weight_scale`, and so on. Shapes: O out features, I in features.

fp8     `weight` [O, I] in float8_e4m3fn; a scale for all, for each row, or for each block.
mxfp8   the same with exponents of two, as bytes, for each 32 in features.
int8    `weight` [O, I] in int8; a scale for each row.
nvfp4   `weight` [O, I/2], two numbers per byte; `weight_scale` [O, I/16] in float8_e4m3fn, times `weight_scale_2`.
mxfp4   `weight` [O, I/2]; exponents of two, as bytes, for each 32 in features.

A weight is number * (weight_scale * weight_scale_2) in float32, rounded once. `pre_quant_scale` [I] of NVFP4_AWQ, by
which the layer multiplies its inputs, is multiplied into the weight.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from runtime.checkpoint.source_formats import FLOATS, MODELOPT, Packed, PackedTensors, SourceHeaders, described
from runtime.errors import WeightsError

if TYPE_CHECKING:
    import torch

    from runtime.checkpoint.stored import Stored

MODELOPT_METHODS = (MODELOPT, "modelopt_fp4", "modelopt_mixed", "modelopt_mxfp8")
_SCALE = "weight_scale"
_SCALES_OF_INPUTS = ("input_scale", "k_scale", "v_scale", "q_scale", "output_scale")
_SCALE_DTYPES = (*FLOATS, "F8_E4M3", "F8_E8M0", "U8")
_LOW_RANK = ("svdquant_lora_a", "svdquant_lora_b")
_GROUP, _MX_GROUP = 16, 32
_NUMBERS_AT_A_TIME = 2**22  # of a weight


def find_modelopt(entry: Mapping[str, Any], headers: SourceHeaders) -> PackedTensors:
    """Find the weights that ModelOpt has quantized.

    Raises:
        WeightsError: for another format, and for tensors that do not fit each other.
    """
    tensors: dict[str, Packed] = {}
    unused = []
    for key in headers.tensors:
        leaf = key.rpartition(".")[2]
        if leaf in _LOW_RANK:
            raise _unsupported(key, entry, headers)
        if leaf == _SCALE or leaf.endswith(f"_{_SCALE}"):
            weight = key.removesuffix("_scale") if leaf == _SCALE else key.removesuffix(f"_{_SCALE}")
            if weight not in headers.tensors:
                raise WeightsError(f"{headers.origin} contains {key!r} without its weight {weight!r}")
            tensors[weight] = _packed(weight, key, entry, headers)
        elif any(leaf == name or leaf.endswith(f"_{name}") for name in _SCALES_OF_INPUTS):
            unused.append(key)
    used = {part for packed in tensors.values() for part in packed.parts.values()}
    for key in headers.tensors:
        if key.endswith(f"{_SCALE}_2") and key not in used:
            headers.need(key.removesuffix("_2"), _SCALE_DTYPES, key)
        if key.endswith("pre_quant_scale") and key not in used:
            raise _unsupported(key, entry, headers)
    return PackedTensors(tensors=tensors, unused=tuple(unused))


def _unsupported(key: str, entry: Mapping[str, Any], headers: SourceHeaders) -> WeightsError:
    found = headers.tensors[key]
    return WeightsError(
        f"{headers.origin} is quantized by {described(entry)}, and {key!r} ({found.dtype} {list(found.shape)}) is not "
        "of a format that is supported as input",
        hint="FP8, MXFP8, INT8, NVFP4 and MXFP4 are; start from the original checkpoint",
    )


def _packed(weight: str, scale: str, entry: Mapping[str, Any], headers: SourceHeaders) -> Packed:
    stored = headers.tensors[weight]
    factors = headers.need(scale, _SCALE_DTYPES, weight)
    second = headers.tensors.get(f"{scale}_2")
    smoothing = headers.tensors.get(f"{weight.removesuffix('weight')}pre_quant_scale")
    is_nibbles = stored.dtype == "U8"
    if len(stored.shape) not in (2, 3) or stored.dtype not in ("F8_E4M3", "I8", "U8") or 0 in stored.shape:
        raise _unsupported(weight, entry, headers)
    if is_nibbles and factors.dtype == "F8_E4M3":
        headers.need(f"{scale}_2", ("F32",), weight)
    if is_nibbles and (factors.dtype != ("F8_E4M3" if second is not None else "U8")):
        raise _unsupported(weight, entry, headers)  # INT4, for instance
    axis = _packed_axis(stored, factors, _GROUP if second is not None else _MX_GROUP) if is_nibbles else -1
    shape = tuple(n * (1 + (is_nibbles and place == len(stored.shape) + axis)) for place, n in enumerate(stored.shape))
    grid = _grid(shape, factors)
    if grid is None or (is_nibbles and not axis):
        raise headers.misfit(factors, "a scale for all, for each row or for each block", repr(weight))
    parts = {"weight": weight, "scale": scale}
    if second is not None:
        headers.need(second.name, ("F32",), weight)
        if math.prod(second.shape) != 1 and second.shape != shape[:-2]:
            raise headers.misfit(second, "one scale", repr(weight))
        parts["second"] = second.name
    if smoothing is not None:
        headers.need(smoothing.name, FLOATS, weight)
        if smoothing.shape != shape[-1:] or len(shape) > 2:
            raise headers.misfit(smoothing, f"[{shape[-1]}]", repr(weight))
        parts["smoothing"] = smoothing.name
    by_expert = [role for role, key in parts.items() if headers.tensors[key].shape[:1] == shape[:1] and len(shape) > 2]
    return Packed(
        parts=parts,
        shape=shape,
        compute=functools.partial(_undo, grid=(grid[-2], grid[-1]), packed_axis=axis if is_nibbles else 0),
        by_expert=tuple(by_expert),
    )


def _packed_axis(weight: Stored, scale: Stored, group: int) -> int:
    """Return the axis along which bytes hold two numbers each: -1, in a stack of transposed experts -2; else 0."""
    for axis in (-1, -2)[: len(weight.shape) - 1]:
        expected = list(weight.shape)
        expected[axis] = expected[axis] * 2 // group
        if tuple(expected) == scale.shape and weight.shape[axis] * 2 % group == 0:
            return axis
    return 0


def _grid(shape: tuple[int, ...], scale: Stored) -> tuple[int, ...] | None:
    """Return the shape of the scales with an axis for each of the weight's; None if they do not fit it."""
    found = scale.shape
    if len(found) == 2 * len(shape):  # [O/b, 1, I/b, 1]
        found = found[::2] if set(found[1::2]) == {1} else found
    if len(shape) == 3 and found == shape[:1]:
        found = (shape[0], 1, 1)
    if found in ((), (1,)):
        found = (1,) * len(shape)
    elif found == shape[:-1]:  # of rows
        found = (*found, 1)
    if len(found) != len(shape):
        return None
    return found if all(_is_cut(size, n) for size, n in zip(shape, found, strict=True)) else None


def _is_cut(size: int, num_blocks: int) -> bool:
    """Whether an axis of this size has this number of blocks, of which only the last may be smaller."""
    return num_blocks == 1 or (0 < num_blocks <= size and -(-size // -(-size // num_blocks)) == num_blocks)


def _undo(
    parts: Mapping[str, torch.Tensor], dtype: torch.dtype, *, grid: tuple[int, int], packed_axis: int
) -> torch.Tensor:
    """Compute a weight [..., O, I]; `grid` is the number of scales along its last two axes."""
    import torch

    weight, factors = parts["weight"], _as_numbers(parts["scale"])
    stack = weight[None] if weight.dim() == 2 else weight
    factors = factors.reshape(-1, *grid)
    factors = factors.expand(len(stack), *grid) if len(factors) == 1 else factors
    if "second" in parts:
        factors = factors * parts["second"].reshape(-1, 1, 1)
    smoothing = parts["smoothing"].float() if "smoothing" in parts else None
    made = [
        torch.cat([part.to(dtype) for part in _rows(one, own, smoothing, packed_axis)])
        for one, own in zip(stack, factors, strict=True)
    ]
    return made[0] if weight.dim() == 2 else torch.stack(made)


def _rows(
    weight: torch.Tensor, factors: torch.Tensor, smoothing: torch.Tensor | None, packed_axis: int
) -> Iterator[torch.Tensor]:
    """Yield some rows of a weight in float32 at a time; a row of blocks is not cut."""
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

    rows_per_byte, columns_per_byte = (2 if packed_axis == axis else 1 for axis in (-2, -1))
    num_rows, num_columns = weight.shape[0] * rows_per_byte, weight.shape[1] * columns_per_byte
    height, width = (-(-n // m) for n, m in zip((num_rows, num_columns), factors.shape, strict=True))
    step = max(_NUMBERS_AT_A_TIME // num_columns // height, 1) * height
    for begin in range(0, num_rows, step):
        numbers = weight[begin // rows_per_byte : -(-(begin + step) // rows_per_byte)]
        if packed_axis == -1:
            numbers = unpack_fp4_from_uint8(numbers.contiguous(), len(numbers), num_columns, dtype=factors.dtype)
        elif packed_axis == -2:
            turned = numbers.T.contiguous()
            numbers = unpack_fp4_from_uint8(turned, num_columns, 2 * len(numbers), dtype=factors.dtype).T
        own = factors[begin // height : -(-(begin + step) // height)]
        wide = own.repeat_interleave(height, 0)[: len(numbers)].repeat_interleave(width, 1)[:, :num_columns]
        made = numbers.float() * wide
        yield made if smoothing is None else made.mul_(smoothing)


def _as_numbers(scale: torch.Tensor) -> torch.Tensor:
    import torch

    return (scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale).float()
