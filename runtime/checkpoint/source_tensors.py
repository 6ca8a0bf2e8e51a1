"""Find the packed tensors of a quantized source checkpoint, in any supported format."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from runtime.checkpoint.source_blocks import find_fp8, find_mxfp4
from runtime.checkpoint.source_compressed import find_compressed
from runtime.checkpoint.source_formats import (
    COMPRESSED,
    FBGEMM,
    FP8,
    MODELOPT,
    MXFP4,
    PackedTensors,
    SourceHeaders,
    described,
    stated,
)
from runtime.checkpoint.source_integers import AUTO_ROUND, AWQ, GPTQ, find_integers
from runtime.checkpoint.source_modelopt import MODELOPT_METHODS, find_modelopt
from runtime.errors import WeightsError

SUPPORTED = (COMPRESSED, MODELOPT, GPTQ, AWQ, AUTO_ROUND, FP8, MXFP4)


def packed_tensors(config: Mapping[str, Any], headers: SourceHeaders, *, plain: bool = False) -> PackedTensors:
    """Find the tensors to dequantize; none in a plain checkpoint.

    Args:
        config: the checkpoint's config.json.
        headers: all its tensors.
        plain: whether to dequantize those of compressed-tensors too, which can be read as they are stored.

    Raises:
        WeightsError: for an unsupported quantization, and for tensors that do not fit each other or their config.
    """
    entry = stated(config)
    method = entry.get("quant_method")
    if not entry or (method == COMPRESSED and not plain):
        return PackedTensors()
    if method == COMPRESSED:
        return find_compressed(entry, headers)
    if method == FBGEMM or (method == FP8 and next(headers.ending_with("weight_scale"), None)):
        return find_modelopt(entry, headers)  # AutoFP8 and FBGEMM use the names of ModelOpt
    if method == FP8:
        return find_fp8(entry, headers)
    if method == MXFP4:
        return find_mxfp4(headers)
    if method in (GPTQ, AWQ, AUTO_ROUND):
        return find_integers(entry, headers)
    if method in MODELOPT_METHODS:
        return find_modelopt(entry, headers)
    raise WeightsError(
        f"{headers.origin} is quantized by {described(entry)!r}, a format that is not supported as input",
        hint=f"start from the original checkpoint, or from one in {', '.join(SUPPORTED[:-1])} or {SUPPORTED[-1]}",
    )


def plain_shapes(config: Mapping[str, Any], headers: SourceHeaders) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the checkpoint's tensors after dequantizing those of `packed_tensors`."""
    packed = packed_tensors(config, headers, plain=True)
    gone = dict.fromkeys(
        [*packed.unused, *(part for tensor in packed.tensors.values() for part in tensor.parts.values())]
    )
    plain = {key: stored.shape for key, stored in headers.tensors.items() if key not in gone}
    return dict(sorted((plain | {key: tensor.shape for key, tensor in packed.tensors.items()}).items()))


def as_integers(pieces: Iterable[bytes | memoryview], dtype: str, shape: Sequence[int]) -> tuple[int, ...]:
    """Decode a small tensor of whole numbers; empty for another dtype or a large one."""
    kind, count = {"I64": "q", "I32": "i"}.get(dtype, ""), math.prod(shape)
    return struct.unpack(f"<{count}{kind}", b"".join(map(bytes, pieces))) if kind and count <= 16 else ()
