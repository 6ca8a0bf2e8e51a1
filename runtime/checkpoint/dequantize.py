"""Open a checkpoint; supported quantized formats are dequantized on read, so that callers see plain weights.

A tensor is dequantized when it is read, so a run holds the tensors of one subgraph at a time, and nothing is converted
beforehand. The arithmetic is that of compressed-tensors: a block of float8 numbers times its scale, in float32, rounded
once to the dtype that the config states.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.checkpoint.reader import Checkpoint
from runtime.checkpoint.source_checks import require_no_adapter, require_true_names
from runtime.checkpoint.source_formats import FP8, Packed, packed_tensors, without_quantization
from runtime.checkpoint.view import Derived, DerivedCheckpoint
from runtime.errors import WeightsError
from runtime.host.hub import weights_directory

if TYPE_CHECKING:
    import torch
    from compressed_tensors.quantization import QuantizationScheme

_FLOATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_USUAL = "bfloat16"


def as_weights(value: Any) -> Path | Checkpoint:
    """Return an argument that must be a directory or hub id of a checkpoint, or an open checkpoint."""
    return value if isinstance(value, Checkpoint) else weights_directory(value)


def open_checkpoint(directory: Path | Checkpoint) -> Checkpoint:
    """Open a checkpoint; its weights read as plain, or as stored by compressed-tensors.

    Args:
        directory: of the checkpoint; its config.json states whether and how it is quantized. An open checkpoint is
            returned as it is.

    Raises:
        WeightsError: when it is missing, damaged, or quantized in an unsupported format.
    """
    if isinstance(directory, Checkpoint):
        return directory
    require_no_adapter(directory)
    stored = Checkpoint(directory)
    shapes = {key: stored.shape(key) for key in stored}
    require_true_names(directory, stored.config, {key: stored.stored(key).dtype for key in stored})
    packed, unused = packed_tensors(stored.config, shapes, str(directory))
    if not packed:
        return stored
    dtype = _dtype(stored.config)
    tensors = {key: _derived(stored, key, tensor, dtype) for key, tensor in packed.items()}
    config = without_quantization(stored.config)
    return DerivedCheckpoint(stored, tensors, hidden=tuple(unused), config=config)


def _dtype(config: dict[str, Any]) -> str:
    """Return torch's name of the dtype of dequantized weights."""
    for part in (config, config.get("text_config") or {}):
        name = str(part.get("dtype") or part.get("torch_dtype") or "").removeprefix("torch.")
        if name in _FLOATS:
            return name
    return _USUAL


def _derived(checkpoint: Checkpoint, key: str, packed: Packed, dtype: str) -> Derived:
    from runtime.checkpoint.stored import Stored

    numbers, scales = packed.parts
    expected = "F8_E4M3" if packed.method == FP8 else "U8"
    found = checkpoint.stored(numbers).dtype
    if found != expected:
        raise WeightsError(
            f"{checkpoint.directory}: {numbers!r} is stored as {found}, but {packed.method} weights must be {expected}"
        )
    undo = _undo_fp8 if packed.method == FP8 else _undo_mxfp4

    def make(source: Checkpoint, index: int | None) -> torch.Tensor:
        import torch

        read = source.read if index is None else lambda name: source.read_part(name, index)
        return undo(read(numbers), read(scales), packed.block, getattr(torch, dtype))

    return Derived(stored=Stored(key, _FLOATS[dtype], packed.shape), sources=packed.parts, make=make)


def _undo_fp8(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Compute a weight [..., O, I] from quantized numbers and the scales of their blocks."""
    import torch
    from compressed_tensors.entrypoints.convert import FP8BlockDequantizer

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


@functools.cache  # a stack is read expert by expert
def _mxfp4() -> QuantizationScheme:
    from compressed_tensors.quantization import preset_name_to_scheme

    from runtime.formats.presets import checked

    return checked(preset_name_to_scheme("MXFP4A16", ["Linear"]))


def _undo_mxfp4(blocks: torch.Tensor, scales: torch.Tensor, block: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Compute experts [..., I, O] from blocks [..., O, I/32, 16] and scales [..., O, I/32]."""
    import torch

    from runtime.formats.compressed import decompress_module

    scheme = _mxfp4()
    num_out, num_groups = scales.shape[-2:]
    packed = blocks.reshape(-1, num_out, num_groups * block[1] // 2)
    factors = scales.reshape(len(packed), num_out, num_groups)
    made = [
        decompress_module({"weight_packed": one, "weight_scale": own}, scheme).to(dtype).T
        for one, own in zip(packed, factors, strict=True)
    ]
    return torch.stack(made).reshape(*blocks.shape[:-3], num_groups * block[1], num_out)
