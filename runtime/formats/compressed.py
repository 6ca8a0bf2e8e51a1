"""The tensors that a quantized checkpoint stores for a scheme: pack a weight into them, and unpack it as a reader does.

The adapter to the compressors of compressed-tensors. `runtime.formats.presets` defines the supported schemes.

Shapes: O out features, I in features.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized import pack_to_int32
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from runtime.errors import QuantizationError, WeightsError
from runtime.formats.packing import pack_rows

if TYPE_CHECKING:
    from runtime.algorithms.result import QuantizedWeight

_ROWS_AT_A_TIME = 480  # a multiple of the rows after which packing 2 to 8 bit numbers along rows starts a new word
_LONG_ROW = 2**20  # elements; a row's length comes from an artifact, which may state any
NUMBERS_AT_A_TIME = 2**20  # of a weight; a compressor holds several copies of its input
NUMBERS_ON_DEVICE = 2**24  # the same on a GPU, where the calls for fewer numbers take longer than their work


def compress_module(name: str, result: QuantizedWeight, scheme: QuantizationScheme) -> dict[str, torch.Tensor]:
    """Pack a quantized weight into the tensors that the checkpoint stores for its module.

    Args:
        name: the module's name, for messages.
        result: an algorithm's result. Its weight is in float32; a narrower dtype may move it off its grid.
        scheme: with its format, as `presets.checked` returns it.

    Returns:
        Contiguous tensors by their name in the module: weight_packed or weight, weight_scale, and depending on the
        format weight_shape, weight_zero_point, weight_global_scale, and the scales of static inputs.

    Raises:
        QuantizationError: if weight, scale, zero point and scheme are inconsistent.
    """
    rows = compress_rows(name, result, scheme)
    return join_rows(name, [rows], result.weight_OI.shape[1], scheme, result.inputs)


def compress_rows(name: str, rows: QuantizedWeight, scheme: QuantizationScheme) -> dict[str, torch.Tensor]:
    """Pack some rows of a quantized weight, for `join_rows`; a row of blocks that share scales may not be cut.

    Args:
        name: the module's name, for messages.
        rows: an algorithm's result for these rows, without the scales of static inputs.
        scheme: with its format.

    Returns:
        Contiguous tensors as described by `rows_layout`. Zero points are not packed, because words hold those of
        several rows.

    Raises:
        QuantizationError: if weight, scale, zero point and scheme are inconsistent.
    """
    weights = scheme.weights
    shape = _scale_shape(rows.weight_OI.shape, weights)
    if list(rows.scale.shape) != shape:
        raise QuantizationError(
            f"{name}: the scale has the shape {list(rows.scale.shape)}, but the weight's scheme requires {shape}"
        )
    if (rows.zero_point is None) != weights.symmetric:
        raise QuantizationError(f"{name}: an asymmetric scheme requires a zero point, a symmetric one has none")
    if (rows.global_scale is None) != (weights.strategy != "tensor_group"):
        raise QuantizationError(f"{name}: NVFP4 requires a global scale, other schemes have none")
    packed = pack_rows(rows, scheme) or _compressed(rows, scheme)
    if rows.zero_point is not None:
        packed["weight_zero_point"] = rows.zero_point.contiguous()
    return packed


def _compressed(rows: QuantizedWeight, scheme: QuantizationScheme) -> dict[str, torch.Tensor]:
    """Pack rows with the compressor of their format."""
    state = {"weight": rows.weight_OI, "weight_scale": rows.scale}
    if rows.zero_point is not None:
        state["weight_zero_point"] = rows.zero_point
    if rows.global_scale is not None:
        state["weight_global_scale"] = rows.global_scale
    compressor = _compressor(scheme)
    num_out = len(rows.weight_OI)
    by_row = [key for key, tensor in state.items() if len(tensor) == num_out > 1]
    parts = [
        compressor.compress({key: t[some] if key in by_row else t for key, t in state.items()}, scheme)
        for some in _parts_of_rows(rows.weight_OI.shape, rows.weight_OI.device.type, is_cut="weight_scale" in by_row)
    ]
    return {key: _joined(key, [part[key] for part in parts], by_row) for key in parts[0] if key != "weight_shape"}


def join_rows(
    name: str,
    parts: Sequence[Mapping[str, torch.Tensor]],
    num_in: int,
    scheme: QuantizationScheme,
    inputs: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Join all rows of a weight to the tensors that `compress_module` returns for the whole weight.

    Args:
        name: the module's name, for messages.
        parts: the results of `compress_rows`, in the order of the rows.
        num_in: I.
        scheme: with its format.
        inputs: the scales of static inputs by their name in the checkpoint.

    Raises:
        QuantizationError: if these are not the scales that the scheme requires.
    """
    if set(inputs) != set(input_parts(scheme)):
        raise QuantizationError(f"{name}: the scheme of its inputs requires {input_parts(scheme)}, not {list(inputs)}")
    packed = joined_rows(parts, scheme)
    num_out = len(packed["weight" if "weight" in packed else "weight_packed"])
    assert list(packed["weight_scale"].shape) == _scale_shape((num_out, num_in), scheme.weights), "parts are missing"
    if scheme.format == CompressionFormat.pack_quantized.value:
        if "weight_zero_point" in packed:
            words = pack_to_int32(packed["weight_zero_point"], scheme.weights.num_bits, packed_dim=0)
            packed["weight_zero_point"] = words.contiguous()
        packed["weight_shape"] = torch.tensor([num_out, num_in])
    return {**packed, **inputs}


