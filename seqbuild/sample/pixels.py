"""Generate pixels in the formats of the supported architectures: one small function for each format.

The format follows from the parameter names of forward and from entries of the config. Each function generates the
pixels of one row of text (`shape.images` images, fewer if a model takes one per row). All rows have the same sizes, so
they are concatenated along the first dimension. Legend of shapes:

N images of the row     C channels      H, W height and width in pixels
P patches of all images K tiles         D entries of a flattened patch
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from seqbuild.sample.geometry import Geometry

Row = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """Requirements on the generated pixels.

    Attributes:
        parameters: parameter names of forward.
        features: parameter names of the model's get_image_features, mapped to whether they are optional; empty
            without it.
        config: the model's.
        geometry: sizes of images and patches from the config.
        images: the number of images in each row.
        scale: see `SampleShape`.
        generator: random generator of the values.
        first: the index, within the row, of the first image.
    """

    parameters: Mapping[str, Any]
    features: Mapping[str, bool]
    config: Any
    geometry: Geometry
    images: int
    scale: int
    generator: torch.Generator
    first: int = 0

    def noise(self, *size: int) -> torch.Tensor:
        """Normalized pixels, float32."""
        return torch.randn(size, generator=self.generator)

    def grids(self, multiple: int = 1) -> list[tuple[int, int]]:
        """Return rows and columns of patches of each image, divisible by `multiple`; they differ if scale allows."""
        rows, columns = ((3, 5), (5, 4), (7, 4))[min(self.scale, 2)]
        sides = [(rows, columns), (columns, rows)] if self.scale else [(rows, columns)]
        chosen = [sides[(self.first + index) % len(sides)] for index in range(self.images)]
        return [(multiple * height, multiple * width) for height, width in chosen]


_SQUARE_PATCHES = ("paddleocr_vl", "kimi_k25")

Form = Callable[[Wanted], Row]
_FORMS: list[tuple[Callable[[Wanted], bool], Form]] = []


def form(applies: Callable[[Wanted], bool]) -> Callable[[Form], Form]:
    """Register a format for models that satisfy `applies`; the first match is used."""

    def register(function: Form) -> Form:
        _FORMS.append((applies, function))
        return function

    return register


def row_of_pixels(wanted: Wanted) -> Row:
    """Generate all image inputs of one row of text."""
    return next(function for applies, function in _FORMS if applies(wanted))(wanted)


def joined(rows: Sequence[Row]) -> Row:
    """Concatenate all rows along the first dimension."""
    made = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    if "target_sizes" in made:  # one long image for all rows
        made["pixel_values"] = torch.cat([row["pixel_values"] for row in rows], dim=-1)
    if "image_token_pooling" in made:  # patches are numbered consecutively over all rows
        patches, places = rows[0]["pixel_values"].shape[:2].numel(), [row["image_token_pooling"] for row in rows]
        made["image_token_pooling"] = torch.cat([place + index * patches for index, place in enumerate(places)])
    return made


def _takes(*names: str) -> Callable[[Wanted], bool]:
    return lambda wanted: all(name in wanted.parameters for name in names)


def _is(*model_types: str) -> Callable[[Wanted], bool]:
    """Detect the few models whose format cannot be determined otherwise."""
    return lambda wanted: getattr(wanted.config, "model_type", "") in model_types


@form(_is("inkling2", "inkling2_loop"))
def _merged_squares(wanted: Wanted) -> Row:
    """Merged patches as small images, channels last, [P, side, side, C], and their grids, [N, 3]."""
    geometry, grids = wanted.geometry, wanted.grids()
    side, patches = geometry.patch * geometry.merge, sum(height * width for height, width in grids)
    return {
        "pixel_values": wanted.noise(patches, side, side, geometry.channels),
        "image_grid_thw": torch.tensor([[1, height, width] for height, width in grids]),
    }


@form(_is("inkling_mm_model"))
def _blocks(wanted: Wanted) -> Row:
    """Patches as short videos, channels last, [P, T, side, side, C]."""
    geometry, patches = wanted.geometry, sum(height * width for height, width in wanted.grids())
    return {"pixel_values": wanted.noise(patches, geometry.time, geometry.patch, geometry.patch, geometry.channels)}


@form(_is("neomme", "fuyu"))
def _bare_patches(wanted: Wanted) -> Row:
    """Flattened patches [P, D] without a grid; in the older format, one row for each image."""
    grids, geometry = wanted.grids(), wanted.geometry
    pixels = wanted.noise(sum(height * width for height, width in grids), geometry.channels * geometry.patch**2)
    return {"pixel_values": pixels if "image_patches" not in wanted.parameters else pixels[None]}


@form(_takes("image_token_pooling"))
def _pooled_crops(wanted: Wanted) -> Row:
    """Flattened patches of small crops [N, P, D], the four patches that form each feature [F, 4], and grids [N, 4]."""
    geometry = wanted.geometry
    height, width = geometry.height // geometry.patch, geometry.width // geometry.patch
    places = torch.arange(wanted.images * height * width).reshape(wanted.images, height, width)
    places = places[:, : height // 2 * 2, : width // 2 * 2].unfold(1, 2, 2).unfold(2, 2, 2).reshape(-1, 4)
    return {
        "pixel_values": wanted.noise(wanted.images, height * width, geometry.channels * geometry.patch**2),
        "image_token_pooling": places,
        "image_grids": torch.tensor([[height // 2, width // 2, 0, 0]]).repeat(wanted.images, 1),
        "image_num_crops": torch.ones(wanted.images, dtype=torch.int64),
    }


@form(_takes("image_grid_thw"))
def _grid_thw(wanted: Wanted) -> Row:
    """Flattened patches [P, D] (or [P, C, h, w]) in the order of the merged patches, and the grids [N, 3]."""
    geometry = wanted.geometry
    grids = wanted.grids(geometry.merge)
    patches = sum(height * width for height, width in grids)
    row = {
        "pixel_values": wanted.noise(patches, *_flat_patch(wanted)),
        "image_grid_thw": torch.tensor([[1, height, width] for height, width in grids]),
    }
    if "image_merge_sizes" in wanted.parameters:
        row["image_merge_sizes"] = torch.full((len(grids),), geometry.merge)
    return row


def _flat_patch(wanted: Wanted) -> tuple[int, ...]:
    """Return the shape of one patch: flattened with its frames, except for the few models that take it unflattened."""
    geometry = wanted.geometry
    if getattr(wanted.config, "model_type", "") in _SQUARE_PATCHES:
        return geometry.channels, geometry.patch, geometry.patch
    return (geometry.channels * geometry.time * geometry.patch**2,)


@form(_takes("image_grid_hw"))
def _grid_hw(wanted: Wanted) -> Row:
    """As `_grid_thw`, without time."""
    grids = wanted.grids(2)
    patches = sum(height * width for height, width in grids)
    pixels = wanted.noise(patches, wanted.geometry.channels * wanted.geometry.patch**2)
    return {"pixel_values": pixels, "image_grid_hw": torch.tensor(grids)}


@form(_takes("spatial_shapes"))
def _spatial_shapes(wanted: Wanted) -> Row:
    """Flattened patches padded to the largest image, [N, P, D], their mask [N, P], and the grids [N, 2]."""
    grids = wanted.grids(int(getattr(wanted.config, "downsample_factor", 1)))
    longest = max(height * width for height, width in grids) + (4 if wanted.scale else 0)
    mask = torch.zeros(len(grids), longest, dtype=torch.int64)
    for index, (height, width) in enumerate(grids):
        mask[index, : height * width] = 1
    pixels = wanted.noise(len(grids), longest, wanted.geometry.channels * wanted.geometry.patch**2) * mask[..., None]
    return {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": torch.tensor(grids)}


@form(_takes("target_sizes"))
def _target_sizes(wanted: Wanted) -> Row:
    """All patches concatenated to one long image [1, C, patch, P * patch], and the grids [N, 2]."""
    grids = wanted.grids(4)
    patch = wanted.geometry.patch
    patches = sum(height * width for height, width in grids)
    pixels = wanted.noise(1, wanted.geometry.channels, patch, patches * patch)
    return {"pixel_values": pixels, "target_sizes": torch.tensor(grids, dtype=torch.int32)}


@form(_takes("pixel_values", "image_sizes"))
def _image_sizes(wanted: Wanted) -> Row:
    """Images of several sizes [N, C, H, W], padded to the largest, and their sizes in pixels [N, 2].

    If the config lists the resolutions of a tiled image: [N, K, C, H, W].
    """
    geometry = wanted.geometry
    if getattr(wanted.config, "image_grid_pinpoints", None):
        return _tiles(wanted)
    is_free = not wanted.features.get("image_sizes", True) or getattr(geometry.source, "model_type", "") == "pixtral"
    if not is_free:
        return _images(wanted)
    unit = geometry.patch * geometry.merge
    sizes = torch.tensor(wanted.grids(unit))
    pixels = wanted.noise(wanted.images, geometry.channels, int(sizes[:, 0].max()), int(sizes[:, 1].max()))
    for index, (height, width) in enumerate(sizes.tolist()):
        pixels[index, :, height:] = 0
        pixels[index, :, :, width:] = 0
    return {"pixel_values": pixels, "image_sizes": sizes}


def _tiles(wanted: Wanted) -> Row:
    """A downscaled view of each image and the tiles of the best matching resolution, [N, K, C, H, W]."""
    side, points = wanted.geometry.height, sorted(wanted.config.image_grid_pinpoints, key=lambda point: sorted(point))
    fitting = sorted(points, key=lambda point: (point[0] * point[1], point))
    first = min(wanted.scale, len(fitting) - 1)
    chosen = [fitting[(first + (index if wanted.scale else 0)) % len(fitting)] for index in range(wanted.images)]
    counts = [1 + (height // side) * (width // side) for height, width in chosen]
    pixels = wanted.noise(wanted.images, max(counts), wanted.geometry.channels, side, side)
    for index, count in enumerate(counts):
        pixels[index, count:] = 0
    # Padding of an image that does not fill its tiles is cut off; a slightly narrower image keeps the same best
    # resolution.
    cut = 8 if wanted.scale else 0
    return {
        "pixel_values": pixels,
        "image_sizes": torch.tensor([[height, width - cut] for height, width in chosen]),
    }


@form(_takes("pixel_values_local"))
def _global_and_local(wanted: Wanted) -> Row:
    """Complete images [N, C, H, W], and from scale 1 on two tiles of each, [2 N, C, h, w]."""
    geometry = wanted.geometry
    return {"pixel_values": wanted.noise(wanted.images, geometry.channels, geometry.height, geometry.width)}


@form(_takes("image_position_ids"))
def _position_ids(wanted: Wanted) -> Row:
    """Flattened patches [N, P, D] and the x and y position of each, [N, P, 2]; -1 for padding."""
    merge, patch = int(getattr(wanted.geometry.source, "pooling_kernel_size", 1)), wanted.geometry.patch
    if hasattr(wanted.geometry.source, "model_patch_size"):  # patches come merged
        merge, patch = 1, int(wanted.geometry.source.model_patch_size)
    grids = wanted.grids(merge)
    longest = max(height * width for height, width in grids)
    places = torch.full((len(grids), longest, 2), -1)
    for index, (height, width) in enumerate(grids):
        ys, xs = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        places[index, : height * width] = torch.stack([xs.flatten(), ys.flatten()], dim=-1)
    pixels = wanted.noise(len(grids), longest, wanted.geometry.channels * patch**2).sigmoid()
    return {"pixel_values": pixels * (places[..., :1] >= 0), "image_position_ids": places}


@form(_takes("flattened_patches"))
def _flattened_patches(wanted: Wanted) -> Row:
    """Patches with a prefix of row and column, numbered from one: [1, P, 2 + D]."""
    height, width = wanted.grids()[0]
    places = torch.cartesian_prod(torch.arange(1, height + 1), torch.arange(1, width + 1)).float()
    pixels = wanted.noise(height * width, wanted.geometry.channels * wanted.geometry.patch**2)
    row = {"flattened_patches": torch.cat([places, pixels], dim=-1)[None]}
    if "width" in wanted.parameters:
        row |= {"height": torch.tensor([height]), "width": torch.tensor([width])}
    if "input_ids" not in wanted.parameters:  # then the mask is that of the patches
        row["attention_mask"] = torch.ones(1, height * width)
    return row


@form(_takes("aspect_ratio_ids"))
def _aspect_ratios(wanted: Wanted) -> Row:
    """[1, N, K, C, H, W] with K tiles, the index of the aspect ratio [1, N], and a mask of tiles [1, N, K]."""
    geometry, tiles = wanted.geometry, int(wanted.geometry.source.max_num_tiles)
    ratios = list(wanted.geometry.source.supported_aspect_ratios)
    images = wanted.images if "input_ids" in wanted.parameters else 1
    arrangements = [(wanted.scale + index) % len(ratios) if wanted.scale else 0 for index in range(images)]
    mask = torch.zeros(1, images, tiles, dtype=torch.int64)
    for index, arrangement in enumerate(arrangements):
        mask[0, index, : ratios[arrangement][0] * ratios[arrangement][1]] = 1
    pixels = wanted.noise(1, images, tiles, geometry.channels, geometry.height, geometry.width)
    return {
        "pixel_values": pixels * mask[..., None, None, None],
        "aspect_ratio_ids": torch.tensor([arrangements]) + 1,
        "aspect_ratio_mask": mask,
    }


@form(_takes("pixel_values_videos"))
def _frames_or_images(wanted: Wanted) -> Row:
    """Images if the model takes them, also under their older name; else videos."""
    name = next(
        name for name in ("pixel_values", "pixel_values_images", "pixel_values_videos") if name in wanted.parameters
    )
    return {name: _images(wanted)["pixel_values"]}


@form(_is("instructblipvideo"))
def _videos(wanted: Wanted) -> Row:
    """[1, T, C, H, W]."""
    geometry, frames = wanted.geometry, 2 + wanted.scale
    return {"pixel_values": wanted.noise(1, frames, geometry.channels, geometry.height, geometry.width)}


@form(_takes("state"))
@form(_takes("tile_fine_mask"))
def _images_and_their_mask(wanted: Wanted) -> Row:
    """[1, N, C, H, W], and a mask of images [1, N]."""
    pixels = _images(wanted)["pixel_values"][None]
    return {"pixel_values": pixels, "pixel_attention_mask": torch.ones(pixels.shape[:2], dtype=torch.bool)}


@form(_takes("image_attention_mask"))
def _images_seen_by_some(wanted: Wanted) -> Row:
    """[1, N, C, H, W]."""
    return {"pixel_values": _images(wanted)["pixel_values"][None]}


@form(_takes("pixel_values", "pixel_attention_mask"))
def _images_by_row(wanted: Wanted) -> Row:
    """[1, N, C, H, W] and a mask of pixels [1, N, H, W]."""
    geometry = wanted.geometry
    height, width = geometry.height, geometry.width
    pixels = wanted.noise(1, wanted.images, geometry.channels, height, width)
    return {
        "pixel_values": pixels,
        "pixel_attention_mask": torch.ones(1, wanted.images, height, width, dtype=torch.bool),
    }


@form(_takes("pixel_values"))
def _images(wanted: Wanted) -> Row:
    """[N, C, H, W]; one image per row without placeholders; [1, T, C, H, W] for videos of T frames."""
    geometry = wanted.geometry
    height, width = geometry.height, geometry.width
    if not height:
        height, width = ((64, 96), (96, 64), (128, 96))[min(wanted.scale, 2)]
    if geometry.frames:
        return {"pixel_values": wanted.noise(1, geometry.frames, geometry.channels, height, width)}
    return {"pixel_values": wanted.noise(wanted.images, geometry.channels, height, width)}


@form(lambda wanted: True)
def _nothing(wanted: Wanted) -> Row:
    """No pixels, for models with other vision inputs: see `seqbuild.sample.extras`."""
    return {}
