"""Key-value caches in 8 bits: scales of what the cache holds, a run that goes on with them, readers that agree.

What a cache holds is what transformers' own cache holds after the plain call of the model.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from compressed_tensors.quantization import QuantizationArgs
from transformers.cache_utils import EncoderDecoderCache

import runtime
from runtime.formats.key_values import KeyValues, attach
from runtime.recipe.recipe import Recipe
from runtime.weights.parameters import Weights
from runtime.workers.group import Alone
from seqbuild.build import build
from tests.runtime.small import (
    DEEPSEEK,
    NARROW,
    WIDTHS,
    Small,
    Stop,
    calibrate,
    load_transformers,
    make_small,
    read_tensors,
    run_weights,
    save_model,
    stop_at,
    token_batches,
)
from tests.sweep import sweep

SCHEME = "{num_bits: 8, type: float, strategy: tensor, symmetric: true, dynamic: false}"
CACHE = f"kv_cache_scheme: {SCHEME}"
RECIPE = f"QuantizationModifier: {{targets: Linear, scheme: FP8_DYNAMIC, ignore: [lm_head], {CACHE}}}"
ALONE = f"QuantizationModifier: {{{CACHE}}}"
ATTENTION = f"QuantizationModifier: {{config_groups: {{a: {{targets: [TARGET], input_activations: {SCHEME}}}}}}}"
WHOLE = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}


def whole_range(text: str) -> str:
    """The same recipe with scales of the whole range, not of a moving average."""
    return text.replace("dynamic: false}", "dynamic: false, observer: static_minmax}")


def kept(model: Any, batches: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """The largest key and value in each layer of transformers' own cache after all batches."""
    found: dict[tuple[int, int], list[float]] = {}
    for batch in batches:
        with torch.no_grad():
            result = model(**batch, use_cache=True)
        cache = getattr(result, "cache", None) or result.past_key_values
        is_double = isinstance(cache, EncoderDecoderCache)
        for number, part in enumerate(
            (cache.self_attention_cache, cache.cross_attention_cache) if is_double else [cache]
        ):
            for index, layer in enumerate(part.layers):
                if getattr(layer, "keys", None) is not None and layer.keys.numel():
                    sizes = found.setdefault((number, index), [0.0, 0.0])
                    for which, states in enumerate((layer.keys, layer.values)):
                        sizes[which] = max(sizes[which], float(states.abs().max()))
    return sorted((key, value) for key, value in found.values())


def measured(small: Small, batches: Sequence[Mapping[str, Any]], **changes: Any) -> KeyValues:
    """What the chain of an artifact measures of the same batches."""
    artifact = small.load()
    model = artifact.empty_model(torch.float32)
    source = Weights(artifact, runtime.checkpoint.reader.Checkpoint(small.weights), torch.float32, model)
    args = QuantizationArgs(**{**WHOLE, "observer": "static_minmax", **changes})
    key_values = KeyValues.of(artifact.manifest, args)
    attach(model, key_values)
    key_values.is_measuring = True
    source.load(model, artifact.manifest.parameters, torch.device("cpu"))
    for batch in batches:
        values = dict(batch)
        with torch.no_grad():
            for subgraph in artifact.subgraphs:
                values |= subgraph.forward(model, **{name: values[name] for name in subgraph.input_names})
    key_values.end_round(Alone(), torch.device("cpu"))
    return key_values


def sizes(key_values: KeyValues) -> list[tuple[float, float]]:
    """The largest key and value that each attention module has kept."""
    found = []
    for module in key_values.all_modules():
        spans = [key_values.spans[module, part] for part in ("k", "v")]
        found.append(tuple(float(torch.maximum(low.abs(), high.abs()).max()) for low, high in spans))
    return sorted((key, value) for key, value in found)


