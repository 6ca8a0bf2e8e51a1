"""Read the geometry of a model's images from its config: sizes of images and patches, under any of their names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# Config entries of vision parts, in lookup order.
_VISION_PARTS = ("vision_config", "vq_config", "encoder", "vision_encoder_config")
_CHANNELS = ("num_channels", "in_channels", "in_chans")
_SIZES = ("image_size", "img_size", "input_size", "resolution")
_MERGES = ("spatial_merge_size", "merge_size", "merge_kernel_size", "downsample_factor")


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """Geometry of pixel inputs.

    Attributes:
        source: the part of the config that it was read from.
        channels: of a pixel.
        height: of an image in pixels; 0 if the config states none.
        width: of an image in pixels; 0 if the config states none.
        patch: side of a patch in pixels.
        time: frames of a patch.
        merge: patches in each direction that form one feature.
        frames: of a video, for models that take only videos; else 0.
    """

    source: Any
    channels: int
    height: int
    width: int
    patch: int
    time: int
    merge: int
    frames: int

    @classmethod
    def of(cls, config: Any) -> Geometry:
        """Read the geometry from the config of a complete model."""
        source = vision_config(config)
        size = _stated(source, config, _SIZES, 0)
        ratios = getattr(config, "scaled_images_ratios", None)
        if ratios:  # the smallest of several views is still one patch
            size = int(config.patch_size / min(ratios))
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return cls(
            source=source,
            channels=_number(_stated(source, config, _CHANNELS, 3)),
            height=int(height),
            width=int(width),
            patch=_number(_stated(source, config, ("patch_size",), 16)),
            time=_number(_stated(source, config, ("temporal_patch_size", "patch_temporal"), 1)),
            merge=_number(_stated(source, config, _MERGES, 1)),
            frames=_number(getattr(config, "num_frames", 0) or 0),
        )


def vision_config(config: Any) -> Any:
    """Return the part of a config that describes the vision model, or the config itself if there is no such part."""
    for name in _VISION_PARTS:
        for part in parts(config):
            found = getattr(part, name, None)
            if found is not None and not isinstance(found, (dict, str)):
                return found
    return config


def parts(config: Any) -> Iterator[Any]:
    """Return the config and its nested configs, breadth first."""
    waiting = [config]
    while waiting:
        found = waiting.pop(0)
        yield found
        names = getattr(found, "sub_configs", None) or ()
        waiting += [part for name in names if (part := getattr(found, name, None)) is not None]


def _stated(source: Any, config: Any, names: tuple[str, ...], default: Any) -> Any:
    for part in (*parts(source), config):
        for name in names:
            value = getattr(part, name, None)
            if value and not isinstance(value, (dict, str)):
                return value
    return default


def _number(value: Any) -> int:
    """Return a single number; sides given per direction must be equal for this."""
    return int(value[0] if isinstance(value, (list, tuple)) else value)
