"""What `oneshot` says about wrong arguments, before anything is compiled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import seqbuild
import seqbuild.build
from runtime.errors import (
    DataError,
    DeviceError,
    ModelError,
    OutputError,
    RecipeError,
    SeqbuildError,
    UsageError,
    WeightsError,
)
from seqbuild.modifiers import QuantizationModifier
from tests.tiny_models import tiny_model

RECIPE = QuantizationModifier(scheme="FP8_DYNAMIC", ignore=["lm_head"])


class PeftModel(nn.Module):
    """Has the name of the wrapper of a library that is not installed."""

    __module__ = "peft.peft_model"


class Compiled(nn.Module):
    """Is like what `torch.compile` returns."""

    def __init__(self) -> None:
        super().__init__()
        self._orig_mod = nn.Linear(2, 2)


# name: (arguments, class of the error, a part of its message)
WRONG: dict[str, tuple[dict[str, Any], type[SeqbuildError], str]] = {
    "no recipe": ({"recipe": None}, UsageError, "no recipe was given"),
    "number as recipe": ({"recipe": 3}, UsageError, "recipe is 3 .pass YAML text"),
    "empty list as recipe": ({"recipe": []}, RecipeError, "the recipe has no modifier"),
    "list of texts as recipe": ({"recipe": ["W4A16"]}, UsageError, "recipe is 'W4A16'"),
    "class as recipe": ({"recipe": QuantizationModifier}, UsageError, "recipe is a "),
    "unknown recipe": ({"recipe": "W4A17"}, RecipeError, "did you mean W4A16"),
    "broken text as recipe": ({"recipe": "GPTQModifier: {scheme: W4A16, damp: 1}"}, RecipeError, "did you mean damp"),
    "missing file as recipe": ({"recipe": "missing.yaml"}, RecipeError, "missing.yaml"),
    "ignore with modifiers": ({"ignore": ["lm_head"]}, UsageError, "ignore applies to the name of a preset only"),
    "number as model": ({"model": 3}, UsageError, "model is 3 .pass a hub id"),
    "module as model": ({"model": nn.Linear(2, 2)}, UsageError, "model is a torch.nn.modules.linear.Linear"),
    "model with an adapter": ({"model": PeftModel()}, UsageError, r"merge_and_unload\(\)"),
    "compiled model": ({"model": Compiled()}, UsageError, "model._orig_mod"),
    "missing model": ({"model": "./missing"}, ModelError, "missing"),
    "empty model": ({"model": ""}, ModelError, "no model"),
    "number as data": ({"dataset": 3}, UsageError, "dataset is 3"),
    "row as data": ({"dataset": {"text": "a"}}, UsageError, r"put it into a list"),
    "class as data": ({"dataset": list}, UsageError, "call it, and pass what it returns"),
    "function as data": ({"dataset": print}, UsageError, "call it, and pass what it returns"),
    "bytes as data": ({"dataset": b"text"}, UsageError, "dataset is a bytes"),
    "no rows": ({"dataset": []}, DataError, "no rows"),
    "used iterator": ({"dataset": iter(())}, DataError, "an iterator can be read only once"),
    "numbers as rows": ({"dataset": [3, 4]}, DataError, "row 0 is 3"),
    "unknown record": ({"dataset": [{"words": "a"}]}, DataError, "neither text nor messages"),
    "text without tokenizer": ({"dataset": ["a text"]}, DataError, "the model has no tokenizer .pass tokenizer="),
    "mixed rows": ({"dataset": [{"input_ids": [3, 4]}, "a text"]}, DataError, "row 1 has no input_ids"),
    "batch as a row": ({"dataset": [{"input_ids": torch.ones(2, 3)}]}, DataError, "row 0 has 2 samples"),
    "text as ids": ({"dataset": [{"input_ids": "a text"}]}, DataError, "input_ids of row 0 is 'a text'"),
    "wrong collator": ({"dataset": ["a"], "data_collator": len}, DataError, "data_collator returned 1"),
    "unknown collator": ({"data_collator": "pad"}, UsageError, "data_collator is 'pad'"),
    "text as function": ({"preprocessing_func": "file.py:f"}, UsageError, "pass a function that takes a row"),
    "function for a path": ({"dataset": "a.jsonl", "preprocessing_func": len}, UsageError, "which is a path or an id"),
    "split of a list": ({"dataset": ["a"], "splits": "train"}, UsageError, "the data set has none"),
    "several splits": ({"splits": ["a", "b"]}, UsageError, "pass the name of one split"),
    "number as tokenizer": ({"tokenizer": 3}, UsageError, "tokenizer is 3"),
    "missing tokenizer": ({"tokenizer": "./missing"}, DataError, "there is no tokenizer at ./missing"),
    "model as processor": ({"processor": nn.Linear(2, 2)}, UsageError, "processor is a torch.nn"),
    "no samples": ({"num_calibration_samples": 0}, UsageError, "num_calibration_samples is 0"),
    "text as length": ({"max_seq_length": "2048"}, UsageError, "max_seq_length is '2048'"),
    "number as switch": ({"load": 1}, UsageError, "load is 1 .it must be True or False"),
    "unknown precision": ({"precision": "int4"}, UsageError, "precision is 'int4'"),
    "missing device": ({"device": "cuda:99"}, DeviceError, "cuda:99"),
    "no output": ({"output_dir": None}, UsageError, "pass one, or load=True"),
    "number as output": ({"output_dir": 3}, UsageError, "output_dir is 3"),
    "progress bar": ({"progress": True}, UsageError, "progress is True"),
    "misspelled": ({"max_seq_len": 3}, UsageError, "did you mean max_seq_length"),
    "unlike any": ({"zzzz": 3}, UsageError, "has no argument 'zzzz'"),
    "plain weights": ({"save_compressed": False}, UsageError, "save_compressed=False is not supported"),
    "basic pipeline": ({"pipeline": "basic"}, UsageError, "propagate_error=False"),
    "data-free with data": ({"pipeline": "datafree", "dataset": ["a"]}, UsageError, "leave one of them out"),
    "number of tokens of a module": ({"min_tokens_per_module": 0.1}, UsageError, "set min_tokens in a modifier"),
    "padding": ({"pad_to_max_length": True}, UsageError, "nothing is padded"),
    "another config": ({"config_name": "other"}, UsageError, "config_name='other' is not supported"),
    "stage": ({"stage": "quant"}, UsageError, "all modifiers of a recipe are applied"),
    "integer for a switch": ({"save_compressed": 1}, UsageError, "save_compressed=1 is not supported"),
}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", num_hidden_layers=1)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_one_error_each(
    name: str, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_with(*_: Any) -> Any:
        raise AssertionError("compiled before the arguments were checked")

    monkeypatch.setattr(seqbuild.build, "compile_with", compile_with)
    monkeypatch.chdir(tmp_path)
    arguments, kind, message = WRONG[name]
    given = {"model": model, "recipe": RECIPE, "output_dir": tmp_path / "out"} | arguments
    with pytest.raises(kind, match=message) as caught:
        seqbuild.oneshot(**given)
    assert type(caught.value) is kind
    assert not list(tmp_path.iterdir())


def test_a_processor_by_path_is_checked_like_that_of_a_model(model: Any, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "processor_config.json").write_text(
        json.dumps({"processor_class": "LlavaProcessor", "audio_tokenizer": {"audio_tokenizer_class": "DacModel"}})
    )
    with pytest.raises(DataError, match="has a processor with a model for sounds"):
        seqbuild.oneshot(model, ["a"], recipe=RECIPE, processor=tmp_path, output_dir=tmp_path / "out")


def test_an_output_that_exists_is_rejected_before_anything_runs(model: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="not empty"):
        seqbuild.oneshot(model, recipe=RECIPE, output_dir=tmp_path)


def test_places_are_checked_before_anything_is_compiled(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seqbuild.build, "compile_with", None)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(OutputError, match="is inside the input directory"):
        seqbuild.oneshot(tmp_path / "model", recipe=RECIPE, output_dir=tmp_path / "model" / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write .*file"):
        seqbuild.oneshot(model, recipe=RECIPE, output_dir=tmp_path / "out", log_dir=tmp_path / "file")


def test_weights_are_required_before_anything_is_compiled(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seqbuild.build, "compile_with", None)
    model.config.save_pretrained(tmp_path / "model")
    with pytest.raises(WeightsError, match="does not contain a safetensors checkpoint"):
        seqbuild.oneshot(tmp_path / "model", recipe=RECIPE, output_dir=tmp_path / "out")
    with pytest.raises(ModelError, match="is a config without weights"):
        seqbuild.oneshot(tmp_path / "model" / "config.json", recipe=RECIPE, output_dir=tmp_path / "out")


def test_arguments_without_effect_are_accepted(model: Any, tmp_path: Path) -> None:
    names = {"tracing_ignore": ["f"], "overwrite_cache": True, "save_compressed": True, "pipeline": "datafree"}
    names |= {"quantization_aware_calibration": False, "recipe_args": None, "sequential_offload_device": "cpu"}
    options = {"output_dir": tmp_path / "out", "artifacts": tmp_path / "artifacts", **names}
    with pytest.raises(UsageError, match="the recipe needs data"):
        seqbuild.oneshot(model, recipe="int8", **options)
    assert len(seqbuild.oneshot(model, recipe=RECIPE, **options).modules) == 7
