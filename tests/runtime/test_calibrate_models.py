from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

import runtime
import seqbuild.build
from runtime.data.inputs import model_inputs
from seqbuild.build import build
from seqbuild.verify.running import EAGER_EXPERTS, configured
from tests.runtime.small import (
    NARROW,
    NARROW_W4,
    RECIPES,
    Small,
    calibrate,
    load_transformers,
    raw_bytes,
    read_tensors,
    recipe,
    run_transformers,
    run_weights,
    save_model,
    token_batches,
    unpacked,
)
from tests.sweep import sweep
from tests.tiny_models import minilm_directory, tiny_model

WITHOUT_EXPERTS = NARROW_W4.replace("lm_head", "lm_head, 're:.*experts.*'")


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_experts_pass_through_and_attention_is_quantized(
    request: pytest.FixtureRequest, tmp_path: Path, name: str
) -> None:
    """Transformers itself does not load experts that stay as they are beside packed weights, so the model that must
    be equalled is the original one, with the quantized weights put into it.
    """
    small: Small = request.getfixturevalue(name)
    out = tmp_path / "out"
    result = calibrate(small, recipe(WITHOUT_EXPERTS, modifier="GPTQModifier"), out)
    attention = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(3) for p in "qkvo"]
    assert [report.name for report in result.modules] == attention
    before, after = read_tensors(small.weights), read_tensors(out)
    kept = [key for key in before if key.removesuffix(".weight") not in attention]
    assert len([key for key in kept if ".experts.3." in key]) == 9
    assert all(raw_bytes(before[key]) == raw_bytes(after[key]) for key in kept)

    model = load_transformers(small.weights)
    with torch.no_grad(), configured(model, EAGER_EXPERTS):
        for module in attention:
            model.get_submodule(module).get_parameter("weight").copy_(unpacked(after, module))
        inputs = token_batches([(2, 17)])[0]
        expected = model(**inputs, use_cache=False).logits
    assert torch.equal(run_weights(small, out, inputs)["logits"], expected)


