"""Images in default samples: forms of pixels, placeholders in the text, and that what is seen matters."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from runtime.errors import TraceError
from seqbuild.sample import thin
from seqbuild.sample import vision as sample_vision
from seqbuild.sample.inputs import default_sample
from seqbuild.sample.shape import SampleShape
from seqbuild.shrink.config import shrink_table
from tests.tiny_models import tiny_model
from tests.zoo import cases, small_model

pytestmark = pytest.mark.filterwarnings("ignore")  # architectures warn of what they will rename

OTHER = SampleShape(batch=2, sequence=19, padding="left", images=2, scale=1, seed=5)
SEEING = {
    "image-text-to-text/llava": "pixel_values",
    "image-text-to-text/llava_next": "pixel_values",
    "image-text-to-text/idefics3": "pixel_values",
    "image-text-to-text/lfm2_vl": "pixel_values",
    "image-text-to-text/qwen2_5_vl": "pixel_values",
    "image-text-to-text/minicpmv4_6": "pixel_values",
    "image-text-to-text/mistral3": "pixel_values",
    "image-text-to-text/mllama": "pixel_values",
    "image-text-to-text/kosmos-2": "pixel_values",
    "image-text-to-text/pix2struct": "flattened_patches",
    "image-text-to-text/udop": "pixel_values",
}


@functools.cache
def zoo_model(name: str) -> Any:
    return small_model(next(case for case in cases() if case.name == name))


@pytest.mark.parametrize("name", SEEING)
def test_what_is_seen_matters(name: str) -> None:
    model = zoo_model(name)
    for shape in (SampleShape(), OTHER):
        sample = default_sample(model, shape)
        with torch.no_grad():
            seen = model(**sample)["logits"]
            pixels = sample[SEEING[name]]
            sample[SEEING[name]] = torch.cat([pixels[..., :2], pixels[..., 2:].flip(-1)], dim=-1)  # not places in front
            other = model(**sample)["logits"]
        assert seen.isfinite().all()
        assert (seen - other).abs().max() > 1e-4


@pytest.mark.parametrize("name", SEEING)
def test_another_seed_changes_values_not_shapes(name: str) -> None:
    model = zoo_model(name)
    one, other = default_sample(model), default_sample(model, SampleShape(seed=1))
    assert {key: value.shape for key, value in one.items()} == {key: value.shape for key, value in other.items()}
    assert not torch.equal(one[SEEING[name]], other[SEEING[name]])


def test_every_row_has_its_own_placeholders_between_its_words() -> None:
    model = zoo_model("image-text-to-text/qwen2_5_vl")
    sample = default_sample(model, OTHER)
    held = sample["input_ids"] == model.config.image_token_id
    assert sample["image_grid_thw"].tolist() == [[1, 10, 8], [1, 8, 10]] * 2
    assert held.sum(dim=1).tolist() == [40, 40]
    assert sample["input_ids"].shape == (2, 19 + 2 * (40 // 2 + 2))  # each image stands between two marks
    assert torch.equal(sample["mm_token_type_ids"], held.to(torch.int64))
    assert sample["attention_mask"].sum(dim=1).tolist() == [60, 61]
    assert not (held & (sample["attention_mask"] == 0)).any()
    assert sample["pixel_values"].shape == (4 * 80, 3 * 2 * 14 * 14)


def test_forms() -> None:
    def shapes(name: str, shape: SampleShape | None = None) -> dict[str, tuple[int, ...]]:
        sample = default_sample(zoo_model(name), shape)
        return {key: tuple(value.shape) for key, value in sample.items() if "mask" not in key and "token" not in key}

    patches = shapes("image-text-to-text/lfm2_vl")
    assert patches == {"input_ids": (3, 37 + 15), "pixel_values": (3, 60, 768), "spatial_shapes": (3, 2)}
    tiles = shapes("image-text-to-text/llava_next", OTHER)
    assert (tiles["pixel_values"], tiles["image_sizes"]) == ((4, 5, 3, 56, 56), (4, 2))
    assert shapes("image-text-to-text/idefics3", OTHER)["pixel_values"] == (2, 2, 3, 128, 128)
    assert shapes("image-text-to-text/mllama", OTHER)["pixel_values"] == (2, 2, 4, 3, 56, 56)
    assert shapes("image encoder/vit") == {"pixel_values": (3, 3, 224, 224)}
    assert shapes("image encoder/timesformer") == {"pixel_values": (3, 8, 3, 224, 224)}


def test_a_large_model_without_weights_is_asked_through_a_narrow_copy() -> None:
    config = Qwen2_5_VLConfig()
    config.text_config.rope_parameters["mrope_section"] = [16, 24, 24]
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    sample = default_sample(model)
    assert {value.device.type for value in sample.values()} == {"cpu"}
    assert (sample["input_ids"] == config.image_token_id).sum(dim=1).tolist() == [15, 15, 15]
    assert sum(parameter.numel() for parameter in thin.thin_copy(model).parameters()) < 2_000_000
    assert thin.thin_copy(model) is thin.thin_copy(model)


def test_no_word_is_taken_for_an_image() -> None:
    table = shrink_table(LlavaConfig(image_token_index=11).to_dict())
    sample = default_sample(LlavaForConditionalGeneration(LlavaConfig.from_dict(table)), SampleShape(sequence=500))
    assert (sample["input_ids"] == 11).sum(dim=1).tolist() == [576, 576, 576]


def test_text_alone_needs_no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_vision, "thin_copy", None)
    assert list(default_sample(tiny_model("llama"))) == ["input_ids", "attention_mask"]


def test_a_class_that_builds_no_copy_of_itself() -> None:
    with pytest.raises(TraceError, match="Linear is not a model of transformers"):
        thin.thin_copy(torch.nn.Linear(2, 2))
