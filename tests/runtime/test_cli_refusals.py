from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from runtime.artifact.manifest import MANIFEST_NAME
from runtime.chain import read_manifest
from tests.runtime.place import Place, Run, assert_refused, edit_manifest, rely_on_other_sources
from tests.runtime.small import read_tensors, write_token_file


def no_artifact(place: Place) -> list[str]:
    place.artifact = place.folder / "nowhere"
    return ["nowhere is not a directory"]


def weights_as_artifact(place: Place) -> list[str]:
    place.artifact = place.weights
    return ["is not an artifact: it has no manifest.msgpack"]


def damaged_manifest(place: Place) -> list[str]:
    path = place.artifact / MANIFEST_NAME
    path.write_bytes(path.read_bytes()[:-5])
    return [str(path), "is damaged"]


def damaged_program(place: Place) -> list[str]:
    path = place.artifact / "subgraphs" / "001.py"
    path.write_bytes(path.read_bytes() + b"\n")
    return [str(path), "is damaged", "compile it again"]


def lost_program(place: Place) -> list[str]:
    (place.artifact / "subgraphs" / "001.py").unlink()
    return ["is incomplete: subgraphs/001.py is missing"]


def other_transformers(place: Place) -> list[str]:
    rely_on_other_sources(place)
    return ["compiled with transformers 4.99.0", "differ: transformers.models.llama.modeling_llama", "--allow-version"]


def no_weights(place: Place) -> list[str]:
    place.weights = place.folder / "nowhere"
    return ["there are no weights at ", "nowhere"]


def weights_are_a_file(place: Place) -> list[str]:
    place.weights = place.recipe
    return ["recipe.yaml is a file, but the weights must be a directory"]


def empty_weights(place: Place) -> list[str]:
    place.weights = place.folder / "empty"
    place.weights.mkdir()
    return ["does not contain a safetensors checkpoint", "it has no model.safetensors"]


def pickled_weights(place: Place) -> list[str]:
    (place.weights / "model.safetensors").rename(place.weights / "pytorch_model.bin")
    return ["does not contain a safetensors checkpoint", "pytorch_model.bin is a pickle: convert it"]


def truncated_weights(place: Place) -> list[str]:
    path = place.weights / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    return [str(path), "damaged", "copy the checkpoint again"]


def weights_of_another_model(place: Place) -> list[str]:
    (place.weights / "config.json").unlink()
    tensors = read_tensors(place.weights)
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(3, 4)
    safetensors.torch.save_file(tensors, place.weights / "model.safetensors")
    return ["'model.layers.2.mlp.up_proj.weight'", "[3, 4]", "[256, 128]"]


def config_of_another_model(place: Place) -> list[str]:
    path = place.weights / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.1}))
    return ["rms_norm_eps = 0.1", "compile the model of this checkpoint"]


def no_data(place: Place) -> list[str]:
    place.data = place.folder / "nowhere.txt"
    return ["nowhere.txt cannot be read: No such file or directory"]


def data_is_a_directory(place: Place) -> list[str]:
    place.data = place.folder / "folder.txt"
    place.data.mkdir()
    return ["folder.txt cannot be read: Is a directory"]


def empty_data(place: Place) -> list[str]:
    place.data = place.write("empty.txt", "")
    return ["empty.txt is empty"]


def blank_data(place: Place) -> list[str]:
    place.data = place.write("blank.txt", " \n \n")
    return ["blank.txt has only white space"]


def long_data(place: Place) -> list[str]:
    place.data = write_token_file(place.folder / "long.safetensors", length=257)
    return ["a sample has 257 tokens", "allows 256", "--seq-len 256 or less"]


def unknown_data(place: Place) -> list[str]:
    place.data = place.write("text.docx", "hello")
    return ["unsupported extension '.docx' of ", ".parquet and .safetensors"]


def foreign_tokens(place: Place) -> list[str]:
    place.data = write_token_file(place.folder / "foreign.safetensors", largest=258)
    return ["has the token id 258, but the model's vocabulary has 258 entries", "use the model's own tokenizer"]


def weights_as_data(place: Place) -> list[str]:
    place.data = place.weights / "model.safetensors"
    return ["is a safetensors file but not a token file", "seqbuild data"]


def binary_data(place: Place) -> list[str]:
    place.data = place.write("text.txt", b"\xff\xfe\x00")
    return ["text.txt is UTF-16, not UTF-8 (convert it"]


def text_without_a_tokenizer(place: Place) -> list[str]:
    place.data = place.write("text.txt", "hello " * 99)
    manifest = read_manifest(place.artifact)
    keep = [entry for entry in manifest.files if "tokenizer" not in entry.path and "chat" not in entry.path]
    for folder in (place.artifact, place.weights):
        for path in [*folder.glob("*tokenizer*"), *folder.glob("chat*")]:
            path.unlink()
    edit_manifest(place, files=tuple(keep))
    return ["tokenizer", "seqbuild data"]


def model_with_other_inputs(place: Place) -> list[str]:
    manifest = read_manifest(place.artifact)
    edit_manifest(place, inputs=(*manifest.inputs, replace(manifest.inputs[0], name="pixel_values")))
    return ["has an input 'pixel_values', which is missing in the data"]


