"""Sounds in default samples: they fit, they matter, and their places in the text are counted right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

from seqbuild.sample.audio import with_places
from seqbuild.sample.inputs import default_sample
from seqbuild.sample.shape import SampleShape
from tests import zoo

# One of each kind: what the sound's tensor is called, and its sizes after the batch.
ALONE = {
    "whisper": ("input_features", (80, 200)),
    "speech_to_text": ("input_features", (200, 80)),
    "seamless_m4t": ("input_features", (200, 160)),
    "speecht5": ("input_values", (9600,)),
    "moonshine": ("input_values", (9600,)),
    "pop2piano": ("input_features", (200, 64)),
}
IN_TEXT = {
    "qwen2_audio": ("input_features", (128, 200), 50),
    "voxtral": ("input_features", (128, 200), 25),
    "granite_speech": ("input_features", (200, 160), 42),
    "omniasr": ("input_values", (1, 9600), 29),
}


def small(model_type: str) -> Any:
    found = [case for case in zoo.cases() if case.model_type == model_type]
    if not found:
        pytest.skip(f"this transformers has no {model_type}")
    return zoo.small_model(found[-1])  # the one that hears


def logits(model: Any, sample: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(**sample, use_cache=False).logits
    assert bool(torch.isfinite(result).all())
    return result


@pytest.mark.parametrize("model_type", ALONE)
def test_sounds_that_are_heard_alone(model_type: str) -> None:
    name, sizes = ALONE[model_type]
    model = small(model_type)
    sample = default_sample(model)
    assert sample[name].shape == (3, *sizes)
    assert "input_ids" not in sample
    assert sample["decoder_input_ids"].shape == (3, 31)
    expected = logits(model, sample)
    assert not torch.equal(logits(model, sample | {name: sample[name].flip(0)}), expected)


@pytest.mark.parametrize("model_type", IN_TEXT)
def test_sounds_in_text(model_type: str) -> None:
    name, sizes, count = IN_TEXT[model_type]
    model = small(model_type)
    sample = default_sample(model, SampleShape(batch=2, sequence=19, padding="left"))
    assert sample[name].shape == (2, *sizes)
    token = model.config.audio_token_id
    assert (sample["input_ids"] == token).sum(dim=1).tolist() == [count, count]
    assert sample["input_ids"].shape == (2, 19 + count)
    assert (sample["attention_mask"] == 0).sum(dim=1).tolist() == [3, 2]
    expected = logits(model, sample)
    assert not torch.equal(logits(model, sample | {name: sample[name].flip(0)}), expected)


def test_several_sounds_in_a_row() -> None:
    sample = default_sample(small("qwen2_audio"), SampleShape(batch=2, sequence=19, images=2))
    assert sample["input_features"].shape == (4, 128, 200)
    assert (sample["input_ids"] == 383).sum(dim=1).tolist() == [100, 100]


def test_longer_sounds_where_they_are_allowed() -> None:
    longer = SampleShape(scale=1, sequence=19, padding="right")
    assert default_sample(small("speech_to_text"), longer)["input_features"].shape == (3, 400, 80)
    assert default_sample(small("whisper"), longer)["input_features"].shape == (3, 80, 200)


def test_seeds_change_values_and_no_shapes() -> None:
    model = small("granite_speech")
    first, second = default_sample(model), default_sample(model, SampleShape(seed=1))
    assert {name: value.shape for name, value in first.items()} == {name: v.shape for name, v in second.items()}
    assert not torch.equal(first["input_features"], second["input_features"])


def test_a_large_model_without_weights_is_asked_through_a_thin_copy() -> None:
    config = WhisperConfig(
        d_model=1280, encoder_layers=32, decoder_layers=32, encoder_attention_heads=20, decoder_attention_heads=20
    )
    with torch.device("meta"):
        model = WhisperForConditionalGeneration(config)
    sample = default_sample(model, SampleShape(batch=1))
    assert sample["input_features"].shape == (1, 80, 3000)
    assert {value.device.type for value in sample.values()} == {"cpu"}


def test_places_in_the_text() -> None:
    text = {"input_ids": torch.tensor([[1, 2, 3, 4, 5, 9]]), "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]])}
    placed = with_places(text, 9, 2, 1)
    assert placed["input_ids"].tolist() == [[1, 2, 3, 4, 9, 9, 5, 10]]  # what was a placeholder by chance is none
    assert placed["attention_mask"].tolist() == [[0, 1, 1, 1, 1, 1, 1, 1]]
