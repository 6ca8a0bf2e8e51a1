"""The compiler finds by dataflow what may be rotated, and says why not where it may not."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

import runtime
from runtime.artifact.manifest import Manifest
from runtime.artifact.rotation_spaces import wrong_rotations
from runtime.artifact.rotation_table import RotatedParameter, RotationSpace, RotationTable
from runtime.checkpoint.reader import Checkpoint
from runtime.errors import RecipeError
from runtime.quantize.rotation_proof import TOLERANCE, require_same_function
from runtime.quantize.rotations import rotated_model
from tests.conftest import CompileOnce
from tests.tiny_models import tiny_model

SPIN = "SpinQuantModifier: {{rotations: [{}], transform_type: random-matrix, randomize: true}}\n"


def table(path: Path) -> RotationTable:
    found = runtime.load(path).manifest.rotations
    assert found is not None
    return found


def spaces(path: Path, rotation: str) -> list[RotationSpace]:
    return [space for space in table(path).spaces if space.rotation == rotation]


def recipe(rotations: str) -> runtime.Recipe:
    return runtime.Recipe.from_text(SPIN.format(rotations) + "QuantizationModifier: {scheme: W8A16}\n", "recipe.yaml")


def test_the_residual_stream_of_a_decoder(compiled: CompileOnce) -> None:
    (stream,) = spaces(compiled("llama"), "R1")
    layers = [f"model.layers.{number}" for number in range(3)]
    assert {entry.name for entry in stream.writers} == {
        "model.embed_tokens.weight",
        *(f"{layer}.{own}.weight" for layer in layers for own in ("self_attn.o_proj", "mlp.down_proj")),
    }
    gains = {entry.name: entry.gain for entry in stream.readers}
    assert gains["model.layers.1.self_attn.k_proj.weight"] == "model.layers.1.input_layernorm.weight"
    assert gains["model.layers.2.mlp.gate_proj.weight"] == "model.layers.2.post_attention_layernorm.weight"
    assert gains["lm_head.weight"] == "model.norm.weight"
    assert len(gains) == 3 * 5 + 1 and not stream.keeps_mean


def test_heads_of_grouped_and_fused_attention(compiled: CompileOnce) -> None:
    heads = spaces(compiled("llama"), "R2")
    assert [(one.block, one.starts) for one in heads] == [(8, (0, 8))] * 3
    assert heads[1].writers == (RotatedParameter(name="model.layers.1.self_attn.v_proj.weight", axis=0),)
    assert heads[1].readers == (RotatedParameter(name="model.layers.1.self_attn.o_proj.weight", axis=1),)
    fused = spaces(compiled("phi3"), "R2")[0]  # queries, keys, values
    assert (fused.writers[0].name, fused.starts) == ("model.layers.0.self_attn.qkv_proj.weight", (48, 56))
    biased = spaces(compiled("gpt2"), "R2")[0]
    assert [(entry.name.rpartition(".")[2], entry.axis) for entry in biased.writers] == [("weight", 1), ("bias", 0)]


def test_layer_norm_keeps_the_mean_and_experts_are_stacks(compiled: CompileOnce) -> None:
    (stream,) = spaces(compiled("gpt2"), "R1")
    assert stream.keeps_mean and stream.norms[0].bias == "transformer.h.0.ln_1.bias"
    assert {"transformer.wpe.weight", "transformer.h.1.mlp.c_proj.bias"} <= {entry.name for entry in stream.writers}
    assert table(compiled("gpt2")).untied == ("lm_head.weight",)
    (stream,) = spaces(compiled("mixtral"), "R1")
    assert RotatedParameter(name="model.layers.0.mlp.experts.down_proj", axis=1) in stream.writers
    readers = {entry.name: entry for entry in stream.readers}
    assert readers["model.layers.0.mlp.experts.gate_up_proj"].axis == 2
    assert readers["model.layers.0.mlp.gate.weight"].gain == "model.layers.0.post_attention_layernorm.weight"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gemma2", "R1: .*the gain model.layers.0.post_attention_layernorm.weight is applied before add"),
        ("bert", "R1: .*the gain embeddings.LayerNorm.weight is applied before add"),
        ("mamba", "R2: no sum over tokens was found"),
    ],
)
def test_what_cannot_be_rotated_has_a_reason(compiled: CompileOnce, name: str, reason: str) -> None:
    path = compiled(name)
    assert not spaces(path, reason[:2])
    with pytest.raises(RecipeError, match=f"recipe.yaml:1: SpinQuantModifier cannot rotate the .*{reason}"):
        rotated_model(runtime.load(path).manifest, recipe(reason[:2]))


def saved(name: str, directory: Path) -> Path:
    """Random weights whose norms have gains and biases."""
    model = tiny_model(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.rand_like(parameter) - 0.25)
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "mixtral", "mamba"])
def test_the_rotated_model_is_the_same(compiled: CompileOnce, tmp_path: Path, name: str) -> None:
    artifact = runtime.load(compiled(name))
    found = [rotation for rotation in ("R1", "R2") if spaces(artifact.path, rotation)]
    model = rotated_model(artifact.manifest, recipe(", ".join(found)))
    assert model is not None
    weights = Checkpoint(saved(name, tmp_path / "model"))
    assert require_same_function(artifact, weights, model, (), "here") < 1e-12 < TOLERANCE
    # Each rotation matters: without one, the outputs differ.
    for left_out in [*model.turns][:: max(1, len(model.turns) // 3)]:
        others = {key: turns for key, turns in model.turns.items() if key != left_out}
        untied = tuple(key for key in model.untied if key in others)
        broken = dataclasses.replace(model, turns=others, untied=untied, half={})
        with pytest.raises(RecipeError, match=r"here would change the model: outputs differ by .* R\d of "):
            require_same_function(artifact, weights, broken, (), "here")


def test_a_sample_that_shows_nothing_proves_nothing(compiled: CompileOnce, tmp_path: Path) -> None:
    artifact = runtime.load(compiled("llama"))
    model = rotated_model(artifact.manifest, recipe("R2"))
    assert model is not None
    ids = torch.arange(8)[None]
    masked = {"input_ids": ids, "attention_mask": torch.zeros_like(ids)}
    with pytest.raises(RecipeError, match="its outputs do not depend on the values of attention"):
        require_same_function(artifact, Checkpoint(saved("llama", tmp_path / "model")), model, [masked], "here")


def changed(manifest: Manifest, number: int = 0, **changes: Any) -> Manifest:
    """The manifest with another space in the place of one."""
    found = manifest.rotations
    assert found is not None
    own = list(found.spaces)
    own[number] = dataclasses.replace(own[number], **changes)
    return dataclasses.replace(manifest, rotations=dataclasses.replace(found, spaces=tuple(own)))


EMBEDDING = RotatedParameter(name="model.embed_tokens.weight", axis=1)


@pytest.mark.parametrize(
    ("number", "changes", "message"),
    [
        (0, {"rotation": "R9"}, "has the rotation 'R9' of 32 channels"),
        (0, {"block": 1}, "of 1 channels"),
        (0, {"block": 16}, "has blocks of 16 channels, which do not fit axis 1 of model.embed_tokens.weight"),
        (0, {"writers": ()}, "has no parameter that writes"),
        (0, {"readers": ()}, "or none that reads"),
        (0, {"starts": ()}, "overlap or are in no order"),
        (1, {"starts": (8, 0)}, r"overlap or are in no order: \[8, 0\]"),
        (1, {"starts": (0, 4)}, "overlap or are in no order"),
        (1, {"starts": (0, 16)}, "do not fit axis 0 of model.layers.0.self_attn.v_proj.weight"),
        (0, {"writers": (RotatedParameter(name="nobody", axis=0),)}, "names 'nobody', which is not a parameter"),
        (0, {"writers": (RotatedParameter(name=EMBEDDING.name, axis=7),)}, "do not fit axis 7"),
        (0, {"writers": (EMBEDDING, EMBEDDING)}, "rotates model.embed_tokens.weight along axis 1 twice"),
        (0, {"writers": (dataclasses.replace(EMBEDDING, gain="model.norm.weight"),)}, "has a writer with a gain"),
        (0, {"norms": ()}, "or readers that name another norm"),
        (
            0,
            {"writers": (EMBEDDING, RotatedParameter(name="model.norm.weight", axis=0))},
            "the norm weight model.norm.weight or its bias is rotated, too",
        ),
    ],
)
def test_a_manifest_with_wrong_spaces_is_rejected(
    compiled: CompileOnce, number: int, changes: dict[str, Any], message: str
) -> None:
    manifest = runtime.load(compiled("llama")).manifest
    assert list(wrong_rotations(manifest)) == []
    with pytest.raises(AssertionError, match=message):
        raise AssertionError("; ".join(wrong_rotations(changed(manifest, number, **changes))))
    untied = dataclasses.replace(manifest, rotations=dataclasses.replace(table(compiled("llama")), untied=("lm_head",)))
    assert "lm_head is listed as untied" in next(wrong_rotations(untied))


def test_an_older_artifact_is_read_and_has_no_rotations(compiled: CompileOnce) -> None:
    manifest = runtime.load(compiled("llama")).manifest
    plain = {key: value for key, value in msgspec.to_builtins(manifest).items() if key != "rotations"}
    older = msgspec.convert(plain, Manifest)
    assert older.rotations is None and list(wrong_rotations(older)) == []
    with pytest.raises(RecipeError, match=r"this artifact is older than they are .compile the model again"):
        rotated_model(older, recipe("R1"))
    assert rotated_model(older, runtime.Recipe.from_text("GPTQModifier: {scheme: W4A16}", "plain.yaml")) is None
