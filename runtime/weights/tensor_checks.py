"""Check the dtypes and values of a checkpoint's tensors.

Dtypes are compared before anything is read, because headers state them. Values are checked

- before the run, if that costs little: tensors outside of the layers (embeddings, final norm, head), which a run would
  reach after hours, and small ones (norms, biases);
- otherwise when they are read, whether they are used or copied.

So a damaged checkpoint ends a run with the tensor's name, and no large tensor is read twice. Parameters must be finite.
Buffers may be infinite (masks are), and tensors that no parameter is made from are not checked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from runtime.checkpoint.dtypes import DTYPES, dtype_name
from runtime.errors import WeightsError

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme
    from torch import nn

    from runtime.artifact.manifest import ParameterEntry
    from runtime.checkpoint.reader import Checkpoint
    from runtime.weights.origins import Origin

SMALL_BYTES = 2**20
_NUMBERS_AT_A_TIME = 2**24
_FLOATS = ("BF16", "F16", "F32", "F64")
_INTEGERS = ("BOOL", "I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64")
# The bits of float8 numbers that are all set in NaN, and for e5m2 in infinities as well.
_NAN_BITS = {"F8_E4M3": 0x7F, "F8_E5M2": 0x7C}


class TensorChecks:
    """The checks of one checkpoint.

    Args:
        checkpoint: the tensors.
        origins: the origin of each parameter.
        parameters: the artifact's table.
        model: the artifact's module tree, which distinguishes parameters from buffers.
        targets: names of the layers.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        origins: Mapping[str, Origin],
        parameters: Mapping[str, ParameterEntry],
        model: nn.Module,
        targets: Iterable[str],
    ) -> None:
        self.checkpoint = checkpoint
        self.origins = origins
        self.targets = tuple(f"{target}." for target in targets)
        self._sound: set[str] = set()
        self._may_be_infinite: dict[str, bool] = {}
        buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
        for name, origin in origins.items():
            self._require_kind(name, origin, parameters[name])
            for key in origin.keys:
                self._may_be_infinite[key] = self._may_be_infinite.get(key, True) and name in buffers

    def require_outside(self, unless: Iterable[str] = ()) -> None:
        """Check tensors outside of the layers, and small ones.

        Args:
            unless: parameters that are checked when they are quantized.

        Raises:
            WeightsError: naming the first tensor with NaN or infinity.
        """
        others = set(unless)
        for name, origin in self.origins.items():
            is_inside = name.startswith(self.targets) or any(part.isdigit() for part in name.split("."))
            for key in origin.keys if name not in others else ():
                if key not in self._sound and (not is_inside or self.checkpoint.num_bytes(key) <= SMALL_BYTES):
                    for part in self.checkpoint.looked_at(key):
                        self._require_part(key, part)
                        self._sound.add(key)

    def require_finite(self, key: str, tensor: torch.Tensor) -> None:
        """Check a tensor that was read, unless it has been checked.

        Raises:
            WeightsError: naming it.
        """
        if key in self._sound or key not in self._may_be_infinite:
            return
        for part in torch.split(tensor.reshape(-1), _NUMBERS_AT_A_TIME):
            self._require_part(key, part)
        self._sound.add(key)

    def pieces(self, key: str) -> Iterator[memoryview]:
        """Yield the bytes of a tensor that is copied unchanged."""
        dtype = DTYPES.get(self.checkpoint.stored(key).dtype)
        is_checked = key in self._may_be_infinite and key not in self._sound and dtype is not None
        for piece in self.checkpoint.pieces(key):
            if is_checked and dtype is not None and len(piece):
                numbers = torch.frombuffer(piece, dtype=torch.uint8).clone().view(dtype)  # it may be unaligned
                self._require_part(key, numbers)
            yield piece

    def _require_part(self, key: str, part: torch.Tensor) -> None:
        value = _odd_number(part, may_be_infinite=self._may_be_infinite[key])
        if value:
            raise WeightsError(
                f"tensor {key!r} of {self.checkpoint.directory} contains {value}",
                hint="copy or export the checkpoint again",
            )

    def _require_kind(self, name: str, origin: Origin, entry: ParameterEntry) -> None:
        if origin.packed is not None:
            self._require_packed_kinds(origin, origin.packed)
            return
        is_float = entry.dtype == "model" or getattr(torch, entry.dtype).is_floating_point
        for key in origin.keys:
            found = self.checkpoint.stored(key).dtype
            if found in (_FLOATS if is_float else _INTEGERS):
                continue
            kinds = ", ".join(_FLOATS) if is_float else "integers"
            if found.startswith("F8_") and is_float:
                raise WeightsError(
                    f"tensor {key!r} of {self.checkpoint.directory} has the dtype float8 ({found}) and no scale",
                    hint="use the original checkpoint, or one whose config.json has a quantization_config",
                )
            raise WeightsError(
                f"tensor {key!r} of {self.checkpoint.directory} has the dtype {found}; parameter {name} needs {kinds}",
                hint="export the checkpoint again",
            )

    def _require_packed_kinds(self, origin: Origin, scheme: QuantizationScheme) -> None:
        from runtime.formats.compressed import stored_dtypes

        for suffix, expected in stored_dtypes(scheme, torch.bfloat16).items():
            key = next((key for key in origin.keys if key.rpartition(".")[2] == suffix), None)
            if key is None:
                continue
            is_plain = expected in (torch.bfloat16, torch.float32)
            allowed: tuple[str, ...] = _FLOATS if is_plain else (dtype_name(expected),)
            if suffix == "weight_shape":
                allowed = ("I32", "I64")
            found = self.checkpoint.stored(key).dtype
            if found not in allowed:
                raise WeightsError(
                    f"tensor {key!r} of {self.checkpoint.directory} has the dtype {found}; its scheme stores "
                    f"{' or '.join(allowed)}",
                    hint="export the checkpoint again",
                )


def read_scale(checkpoint: Checkpoint, key: str) -> torch.Tensor:
    """Read a scale or zero point of static inputs or of a key-value cache.

    Raises:
        WeightsError: for a scale that is not finite and above zero.
    """
    tensor = checkpoint.read(key)
    numbers = tensor.to(torch.float32)
    bad = ~(torch.isfinite(numbers) & (numbers > 0))
    if key.endswith("_scale") and bool(bad.any()):
        raise WeightsError(
            f"scale {key!r} of {checkpoint.directory} is {float(numbers[bad][0]):g}; it must be finite and above zero",
            hint="quantize again",
        )
    return tensor


def _odd_number(values: torch.Tensor, *, may_be_infinite: bool) -> str:
    """Return "NaN" or "infinity" if a tensor contains it, else ""."""
    if not values.numel() or values.is_complex() or not values.is_floating_point():
        return ""
    if values.dtype.itemsize == 1:
        bits = _NAN_BITS.get(dtype_name(values.dtype))
        codes: Any = values.view(torch.uint8)
        return "NaN" if bits is not None and bool((codes.bitwise_and(bits) == bits).any()) else ""
    low, high = torch.aminmax(values)  # NaN if any is
    if bool(torch.isnan(low)):
        return "NaN"
    return "" if may_be_infinite or bool(torch.isfinite(low) & torch.isfinite(high)) else "infinity"
