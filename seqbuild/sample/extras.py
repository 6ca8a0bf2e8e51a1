"""Generate the additional inputs of some multimodal models, by the names of forward's parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from seqbuild.sample.geometry import Geometry

if TYPE_CHECKING:
    from seqbuild.sample.shape import SampleShape

Row = dict[str, torch.Tensor]
Extra = Callable[[Any, Row, Row, "SampleShape", torch.Generator], "torch.Tensor | None"]
_EXTRAS: dict[str, Extra] = {}


def extra(name: str) -> Callable[[Extra], Extra]:
    """Register the maker of the parameter `name`."""

    def register(function: Extra) -> Extra:
        _EXTRAS[name] = function
        return function

    return register


def extras(
    config: Any,
    parameters: Mapping[str, Any],
    text: Row,
    pixels: Row,
    shape: SampleShape,
    generator: torch.Generator,
) -> Row:
    """Generate every registered name among `parameters` that has no other generator."""
    wanted = {name: make for name, make in _EXTRAS.items() if name in parameters and name not in pixels}
    made = {name: make(config, text, pixels, shape, generator) for name, make in wanted.items()}
    return {name: value for name, value in made.items() if value is not None}


@extra("qformer_input_ids")
def _qformer_ids(config: Any, text: Row, pixels: Row, shape: SampleShape, generator: torch.Generator) -> torch.Tensor:
    """The instruction in the query transformer's vocabulary, int64 [rows of pixels, 11]."""
    high = int(config.qformer_config.vocab_size) // 2
    return torch.randint(10, high, (len(pixels["pixel_values"]), 11), generator=generator)


@extra("high_res_pixel_values")
def _high_res(config: Any, text: Row, pixels: Row, shape: SampleShape, generator: torch.Generator) -> torch.Tensor:
    """The same images at a higher resolution: [N, C, H, W]."""
    geometry = Geometry.of(config.high_res_vision_config)
    size = (len(pixels["pixel_values"]), geometry.channels, geometry.height, geometry.width)
    return torch.randn(size, generator=generator)


@extra("bbox")
def _boxes(config: Any, text: Row, pixels: Row, shape: SampleShape, generator: torch.Generator) -> torch.Tensor:
    """Position of each word: x and y of two corners, float [batch, sequence, 4] within 0 and 1."""
    corners = torch.rand((*text["input_ids"].shape, 2, 2), generator=generator) * 0.5
    return torch.cat([corners[..., 0, :], corners.sum(dim=-2)], dim=-1)


@extra("state")
def _state(config: Any, text: Row, pixels: Row, shape: SampleShape, generator: torch.Generator) -> torch.Tensor:
    """Joint positions of a robot, [batch, state]."""
    return torch.randn((shape.batch, int(config.max_state_dim)), generator=generator)


@extra("noise")
def _noise(config: Any, text: Row, pixels: Row, shape: SampleShape, generator: torch.Generator) -> torch.Tensor | None:
    """Noise for a robot's motion, [batch, steps, action], or for selecting hidden patches, [batch, patches]."""
    if not hasattr(config, "max_action_dim"):
        geometry = Geometry.of(config)
        patches = (geometry.height // geometry.patch) * (geometry.width // geometry.patch)
        return torch.rand((shape.batch, patches), generator=generator) if hasattr(config, "mask_ratio") else None
    return torch.randn((shape.batch, int(config.chunk_size), int(config.max_action_dim)), generator=generator)


@extra("timestep")
def _timestep(config: Any, text: Row, pixels: Row, shape: SampleShape, generator: torch.Generator) -> torch.Tensor:
    """Remaining noise level, [batch], within 0 and 1."""
    return torch.rand(shape.batch, generator=generator)


@extra("cross_attention_mask")
def _cross_mask(config: Any, text: Row, pixels: Row, shape: SampleShape, generator: torch.Generator) -> torch.Tensor:
    """Tiles visible to each token, int64 [batch, sequence, N, K]: those of the preceding images."""
    tiles = pixels["aspect_ratio_mask"]
    return _seen(text, tiles.shape[1])[..., None] * tiles[:, None]


@extra("image_attention_mask")
def _image_mask(config: Any, text: Row, pixels: Row, shape: SampleShape, generator: torch.Generator) -> torch.Tensor:
    """Images visible to each token, int64 [batch, sequence, N]: the preceding ones."""
    return _seen(text, pixels["pixel_values"].shape[1])


@extra("protein_input_ids")
def _protein(config: Any, text: Row, pixels: Row, shape: SampleShape, generator: torch.Generator) -> torch.Tensor:
    """Amino acids, int64 [batch, 29]."""
    high = int(config.protein_encoder_config.vocab_size)
    return torch.randint(min(5, high - 2), high, (shape.batch, 29), generator=generator)


@extra("protein_attention_mask")
def _protein_mask(config: Any, text: Row, pixels: Row, shape: SampleShape, generator: torch.Generator) -> torch.Tensor:
    """Mask with all amino acids present, int64 [batch, 29]."""
    return torch.ones((shape.batch, 29), dtype=torch.int64)


def _seen(text: Row, images: int) -> torch.Tensor:
    """Int64 [batch, sequence, images]: image n is seen from token n + 1 on, so that the first token sees none."""
    batch, length = text["input_ids"].shape
    seen = torch.arange(length)[:, None] > torch.arange(images)
    return seen.to(torch.int64).expand(batch, -1, -1).clone()
