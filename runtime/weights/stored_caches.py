"""Let a model round its keys and values as a quantized checkpoint states, with the scales that it stores."""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtime.errors import WeightsError
from runtime.weights.origins import checkpoint_prefix
from runtime.weights.tensor_checks import read_scale

if TYPE_CHECKING:
    from torch import nn

    from runtime.weights.parameters import Weights


def attach_stored_caches(source: Weights, model: nn.Module) -> list[str]:
    """Attach the key-value cache of a checkpoint to a model, if it states a scheme or rotates queries and keys.

    Returns:
        The names of the scales.

    Raises:
        WeightsError: if a scale is missing or invalid.
    """
    rotations = source.transforms.attention
    if source.cache_scheme is None and not rotations:
        return []
    from runtime.formats.key_values import KeyValues, attach

    manifest = source.artifact.manifest
    key_values = KeyValues.of(manifest, source.cache_scheme, has_queries=source.has_queries, rotations=rotations)
    keys = []
    for module in key_values.all_modules():
        for part in key_values.parts:
            name = f"{checkpoint_prefix(source, module)}.{part}_scale"
            if name not in source.checkpoint:
                raise WeightsError(
                    f"missing tensor {name!r} in {source.checkpoint.directory}, required by its kv_cache_scheme",
                    hint="copy or export the checkpoint again",
                )
            key_values.scales[module, part] = read_scale(source.checkpoint, name)
            keys.append(name)
    attach(model, key_values)
    return keys
