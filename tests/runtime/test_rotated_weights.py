"""Runs with rotations: what is written computes the same, and is the same however the run went."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import runtime
from runtime.artifact.encoding import sha256
from runtime.artifact.manifest import MANIFEST_NAME, Manifest
from runtime.checkpoint.reader import Checkpoint
from runtime.errors import RecipeError
from runtime.quantize.preparation import prepare
from runtime.quantize.rotations import rotated_model
from tests.runtime.small import (
    NARROW_W4,
    Small,
    Stop,
    calibrate,
    directory_bytes,
    load_transformers,
    read_tensors,
    run_transformers,
    run_weights,
    stop_at,
    token_batches,
)

SPIN = "SpinQuantModifier: {}\n"
# As good as nothing, so that all other differences are those of rotations.
W8 = (
    "QuantizationModifier: {config_groups: {a: {targets: ['re:.*layers.2.self_attn.q_proj'], "
    "weights: {num_bits: 8, type: int, strategy: channel}}}}\n"
)


def plan(text: str) -> runtime.Recipe:
    return runtime.Recipe.from_text(text, "recipe.yaml")


def hadamard(size: int) -> torch.Tensor:
    signs = [[(-1.0) ** bin(i & j).count("1") for j in range(size)] for i in range(size)]
    return torch.tensor(signs, dtype=torch.float64) / math.sqrt(size)


def nearly(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one.float() - two.float()).norm() / two.float().norm())


def test_a_tied_model_in_bfloat16(sharded_llama: Small, tmp_path: Path) -> None:
    result = calibrate(sharded_llama, plan(SPIN + W8), tmp_path / "out", max_shard_bytes=200_000)
    before, after = read_tensors(sharded_llama.weights), read_tensors(tmp_path / "out")
    embedding, norm = "model.embed_tokens.weight", "model.norm.weight"
    turn = hadamard(before[embedding].shape[1])
    assert torch.equal(after[embedding], (before[embedding].double() @ turn).bfloat16())
    head = (before[embedding].double() * before[norm].double()) @ turn
    assert "lm_head.weight" not in before and torch.equal(after["lm_head.weight"], head.bfloat16())
    assert all(bool((after[key] == 1).all()) for key in after if key.endswith("norm.weight"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert json.loads((sharded_llama.weights / "config.json").read_text())["tie_word_embeddings"] is True
    assert result.num_bytes == sum(tensor.nbytes for tensor in after.values())

    (inputs,) = token_batches([(2, 24)])
    expected = run_transformers(sharded_llama.weights, inputs)
    assert nearly(run_transformers(tmp_path / "out", inputs), expected) < 0.1
    assert nearly(run_weights(sharded_llama, tmp_path / "out", inputs)["logits"], expected) < 0.1
    model = load_transformers(tmp_path / "out")
    assert model.get_input_embeddings().weight is not model.get_output_embeddings().weight

    again = plan((tmp_path / "out" / "recipe.yaml").read_text())
    calibrate(sharded_llama, again, tmp_path / "again", max_shard_bytes=200_000)
    assert read_tensors(tmp_path / "again").keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in read_tensors(tmp_path / "again").items())


def test_a_head_stays_tied_if_the_last_norm_has_no_gain(sharded_llama: Small, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    shutil.copytree(sharded_llama.weights, tmp_path / "model")
    for path in (tmp_path / "model").glob("*.safetensors*"):
        path.unlink()
    tensors = read_tensors(sharded_llama.weights)
    tensors["model.norm.weight"] = torch.ones_like(tensors["model.norm.weight"])
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    calibrate(sharded_llama, plan(SPIN + W8), tmp_path / "out", weights=tmp_path / "model")
    assert "lm_head.weight" not in read_tensors(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True
    (inputs,) = token_batches([(2, 24)])
    assert nearly(run_transformers(tmp_path / "out", inputs), run_transformers(tmp_path / "model", inputs)) < 0.1


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_experts_that_are_stored_one_by_one(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    small: Small = request.getfixturevalue(name)
    text = SPIN.replace("{}", "{transform_type: random-matrix, randomize: true}") + W8
    calibrate(small, plan(text), tmp_path / "out")
    (inputs,) = token_batches([(2, 24)])
    found, expected = (run_weights(small, path, inputs)["logits"] for path in (tmp_path / "out", small.weights))
    assert nearly(found, expected) < 0.02


def test_experts_that_are_not_split_are_rotated_as_they_are_read(qwen3_moe: Small) -> None:
    artifact = qwen3_moe.load()
    prepared = prepare(artifact, Checkpoint(qwen3_moe.weights), plan(SPIN + W8), torch.float32)
    plain = prepare(artifact, Checkpoint(qwen3_moe.weights), None, torch.float32)
    name, cpu = "model.layers.0.mlp.experts.down_proj", torch.device("cpu")
    assert name in prepared.artifact.manifest.parameters
    expected = hadamard(32).T @ plain.weights.read(name, cpu).double()
    assert torch.allclose(prepared.weights.read(name, cpu).double(), expected, atol=1e-6)


def test_a_stopped_run_goes_on_to_the_same_bytes(
    narrow_llama: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = plan(f"{SPIN}GPTQModifier: {{{NARROW_W4}}}")
    stop: Callable[[int], list[int]] = partial(stop_at, monkeypatch)
    calls = stop(0)
    calibrate(narrow_llama, recipe, tmp_path / "expected")
    num_proof = 3 * len(narrow_llama.load().subgraphs)  # the original, the rotated and the half rotated model
    assert calls[0] == num_proof + 15
    for number in (2, num_proof + 4, num_proof + 8):
        stop(number)
        with pytest.raises(Stop):
            calibrate(narrow_llama, recipe, tmp_path / "out", resume=number > num_proof + 4)
    stop(0)
    calibrate(narrow_llama, recipe, tmp_path / "out", resume=True)
    assert directory_bytes(tmp_path / "out") == directory_bytes(tmp_path / "expected")


def tampered(small: Small, directory: Path, **changes: Any) -> Path:
    """An artifact whose first space was changed by hand, with the right digests."""
    shutil.copytree(small.artifact, directory)
    manifest = small.load().manifest
    table = manifest.rotations
    assert table is not None
    spaces = (dataclasses.replace(table.spaces[0], **changes), *table.spaces[1:])
    changed = dataclasses.replace(manifest, rotations=dataclasses.replace(table, spaces=spaces))
    (directory / MANIFEST_NAME).write_bytes(changed.to_bytes())
    assert Manifest.from_bytes(changed.to_bytes()) == changed and len(sha256(changed.to_bytes())) == 64
    return directory


def test_a_manifest_with_a_wrong_space_stops_the_run(narrow_llama: Small, tmp_path: Path) -> None:
    table = narrow_llama.load().manifest.rotations
    assert table is not None
    stream = table.spaces[0]
    wrong = {
        "a writer is missing": {"writers": stream.writers[:-1]},
        "a reader is missing": {"readers": (*stream.readers[:-2], stream.readers[-1])},
        "a gain is not folded": {
            "readers": (dataclasses.replace(stream.readers[0], gain=""), *stream.readers[1:]),
        },
    }
    for number, changes in enumerate(wrong.values()):
        small = Small(narrow_llama.weights, tampered(narrow_llama, tmp_path / f"artifact{number}", **changes))
        with pytest.raises(
            RecipeError, match=r"recipe.yaml:1: SpinQuantModifier would change the model: .* R1 of model"
        ):
            calibrate(small, plan(SPIN + W8), tmp_path / "out", batches=())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("transform_block_size: 24", "transform_block_size 24 does not divide the 32 channels .*use 32, for instance"),
        ("rotations: [R2, R3], transform_block_size: 16", "transform_block_size has no effect without R1 or R4"),
        ("rotations: [R3, R9]", "rotations must be a list of R1, R2, R3 and R4, not"),
        ("rotations: []", r"rotations must be a list of R1, R2, R3 and R4, not \[\]"),
        ("transform_type: fourier", "transform_type must be hadamard, random-hadamard or random-matrix"),
        ("learnable: true", "learnable True is not supported: rotations are not trained"),
        ("mappings: {}", "mappings {} is not supported: the compiler finds what is rotated"),
        ("ignore: [lm_head]", "is not supported: a rotation changes every module of its space"),
        ("seed: -1", "seed must be an integer of at least 0"),
    ],
)
def test_wrong_fields_are_rejected(narrow_llama: Small, fields: str, message: str) -> None:
    with pytest.raises(RecipeError, match=f"recipe.yaml:1: .*{message}"):
        rotated_model(narrow_llama.load().manifest, plan(f"SpinQuantModifier: {{{fields}}}\n{W8}"))


def test_order_and_number_of_modifiers() -> None:
    for text, message in {
        f"AWQModifier: {{}}\n{SPIN}{W8}": "recipe.yaml:2: SpinQuantModifier comes after AWQModifier .rotate before",
        f"{W8}{SPIN}": "recipe.yaml:2: SpinQuantModifier comes after QuantizationModifier .rotate before quantizing",
        SPIN: "recipe.yaml:1: SpinQuantModifier rotates weights, but no modifier quantizes them",
        f"a_stage: {{a_modifiers: {{{SPIN.strip()}}}}}\nb_stage: {{b_modifiers: {{{SPIN.strip()}}}}}\n{W8}": "has two",
    }.items():
        with pytest.raises(RecipeError, match=message):
            plan(text)
