"""What llm-compressor's recipes mean where their words leave it open, and checkpoints as it writes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

import runtime
from runtime.errors import RecipeError
from tests.runtime.small import WIDTHS, Small, calibrate, read_tensors, recipe, token_batches

STATIC = "num_bits: 8, type: float, strategy: tensor, dynamic: false, symmetric: true"


@pytest.fixture(scope="module")
def model(small: Callable[..., Small]) -> Small:
    """Its heads have norms of their own."""
    return small("Qwen3ForCausalLM", "Qwen3Config", {**WIDTHS, "head_dim": 32})


def perplexity(model: Small, weights: Path) -> float:
    return runtime.evaluate(model.load(), weights=weights, batches=token_batches()).perplexity


def config_of(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return found


@pytest.mark.parametrize("target", ["re:.*self_attn.*", "re:model", "Module"])
def test_targets_that_match_other_modules_than_linear(model: Small, tmp_path: Path, target: str) -> None:
    """Norms and embeddings are not quantized, and no reader takes them for it."""
    out = tmp_path / "out"
    result = calibrate(model, recipe(f"targets: ['{target}'], scheme: W8A8, ignore: [lm_head]"), out)
    has_table = target != "re:.*self_attn.*"
    assert ("model.embed_tokens" in config_of(out)["quantization_config"]["ignore"]) is has_table
    said = (
        "warning: the embeddings model.embed_tokens are not quantized: a target that also matches Linear modules does "
        "not apply to embeddings; name them in a target of their own"
    )
    assert (said in result.remarks) is has_table
    assert perplexity(model, out) > 1
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out)
    (batch,) = token_batches(((2, 9),))
    assert torch.isfinite(loaded(**batch).logits).all()


def test_an_ignored_name_that_no_module_has_is_remarked_upon(model: Small, tmp_path: Path) -> None:
    text = "targets: Linear, scheme: W8A8, ignore: [lm_head, 're:.*mlp\\.fc1$', Conv1d, 're:.*q_norm$']"
    remarks = calibrate(model, recipe(text), tmp_path / "out").remarks
    assert [line for line in remarks if "ignore" in line] == [
        "ignore entries that match no module: re:.*mlp\\.fc1$, Conv1d (seqbuild inspect shows module names)"
    ]


@pytest.mark.parametrize("weights", ["num_bits: 8, strategy: channel, group_size: -1", "num_bits: 4, group_size: -1"])
def test_a_group_of_minus_one_is_a_row(model: Small, tmp_path: Path, weights: str) -> None:
    groups = f"config_groups: {{a: {{targets: [Linear], weights: {{{weights}}}}}}}, ignore: [lm_head]"
    calibrate(model, recipe(groups), tmp_path / "out")
    assert read_tensors(tmp_path / "out")["model.layers.0.mlp.down_proj.weight_scale"].shape == (128, 1)


def test_one_block_for_a_whole_weight(model: Small, tmp_path: Path) -> None:
    text = "targets: ['re:.*k_proj'], scheme: FP8_BLOCK"
    calibrate(model, recipe(text, modifier="GPTQModifier"), tmp_path / "out")
    assert read_tensors(tmp_path / "out")["model.layers.0.self_attn.k_proj.weight_scale"].shape == (1, 1)
    assert perplexity(model, tmp_path / "out") > 1


def spans_of_first_layer(model: Small) -> list[torch.Tensor]:
    """The smallest and the largest input of the first query projection, batch by batch."""
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model.weights, dtype="auto").eval()
    spans = []

    def hook(module: Any, args: tuple[torch.Tensor, ...]) -> None:
        spans.append(torch.stack(args[0].detach().aminmax()))

    loaded.model.layers[0].self_attn.q_proj.register_forward_pre_hook(hook)
    with torch.no_grad():
        for batch in token_batches():
            loaded(**batch)
    return spans


@pytest.mark.parametrize(
    ("observer", "averaging"),
    [
        ("", 0.01),
        (", observer: minmax", 0.01),
        (", observer: MinMax, observer_kwargs: {averaging_constant: 0.75}", 0.75),
        (", observer: minmax, observer_kwargs: {averaging_constant: 1.0}", 1.0),
        (", observer: static_minmax", None),
    ],
)
def test_static_inputs_span_a_moving_average_unless_told_otherwise(
    model: Small, tmp_path: Path, observer: str, averaging: float | None
) -> None:
    weights = "weights: {num_bits: 8, type: float, strategy: channel}"
    scheme = f"a: {{targets: [Linear], {weights}, input_activations: {{{STATIC}{observer}}}}}"
    calibrate(model, recipe(f"config_groups: {{{scheme}}}, ignore: [lm_head]"), tmp_path / "out")
    average, *others = spans = spans_of_first_layer(model)
    for newest in others:
        average = average + (averaging or 0) * (newest - average)
    if averaging is None:
        average = torch.stack((torch.stack(spans)[:, 0].amin(), torch.stack(spans)[:, 1].amax()))
    got = read_tensors(tmp_path / "out")["model.layers.0.self_attn.q_proj.input_scale"]
    torch.testing.assert_close(got, average.abs().amax()[None] / 448, rtol=1e-4, atol=0)


def test_other_averages_do_not_go_with_rescaling(model: Small, tmp_path: Path) -> None:
    inputs = f"input_activations: {{{STATIC}, observer: minmax, observer_kwargs: {{averaging_constant: 0.5}}}}"
    scheme = f"a: {{targets: [Linear], weights: {{num_bits: 8, type: float, strategy: channel}}, {inputs}}}"
    text = f"SmoothQuantModifier: {{}}\nQuantizationModifier: {{config_groups: {{{scheme}}}, ignore: [lm_head]}}"
    with pytest.raises(RecipeError, match=r"averaging_constant cannot be combined with SmoothQuant or AWQ"):
        calibrate(model, runtime.Recipe.from_text(text, "r"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_observers_of_other_tools_do_not_matter_to_readers(model: Small, tmp_path: Path) -> None:
    out = tmp_path / "out"
    calibrate(model, recipe("targets: Linear, scheme: FP8, ignore: [lm_head]"), out)
    before, config = perplexity(model, out), config_of(out)
    for part in ("weights", "input_activations"):
        args = config["quantization_config"]["config_groups"]["group_0"][part]
        args.update(observer="somebody_elses", observer_kwargs={"a": "b"})
    (out / "config.json").write_text(json.dumps(config))
    assert perplexity(model, out) == before


@pytest.mark.parametrize("is_symmetric", [True, False])
def test_few_bits_in_a_byte_each(model: Small, tmp_path: Path, is_symmetric: bool) -> None:
    """As llm-compressor writes integers of 4 bits beside inputs of 8."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    out, spread = tmp_path / "out", tmp_path / "spread"
    weights = f"weights: {{num_bits: 4, type: int, strategy: channel, symmetric: {str(is_symmetric).lower()}}}"
    inputs = "input_activations: {num_bits: 8, type: int, strategy: token, dynamic: true, symmetric: true}"
    scheme = f"a: {{targets: [Linear], {weights}, {inputs}}}"
    calibrate(model, recipe(f"config_groups: {{{scheme}}}, ignore: [lm_head]"), out)
    config, tensors = config_of(out), read_tensors(out)
    groups = config["quantization_config"]
    groups["format"] = groups["config_groups"]["group_0"]["format"] = "int-quantized"
    for key in [key for key in tensors if key.endswith(".weight_packed")]:
        owner = key.removesuffix("_packed")
        shape = torch.Size(tensors.pop(f"{owner}_shape").tolist())
        tensors[owner] = unpack_from_int32(tensors.pop(key), 4, shape)
        if not is_symmetric:
            zero = tensors[f"{owner}_zero_point"]
            tensors[f"{owner}_zero_point"] = unpack_from_int32(zero, 4, torch.Size((shape[0], 1)), packed_dim=0)
    spread.mkdir()
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, spread / "model.safetensors")
    (spread / "config.json").write_text(json.dumps(config))
    assert perplexity(model, spread) == perplexity(model, out)