def test_experts_are_named_under_ignore_for_readers_to_whom_they_are_linear(qwen3_moe: Small, tmp_path: Path) -> None:
    calibrate(qwen3_moe, recipe(WITHOUT_EXPERTS), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    layers = [
        entry
        for index in range(3)
        for entry in (rf"re:model\.layers\.{index}\.mlp\.experts\.\d+\.", f"model.layers.{index}.mlp.gate")
    ]
    assert sorted(config["ignore"]) == sorted(["lm_head", *layers])


def test_experts_beside_float_weights_load_in_transformers(qwen3_moe: Small, tmp_path: Path) -> None:
    plan = recipe(RECIPES["FP8_DYNAMIC"].replace("lm_head", "lm_head, 're:.*experts.*'"))
    calibrate(qwen3_moe, plan, tmp_path / "out")
    inputs = token_batches([(2, 17)])[0]
    got = run_weights(qwen3_moe, tmp_path / "out", inputs)["logits"]
    assert torch.equal(got, run_transformers(tmp_path / "out", inputs))


def test_gemma2(gemma2: Small, tmp_path: Path) -> None:
    calibrate(gemma2, recipe(NARROW_W4, modifier="GPTQModifier"), tmp_path / "out")
    inputs = token_batches([(2, 17)])[0]
    got = run_weights(gemma2, tmp_path / "out", inputs)["logits"]
    assert torch.equal(got, run_transformers(tmp_path / "out", inputs))


@pytest.mark.parametrize("modifier", sweep(["QuantizationModifier", "GPTQModifier"], "GPTQModifier"))
def test_bert(tmp_path: Path, modifier: str) -> None:
    source = minilm_directory()
    artifact = runtime.load(seqbuild.build.build(source, out=tmp_path).path)
    batches = token_batches([(2, 30)])
    for batch in batches:
        batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    batches = [{entry.name: batch[entry.name] for entry in artifact.manifest.inputs} for batch in batches]
    plan = recipe("targets: Linear, scheme: W4A16", modifier=modifier)
    result = runtime.calibrate(artifact, weights=source, recipe=plan, batches=batches, out=tmp_path / "out")
    assert len(result.modules) == 6 * 6 + 1
    small = Small(weights=source, artifact=artifact.path)
    model = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        expected = model(**batches[0])
    got = run_weights(small, tmp_path / "out", batches[0])
    assert torch.equal(got["last_hidden_state"], expected.last_hidden_state)
    assert torch.equal(got["pooler_output"], expected.pooler_output)


@pytest.mark.parametrize(
    ("name", "modifier"),
    sweep(
        [(name, modifier) for name in ("t5", "bart") for modifier in ("QuantizationModifier", "GPTQModifier")],
        ("t5", "GPTQModifier"),
        ("bart", "QuantizationModifier"),
    ),
)
def test_encoder_decoder(tmp_path: Path, name: str, modifier: str) -> None:
    weights = save_model(tiny_model(name), tmp_path / "model")
    small = Small(weights=weights, artifact=seqbuild.build.build(weights, out=tmp_path).path)
    ids_BS = torch.randint(3, 128, (3, 20), generator=torch.Generator().manual_seed(0))
    known = {"input_ids": ids_BS, "decoder_input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS)}
    known["decoder_attention_mask"] = known["attention_mask"]
    inputs = {entry.name: known[entry.name] for entry in small.load().manifest.inputs}
    result = calibrate(small, recipe(NARROW_W4, modifier=modifier), tmp_path / "out", batches=[inputs])
    assert len(result.modules) == {"t5": 2 * 6 + 2 * 10, "bart": 2 * 6 + 2 * 10}[name]
    # transformers cannot initialize a T5 with packed weights, so they are put into the original model.
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(weights).eval()
    with torch.no_grad():
        for report in result.modules:
            weight_OI = unpacked(read_tensors(tmp_path / "out"), report.name)
            model.get_submodule(report.name).get_parameter("weight").copy_(weight_OI)
        expected = model(**inputs, use_cache=False).logits
    assert torch.equal(run_weights(small, tmp_path / "out", inputs)["logits"], expected)


def test_layers_that_share_their_weights_are_quantized_once(tmp_path: Path) -> None:
    sizes = {
        **{key: NARROW[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")},
        "embedding_size": 16,
        "num_hidden_layers": 3,
    }
    model = transformers.AlbertModel(transformers.AlbertConfig(**sizes)).eval()
    weights = save_model(model, tmp_path / "model")
    small = Small(weights=weights, artifact=seqbuild.build.build(weights, out=tmp_path).path)
    batch = token_batches([(2, 20)])[0]
    known = batch | {"token_type_ids": torch.zeros_like(batch["input_ids"])}
    inputs = {entry.name: known[entry.name] for entry in small.load().manifest.inputs}
    plan = recipe(NARROW_W4.replace("lm_head", "pooler"), modifier="GPTQModifier")
    result = calibrate(small, plan, tmp_path / "out", batches=[inputs])
    names = [report.name for report in result.modules]
    assert len(names) == len(dict.fromkeys(names))
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        expected = loaded(**inputs).last_hidden_state
    assert torch.equal(run_weights(small, tmp_path / "out", inputs)["last_hidden_state"], expected)


# Modules that the forward pass never comes to.


@pytest.fixture(scope="module")
def llava(small: Callable[..., Small]) -> Small:
    """Text alone never comes to the vision tower."""
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 4, "image_size": 16, "patch_size": 8}
    sizes = {"text_config": {"model_type": "llama", **NARROW}, "vision_config": vision, "image_token_index": 3}
    return small("LlavaForConditionalGeneration", "LlavaConfig", sizes, text_only=True)


def test_unreached_modules_stay_as_they_are_and_are_reported(llava: Small, tmp_path: Path) -> None:
    lines: list[str] = []
    result = calibrate(llava, recipe(NARROW_W4, modifier="GPTQModifier"), tmp_path / "out", progress=lines.append)
    assert len(result.modules) == 21
    assert all("language_model" in report.name for report in result.modules)
    assert len(result.unreached) == 2 * 6 + 2
    assert all("language_model" not in name for name in result.unreached)
    assert lines[0] == (
        f"left unchanged, because the model never calls them: {', '.join(result.unreached[:3])} and 11 more"
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert [name for name in result.unreached if name not in config["ignore"]] == []
    before, after = read_tensors(llava.weights), read_tensors(tmp_path / "out")
    kept = [key for key in before if "vision" in key or "projector" in key]
    assert kept and all(raw_bytes(before[key]) == raw_bytes(after[key]) for key in kept)

    inputs = token_batches([(2, 17)])[0]
    inputs["input_ids"][inputs["input_ids"] == 3] = 4
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        expected = loaded(**inputs, use_cache=False).logits
    assert torch.equal(run_weights(llava, tmp_path / "out", inputs)["logits"], expected)


def test_a_recipe_for_nothing_but_unreached_modules_is_refused(llava: Small, tmp_path: Path) -> None:
    plan = recipe(NARROW_W4.replace("Linear", "'re:.*vision_tower'"))
    with pytest.raises(runtime.RecipeError, match="the model never calls any module that the recipe targets"):
        calibrate(llava, plan, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_stream_is_not_rotated_for_a_part_of_a_model(llava: Small, tmp_path: Path) -> None:
    """What the artifact does not contain would read and write the stream as before."""
    spin = runtime.Recipe.from_text(f"SpinQuantModifier: {{}}\nQuantizationModifier: {{{NARROW_W4}}}", "recipe.yaml")
    with pytest.raises(runtime.RecipeError, match=r"projector.* the checkpoint would be wrong for images"):
        calibrate(llava, spin, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_transformers_does_not_load_is_remarked_upon(qwen3_moe: Small, llama: Small, tmp_path: Path) -> None:
    at_layers = Small(
        weights=qwen3_moe.weights, artifact=build(qwen3_moe.weights, out=tmp_path / "artifacts", leaves="target").path
    )
    moe = calibrate(at_layers, recipe(NARROW_W4), tmp_path / "moe")
    left = "stacked expert weights are not quantized, because the artifact calls the model's own modules"
    assert [left in remark for remark in moe.remarks] == [True, False, False]
    assert "transformers 5.17 initializes experts that are not quantized at random" in moe.remarks[1]
    assert (
        "transformers 5.24 does not load experts that are not quantized if other layers are integers" in moe.remarks[2]
    )
    (remark,) = calibrate(at_layers, recipe(RECIPES["FP8_DYNAMIC"]), tmp_path / "fp8").remarks
    assert left in remark
    ignored = recipe(RECIPES["FP8_DYNAMIC"].replace("lm_head", "lm_head, 're:.*experts'"))
    assert calibrate(at_layers, ignored, tmp_path / "ignored").remarks == ()
    assert calibrate(qwen3_moe, recipe(NARROW_W4), tmp_path / "apart").remarks == ()
    assert calibrate(llama, recipe(NARROW_W4), tmp_path / "llama").remarks == ()


# Inputs that a plain call leaves out.


def test_static_scales_are_those_of_a_plain_call(small: Callable[..., Small], tmp_path: Path) -> None:
    """GPT-J adds the embedding of token 0 everywhere where token types are zeros."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "vocab_size": 258, "n_positions": 64}
    gptj = small("GPTJForCausalLM", "GPTJConfig", sizes | {"bos_token_id": 0, "eos_token_id": 1})
    static = "{num_bits: 8, type: float, strategy: tensor, dynamic: false, observer: static_minmax}"
    weights = "{num_bits: 8, type: float, strategy: tensor}"
    plan = recipe(
        f"config_groups: {{a: {{targets: ['re:.*q_proj'], weights: {weights}, input_activations: {static}}}}}"
    )
    calibrate(gptj, plan, tmp_path / "out")
    model, largest = load_transformers(gptj.weights), []
    module = model.get_submodule("transformer.h.0.attn.q_proj")
    module.register_forward_pre_hook(lambda _, inputs: largest.append(inputs[0].abs().max().item()))
    with torch.no_grad():
        for batch in token_batches():
            model(**batch)
    scale = read_tensors(tmp_path / "out")["transformer.h.0.attn.q_proj.input_scale"]
    assert scale.item() == pytest.approx(max(largest) / 448, rel=1e-5)


# Conv1D

GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 258, "n_positions": 64, "tie_word_embeddings": False}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 1}


def test_conv1d_modules_stay_as_they_are_and_it_is_said(small: Callable[..., Small], tmp_path: Path) -> None:
    gpt2 = small("GPT2LMHeadModel", "GPT2Config", GPT2)
    batches = [model_inputs(gpt2.load().manifest, batch) for batch in token_batches()]
    everything = recipe(NARROW_W4.partition(", ignore")[0], modifier="GPTQModifier")
    done = calibrate(gpt2, everything, tmp_path / "out", batches=batches)
    assert [module.name for module in done.modules] == ["lm_head"]
    (said,) = [remark for remark in done.remarks if "Conv1D" in remark]
    assert said.startswith("warning: 8 Conv1D modules are not quantized (transformer.h.0.attn.c_attn, ")
    before, after = read_tensors(gpt2.weights), read_tensors(tmp_path / "out")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if ".h." in name)


@pytest.mark.parametrize("target", ["Conv1D", "'re:.*c_fc'"])
def test_a_recipe_for_conv1d_alone_is_refused(small: Callable[..., Small], tmp_path: Path, target: str) -> None:
    gpt2 = small("GPT2LMHeadModel", "GPT2Config", GPT2)
    with pytest.raises(runtime.RecipeError, match="8 modules of this model are Conv1D, which cannot be quantized"):
        calibrate(gpt2, recipe(f"targets: [{target}], scheme: W4A16", modifier="GPTQModifier"), tmp_path / "out")


def test_the_library_gives_conv1d_no_quantized_weight() -> None:
    """Should this fail, Conv1D can be quantized: readers would load it then."""
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
    from transformers.pytorch_utils import Conv1D

    model = torch.nn.ModuleDict({"linear": torch.nn.Linear(128, 128), "conv": Conv1D(128, 128)})  # type: ignore[no-untyped-call]
    groups = {"a": preset_name_to_scheme("W4A16", ["Linear", "Conv1D"])}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups))
    assert hasattr(model["linear"], "weight_scale")
    assert not hasattr(model["conv"], "weight_scale")
