"""Restore consistency between entries of a config after each has been shrunk separately."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

Table = dict[str, Any]
Rule = Callable[[Mapping[str, Any], Table], None]
_RULES: list[Rule] = []

_DEPTHS = ("num_hidden_layers", "depth", "num_layers")
_HEAD_LISTS = ("num_heads", "num_attention_heads")


def agree(full: Mapping[str, Any], small: Table) -> None:
    """Correct, in place, entries of `small` that depend on several others; `full` is the original table."""
    for rule in _RULES:
        rule(full, small)


def _rule(function: Rule) -> Rule:
    _RULES.append(function)
    return function


@_rule
def _numbers_of_layers(full: Mapping[str, Any], small: Table) -> None:
    """Keep references to the layers whose features are passed to the text model valid."""
    vision = small.get("vision_config")
    if not isinstance(vision, Mapping):
        return
    depth = next((vision[name] for name in _DEPTHS if isinstance(vision.get(name), int)), 0)
    for table in [small, *_tables_inside(small)]:
        for name in ("vision_feature_layer", "vision_feature_layers"):
            value = table.get(name)
            if depth and value is not None:
                table[name] = _kept(value, depth) if isinstance(value, int) else [_kept(one, depth) for one in value]


def _kept(number: int, depth: int) -> int:
    return min(number, depth - 1) if number >= 0 else max(number, -depth)


@_rule
def _widths_of_stages(full: Mapping[str, Any], small: Table) -> None:
    """Make a pyramid's first width a multiple of its first number of heads, and each stage short."""
    heads = next((small[name] for name in _HEAD_LISTS if _is_numbers(small.get(name))), None)
    if heads and isinstance(small.get("embed_dim"), int) and small["embed_dim"] % heads[0]:
        small["embed_dim"] = 16 * heads[0] if heads[0] <= 4 else 4 * heads[0]
    if _is_numbers(small.get("depths")):
        small["depths"] = [min(2, depth) for depth in small["depths"]]


@_rule
def _shuffled_pixels(full: Mapping[str, Any], small: Table) -> None:
    """Match the perceptron's input to pixel shuffle, which widens features by the square of its ratio."""
    ratio = small.get("pixel_shuffle_ratio")
    if ratio and {"hidden_size", "projector_input_dim", "projector_output_dim"} <= small.keys():
        small["intermediate_size"] = round(small["hidden_size"] / ratio**2)
        small["projector_input_dim"] = small["projector_output_dim"]


@_rule
def _stacked_layers(full: Mapping[str, Any], small: Table) -> None:
    """Match the output width of a tower that concatenates several of its layers."""
    if {"intermediate_layers_indices", "vision_output_dim", "hidden_size"} <= small.keys():
        small["vision_output_dim"] = small["hidden_size"] * (1 + len(small["intermediate_layers_indices"]))


@_rule
def _merged_widths(full: Mapping[str, Any], small: Table) -> None:
    """Make merged patches as wide as all of their parts."""
    before, after = full.get("vision_config"), small.get("vision_config")
    if not isinstance(before, Mapping) or not isinstance(after, Mapping) or "hidden_size" not in after:
        return
    merge = before.get("merge_size") or before.get("spatial_merge_size")
    sources = [
        (full[part], small[part]) for part in ("vision_config", "text_config") if isinstance(full.get(part), dict)
    ]
    for name in ("out_hidden_size", "merged_hidden_size"):
        for large, little in sources:
            if isinstance(merge, int) and full.get(name) == large.get("hidden_size", 0) * merge**2:
                small[name] = little["hidden_size"] * merge**2


@_rule
def _convolutions(full: Mapping[str, Any], small: Table) -> None:
    """Update widths that a tower computes from others and also states separately."""
    if "width_coefficient" in full and "hidden_dim" in full:
        small["hidden_dim"] = full["hidden_dim"]
    channels, factors = small.get("base_channels"), small.get("channel_multiplier")
    if isinstance(channels, int) and factors and full.get("hidden_size") == full["base_channels"] * factors[-1]:
        small["hidden_size"] = channels * factors[-1]


@_rule
def _towers_in_a_row(full: Mapping[str, Any], small: Table) -> None:
    """Match the output of each part to the input of the next."""
    if full.get("adapter_input_size") == full.get("hidden_size") and "adapter_input_size" in small:
        small["adapter_input_size"] = small["hidden_size"]
    first, second = small.get("sam_config"), small.get("encoder_config")
    if not isinstance(first, dict) or not isinstance(second, dict) or not first.get("downsample_channels"):
        return
    if full["sam_config"]["downsample_channels"][-1] == full["encoder_config"]["hidden_size"]:
        widths = [min(width, 32) for width in first["downsample_channels"][:-1]]
        first["downsample_channels"] = [*widths, second["hidden_size"]]


@_rule
def _codes_among_words(full: Mapping[str, Any], small: Table) -> None:
    """Keep codes of images, and then of sounds, inside the vocabulary."""
    if {"image_token_offset", "audio_token_offset", "vision_config", "audio_config"} <= small.keys():
        codes = 64
        small["vision_config"]["codebook_size"] = small["audio_config"]["codebook_size"] = codes
        small["image_token_offset"] = small["text_config"]["vocab_size"] // 2
        small["audio_token_offset"] = small["image_token_offset"] + codes


def _is_numbers(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(type(item) is int for item in value)


def _tables_inside(table: Table) -> Iterator[Table]:
    for value in table.values():
        if isinstance(value, dict):
            yield value