TWO = {**NARROW, "num_hidden_layers": 2}
WINDOWS = ["sliding_attention", "full_attention"]
# What differs is what attention does between its projections and its cache.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "groups of heads": ("Llama", TWO),
    "one head": ("Llama", {**TWO, "num_key_value_heads": 1}),
    "a norm of keys": ("Qwen3", {**TWO, "head_dim": 16}),
    "soft caps, by eager attention": ("Gemma2", {**TWO, "head_dim": 16, "sliding_window": 64, "layer_types": WINDOWS}),
    "sinks, by eager attention": ("GptOss", {**TWO, "head_dim": 16, "num_local_experts": 4, "layer_types": WINDOWS}),
    "a latent that is expanded": ("DeepseekV3", {**DEEPSEEK, "num_hidden_layers": 2}),
    "one projection for all": ("Phi3", TWO),
    "alibi, without attention functions": ("Mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 258}),
    "rotary for a part of a head": (
        "GPTNeoX",
        {key: value for key, value in TWO.items() if key != "num_key_value_heads"},
    ),
    "keys that layers share": (
        "Gemma3n",
        {
            **TWO,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "head_dim": 16,
            "intermediate_size": [48] * 4,
            "layer_types": WINDOWS * 2,
            "activation_sparsity_pattern": [0.0] * 4,
            "vocab_size_per_layer_input": 258,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 4,
            "sliding_window": 64,
        },
    ),
}


