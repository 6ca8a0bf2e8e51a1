"""Generate token ids and the accompanying inputs: masks, types, boxes, languages, several id streams."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from seqbuild.sample.shape import SAMPLE_SHORTER, SampleShape

_FIRST_PLAIN_TOKEN = 10
_PAGE = 1000  # width and height of a page


def text_inputs(
    config: Any, parameters: Mapping[str, Any], shape: SampleShape, generator: torch.Generator | None = None
) -> dict[str, torch.Tensor]:
    """Generate all text inputs among the parameters, from a generator or from the seed of the shape."""
    generator = generator or torch.Generator().manual_seed(shape.seed)
    inputs = _tokens(config, parameters, "", shape, generator) if "input_ids" in parameters else {}
    if "decoder_input_ids" not in parameters:  # a decoder of learned queries has a mask, too, but no padding
        return inputs
    shorter = dataclasses.replace(shape, sequence=max(1, shape.sequence - SAMPLE_SHORTER))
    return inputs | _tokens(config, parameters, "decoder_", shorter, generator)


def _tokens(
    config: Any, parameters: Mapping[str, Any], prefix: str, shape: SampleShape, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Generate inputs for the parameters that begin with `prefix` (nothing or `decoder_`).

    Ids are int64 [batch, sequence]; for models with several streams, [batch, sequence, streams] or [batch * streams,
    sequence].
    """
    size = (shape.batch, shape.sequence)
    made = {
        "input_ids": _ids(config, prefix, size, generator),
        "attention_mask": _mask(shape),
        "token_type_ids": _types(config, size),
        "lang_ids": torch.zeros(shape.batch, dtype=torch.int64),
        "bbox": _boxes(size, generator),
    }
    return {prefix + name: value for name, value in made.items() if prefix + name in parameters}


def vocabulary(config: Any, prefix: str = "") -> int:
    """Return the number of ids for plain text (or the decoder's text)."""
    text = config.get_text_config(decoder=bool(prefix)) if hasattr(config, "get_text_config") else config
    sizes = [getattr(place, "vocab_size", None) for place in (text, config)]
    sizes += [getattr(config, "codebook_vocab_size", None)] if hasattr(config, "codebook_vocab_size") else []
    known = [size for size in sizes if isinstance(size, int) and size > 0]
    return min(known) if known else 128


def _ids(config: Any, prefix: str, size: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    count = vocabulary(config, prefix)
    low = min(_FIRST_PLAIN_TOKEN, count - 1)
    high = max(low + 1, count // 2)  # special tokens tend to lie at either end
    return torch.randint(low, high, _streams(config, prefix, size), generator=generator)


def _streams(config: Any, prefix: str, size: tuple[int, int]) -> tuple[int, ...]:
    """Return the shape of the ids of the few models that read audio codes with or instead of text."""
    kind = str(getattr(config, "model_type", ""))
    batch, sequence = size
    if kind == "dia" and prefix:
        return (batch, sequence, int(config.decoder_config.num_channels))
    if kind == "kyutai_speech_to_text":
        return (batch, sequence, int(config.num_codebooks) + 1)
    if kind in ("musicgen_decoder", "musicgen_melody_decoder"):
        return (batch * int(config.num_codebooks), sequence)
    return size


def _mask(shape: SampleShape) -> torch.Tensor:
    """Int64 [batch, sequence]: row i of the first three is padded by three tokens less i."""
    mask = torch.ones((shape.batch, shape.sequence), dtype=torch.int64)
    for row in range(min(shape.batch, 3)):
        padded = min(3 - row, shape.sequence - 1)
        if shape.padding == "left":
            mask[row, :padded] = 0
        elif shape.padding == "right":
            mask[row, shape.sequence - padded :] = 0
    return mask


def _types(config: Any, size: tuple[int, int]) -> torch.Tensor:
    """Token types, all zero: int64 [batch, sequence], or [batch, sequence, K] for models with K kinds of types."""
    kinds = getattr(config, "type_vocab_sizes", None)
    return torch.zeros((*size, len(kinds)) if kinds else size, dtype=torch.int64)


def _boxes(size: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Position of each word on a page: left, top, right, bottom; int64 [batch, sequence, 4]."""
    corners = torch.randint(0, _PAGE // 2, (*size, 2, 2), generator=generator)
    return torch.cat([corners[..., 0, :], corners.sum(dim=-2)], dim=-1)
