"""Open a checkpoint; supported quantized formats are dequantized on read, so that callers see plain weights.

A tensor is dequantized when it is read, so a run holds the tensors of one subgraph at a time, and nothing is converted
beforehand. Values are rounded once to the dtype that the config states.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.checkpoint.reader import Checkpoint
from runtime.checkpoint.source_checks import (
    is_unreadable,
    require_no_adapter,
    require_true_names,
    with_entry_of_file,
)
from runtime.checkpoint.source_formats import (
    COMPRESSED,
    Packed,
    SourceHeaders,
    stated,
    without_quantization,
)
from runtime.checkpoint.source_tensors import as_integers, packed_tensors
from runtime.checkpoint.stored import Stored
from runtime.checkpoint.view import Derived, DerivedCheckpoint
from runtime.errors import WeightsError
from runtime.host.hub import weights_directory

if TYPE_CHECKING:
    import torch

FLOAT_NAMES: Mapping[str, str] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_USUAL = "bfloat16"
_NAN_OF_E8M0 = 255


def as_weights(value: Any) -> Path | Checkpoint:
    """Return an argument that must be a directory or hub id of a checkpoint, or an open checkpoint."""
    return value if isinstance(value, Checkpoint) else weights_directory(value)


def open_checkpoint(directory: Path | Checkpoint, *, plain: bool = False, dtype: str | None = None) -> Checkpoint:
    """Open a checkpoint; its weights read as plain, or as stored by compressed-tensors.

    Args:
        directory: of the checkpoint; its config.json states whether and how it is quantized. An open checkpoint is
            returned as it is.
        plain: whether the weights of compressed-tensors read as plain, too.
        dtype: torch's name of the dtype of dequantized weights; None for that of the config.

    Raises:
        WeightsError: when it is missing, damaged, or quantized in an unsupported format.
    """
    if isinstance(directory, Checkpoint):
        return directory
    require_no_adapter(directory)
    stored = Checkpoint(directory)
    headers = headers_of(stored)
    dtypes = {key: tensor.dtype for key, tensor in headers.tensors.items()}
    stored.config = with_entry_of_file(stored.config, directory, dtypes)
    require_true_names(directory, stored.config, dtypes)
    entry = stated(stored.config)
    if not entry or (entry.get("quant_method") == COMPRESSED and not plain):
        return stored
    found = packed_tensors(stored.config, headers, plain=plain)
    name = dtype or config_dtype(stored.config)
    tensors = {key: _derived(stored, key, tensor, name) for key, tensor in found.tensors.items()}
    view = DerivedCheckpoint(stored, tensors, hidden=found.unused, config=without_quantization(stored.config))
    for key in view:
        if not view.is_derived(key) and is_unreadable(key, dtypes):
            raise WeightsError(
                f"tensor {key!r} of {directory} ({dtypes[key]}) belongs to no weight that its quantization entry "
                "describes",
                hint="use the config.json of this checkpoint, or copy it again",
            )
    return view


def headers_of(checkpoint: Checkpoint) -> SourceHeaders:
    """Return the tensors of a checkpoint as its headers state them."""

    def integers(key: str) -> tuple[int, ...]:
        stored = checkpoint.stored(key)
        return as_integers(checkpoint.pieces(key), stored.dtype, stored.shape)

    tensors = {key: checkpoint.stored(key) for key in checkpoint}
    return SourceHeaders(tensors=tensors, origin=str(checkpoint.directory), integers=integers)


def config_dtype(config: Mapping[str, Any]) -> str:
    """Return torch's name of the dtype that a config states for weights; bfloat16 if it states none."""
    for part in (config, config.get("text_config") or {}):
        found = part.get("dtype") or part.get("torch_dtype") if isinstance(part, Mapping) else ""
        name = str(found or "").removeprefix("torch.")
        if name in FLOAT_NAMES:
            return name
    return _USUAL


def _derived(checkpoint: Checkpoint, key: str, packed: Packed, dtype: str) -> Derived:
    origin = checkpoint.directory

    def make(source: Checkpoint, index: int | None) -> torch.Tensor:
        import torch

        by_expert = packed.by_expert if index is not None else ()
        parts = {
            role: source.read_part(name, index) if index is not None and role in by_expert else source.read(name)
            for role, name in packed.parts.items()
        }
        for role, tensor in parts.items():
            _require_sound(packed.parts[role], tensor, origin, is_signed=packed.has_signed_scales)
        try:
            made = packed.compute(parts, getattr(torch, dtype))
        except ValueError as error:
            raise WeightsError(f"{origin}: {key!r}: {error}", hint="copy or export the checkpoint again") from error
        return made if index is None or by_expert else made[index].clone()

    return Derived(
        stored=Stored(key, FLOAT_NAMES[dtype], packed.shape),
        sources=tuple(packed.parts.values()),
        make=make,
        is_stack=bool(packed.by_expert),
    )


def _require_sound(name: str, tensor: torch.Tensor, origin: Path, *, is_signed: bool) -> None:
    """Reject scales that are not finite, or negative in a format without negative scales."""
    import torch

    if "scale" not in name.rpartition(".")[2]:
        return
    if tensor.dtype == torch.uint8:  # exponents of two
        bad = tensor == _NAN_OF_E8M0
        values = torch.where(bad, torch.nan, 1.0)
    elif tensor.is_floating_point():
        values = tensor.float()
        bad = ~torch.isfinite(values) if is_signed else ~(torch.isfinite(values) & (values >= 0))
    else:
        return
    is_divisor = name.endswith("weight_global_scale")
    bad = bad | (values == 0) if is_divisor else bad
    if bool(bad.any()):
        wanted = "finite" if is_signed else "finite and positive" if is_divisor else "finite and not negative"
        raise WeightsError(
            f"scale {name!r} of {origin} is {float(values[bad].flatten()[0]):g}; it must be {wanted}",
            hint="copy or export the checkpoint again",
        )