# tests/test_zoo_caches.py takes all architectures through it.
@pytest.mark.parametrize(
    "kind",
    sweep(
        KINDS,
        "groups of heads",
        "sinks, by eager attention",
        "a latent that is expanded",
        "alibi, without attention functions",
        "rotary for a part of a head",
        "keys that layers share",
    ),
)
def test_what_is_measured_is_what_the_cache_of_transformers_holds(kind: str, tmp_path: Path) -> None:
    name, config = KINDS[kind]
    small = make_small(
        tmp_path, f"{name}ForCausalLM", f"{name}TextConfig" if name == "Gemma3n" else f"{name}Config", config
    )
    batches = token_batches([(2, 9), (1, 7)])
    model = transformers.AutoModelForCausalLM.from_pretrained(small.weights, dtype=torch.float32).eval()
    expected = kept(model, batches)
    got = sizes(measured(small, batches))
    assert len(got) == len(expected) >= 2
    for ours, theirs in zip(got, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_decoder_keeps_its_own_tokens_and_the_encoders(tmp_path: Path) -> None:
    widths = {"d_model": 32, "vocab_size": 258, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    small = make_small(tmp_path, "T5ForConditionalGeneration", "T5Config", widths)
    batches = [
        {**batch, "decoder_input_ids": batch["input_ids"].flip(1), "decoder_attention_mask": batch["attention_mask"]}
        for batch in token_batches([(2, 9), (1, 7)])
    ]
    model = transformers.T5ForConditionalGeneration.from_pretrained(small.weights, dtype=torch.float32).eval()
    expected, got = kept(model, batches), sizes(measured(small, batches))
    assert len(got) == 4  # the encoder keeps nothing
    for ours, theirs in zip(got, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.fixture(scope="module")
def model(small: Callable[..., Small]) -> Small:
    return small("LlamaForCausalLM", "LlamaConfig", WIDTHS, dtype=torch.bfloat16)


@pytest.mark.parametrize("text", [ALONE, ALONE.replace(CACHE, f"{CACHE}, config_groups: {{}}, targets: [Linear]")])
def test_a_recipe_of_the_cache_alone_leaves_weights_as_they_are(model: Small, tmp_path: Path, text: str) -> None:
    done = calibrate(model, Recipe.from_text(whole_range(text), "r"), tmp_path / "out", propagate_error=False)
    tensors, original = read_tensors(tmp_path / "out"), read_tensors(model.weights)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in original.items())
    added = [name for name in tensors if name not in original]
    assert added == [f"model.layers.{i}.self_attn.{part}_scale" for i in range(3) for part in "kv"]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model.weights, dtype="auto").eval()
    expected = kept(loaded, token_batches())
    scales = [tuple(float(tensors[f"model.layers.{i}.self_attn.{p}_scale"]) for p in "kv") for i in range(3)]
    assert sorted(scales) == sorted(
        tuple(float(torch.tensor(size / 448).bfloat16()) for size in layer) for layer in expected
    )
    stated = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert stated["config_groups"] == {} and stated["kv_cache_scheme"]["num_bits"] == 8
    assert stated["format"] == "dense" and not done.modules and done.num_caches == 3
    quantized = dataclasses.replace(model, weights=tmp_path / "out")  # is read without the scales of its cache
    again = calibrate(quantized, Recipe.from_text(whole_range(text), "r"), tmp_path / "two", propagate_error=False)
    assert any("6 scales of inputs or key-value caches, or transforms," in remark for remark in again.remarks)
    assert (tmp_path / "two" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()
    load_transformers(tmp_path / "out")


@pytest.mark.parametrize("target", ["LlamaAttention", "re:.*self_attn$"])
def test_a_scheme_for_attention_has_scales_of_queries_too(model: Small, tmp_path: Path, target: str) -> None:
    text = whole_range(ATTENTION.replace("TARGET", f"'{target}'"))
    calibrate(model, Recipe.from_text(text, "r"), tmp_path / "out", propagate_error=False)
    tensors = read_tensors(tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model.weights, dtype="auto").eval()
    largest = [0.0] * 3
    original = torch.nn.functional.scaled_dot_product_attention
    calls: list[int] = []

    def watched(query: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        largest[len(calls) % 3] = max(largest[len(calls) % 3], float(query.abs().max()))
        calls.append(1)
        return original(query, *args, **options)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
        for batch in token_batches():
            loaded(**batch, use_cache=False)
    for index, size in enumerate(largest):
        got = tensors[f"model.layers.{index}.self_attn.q_scale"]
        assert got.shape == (1,) and float(got) == float(torch.tensor(size / 448).bfloat16())
    stated = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    (group,) = stated["config_groups"].values()
    assert group["targets"] == ["LlamaAttention"] and group["weights"] is None
    assert group["input_activations"] == stated["kv_cache_scheme"]
    inputs = token_batches([(2, 17)], seed=5)[0]
    run_weights(model, tmp_path / "out", inputs)  # our own reader takes it


def test_each_head_may_have_a_scale(model: Small, tmp_path: Path) -> None:
    text = whole_range(ALONE).replace("strategy: tensor", "strategy: attn_head")
    calibrate(model, Recipe.from_text(text, "r"), tmp_path / "out")
    tensors = read_tensors(tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model.weights, dtype="auto").eval()
    largest_H = torch.zeros(2)
    for batch in token_batches():
        with torch.no_grad():
            keys = loaded(**batch, use_cache=True).past_key_values.layers[0].keys
        largest_H = torch.maximum(largest_H, keys.float().abs().amax((0, 2, 3)))
    got = tensors["model.layers.0.self_attn.k_scale"]
    assert torch.equal(got, (largest_H / 448).bfloat16().reshape(2, 1, 1))
    run_weights(model, tmp_path / "out", token_batches([(2, 17)], seed=5)[0])


@pytest.mark.parametrize("averaging", [None, 0.5])
def test_without_an_observer_scales_are_those_of_a_moving_average(averaging: float | None) -> None:
    options = {"observer": "minmax", "observer_kwargs": {"averaging_constant": averaging}} if averaging else {}
    args = QuantizationArgs(**{**WHOLE, **options})
    key_values = KeyValues(args=args, is_measuring=True)
    for batch in ([-448.0, 44.8], [-4.48, 89.6]):
        for part, factor in zip("kv", (1.0, 2.0), strict=True):
            key_values.handle("a", part, torch.tensor(batch) * factor)
    key_values.end_round(Alone(), torch.device("cpu"))
    scales = [float(key_values.scale_of("a", part, torch.float32)) for part in "kv"]
    share = averaging or 0.01
    size = (448 * (1 - share) + 4.48 * share) / 448
    assert scales == pytest.approx([size, 2 * size])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_scale_is_never_zero_or_infinite(dtype: torch.dtype) -> None:
    key_values = KeyValues(args=QuantizationArgs(**WHOLE), is_measuring=True)
    key_values.handle("a", "k", torch.zeros(4, dtype=dtype))
    key_values.handle("a", "v", torch.tensor([1.0, torch.inf], dtype=dtype))
    key_values.end_round(Alone(), torch.device("cpu"))
    assert float(key_values.scale_of("a", "k", dtype)) == torch.finfo(dtype).eps
    with pytest.raises(runtime.QuantizationError, match="the values of a reach inf, so their v_scale is undefined"):
        key_values.scale_of("a", "v", dtype)


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


@pytest.mark.parametrize(("text", "propagates"), [(RECIPE, True), (ALONE, True), (RECIPE, False), (ALONE, False)])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    model: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, propagates: bool
) -> None:
    plan = Recipe.from_text(text, "r")
    calibrate(model, plan, tmp_path / "whole", propagate_error=propagates)
    with monkeypatch.context() as patch:
        stop_at(patch, 11 if propagates else 8)  # in the second layer, or the third
        with pytest.raises(Stop):
            calibrate(model, plan, tmp_path / "out", propagate_error=propagates)
    assert calibrate(model, plan, tmp_path / "out", propagate_error=propagates, resume=True).resumed_at
    whole, resumed = read_tensors(tmp_path / "whole"), read_tensors(tmp_path / "out")
    assert all(torch.equal(tensor.view(torch.uint8), resumed[name].view(torch.uint8)) for name, tensor in whole.items())


def test_a_cache_is_rounded_whatever_is_ignored(model: Small, tmp_path: Path) -> None:
    """Readers round the cache of all layers, and have no list of those that are left alone."""
    text = RECIPE.replace("[lm_head]", "[lm_head, 're:.*self_attn']")
    calibrate(model, Recipe.from_text(text, "r"), tmp_path / "out")
    assert sum(name.endswith(("k_scale", "v_scale")) for name in read_tensors(tmp_path / "out")) == 6


def test_an_artifact_that_stops_at_layers_is_refused(tmp_path: Path, byte_tokenizer_dir: Path) -> None:
    config = transformers.LlamaConfig(**TWO)
    weights = save_model(transformers.LlamaForCausalLM(config), tmp_path / "model", byte_tokenizer_dir)
    small = Small(weights=weights, artifact=build(weights, out=tmp_path / "artifacts", leaves="target").path)
    with pytest.raises(runtime.RecipeError, match="the artifact lists no key-value cache"):
        calibrate(small, Recipe.from_text(RECIPE, "r"), tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ATTENTION.replace("TARGET", "Linear"), "the target 'Linear' matches .*q_proj, but its group has no weights"),
        (ATTENTION.replace("TARGET", "'re:.*self_attn'"), "matches model.layers.0.self_attn.q_proj, but its group"),
        (ATTENTION.replace("TARGET", "GemmaAttention"), "the target 'GemmaAttention' matches no attention module"),
        (ATTENTION.replace("TARGET", "model.layers.1.self_attn"), "r:1: model.layers.0.self_attn, .* is not targeted"),
        (ALONE.replace("num_bits: 8", "num_bits: 4"), "r:1: a key-value cache of 4 bit float by tensor"),
        (ALONE.replace("type: float", "type: int"), "r:1: a key-value cache of 8 bit int by tensor"),
        ("QuantizationModifier: {targets: Linear}", "neither scheme nor config_groups"),
        ("QuantizationModifier: {config_groups: {a: {targets: [Linear]}}}", "without weights quantizes nothing"),
        (
            ATTENTION.replace("TARGET", "LlamaAttention").removesuffix("}") + f", {whole_range(CACHE)}}}",
            "a rounds keys and values in another way than the cache",
        ),
    ],
)
def test_what_is_refused(model: Small, tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(runtime.RecipeError, match=message):
        calibrate(model, Recipe.from_text(text, "r"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_heads_than_the_artifact_states_are_an_error(model: Small, tmp_path: Path) -> None:
    artifact = model.load()
    odd = tuple(dataclasses.replace(entry, heads=7) for entry in artifact.manifest.cached)
    artifact.manifest = dataclasses.replace(artifact.manifest, cached=odd)
    plan = Recipe.from_text(ALONE.replace("strategy: tensor", "strategy: attn_head"), "r")
    options = {"weights": model.weights, "recipe": plan, "batches": token_batches()}
    with pytest.raises(
        runtime.ArtifactError, match=r"layers\.0\.self_attn has 2 heads, but the artifact states another"
    ):
        runtime.calibrate(artifact, out=tmp_path / "out", **options)
