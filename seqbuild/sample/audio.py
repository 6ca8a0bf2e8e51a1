"""Generate audio for a default sample: spectrograms or waveforms, their masks, and placeholder tokens.

There are no rules per architecture. The config states a few widths and lengths; a thin copy of the model is run on
sounds of these, one kind after the other, and the first accepted kind becomes the sample. The thin copy also determines
the number of tokens for each sound.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from runtime.errors import TraceError
from seqbuild.sample.shape import PASS_SAMPLE
from seqbuild.sample.thin import thin_copy
from seqbuild.sample.tokens import text_inputs

if TYPE_CHECKING:
    from torch import nn

    from seqbuild.sample.shape import SampleShape

Row = dict[str, torch.Tensor]

_SPECTROGRAMS = ("input_features", "audio_input_features")
_WAVEFORMS = ("input_values",)
_MASKS = ("input_features_mask", "feature_attention_mask", "audio_attention_mask", "padding_mask")
_WIDTHS = re.compile(
    r"num_mel_bins|n_mels|n_mel_bins|input_feat_per_channel|feature_projection_input_dim|feature_size|input_feat_size"
    r"|input_dim|input_size"
)
_STACKED, _FIXED, _OWN_WIDTHS = "num_stacked_frames", "max_source_positions", ("d_model", "hidden_size")
_PLACEHOLDERS = ("audio_token_id", "audio_token_index")
# Divisible by the strides of convolutions and patches, and not equal to the width of a spectrogram.
_FRAMES, _SAMPLES = 200, 9600
_BEFORE = 4  # tokens of text before the first sound: more than are padded


@dataclass(frozen=True, kw_only=True, slots=True)
class Sound:
    """One kind of sound that a model may accept.

    Attributes:
        name: the parameter of forward.
        axes: of the tensor, after the batch: `width` and `length` of a spectrogram, `length` and `1` of a waveform.
        width: the width, one of those stated by the config.
        length: frames or samples.
        mask: `int64` or `bool`: [batch, length]; `counted`: bool [batch, tokens of a sound]; `whole`: int64 without
            padding; or empty for no mask.
    """

    name: str
    axes: tuple[str, ...]
    width: int
    length: int
    mask: str

    def shape(self, config: Any, sounds: int) -> tuple[int, ...]:
        """Return the shape of a tensor of `sounds` sounds of this kind for a model with this config."""
        sizes = {"1": 1, "length": self.length}
        if "width" in self.axes:
            sizes["width"] = widths(config)[self.width]
        return (sounds, *(sizes[axis] for axis in self.axes))


def takes_audio(parameters: Mapping[str, Any]) -> bool:
    """Return whether the model takes sounds, alone or in text. For models that also take images, sounds suffice."""
    return "pixel_values" not in parameters and any(name in parameters for name in (*_SPECTROGRAMS, *_WAVEFORMS))


def replaces_text(parameters: Mapping[str, Any]) -> bool:
    """Return whether sounds are the input of an encoder, whose decoder writes text."""
    return takes_audio(parameters) and "decoder_input_ids" in parameters and "input_ids" not in parameters


def is_input(name: str) -> bool:
    """Return whether a parameter of such a model is a sound, its mask or an input of the decoder."""
    return name in (*_SPECTROGRAMS, *_WAVEFORMS, *_MASKS, "attention_mask") or name.startswith("decoder_")


def with_audio(model: nn.Module, parameters: Mapping[str, Any], shape: SampleShape) -> Row:
    """Generate a sample of text and sounds.

    Args:
        model: the model whose forward takes `parameters`; neither run nor modified.
        parameters: the parameters of the signature, by name.
        shape: `images` sounds in each of `batch` rows, in lengths by `scale`.

    Raises:
        TraceError: if the thin copy accepts none of the known kinds of sound.
    """
    thin: Any = thin_copy(model)
    audio = _Audio(parameters=parameters, shape=shape)
    reasons: dict[str, None] = {}
    for sound in audio.kinds(model.config):
        try:
            count = audio.count(thin, sound)
            trial = audio.sample(thin.config, sound, count)
            with torch.no_grad():
                _require_finite(thin(**trial))
                if audio.mask_name == "attention_mask" and _ignores(thin, trial, audio.mask_name):
                    sound = replace(sound, mask="")
        except (ValueError, RuntimeError, IndexError, TypeError, AttributeError, AssertionError) as error:
            reasons[str(error).splitlines()[0] if str(error) else type(error).__name__] = None
            continue
        return audio.sample(model.config, sound, count)
    raise TraceError(
        f"cannot generate audio that {type(model).__name__} accepts: {'; '.join(list(reasons)[-3:])}", hint=PASS_SAMPLE
    )


def _require_finite(output: Any) -> None:
    """Reject a kind of sound for which the model returns NaN (padded frames, in some versions of some models)."""
    values = output.values() if isinstance(output, Mapping) else ()
    if not all(bool(torch.isfinite(value).all()) for value in values if isinstance(value, torch.Tensor)):
        raise ValueError("the output is not finite")


def _ignores(thin: Any, trial: Row, mask: str) -> bool:
    """Return whether a mask of sounds has no effect: the model takes it only because others do (Whisper)."""
    if mask not in trial:
        return False
    masked = trial[mask].clone()
    masked[:, masked.shape[1] // 2 :] = 0
    outputs = [thin(**trial), thin(**trial | {mask: masked}), thin(**{k: v for k, v in trial.items() if k != mask})]
    found = [[value for value in output.values() if isinstance(value, torch.Tensor)] for output in outputs]
    return all(len(found[0]) == len(other) and all(map(torch.equal, found[0], other)) for other in found[1:])


def widths(config: Any) -> list[int]:
    """Return the possible channels of a frame: all that the config states, then the model's own width."""
    entries = list(_entries(config.to_dict()))
    stacked = [value for key, value in entries if key == _STACKED]
    found = [value * (stacked[0] if stacked else 1) for key, value in entries if _WIDTHS.fullmatch(key)]
    own = next((getattr(config, name, None) for name in _OWN_WIDTHS if getattr(config, name, None)), None)
    return [*dict.fromkeys(found), *([int(own)] if isinstance(own, int) else [])]