BOTH = [
    no_artifact,
    weights_as_artifact,
    damaged_manifest,
    damaged_program,
    lost_program,
    other_transformers,
    no_weights,
    weights_are_a_file,
    empty_weights,
    pickled_weights,
    truncated_weights,
    weights_of_another_model,
    config_of_another_model,
    no_data,
    data_is_a_directory,
    empty_data,
    blank_data,
    long_data,
    unknown_data,
    foreign_tokens,
    weights_as_data,
    binary_data,
    text_without_a_tokenizer,
    model_with_other_inputs,
]


def no_recipe(place: Place) -> list[str]:
    place.recipe = place.folder / "nowhere.yaml"
    return ["nowhere.yaml", "No such file or directory"]


def broken_recipe(place: Place) -> list[str]:
    place.recipe.write_text("GPTQModifier:\n  targets: [Linear\n  scheme: W4A16\n")
    return ["recipe.yaml:", "3"]


def misspelled_recipe(place: Place) -> list[str]:
    place.recipe.write_text("GPTQModifier:\n  targets: Linear\n  sceme: W4A16\n")
    return ["recipe.yaml:3", "sceme"]


def recipe_without_targets(place: Place) -> list[str]:
    place.recipe.write_text("GPTQModifier:\n  targets: Conv1D\n  scheme: W4A16\n")
    return ["recipe.yaml:2: the target 'Conv1D' matches no module"]


def recipe_that_ignores_all(place: Place) -> list[str]:
    place.recipe.write_text("GPTQModifier: {targets: Linear, scheme: W4A16, ignore: [Linear]}\n")
    return ["the recipe ignores every module that it targets"]


def groups_that_do_not_divide(place: Place) -> list[str]:
    weights = "{num_bits: 4, type: int, symmetric: true, strategy: group, group_size: 96}"
    place.recipe.write_text(f"GPTQModifier: {{config_groups: {{a: {{targets: [Linear], weights: {weights}}}}}}}\n")
    return ["model.layers.0.self_attn.q_proj has 128 input features, which is not a multiple of group_size 96"]


def full_output(place: Place) -> list[str]:
    place.out.mkdir()
    (place.out / "precious").write_text("data")
    return ["out is not empty", "choose another"]


def output_is_a_file(place: Place) -> list[str]:
    place.out.write_text("data")
    return ["out exists and is not a directory"]


def output_is_a_link(place: Place) -> list[str]:
    (place.folder / "elsewhere").mkdir()
    place.out.symlink_to(place.folder / "elsewhere")
    return ["out exists and is not a directory"]


def output_below_a_file(place: Place) -> list[str]:
    place.out = place.recipe / "out"
    return ["recipe.yaml/out", "part of the path is not a directory"]


def output_far_below_a_file(place: Place) -> list[str]:
    place.out = place.recipe / "deep" / "out"
    return ["recipe.yaml/deep/out", "part of the path is not a directory"]


def output_with_a_long_name(place: Place) -> list[str]:
    place.out = place.folder / ("x" * 300)
    return ["xxx", "the name is too long"]


CALIBRATE = [
    no_recipe,
    broken_recipe,
    misspelled_recipe,
    recipe_without_targets,
    recipe_that_ignores_all,
    groups_that_do_not_divide,
    full_output,
    output_is_a_file,
    output_is_a_link,
    output_below_a_file,
    output_far_below_a_file,
    output_with_a_long_name,
]


@pytest.mark.parametrize("spoil", [*BOTH, *CALIBRATE], ids=lambda function: function.__name__)
def test_calibrate_refuses(place: Place, run: Run, spoil: Callable[[Place], list[str]]) -> None:
    parts = spoil(place)
    before = place.tree()
    assert_refused(run(place.calibrate()), *parts)
    assert place.tree() == before


def test_a_loop_of_links_is_no_bug(place: Place, run: Run) -> None:
    (place.folder / "one").symlink_to(place.folder / "two")
    (place.folder / "two").symlink_to(place.folder / "one")
    place.out = place.folder / "one" / "out"
    result = run(place.calibrate())
    assert_refused(result, "one")
    assert "internal error" not in result[2]


@pytest.mark.parametrize("spoil", BOTH, ids=lambda function: function.__name__)
def test_evaluate_refuses(place: Place, run: Run, spoil: Callable[[Place], list[str]]) -> None:
    parts = spoil(place)
    before = place.tree()
    assert_refused(run(place.evaluate()), *parts)
    assert place.tree() == before


@pytest.mark.parametrize("spoil", BOTH[:6], ids=lambda function: function.__name__)
def test_check_refuses(place: Place, run: Run, spoil: Callable[[Place], list[str]]) -> None:
    parts = spoil(place)
    assert_refused(run(["check", str(place.artifact)]), *parts)


@pytest.mark.parametrize("option", ["--max-shard-size", "--activation-memory", "--statistics-memory"])
def test_sizes_have_units(place: Place, run: Run, option: str) -> None:
    before = place.tree()
    assert_refused(run(place.calibrate(option, "24")), "'24', a size without a unit", "24GiB")
    assert place.tree() == before