def joined_rows(parts: Sequence[Mapping[str, torch.Tensor]], scheme: QuantizationScheme) -> dict[str, torch.Tensor]:
    """Join the results of `compress_rows` for consecutive rows to the result for all of them."""
    by_row = () if scheme.weights.strategy == "tensor" else ("weight_scale", "weight_zero_point")
    return {key: _joined(key, [part[key] for part in parts], by_row) for key in parts[0]}


def rows_layout(
    shape: tuple[int, int], scheme: QuantizationScheme, scale_dtype: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Names, shapes and dtypes of what `compress_rows` returns for rows of this shape, in its order.

    Args:
        shape: of the rows, [R, I].
        scheme: with its format.
        scale_dtype: the dtype of stored scales, unless the format defines its own.
    """
    shapes, dtypes = stored_shapes(shape, scheme), stored_dtypes(scheme, scale_dtype)
    if "weight_zero_point" in shapes:
        shapes["weight_zero_point"], dtypes["weight_zero_point"] = shapes["weight_scale"], torch.int8
    absent = ("weight_shape", *input_parts(scheme))
    return {name: (shapes[name], dtype) for name, dtype in dtypes.items() if name not in absent}


def _parts_of_rows(shape: Sequence[int], device_type: str, *, is_cut: bool) -> list[slice]:
    """Split the rows of a weight into parts to process one at a time; one part unless `is_cut`."""
    num_out, num_in = shape
    numbers = NUMBERS_AT_A_TIME if device_type == "cpu" else NUMBERS_ON_DEVICE
    step = max(1, numbers // max(num_in, 1) // _ROWS_AT_A_TIME) * _ROWS_AT_A_TIME
    return [slice(start, start + step) for start in range(0, num_out, step)] if is_cut else [slice(0, num_out)]


def _joined(key: str, parts: Sequence[torch.Tensor], by_row: Sequence[str]) -> torch.Tensor:
    is_cut = key in by_row or key in ("weight", "weight_packed")
    return torch.cat(list(parts)) if is_cut and len(parts) > 1 else parts[0].contiguous()


def input_parts(scheme: QuantizationScheme) -> tuple[str, ...]:
    """Names of the tensors that hold the scales of static inputs."""
    inputs = scheme.input_activations
    if inputs is None or inputs.dynamic is True:
        return ()
    if inputs.dynamic == "local":
        return ("input_global_scale",)
    return ("input_scale",) if inputs.symmetric else ("input_scale", "input_zero_point")


def _scale_shape(shape: Sequence[int], args: QuantizationArgs) -> list[int]:
    num_out, num_in = shape
    if args.strategy == "tensor":
        return [1]
    if args.strategy == "block":
        height, width = args.block_structure
        return [-(-num_out // height), -(-num_in // width)]
    return [num_out, -(-num_in // args.group_size) if args.strategy in ("group", "tensor_group") else 1]


def decompress_module(tensors: Mapping[str, torch.Tensor], scheme: QuantizationScheme) -> torch.Tensor:
    """Unpack a module's tensors into the dense weight that a reader of the checkpoint uses.

    Args:
        tensors: by their name in the module, as `compress_module` returns them.
        scheme: with its format.

    Returns:
        weight_OI in the scale's dtype; in bfloat16 for formats of small floats.

    Raises:
        WeightsError: if a tensor is missing.
    """
    compressor = _compressor(scheme)
    parts = {name: tensor for name, tensor in tensors.items() if not name.startswith("input_")}
    missing = [
        key for key in compressor.compression_param_names(scheme) if key not in parts and not key.startswith("input_")
    ]
    if missing:
        raise WeightsError(
            f"missing {', '.join(missing)}, required by the format {CompressionFormat(scheme.format).value}",
            hint=f"the module has {', '.join(tensors)}",
        )
    if "weight_zero_point" in parts and len(parts["weight_zero_point"]) == 1:
        # compressed-tensors views its transpose as bytes, for which torch requires the last stride to be 1.
        parts["weight_zero_point"] = parts["weight_zero_point"].as_strided(parts["weight_zero_point"].shape, (1, 1))
    by_row = [key for key in ("weight", "weight_packed", "weight_scale") if key in parts]
    num_out = len(parts[by_row[0]])
    is_cut = "weight_zero_point" not in parts and num_out == len(parts["weight_scale"]) > _ROWS_AT_A_TIME
    if not is_cut:
        weight_OI: torch.Tensor = compressor.decompress(parts, scheme)["weight"]
        return weight_OI
    num_in = int(parts["weight_shape"][1]) if "weight_shape" in parts else parts[by_row[0]].shape[1]
    dense = []
    for rows in _parts_of_rows((num_out, num_in), parts[by_row[0]].device.type, is_cut=True):
        some = {key: tensor[rows] if key in by_row else tensor for key, tensor in parts.items()}
        if "weight_shape" in some:
            some["weight_shape"] = parts["weight_shape"].new_tensor((len(some[by_row[0]]), num_in))
        dense.append(compressor.decompress(some, scheme)["weight"])
    return torch.cat(dense)


def stored_shapes(shape: tuple[int, ...], scheme: QuantizationScheme) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a checkpoint stores for a weight.

    Args:
        shape: of the dense weight, [O, I].
        scheme: with its format.
    """
    args = scheme.weights
    sizes = _scale_shape(shape, args)
    # Compressing a few rows shows the shapes of all. Meta tensors would, too, but to round them torch imports libraries
    # for half a second, which then stay in memory.
    height = min(args.block_structure[0], shape[0]) if args.strategy == "block" else 1
    few = (height, shape[1])
    with torch.device("cpu" if shape[1] <= _LONG_ROW else "meta"):
        state = {"weight": torch.zeros(few), "weight_scale": torch.ones(_scale_shape(few, args))}
        if not args.symmetric:
            state["weight_zero_point"] = torch.zeros(_scale_shape(few, args), dtype=torch.int8)
        if args.strategy == "tensor_group":
            state["weight_global_scale"] = torch.ones(1)
    packed = _compressor(scheme).compress(state, scheme)
    found = {
        name: (shape[0], *tensor.shape[1:]) if name in ("weight", "weight_packed") else tuple(tensor.shape)
        for name, tensor in packed.items()
    }
    found["weight_scale"] = tuple(sizes)
    if not args.symmetric:
        num_rows, *rest = sizes
        if scheme.format == CompressionFormat.pack_quantized.value:  # packed along the rows
            num_rows = math.ceil(num_rows * args.num_bits / 32)
        found["weight_zero_point"] = (num_rows, *rest)
    return found | dict.fromkeys(input_parts(scheme), (1,))


def stored_dtypes(scheme: QuantizationScheme, scale_dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Names and dtypes of the tensors that a checkpoint stores for a weight, in the order of `compress_module`.

    Args:
        scheme: with its format.
        scale_dtype: the dtype of stored scales, unless the format defines its own.
    """
    from runtime.algorithms.rtn import quantize_rtn

    args = scheme.weights
    weight_OI = torch.ones(1, max(args.group_size or 0, 32))  # a group size of -1 means the whole row
    plain = args.model_copy(update={"observer": None, "observer_kwargs": {}})
    result = quantize_rtn(weight_OI, plain, scale_dtype=scale_dtype)
    dtypes = {"input_scale": scale_dtype, "input_zero_point": torch.int8, "input_global_scale": torch.float32}
    inputs = {part: torch.ones(1, dtype=dtypes[part]) for part in input_parts(scheme)}
    tensors = compress_module("", dataclasses.replace(result, inputs=inputs), scheme)
    return {name: tensor.dtype for name, tensor in tensors.items()}


def _compressor(scheme: QuantizationScheme) -> Any:
    return BaseCompressor.get_value_from_registry(CompressionFormat(scheme.format).value)


def static_input_parts(
    minimum: torch.Tensor, maximum: torch.Tensor, args: QuantizationArgs, scale_dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Compute the tensors that `input_parts` names from an input's minimum and maximum, both scalars."""
    from runtime.algorithms import grid

    low, high = minimum.float().reshape(1), maximum.float().reshape(1)
    if args.dynamic == "local":
        return {"input_global_scale": grid.global_scale_for(low, high)}
    scale, zero_point = grid.fit(low, high, args, scale_dtype=scale_dtype)
    return {"input_scale": scale} if zero_point is None else {"input_scale": scale, "input_zero_point": zero_point}