def _entries(table: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _entries(value)
        elif type(value) is int and value > 1:
            yield key, value


@dataclass(frozen=True, kw_only=True, slots=True)
class _Audio:
    """Generator of text and sounds; see `with_audio`."""

    parameters: Mapping[str, Any]
    shape: SampleShape

    @property
    def is_alone(self) -> bool:
        """Return whether sounds replace the encoder's text."""
        return "decoder_input_ids" in self.parameters or "input_ids" not in self.parameters

    @property
    def mask_name(self) -> str:
        own = next((name for name in _MASKS if name in self.parameters), "")
        return own or ("attention_mask" if self.is_alone and "attention_mask" in self.parameters else "")

    def kinds(self, config: Any) -> Iterator[Sound]:
        """Yield the kinds to try, shortest first."""
        has_mask = any(name in self.parameters for name in _MASKS) or self.is_alone
        masks = ("int64", "bool", "counted", "whole", "") if has_mask else ("",)
        spectra: tuple[tuple[str, ...], ...] = (("width", "length"), ("length", "width"))
        for name in _SPECTROGRAMS:
            for length in self._frames(config) if name in self.parameters else ():
                for width in range(len(widths(config))):
                    for axes in spectra:
                        for mask in masks:
                            yield Sound(name=name, axes=axes, width=width, length=length, mask=mask)
        waves: tuple[tuple[str, ...], ...] = (("length",), ("1", "length"))
        for name in _WAVEFORMS:
            for axes in waves if name in self.parameters else ():
                for mask in masks:
                    yield Sound(name=name, axes=axes, width=0, length=_SAMPLES * (1 + self.shape.scale), mask=mask)

    def _frames(self, config: Any) -> list[int]:
        fixed = [2 * value for key, value in _entries(config.to_dict()) if key == _FIXED]
        by_token = getattr(config, "audio_length_per_tok", None)
        if by_token and _placeholder(config) is None:  # sound accompanies each token of text
            return [by_token * self.shape.sequence]
        scale = self.shape.scale
        free = [_FRAMES * (1 + scale), _FRAMES // 2 * (2 + scale), _FRAMES]
        return list(dict.fromkeys([*free, *fixed]))

    def sample(self, config: Any, sound: Sound, count: int) -> Row:
        """Generate text and sounds for a model with this config; each sound has `count` placeholder tokens."""
        generator = torch.Generator().manual_seed(self.shape.seed)
        text = text_inputs(config, self.parameters, self.shape, generator)
        token = None if self.is_alone else _placeholder(config)
        rows = 1 if token is None else self.shape.images
        size = sound.shape(config, self.shape.batch * rows)
        sample = {sound.name: torch.randn(size, generator=generator)}
        if self.mask_name and sound.mask:
            length = count if sound.mask == "counted" else sound.length
            mask = torch.ones((size[0], length), dtype=torch.int64 if sound.mask in ("int64", "whole") else torch.bool)
            is_padded = token is None and bool(self.shape.padding) and sound.mask != "whole"
            for row in range(min(3, size[0]) if is_padded else 0):
                mask[row, length - length // 16 * (3 - row) :] = 0  # sounds end early, on whichever side text is padded
            sample[self.mask_name] = mask
        if "audio_embed_sizes" in self.parameters:
            sample["audio_embed_sizes"] = torch.full((size[0],), count)
        if self.is_alone:
            return {**sample, **{key: value for key, value in text.items() if key.startswith("decoder_")}}
        return {**(with_places(text, token, count, rows) if token is not None and count else text), **sample}

    def count(self, thin: Any, sound: Sound) -> int:
        """Return the number of placeholder tokens for each sound; 0 if there are none."""
        config = thin.config
        if self.is_alone or _placeholder(config) is None:
            return 0
        steps = getattr(getattr(config, "audio_config", None), "time_reduction", None)
        if "audio_embed_sizes" in self.parameters and steps:
            return -(-sound.length // int(steps))
        trial = self.sample(config, replace(sound, mask="") if sound.mask == "counted" else sound, 2)
        sounds = len(trial[sound.name])
        with torch.no_grad():
            try:
                features = _inner(thin, "get_audio_features")(trial).pooler_output
            except (ValueError, RuntimeError, AttributeError):  # it reads the tokens, which do not exist yet
                lengths = torch.full((sounds,), sound.length)
                return int(_method(thin, "_get_feat_extract_output_lengths")(lengths)[1][0])
        if isinstance(features, (tuple, list)):
            return len(features[0])
        return int(features.shape[:-1].numel()) // sounds


def with_places(text: Row, token: int, count: int, sounds: int) -> Row:
    """Insert `count` placeholders for each of `sounds` sounds into `text`, separated by one token of text."""
    ids = text["input_ids"]
    before = min(_BEFORE, ids.shape[1] - 1)
    plain = torch.where(ids == token, ids + 1, ids)
    pieces = {"input_ids": token, "attention_mask": 1}
    result: Row = {}
    for name, value in text.items():
        if name.startswith("decoder_") or value.shape[:2] != ids.shape:
            result[name] = value
            continue
        value = plain if name == "input_ids" else value
        block = value.new_full((len(value), count, *value.shape[2:]), pieces.get(name, 0))
        parts = [value[:, :before]]
        for place in range(sounds):
            parts += [block, value[:, before + place : before + place + 1]]
        result[name] = torch.cat([*parts, value[:, before + sounds :]], dim=1)
    return result


def _placeholder(config: Any) -> int | None:
    for place in (config, getattr(config, "audio_config", None)):
        for name in _PLACEHOLDERS:
            token = getattr(place, name, None)
            if isinstance(token, int) and token >= 0:
                return token
    return None


def _method(thin: Any, name: str) -> Any:
    """Return the method of that name of the innermost module that has it; outer modules forward to it."""
    owners = [module for module in thin.modules() if hasattr(module, name)]
    if not owners:
        raise AttributeError(f"{type(thin).__name__} has no {name}")
    return getattr(owners[-1], name)


def _inner(thin: Any, name: str) -> Callable[[Row], Any]:
    """Return the method as a function of a complete sample: arguments are matched by name, missing ones are None."""
    method = _method(thin, name)
    needed = inspect.signature(method).parameters.values()
    given = {parameter.name: parameter for parameter in needed if parameter.kind is parameter.POSITIONAL_OR_KEYWORD}

    def call(sample: Row) -> Any:
        absent = {key: None for key, parameter in given.items() if parameter.default is parameter.empty}
        return method(**absent | {key: value for key, value in sample.items() if key in given})

    return call
