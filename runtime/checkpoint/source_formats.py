"""Recognize the quantized tensors of a source checkpoint by names and shapes.

Two formats are dequantized while they are read, so that a model is converted to another format in one step:

fp8     DeepSeek's: `weight` [O, I] in float8_e4m3fn, and `weight_scale_inv` [O/b, I/b], a scale for each block; a scale
        for the whole tensor is one block. Experts may be stacked, with one more axis in front.
mxfp4   gpt-oss's: `X_blocks` [E, O, I/32, 16], two numbers per byte, and `X_scales` [E, O, I/32], exponents of two. The
        model's parameter is X [E, I, O].

Tensors without a scale (`modules_to_not_convert`) are already plain.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runtime.errors import WeightsError

ENTRY = "quantization_config"
OLD_ENTRY = "compression_config"  # of early versions of compressed-tensors, which vLLM still reads
FP8, MXFP4 = "fp8", "mxfp4"
READABLE = "compressed-tensors"  # not dequantized here: the reader takes weights as they are stored

_SCALE, _BLOCKS, _SCALES = "_scale_inv", "_blocks", "_scales"
_INPUT_SCALE = "activation_scale"
_MX_GROUP = 32
_USUAL_BLOCK = (128, 128)


@dataclass(frozen=True, kw_only=True, slots=True)
class Packed:
    """A plain tensor that is stored as two tensors.

    Attributes:
        method: FP8 or MXFP4.
        parts: names of the two tensors: numbers and their scales.
        shape: of the plain tensor.
        block: rows and columns that share a scale.
    """

    method: str
    parts: tuple[str, str]
    shape: tuple[int, ...]
    block: tuple[int, int]


def stated(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the quantization entry of a config.json; empty for a plain checkpoint.

    A model with several parts may have the entry in its text config.
    """
    path = entry_path(config)
    found: Mapping[str, Any] = config
    for name in path.split(".") if path else ():
        found = found[name]
    return found if path else {}


def entry_path(config: Mapping[str, Any]) -> str:
    """Return the path of the quantization entry in a config.json; empty for a plain checkpoint."""
    for prefix, part in (("", config), ("text_config.", config.get("text_config"))):
        for name in (ENTRY, OLD_ENTRY):
            if isinstance(part, Mapping) and isinstance(part.get(name), Mapping) and part[name]:
                return f"{prefix}{name}"
    return ""


def described(entry: Mapping[str, Any]) -> str:
    """Describe a quantization entry: its method, and the algorithm or number of bits if stated."""
    bits = entry.get("bits", entry.get("w_bit"))
    detail = entry.get("quant_algo") or (f"{bits} bits" if bits is not None else "")
    return " ".join(str(part) for part in (entry.get("quant_method") or "no quant_method", detail) if part)[:200]


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of the same model with plain weights."""
    entries = (ENTRY, OLD_ENTRY)
    plain = {name: value for name, value in config.items() if name not in entries}
    if isinstance(plain.get("text_config"), Mapping):
        plain["text_config"] = {name: value for name, value in plain["text_config"].items() if name not in entries}
    return plain


def packed_tensors(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], origin: str
) -> tuple[dict[str, Packed], list[str]]:
    """Find the tensors to dequantize.

    Args:
        config: the checkpoint's config.json.
        shapes: of all its tensors.
        origin: the checkpoint's name in messages.

    Returns:
        The packed form of each plain tensor by its name, and the names of tensors that are then unused.

    Raises:
        WeightsError: for a quantization that is neither of these nor one of compressed-tensors, and for tensors whose
            shapes do not match.
    """
    entry = stated(config)
    method = entry.get("quant_method")
    if not entry or method == READABLE:
        return {}, []
    if method == FP8:
        return _fp8(entry, shapes, origin)
    if method == MXFP4:
        return _mxfp4(shapes, origin), []
    raise WeightsError(
        f"{origin} is quantized by {described(entry)!r}, a format that is not supported as input",
        hint=f"start from the original checkpoint, or from one in {FP8}, {MXFP4} or {READABLE}",
    )


def plain_shapes(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], origin: str
) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the checkpoint's tensors after dequantizing those of `packed_tensors`."""
    packed, unused = packed_tensors(config, shapes, origin)
    gone = dict.fromkeys([*unused, *(part for tensor in packed.values() for part in tensor.parts)])
    plain = {key: shape for key, shape in shapes.items() if key not in gone}
    return dict(sorted((plain | {key: tensor.shape for key, tensor in packed.items()}).items()))


def _fp8(
    entry: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], origin: str
) -> tuple[dict[str, Packed], list[str]]:
    block = _block(entry, origin)
    found: dict[str, Packed] = {}
    for scale, scale_shape in shapes.items():
        if not scale.endswith(_SCALE):
            continue
        key = scale.removesuffix(_SCALE)
        shape = shapes.get(key)
        if shape is None or len(shape) < 2:
            raise WeightsError(f"{origin} contains {scale!r} without its weight {key!r}")
        own = block if block is not None else (shape[-2], shape[-1])
        expected = (*shape[:-2], -(-shape[-2] // own[0]), -(-shape[-1] // own[1]))
        if scale_shape != expected and not (block is None and math.prod(scale_shape) == math.prod(expected)):
            raise WeightsError(
                f"{origin}: {scale!r} has shape {list(scale_shape)}, and blocks of {own[0]}x{own[1]} of {key!r} "
                f"{list(shape)} need {list(expected)}",
                hint="check weight_block_size in its config.json",
            )
        found[key] = Packed(method=FP8, parts=(key, scale), shape=shape, block=own)
    return found, [key for key in shapes if key.endswith(_INPUT_SCALE)]


def _block(entry: Mapping[str, Any], origin: str) -> tuple[int, int] | None:
    """Return rows and columns of a block; None if a whole tensor is one block."""
    block = entry.get("weight_block_size", _USUAL_BLOCK)
    if block is None:
        return None
    if not isinstance(block, (list, tuple)) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        raise WeightsError(f"{origin}: its config.json has weight_block_size = {block!r}, not two positive numbers")
    return block[0], block[1]


def _mxfp4(shapes: Mapping[str, tuple[int, ...]], origin: str) -> dict[str, Packed]:
    found: dict[str, Packed] = {}
    for key, shape in shapes.items():
        if not key.endswith(_BLOCKS):
            continue
        name = key.removesuffix(_BLOCKS)
        scales = f"{name}{_SCALES}"
        if len(shape) != 4 or shape[-1] * 2 != _MX_GROUP or shapes.get(scales) != shape[:-1]:
            found_shapes = f"{key!r} {list(shape)} and {scales!r} {list(shapes.get(scales, ()))}"
            raise WeightsError(f"{origin}: {found_shapes} are not valid MXFP4 experts")
        num_experts, num_out, num_groups, _ = shape
        plain = (num_experts, num_groups * _MX_GROUP, num_out)
        found[name] = Packed(method=MXFP4, parts=(key, scales), shape=plain, block=(1, _MX_GROUP))
    return found
