"""Embeddings that a recipe's targets mean: rounded to integers, read back, and refused where no reader takes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from packaging import version
from transformers import CompressedTensorsConfig

import runtime
from runtime.checkpoint.reader import Checkpoint
from runtime.recipe.recipe import Recipe
from runtime.weights.parameters import Weights
from tests.runtime.small import WIDTHS, Small, calibrate, read_tensors, run_weights, token_batches

ROUND = "QuantizationModifier"
READS_TABLES = version.parse(transformers.__version__) >= version.parse("5.24")


@pytest.fixture(scope="module")
def model(small: Callable[..., Small]) -> Small:
    return small("LlamaForCausalLM", "LlamaConfig", WIDTHS, dtype=torch.bfloat16)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("target", ["Embedding", "model.embed_tokens", "'re:.*embed_tokens$'"])
def test_a_table_is_rounded_and_transformers_computes_the_same(model: Small, tmp_path: Path, target: str) -> None:
    plan = Recipe.from_text(f"{ROUND}: {{targets: [{target}], scheme: W4A16}}", "r")
    done = calibrate(model, plan, tmp_path / "out", batches=())
    assert [report.name for report in done.modules] == ["model.embed_tokens"]
    assert any("quantized embeddings (model.embed_tokens) are loaded by" in remark for remark in done.remarks)
    tensors, original = read_tensors(tmp_path / "out"), read_tensors(model.weights)
    assert all(torch.equal(tensors[name], original[name]) for name in original if "embed_tokens" not in name)
    assert tensors["model.embed_tokens.weight_packed"].shape == (258, 16)
    if not READS_TABLES:
        pytest.skip("transformers loads quantized embeddings from 5.24 on")
    config = CompressedTensorsConfig(dequantize=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.bfloat16, quantization_config=config
    ).eval()
    inputs = token_batches([(2, 17)], seed=5)[0]
    with torch.no_grad():
        expected = loaded(**inputs, use_cache=False).logits
    assert torch.equal(run_weights(model, tmp_path / "out", inputs)["logits"], expected)


def test_a_table_beside_layers_of_another_scheme(model: Small, tmp_path: Path) -> None:
    eight = "{num_bits: 8, type: int, symmetric: true, strategy: channel}"
    groups = f"a: {{targets: [Embedding], weights: {eight}}}, b: {{targets: [Linear], weights: {eight}}}"
    plan = Recipe.from_text(f"{ROUND}: {{config_groups: {{{groups}}}, ignore: [lm_head]}}", "r")
    calibrate(model, plan, tmp_path / "out", batches=())
    stated = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert stated["ignore"] == ["lm_head"]
    tensors, original = read_tensors(tmp_path / "out"), read_tensors(model.weights)["model.embed_tokens.weight"].float()
    scale = tensors["model.embed_tokens.weight_scale"].float()
    artifact = model.load()
    reader = Weights(artifact, Checkpoint(tmp_path / "out"), torch.bfloat16, artifact.empty_model())
    dense = reader.read("model.embed_tokens.weight", torch.device("cpu")).float()
    # Half a step, and the rounding of up to 127 steps to bfloat16.
    assert 0 < float(((dense - original).abs() / scale).max()) < 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "GPTQModifier: {targets: Embedding, scheme: W4A16}",
            "matches model.embed_tokens, but embeddings have no inputs",
        ),
        (f"{ROUND}: {{targets: Embedding, scheme: W4A16_ASYM}}", "only symmetric integer weights by group or channel"),
        (
            f"{ROUND}: {{targets: Embedding, scheme: FP8_DYNAMIC}}",
            "only symmetric integer weights by group or channel",
        ),
        (f"{ROUND}: {{targets: Embedding, scheme: W8A8}}", "only symmetric integer weights by group or channel"),
        (
            f"{ROUND}: {{targets: LlamaAttention, scheme: W4A16}}",
            "matches model.layers.0.self_attn, .* whose only",
        ),
        (f"{ROUND}: {{targets: LlamaMLP, scheme: W4A16}}", "matches no module"),
    ],
)
def test_what_no_reader_takes_is_refused(model: Small, tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(runtime.RecipeError, match=f"r:1: the target .*{message}"):
        calibrate(model, Recipe.from_text(text, "r"), tmp_path / "out")


def test_a_table_that_is_tied_to_the_head_is_refused(small: Callable[..., Small], tmp_path: Path) -> None:
    tied = small("LlamaForCausalLM", "LlamaConfig", {**WIDTHS, "tie_word_embeddings": True})
    plan = Recipe.from_text(f"{ROUND}: {{targets: Embedding, scheme: W4A16}}", "r")
    with pytest.raises(runtime.RecipeError, match=r"model\.embed_tokens shares its weight with lm_head"):
        calibrate(tied, plan, tmp_path / "out")
