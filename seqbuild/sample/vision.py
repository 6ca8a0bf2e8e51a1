"""Images in a default sample: pixels, the tokens that hold their places in the text, and what else goes with them.

How many tokens an image takes is not computed by rules for each architecture: a thin copy of the model is asked.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from seqbuild.sample.extras import extras
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
_SEEN = {"pixel_values", "pixel_values_images", "flattened_patches"}
_ANY_TOKEN = 10
_PADDED = 3  # the tokens at either end that may be padding


def with_images(
    model: nn.Module, parameters: Mapping[str, Any], text: Row, shape: SampleShape, generator: torch.Generator
) -> Row:
    """The sample `text` (empty for a model that takes none), and images in it.

    Args:
        model: whose forward takes `parameters`; neither run nor changed.
        parameters: names to parameters of the signature.
        text: `input_ids` int64 [batch, sequence], and the masks and types that go with them.
        shape: `images` for each of `batch` rows, in sizes by `scale`.
        generator: of the values.
    """
    config: Any = model.config
    token = placeholder(config, parameters) if "input_ids" in text else None
    asking = _asking(model) if token is not None else None
    asked = _asked(asking)
    wanted = Wanted(
        parameters=parameters,
        asked=asked,
        config=config,
        geometry=Geometry.of(config),
        images=shape.images if _many_by_row(token, parameters) else 1,
        scale=shape.scale,
        generator=generator,
    )
    rows = [row_of_pixels(wanted) for _ in range(shape.batch)]
    pixels = joined(rows)
    pixels |= extras(config, asked, text, pixels, shape, generator)
    if token is not None and asking is not None:
        row = {name: value[: len(value) // shape.batch] for name, value in pixels.items()} | rows[0]
        text = _with_placeholders(text, parameters, config, token, _counts(asking, row, wanted))
    elif "image_embeds_position_mask" in parameters:
        text = _with_placeholders(text, parameters, config, _ANY_TOKEN, [int(config.latent_query_num)])
    pixels |= extras(config, parameters, text, pixels, shape, generator)
    return text | {name: value for name, value in pixels.items() if name in parameters}


def _many_by_row(token: int | None, parameters: Mapping[str, Any]) -> bool:
    if "image_embeds_position_mask" in parameters:
        return False
    return token is not None or "aspect_ratio_ids" in parameters or "image_attention_mask" in parameters


def placeholder(config: Any, parameters: Mapping[str, Any]) -> int | None:
    """The token that holds the place of one feature of an image, if the text has such a token."""
    if "image_embeds_position_mask" in parameters:
        return _ANY_TOKEN
    found = _first(config, _PLACEHOLDERS)
    if found is None and "pixel_values_videos" not in parameters:
        found = _first(config, ("video_token_index",))  # a film is all that such a model sees
    return found if found is not None and found >= 0 else None


def _first(config: Any, names: Sequence[str]) -> int | None:
    for part in parts(config):
        for name in names:
            value = getattr(part, name, None)
            if isinstance(value, int):
                return value
    return None


def _asking(model: nn.Module) -> Any:
    """The thin copy's own way from pixels to features of the text; of several, the one that names most of its inputs.

    Outer modules hand on to inner ones, often under `**kwargs`.
    """
    for way in ("get_image_features", "get_video_features"):
        found = [getattr(module, way) for module in thin_copy(model).modules() if hasattr(module, way)]
        named = [one for one in found if _SEEN & inspect.signature(one).parameters.keys()]
        if named:
            return max(named, key=lambda one: len(inspect.signature(one).parameters))
    return None


def _asked(asking: Any) -> dict[str, bool]:
    if asking is None:
        return {}
    return {
        name: parameter.default is not inspect.Parameter.empty
        for name, parameter in inspect.signature(asking).parameters.items()
    }


def _counts(asking: Any, pixels: Row, wanted: Wanted) -> list[int]:
    """How many features each image of one row becomes."""
    sizes = _sizes(asking, pixels, wanted)
    if len(sizes) == wanted.images:
        return sizes
    if "image_grid_thw" in pixels:  # all in one, and perhaps of several sizes: each is shown by itself
        single = [dataclasses.replace(wanted, images=1, first=index) for index in range(wanted.images)]
        return [sum(_sizes(asking, row_of_pixels(one), one)) for one in single]
    return [sum(sizes) // wanted.images] * wanted.images


def _sizes(asking: Any, pixels: Row, wanted: Wanted) -> list[int]:
    """How many features there are in each part of the answer."""
    given: dict[str, Any] = {name: value for name, value in pixels.items() if name in wanted.asked}
    for name, is_optional in wanted.asked.items():
        stated = getattr(wanted.geometry.source, name, None)
        if name not in given and not is_optional and isinstance(stated, (int, str, list)):
            given[name] = stated
    if "pixel_attention_mask" in pixels and "pixel_attention_mask" not in wanted.asked:
        given["pixel_values"] = given["pixel_values"].flatten(0, 1)  # asked is a part that sees no rows
    with torch.no_grad():
        features = asking(**given)
    if not isinstance(features, (torch.Tensor, tuple, list)):
        features = _first_there(features)
    if isinstance(features, torch.Tensor):
        features = list(features) if features.dim() == 3 else [features]
    return [int(feature.numel() // feature.shape[-1]) for feature in features]


def _first_there(output: Any) -> Any:
    """What a model's output calls the features that go into the text. Some set an attribute that is no entry."""
    pooled, deep = getattr(output, "pooler_output", None), getattr(output, "deepstack_features", None)
    if pooled is not None:
        return pooled
    return output.last_hidden_state if deep is None else deep[0][1]


def _with_placeholders(text: Row, parameters: Mapping[str, Any], config: Any, token: int, counts: Sequence[int]) -> Row:
    """The text with a run of placeholders for each image, between words, so that padding stays at the ends."""
    ids = text["input_ids"]
    batch, length = ids.shape
    plain = _plain(ids, config)
    before, after = _first(config, _STARTS), _first(config, _ENDS)
    first, last = min(_PADDED + 1, length), max(length - _PADDED - 1, min(_PADDED + 1, length))
    columns: list[torch.Tensor] = []
    kinds: list[int] = []  # of each column: 1 for a feature, 0 for a mark around it, -1 for the text's next column
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
    """The text's columns of `values` and, between them, `inserted`; None for 1 where there is a feature, else 0."""
    columns, position = [], 0
    for kind in kinds:
        if kind < 0:
            columns.append(values[:, position])
            position += 1
        else:
            columns.append(torch.full_like(values[:, 0], kind if inserted is None else inserted))
    return torch.stack(columns, dim=1)


def _plain(ids: torch.Tensor, config: Any) -> torch.Tensor:
    """Token ids without those that the config gives a meaning: a word must not be taken for an image."""
    marked = {
        value
        for part in parts(config)
        for name, value in part.to_dict().items()
        if isinstance(value, int) and name.endswith(("token_id", "token_index", "patch_id", "start_id", "end_id"))
    }
    plain = next((token for token in range(10, 10 + len(marked) + 1) if token not in marked), 0)
    return torch.where(torch.isin(ids, torch.tensor(sorted(marked) or [-1])), plain, ids)
