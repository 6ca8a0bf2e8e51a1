"""Generate the additional inputs of some multimodal models, by the names of forward's parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from seqbuild.sample.geometry import Geometry

if TYPE_CHECKING:
    from seqbuild.sample.shape import SampleShape

Row = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """The inputs from which others are derived.

    Attributes:
        config: the model's config.
        text: text inputs.
        pixels: image inputs.
        shape: the shape of the sample.
        generator: random generator of the values.
    """

    config: Any
    text: Row
    pixels: Row
    shape: SampleShape
    generator: torch.Generator


Extra = Callable[[Inputs], "torch.Tensor | None"]
_EXTRAS: dict[str, Extra] = {}


def extra(name: str) -> Callable[[Extra], Extra]:
    """Register the generator of the parameter `name`."""

    def register(function: Extra) -> Extra:
        _EXTRAS[name] = function
        return function

    return register


def extras(parameters: Mapping[str, Any], given: Inputs) -> Row:
    """Generate every registered name among `parameters` that is not an image input."""
    wanted = {name: make for name, make in _EXTRAS.items() if name in parameters and name not in given.pixels}
    made = {name: make(given) for name, make in wanted.items()}
    return {name: value for name, value in made.items() if value is not None}


@extra("qformer_input_ids")
def _qformer_ids(given: Inputs) -> torch.Tensor:
    """Instruction in the query transformer's vocabulary, int64 [rows of pixels, 11]."""
    high = int(given.config.qformer_config.vocab_size) // 2
    return torch.randint(10, high, (len(given.pixels["pixel_values"]), 11), generator=given.generator)


@extra("high_res_pixel_values")
def _high_res(given: Inputs) -> torch.Tensor:
    """The same images at a higher resolution: [N, C, H, W]."""
    geometry = Geometry.of(given.config.high_res_vision_config)
    size = (len(given.pixels["pixel_values"]), geometry.channels, geometry.height, geometry.width)
    return torch.randn(size, generator=given.generator)


@extra("bbox")
def _boxes(given: Inputs) -> torch.Tensor:
    """Position of each word: x and y of two corners, float [batch, sequence, 4] within 0 and 1."""
    corners = torch.rand((*given.text["input_ids"].shape, 2, 2), generator=given.generator) * 0.5
    return torch.cat([corners[..., 0, :], corners.sum(dim=-2)], dim=-1)


@extra("state")
def _state(given: Inputs) -> torch.Tensor:
    """Joint positions of a robot, [batch, state]."""
    return torch.randn((given.shape.batch, int(given.config.max_state_dim)), generator=given.generator)


@extra("noise")
def _noise(given: Inputs) -> torch.Tensor | None:
    """Noise for a robot's motion, [batch, steps, action], or for selecting hidden patches, [batch, patches]."""
    config, batch, generator = given.config, given.shape.batch, given.generator
    if not hasattr(config, "max_action_dim"):
        geometry = Geometry.of(config)
        patches = (geometry.height // geometry.patch) * (geometry.width // geometry.patch)
        return torch.rand((batch, patches), generator=generator) if hasattr(config, "mask_ratio") else None
    return torch.randn((batch, int(config.chunk_size), int(config.max_action_dim)), generator=generator)


@extra("timestep")
def _timestep(given: Inputs) -> torch.Tensor:
    """Remaining noise level, [batch], within 0 and 1."""
    return torch.rand(given.shape.batch, generator=given.generator)


@extra("cross_attention_mask")
def _cross_mask(given: Inputs) -> torch.Tensor:
    """Tiles visible to each token, int64 [batch, sequence, N, K]: those of the preceding images."""
    tiles = given.pixels["aspect_ratio_mask"]
    return _visible(given.text, tiles.shape[1])[..., None] * tiles[:, None]


@extra("image_attention_mask")
def _image_mask(given: Inputs) -> torch.Tensor:
    """Images visible to each token, int64 [batch, sequence, N]: the preceding ones."""
    return _visible(given.text, given.pixels["pixel_values"].shape[1])


@extra("protein_input_ids")
def _protein(given: Inputs) -> torch.Tensor:
    """Amino acids, int64 [batch, 29]."""
    high = int(given.config.protein_encoder_config.vocab_size)
    return torch.randint(min(5, high - 2), high, (given.shape.batch, 29), generator=given.generator)


@extra("protein_attention_mask")
def _protein_mask(given: Inputs) -> torch.Tensor:
    """Mask with all amino acids present, int64 [batch, 29]."""
    return torch.ones((given.shape.batch, 29), dtype=torch.int64)


def _visible(text: Row, images: int) -> torch.Tensor:
    """Int64 [batch, sequence, images]: image n is visible from token n + 1 on, so that the first token sees none."""
    batch, length = text["input_ids"].shape
    visible = torch.arange(length)[:, None] > torch.arange(images)
    return visible.to(torch.int64).expand(batch, -1, -1).clone()
