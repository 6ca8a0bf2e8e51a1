"""Key-value caches in 8 bits: measured scales, a run that goes on with them, and readers that agree."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from compressed_tensors.quantization import QuantizationArgs

import runtime
from runtime.key_values import KeyValues
from runtime.recipe import Recipe
from seqbuild.build import build
from tests.runtime.small import (
    WIDTHS,
    Small,
    calibrate,
    load_transformers,
    read_tensors,
    run_weights,
    save_model,
    token_batches,
)

CACHE = "kv_cache_scheme: {num_bits: 8, type: float, strategy: tensor, symmetric: true, dynamic: false}"
RECIPE = f"QuantizationModifier: {{targets: Linear, scheme: FP8_DYNAMIC, ignore: [lm_head], {CACHE}}}"


@pytest.fixture(scope="module")
def model(small: Callable[..., Small]) -> Small:
    return small("LlamaForCausalLM", "LlamaConfig", WIDTHS, dtype=torch.bfloat16)


def test_scales_are_those_of_the_largest_keys_and_values(model: Small, tmp_path: Path) -> None:
    """The first layer sees what it sees without quantization: its keys and values are transformers'."""
    text = RECIPE.replace("dynamic: false}", "dynamic: false, observer: static_minmax}")
    calibrate(model, Recipe.from_text(text, "r"), tmp_path / "out")
    tensors = read_tensors(tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model.weights, dtype="auto").eval()
    largest = [0.0, 0.0]
    for batch in token_batches():
        with torch.no_grad():
            layer = loaded(**batch, use_cache=True).past_key_values.layers[0]
        for which, states in enumerate((layer.keys, layer.values)):
            largest[which] = max(largest[which], float(states.abs().max()))
    for part, size in zip(("k_scale", "v_scale"), largest, strict=True):
        got = tensors[f"model.layers.0.self_attn.{part}"]
        assert got.dtype == torch.bfloat16 and got.shape == (1,)
        assert float(got) == float(torch.tensor(size / 448).bfloat16())
    assert sum(name.endswith(("k_scale", "v_scale")) for name in tensors) == 6


def test_without_an_observer_scales_are_those_of_a_moving_average() -> None:
    args = QuantizationArgs(num_bits=8, type="float", strategy="tensor", symmetric=True, dynamic=False)
    key_values = KeyValues(args=args, modules={}, is_measuring=True)
    for batch in ([-448.0, 44.8], [-4.48, 89.6]):
        for which, factor in enumerate((1.0, 2.0)):
            key_values.handle("a", which, torch.tensor(batch) * factor)
    scales = [float(scale) for scale in key_values.scale_of("a", torch.float32)]
    assert scales == pytest.approx([0.9901, 1.9802])


def test_equal_to_attention_of_rounded_keys_and_values(
    model: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention as transformers has it, its keys and values put on the grid of the scales that were written.

    compressed-tensors would do that by itself, but looks for an argument that transformers 5.24 has renamed.
    """
    calibrate(model, Recipe.from_text(RECIPE, "r"), tmp_path / "out")
    inputs = token_batches([(2, 17)], seed=5)[0]
    got = run_weights(model, tmp_path / "out", inputs)["logits"]
    tensors = read_tensors(tmp_path / "out")
    loaded = load_transformers(tmp_path / "out")
    original = torch.nn.functional.scaled_dot_product_attention
    calls: list[int] = []

    def on_grid(states: torch.Tensor, part: str) -> torch.Tensor:
        scale = tensors[f"model.layers.{len(calls)}.self_attn.{part}"]
        return (states / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(scale.dtype) * scale

    def rounded(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
        key, value = on_grid(key, "k_scale"), on_grid(value, "v_scale")
        calls.append(1)
        return original(query, key, value, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", rounded)
    with torch.no_grad():
        expected = loaded(**inputs, use_cache=False).logits
    assert len(calls) == 3
    assert torch.equal(got, expected)
    calibrate(model, Recipe.from_text(RECIPE.replace(f", {CACHE}", ""), "r"), tmp_path / "without")
    assert not torch.equal(got, run_weights(model, tmp_path / "without", inputs)["logits"])


def test_attention_that_cannot_be_seen_is_refused(tmp_path: Path, byte_tokenizer_dir: Path) -> None:
    config = transformers.LlamaConfig(**WIDTHS)
    weights = save_model(transformers.LlamaForCausalLM(config), tmp_path / "model", byte_tokenizer_dir)
    choices: list[dict[str, Any]] = [{"attn_implementation": "eager"}, {"leaves": "target"}]
    for options in choices:
        small = Small(weights=weights, artifact=build(weights, out=tmp_path / "artifacts", **options).path)
        with pytest.raises(runtime.RecipeError, match="does not say where its keys and values are"):
            calibrate(small, Recipe.from_text(RECIPE, "r"), tmp_path / "out")


def test_a_cache_of_modules_that_are_all_ignored_is_refused(model: Small, tmp_path: Path) -> None:
    text = RECIPE.replace("[lm_head]", "[lm_head, 're:.*self_attn']")
    with pytest.raises(runtime.RecipeError, match=r"self_attn keeps keys and values, and nothing in it is quantized"):
        calibrate(model, Recipe.from_text(text, "r"), tmp_path / "out")
