"""Let a model round its keys and values as a quantized checkpoint states, with the scales that it stores."""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtime.errors import WeightsError
from runtime.weights.origins import checkpoint_prefix
from runtime.weights.tensor_checks import read_scale

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs
    from torch import nn

    from runtime.artifact.manifest import Manifest
    from runtime.checkpoint.reader import Checkpoint
    from runtime.weights.origins import ParameterSource


def attach_stored_caches(
    model: nn.Module,
    source: ParameterSource,
    checkpoint: Checkpoint,
    manifest: Manifest,
    scheme: QuantizationArgs | None,
    *,
    has_queries: bool,
) -> list[str]:
    """Attach the key-value cache of a checkpoint to a model, if it states a scheme or rotates queries and keys.

    Args:
        model: the artifact's module tree.
        source: the origins of the parameters.
        checkpoint: has the scales.
        manifest: of the artifact.
        scheme: of the cache; None if it is not rounded.
        has_queries: whether queries are rounded, too.

    Returns:
        The names of the scales.

    Raises:
        WeightsError: if a scale is missing or invalid.
    """
    rotations = source.transforms.attention
    if scheme is None and not rotations:
        return []
    from runtime.formats.key_values import KeyValues, attach

    key_values = KeyValues.of(manifest, scheme, has_queries=has_queries, rotations=rotations)
    keys = []
    for module in key_values.all_modules():
        for part in key_values.parts:
            name = f"{checkpoint_prefix(source, module)}.{part}_scale"
            if name not in checkpoint:
                raise WeightsError(
                    f"missing tensor {name!r} in {checkpoint.directory}, required by its kv_cache_scheme",
                    hint="copy or export the checkpoint again",
                )
            key_values.scales[module, part] = read_scale(checkpoint, name)
            keys.append(name)
    attach(model, key_values)
    return keys
