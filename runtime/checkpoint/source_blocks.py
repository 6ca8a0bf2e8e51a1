"""Checkpoints whose weights are small floats in blocks that share a scale, as DeepSeek and OpenAI publish them.

fp8     DeepSeek's: `weight` [O, I] in float8_e4m3fn, and `weight_scale_inv` [O/b, I/b], a scale for each block; a scale
        for the whole tensor is one block. Experts may be stacked, with one more axis in front.
mxfp4   gpt-oss's: `X_blocks` [E, O, I/32, 16], two numbers per byte, and `X_scales` [E, O, I/32], exponents of two. The
        model's parameter is X [E, I, O].

Tensors without a scale (`modules_to_not_convert`) are already plain. The arithmetic is that of compressed-tensors: a
block of float8 numbers times its scale, in float32, rounded once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from runtime.checkpoint.source_formats import Packed, PackedTensors, SourceHeaders
from runtime.errors import WeightsError

if TYPE_CHECKING:
    import torch
    from compressed_tensors.quantization import QuantizationScheme

_SCALE, _BLOCKS, _SCALES = "_scale_inv", "_blocks", "_scales"
_INPUT_SCALE = "activation_scale"
_MX_GROUP = 32
_USUAL_BLOCK = (128, 128)
_SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0", "U8")


def find_fp8(entry: Mapping[str, Any], headers: SourceHeaders) -> PackedTensors:
    """Find weights in float8 with a scale for each block.

    Raises:
        WeightsError: for tensors that do not fit each other or the entry.
    """
    origin, block = headers.origin, _block(entry, headers.origin)
    found: dict[str, Packed] = {}
    for name, scale in headers.tensors.items():
        if not name.endswith(_SCALE):
            continue
        key = name.removesuffix(_SCALE)
        if key not in headers.tensors or len(headers.tensors[key].shape) < 2:
            raise WeightsError(f"{origin} contains {name!r} without its weight {key!r}")
        shape = headers.need(key, ("F8_E4M3",), name).shape
        headers.need(name, _SCALE_DTYPES, key)
        if 0 in shape:
            raise headers.misfit(headers.tensors[key], "a matrix", repr(name))
        own = block if block is not None else (shape[-2], shape[-1])
        expected = (*shape[:-2], -(-shape[-2] // own[0]), -(-shape[-1] // own[1]))
        if scale.shape != expected and not (block is None and math.prod(scale.shape) == math.prod(expected)):
            raise WeightsError(
                f"{origin}: {name!r} has shape {list(scale.shape)}, and blocks of {own[0]}x{own[1]} of {key!r} "
                f"{list(shape)} need {list(expected)}",
                hint="check weight_block_size in its config.json",
            )
        found[key] = Packed(
            parts={"weight": key, "scale": name},
            shape=shape,
            compute=functools.partial(_undo_fp8, block=own),
            by_expert=("weight", "scale") if len(shape) > 2 and len(scale.shape) == len(shape) else (),
        )
    return PackedTensors(tensors=found, unused=tuple(key for key in headers.tensors if key.endswith(_INPUT_SCALE)))


def _block(entry: Mapping[str, Any], origin: str) -> tuple[int, int] | None:
    """Return rows and columns of a block; None if a whole tensor is one block."""
    block = entry.get("weight_block_size", _USUAL_BLOCK)
    if block is None:
        return None
    if not isinstance(block, (list, tuple)) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        raise WeightsError(f"{origin}: its config.json has weight_block_size = {block!r}, not two positive numbers")
    return block[0], block[1]


def _undo_fp8(parts: Mapping[str, torch.Tensor], dtype: torch.dtype, *, block: tuple[int, int]) -> torch.Tensor:
    """Compute a weight [..., O, I] from quantized numbers and the scales of their blocks."""
    import torch
    from compressed_tensors.entrypoints.convert import FP8BlockDequantizer

    weight, scale = parts["weight"], parts["scale"]
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    rows, columns = weight.shape[-2:]
    converter = FP8BlockDequantizer(weight_block_size=block, dtype=dtype)
    numbers = weight.reshape(-1, rows, columns)
    factors = scale.reshape(len(numbers), -(-rows // block[0]), -(-columns // block[1]))
    made = [
        converter.process({"linear.weight": one, "linear.weight_scale_inv": own})["linear.weight"]
        for one, own in zip(numbers, factors, strict=True)
    ]
    return made[0].reshape(weight.shape) if len(made) == 1 else torch.stack(made).reshape(weight.shape)


def find_mxfp4(headers: SourceHeaders) -> PackedTensors:
    """Find stacked experts in MXFP4.

    Raises:
        WeightsError: for tensors that do not fit each other.
    """
    found: dict[str, Packed] = {}
    for key, blocks in headers.tensors.items():
        if not key.endswith(_BLOCKS):
            continue
        name = key.removesuffix(_BLOCKS)
        scales = headers.tensors.get(f"{name}{_SCALES}")
        shape = blocks.shape
        if len(shape) != 4 or 0 in shape or shape[-1] * 2 != _MX_GROUP or scales is None or scales.shape != shape[:-1]:
            shapes = f"{key!r} {list(shape)} and {name + _SCALES!r} {list(scales.shape) if scales else []}"
            raise WeightsError(f"{headers.origin}: {shapes} are not valid MXFP4 experts")
        for stored in (blocks, scales):
            headers.need(stored.name, ("U8",), name)
        num_experts, num_out, num_groups, _ = shape
        found[name] = Packed(
            parts={"blocks": key, "scale": scales.name},
            shape=(num_experts, num_groups * _MX_GROUP, num_out),
            compute=_undo_mxfp4,
            by_expert=("blocks", "scale"),
        )
    return PackedTensors(tensors=found)


@functools.cache  # a stack is read expert by expert
def _mxfp4() -> QuantizationScheme:
    from compressed_tensors.quantization import preset_name_to_scheme

    from runtime.formats.presets import checked

    return checked(preset_name_to_scheme("MXFP4A16", ["Linear"]))


def _undo_mxfp4(parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Compute experts [..., I, O] from blocks [..., O, I/32, 16] and scales [..., O, I/32]."""
    import torch

    from runtime.formats.compressed import decompress_module

    scheme, blocks, scales = _mxfp4(), parts["blocks"], parts["scale"]
    num_out, num_groups = scales.shape[-2:]
    packed = blocks.reshape(-1, num_out, num_groups * _MX_GROUP // 2)
    factors = scales.reshape(len(packed), num_out, num_groups)
    made = [
        decompress_module({"weight_packed": one, "weight_scale": own}, scheme).to(dtype).T
        for one, own in zip(packed, factors, strict=True)
    ]
    return torch.stack(made).reshape(*blocks.shape[:-3], num_groups * _MX_GROUP, num_out)
