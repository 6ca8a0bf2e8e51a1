"""Generate images for a default sample: pixels, their placeholder tokens in the text, and the accompanying inputs.

There are no rules per architecture for the number of tokens of an image: a thin copy of the model computes it.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from seqbuild.sample.extras import Inputs, extras
from seqbuild.sample.geometry import Geometry, parts
from seqbuild.sample.pixels import Row, Wanted, joined, row_of_pixels
from seqbuild.sample.thin import thin_copy

if TYPE_CHECKING:
    from torch import nn

    from seqbuild.sample.shape import SampleShape

_PLACEHOLDERS = ("image_token_id", "image_token_index", "image_patch_id", "media_placeholder_token_id")
_STARTS = ("vision_start_token_id", "image_start_token_id", "boi_token_id", "boi_token_index")
_ENDS = ("vision_end_token_id", "image_end_token_id", "eoi_token_id", "eoi_token_index")
_IMAGE_TYPE = ("mm_token_type_ids", "moe_mm_token_type_ids", "token_type_ids", "image_embeds_position_mask")
_PIXELS = {"pixel_values", "pixel_values_images", "flattened_patches"}
_ANY_TOKEN = 10
_PADDED = 3  # tokens at either end that may be padding


def with_images(
    model: nn.Module, parameters: Mapping[str, Any], text: Row, shape: SampleShape, generator: torch.Generator
) -> Row:
    """Generate images, and insert their placeholder tokens into a sample of text.

    Args:
        model: the model whose forward takes `parameters`; neither run nor modified.
        parameters: the parameters of the signature, by name.
        text: `input_ids` int64 [batch, sequence] with their masks and types; empty if the model takes no text.
        shape: `images` for each of `batch` rows, in sizes by `scale`.
        generator: random generator of the values.
    """
    config: Any = model.config
    token = placeholder(config, parameters) if "input_ids" in text else None
    method = _feature_method(model) if token is not None else None
    features = _parameters(method)
    wanted = Wanted(
        parameters=parameters,
        features=features,
        config=config,
        geometry=Geometry.of(config),
        images=shape.images if _many_by_row(token, parameters) else 1,
        scale=shape.scale,
        generator=generator,
    )
    rows = [row_of_pixels(wanted) for _ in range(shape.batch)]
    pixels = joined(rows)
    pixels |= extras(features, Inputs(config=config, text=text, pixels=pixels, shape=shape, generator=generator))
    if token is not None and method is not None:
        row = {name: value[: len(value) // shape.batch] for name, value in pixels.items()} | rows[0]
        text = _with_placeholders(text, parameters, config, token, _counts(method, row, wanted))
    elif "image_embeds_position_mask" in parameters:
        text = _with_placeholders(text, parameters, config, _ANY_TOKEN, [int(config.latent_query_num)])
    pixels |= extras(parameters, Inputs(config=config, text=text, pixels=pixels, shape=shape, generator=generator))
    return text | {name: value for name, value in pixels.items() if name in parameters}


def _many_by_row(token: int | None, parameters: Mapping[str, Any]) -> bool:
    if "image_embeds_position_mask" in parameters:
        return False
    return token is not None or "aspect_ratio_ids" in parameters or "image_attention_mask" in parameters


def placeholder(config: Any, parameters: Mapping[str, Any]) -> int | None:
    """Return the placeholder token for one feature of an image, if there is one."""
    if "image_embeds_position_mask" in parameters:
        return _ANY_TOKEN
    found = _first(config, _PLACEHOLDERS)
    if found is None and "pixel_values_videos" not in parameters:
        found = _first(config, ("video_token_index",))  # such a model takes only videos
    return found if found is not None and found >= 0 else None


def _first(config: Any, names: Sequence[str]) -> int | None:
    for part in parts(config):
        for name in names:
            value = getattr(part, name, None)
            if isinstance(value, int):
                return value
    return None


def _feature_method(model: nn.Module) -> Any:
    """Return the thin copy's method from pixels to features of the text; of several, the one with most parameters.

    Outer modules forward to inner ones, often with `**kwargs`.
    """
    for name in ("get_image_features", "get_video_features"):
        found = [getattr(module, name) for module in thin_copy(model).modules() if hasattr(module, name)]
        named = [one for one in found if _PIXELS & inspect.signature(one).parameters.keys()]
        if named:
            return max(named, key=lambda one: len(inspect.signature(one).parameters))
    return None


def _parameters(method: Any) -> dict[str, bool]:
    if method is None:
        return {}
    return {
        name: parameter.default is not inspect.Parameter.empty
        for name, parameter in inspect.signature(method).parameters.items()
    }


def _counts(method: Any, pixels: Row, wanted: Wanted) -> list[int]:
    """Return the number of features of each image of one row."""
    sizes = _sizes(method, pixels, wanted)
    if len(sizes) == wanted.images:
        return sizes
    if "image_grid_thw" in pixels:  # all images in one tensor, of possibly different sizes: run each separately
        single = [dataclasses.replace(wanted, images=1, first=index) for index in range(wanted.images)]
        return [sum(_sizes(method, row_of_pixels(one), one)) for one in single]
    return [sum(sizes) // wanted.images] * wanted.images


def _sizes(method: Any, pixels: Row, wanted: Wanted) -> list[int]:
    """Return the number of features in each part of the method's result."""
    given: dict[str, Any] = {name: value for name, value in pixels.items() if name in wanted.features}
    for name, is_optional in wanted.features.items():
        stated = getattr(wanted.geometry.source, name, None)
        if name not in given and not is_optional and isinstance(stated, (int, str, list)):
            given[name] = stated
    if "pixel_attention_mask" in pixels and "pixel_attention_mask" not in wanted.features:
        given["pixel_values"] = given["pixel_values"].flatten(0, 1)  # this method does not distinguish rows
    with torch.no_grad():
        features = method(**given)
    if not isinstance(features, (torch.Tensor, tuple, list)):
        features = _features(features)
    if isinstance(features, torch.Tensor):
        features = list(features) if features.dim() == 3 else [features]
    return [int(feature.numel() // feature.shape[-1]) for feature in features]


def _features(output: Any) -> Any:
    """Return the features that are inserted into the text. Some models set an attribute that is not an entry."""
    pooled, deep = getattr(output, "pooler_output", None), getattr(output, "deepstack_features", None)
    if pooled is not None:
        return pooled
    return output.last_hidden_state if deep is None else deep[0][1]


def _with_placeholders(text: Row, parameters: Mapping[str, Any], config: Any, token: int, counts: Sequence[int]) -> Row:
    """Insert placeholders for each image between words, so that padding remains at the ends."""
    ids = text["input_ids"]
    batch, length = ids.shape
    plain = _plain(ids, config)
    before, after = _first(config, _STARTS), _first(config, _ENDS)
    first, last = min(_PADDED + 1, length), max(length - _PADDED - 1, min(_PADDED + 1, length))
    columns: list[torch.Tensor] = []
    kinds: list[int] = []  # for each column: 1 for a feature, 0 for a start or end token, -1 for a column of the text
    for position in range(length + 1):
        for index, count in enumerate(counts):
            if position == first + (last - first) * index // len(counts):
                run = [mark for mark in (before,) if mark is not None] + [token] * count
                run += [mark for mark in (after,) if mark is not None]
                columns += [torch.full((batch,), value) for value in run]
                kinds += [int(value == token) for value in run]
        if position < length:
            columns.append(plain[:, position])
            kinds.append(-1)
    result = dict(text) | {"input_ids": torch.stack(columns, dim=1)}
    for name, inserted in (("attention_mask", 1), ("token_type_ids", None)):
        if name in text:
            result[name] = _spread(text[name], kinds, inserted)
    for name in _IMAGE_TYPE:
        if name in parameters:
            result[name] = _spread(torch.zeros_like(ids), kinds, None)
    return result


def _spread(values: torch.Tensor, kinds: Sequence[int], inserted: int | None) -> torch.Tensor:
    """Insert columns into `values`: `inserted`, or if that is None, 1 for a feature and 0 for a start or end token."""
    columns, position = [], 0
    for kind in kinds:
        if kind < 0:
            columns.append(values[:, position])
            position += 1
        else:
            columns.append(torch.full_like(values[:, 0], kind if inserted is None else inserted))
    return torch.stack(columns, dim=1)


def _plain(ids: torch.Tensor, config: Any) -> torch.Tensor:
    """Replace special token ids of the config, so that no word is mistaken for an image."""
    marked = {
        value
        for part in parts(config)
        for name, value in part.to_dict().items()
        if isinstance(value, int) and name.endswith(("token_id", "token_index", "patch_id", "start_id", "end_id"))
    }
    plain = next((token for token in range(10, 10 + len(marked) + 1) if token not in marked), 0)
    return torch.where(torch.isin(ids, torch.tensor(sorted(marked) or [-1])), plain, ids)
