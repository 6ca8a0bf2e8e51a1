"""Rotations that stay in a model: R3, R4 and QuIP, as this project and compressed-tensors compute them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.transform import TransformConfig, apply_transform_config
from safetensors.torch import load_file, save_file

import runtime
from runtime.artifact.inner_linears import inner_linears
from runtime.checkpoint.dequantize import open_checkpoint
from runtime.errors import RecipeError, WeightsError
from runtime.formats import key_values
from runtime.formats.transforms import ModelTransforms, TransformConfigError, read_transform_config
from runtime.model.experts import all_tokens_seen
from runtime.quantize.preparation import Prepared, prepare
from runtime.quantize.transform_limits import transform_limits
from runtime.quantize.transform_proof import prove_transforms
from tests.runtime.small import (
    NARROW,
    NARROW_W4,
    Small,
    Stop,
    calibrate,
    directory_bytes,
    load_transformers,
    read_tensors,
    run_weights,
    stop_at,
    token_batches,
)

ROUNDED = f"GPTQModifier: {{{NARROW_W4}}}"
QUIP = "QuIPModifier: {rotations: [v, u], transform_block_size: 16, seed: 5}"
# Sizes of 32, 48 and 8: one of them is not a power of two.
WHOLE = "QuIPModifier: {precision: float32}"
R3_R4 = "SpinQuantModifier: {rotations: [R3, R4], transform_type: random-hadamard}"


def of(*modifiers: str) -> runtime.Recipe:
    return runtime.Recipe.from_text("\n".join(modifiers), "recipe.yaml")


def prepared(small: Small, *modifiers: str, dtype: torch.dtype = torch.float32) -> Prepared:
    return prepare(small.load(), open_checkpoint(small.weights, plain=True), of(*modifiers), dtype)


def inputs() -> dict[str, torch.Tensor]:
    return dict(token_batches([(2, 24)])[0])


@pytest.fixture(scope="module")
def quip(narrow_llama: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with transformed inputs and outputs."""
    return Path(calibrate(narrow_llama, of(QUIP, ROUNDED), tmp_path_factory.mktemp("quip") / "out").path)


@pytest.fixture(scope="module")
def rotated(narrow_llama: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with R4, and R3 before a rounded cache."""
    cache = "kv_cache_scheme: {num_bits: 8, type: float, strategy: tensor, symmetric: true, dynamic: false}"
    plan = of(R3_R4, f"QuantizationModifier: {{{NARROW_W4}, {cache}}}")
    return Path(calibrate(narrow_llama, plan, tmp_path_factory.mktemp("rotated") / "out").path)


def config_of(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())["quantization_config"]
    return config


def place(location: str, *, inverse: bool = False, target: str = "Linear", ignore: tuple[str, ...] = ()) -> Any:
    return {"targets": [target], "location": location, "inverse": inverse, "ignore": list(ignore)}


def group(kind: str, block: int | None, *places: Any) -> dict[str, Any]:
    fixed = {"randomize": False, "requires_grad": False, "precision": "torch.float64"}
    return {"type": kind, "apply": list(places), "head_dim": block, **fixed}


def test_the_config_is_that_of_llm_compressor(quip: Path, rotated: Path) -> None:
    """As llm-compressor 0.14.0.1 writes it for the same modifiers; `seed` is ours."""
    head = ("lm_head",)
    kind = "random-hadamard"
    assert config_of(quip)["transform_config"]["config_groups"] == {
        "v": group(kind, 16, place("input", ignore=head), place("weight_input", inverse=True, ignore=head)),
        "u": group(kind, 16, place("weight_output", ignore=head), place("output", inverse=True, ignore=head)),
    }
    attention, down = "re:.*self_attn$", "re:.*down_proj$"
    assert config_of(rotated)["transform_config"]["config_groups"] == {
        "R3": group(kind, 8, place("q_attn", target=attention), place("k_cache", target=attention)),
        "R4": group(kind, None, place("input", target=down), place("weight_input", inverse=True, target=down)),
    }
    names = [name for name in read_tensors(quip) if name.endswith(("v_input.weight", "u_output.weight"))]
    assert sorted(names) == [f"model.layers.0.self_attn.q_proj.{own}.weight" for own in ("u_output", "v_input")]


def test_compressed_tensors_computes_the_same(quip: Path, narrow_llama: Small) -> None:
    model = load_transformers(quip, torch.float32)
    config = TransformConfig.model_validate(config_of(quip)["transform_config"])
    for scheme in config.config_groups.values():
        scheme.apply = [args for args in scheme.apply if args.is_online()]
    with torch.no_grad():
        without = model(**inputs(), use_cache=False).logits
        apply_transform_config(model, config)
        unexpected = model.load_state_dict(
            {
                name: value
                for name, value in read_tensors(quip).items()
                if name.endswith(("v_input.weight", "t.weight"))
            },
            strict=False,
        ).unexpected_keys
        logits = model(**inputs(), use_cache=False).logits
    assert not unexpected
    ours = run_weights(narrow_llama, quip, inputs())["logits"]
    torch.testing.assert_close(ours, logits, rtol=1e-4, atol=1e-5)
    assert (ours - without).abs().max() > 0.1 * ours.abs().max()


@pytest.mark.parametrize("modifier", [QUIP, WHOLE, R3_R4, "SpinQuantModifier: {rotations: [R1, R2, R3, R4]}"])
def test_the_function_does_not_change(narrow_llama: Small, modifier: str) -> None:
    if "R1" in modifier:
        modifier = modifier.replace("R4]", "R4], transform_block_size: 16")
    recipe = of(modifier, ROUNDED)
    prove_transforms(prepared(narrow_llama, modifier, ROUNDED), recipe, token_batches())


@pytest.mark.parametrize("modifier", [QUIP, R3_R4])
def test_a_wrong_rotation_is_found(narrow_llama: Small, modifier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    job = prepared(narrow_llama, modifier, ROUNDED)
    if modifier == R3_R4:
        monkeypatch.setattr(key_values, "_ROTATED", ("k",))
    else:
        found = job.source.transforms
        wrong = tuple(replace(one, inverse=not one.inverse) for one in found.transforms)
        job.source.transforms = replace(found, transforms=wrong)
    with pytest.raises(RecipeError, match="would change the model: outputs differ by"):
        prove_transforms(job, of(modifier, ROUNDED), token_batches())


def test_a_resumed_run_gives_the_same_bytes(
    quip: Path, narrow_llama: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 11)
        with pytest.raises(Stop):
            calibrate(narrow_llama, of(QUIP, ROUNDED), tmp_path / "out")
    calibrate(narrow_llama, of(QUIP, ROUNDED), tmp_path / "out", resume=True)
    assert directory_bytes(tmp_path / "out") == directory_bytes(quip)


def test_recipe_yaml_gives_the_same_bytes(quip: Path, narrow_llama: Small, tmp_path: Path) -> None:
    plan = runtime.Recipe.from_file(quip / "recipe.yaml")
    calibrate(narrow_llama, plan, tmp_path / "out")
    assert read_tensors(tmp_path / "out").keys() == read_tensors(quip).keys()
    assert config_of(tmp_path / "out") == config_of(quip)


@pytest.mark.parametrize("name", ["quip", "rotated"])
def test_dequantized_weights_need_no_transform(
    name: str, narrow_llama: Small, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    directory = request.getfixturevalue(name)
    runtime.dequantize(directory, out=tmp_path / "plain")
    plain = run_weights(narrow_llama, tmp_path / "plain", inputs())["logits"]
    ours = run_weights(narrow_llama, directory, inputs())["logits"]
    difference = (plain - ours).square().mean().sqrt() / ours.square().mean().sqrt()
    assert difference < (1e-5 if name == "quip" else 0.3)  # a plain model does not round its cache
    left = ("_input.weight", "_output.weight", "_attn.weight", "k_scale")
    assert not any(key.endswith(left) for key in read_tensors(tmp_path / "plain"))


def test_a_module_with_a_bias_computes_the_same(small: Callable[..., Small], tmp_path: Path) -> None:
    # The head shares the embeddings, which a reader of the config must not take for a transformed Linear.
    qwen2 = small("Qwen2ForCausalLM", "Qwen2Config", {**NARROW, "num_hidden_layers": 1, "tie_word_embeddings": True})
    remarks = calibrate(qwen2, of(QUIP, ROUNDED), tmp_path / "out").remarks
    assert any("vLLM 0.32 does not run modules that have a bias" in text for text in remarks)
    runtime.dequantize(tmp_path / "out", out=tmp_path / "plain")
    logits = [run_weights(qwen2, tmp_path / name, inputs())["logits"] for name in ("out", "plain")]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    biases = [read_tensors(tmp_path / name)["model.layers.0.self_attn.q_proj.bias"] for name in ("out", "plain")]
    torch.testing.assert_close(biases[1], read_tensors(qwen2.weights)["model.layers.0.self_attn.q_proj.bias"])
    assert not torch.allclose(*biases)


def test_a_plan_without_weights_counts_the_matrices(narrow_llama: Small) -> None:
    with_weights = prepared(narrow_llama, WHOLE, ROUNDED)
    without = prepare(narrow_llama.load(), None, of(WHOLE, ROUNDED), torch.float32)
    expected = {name for name in with_weights.source.stored_names() if name.endswith("v_input.weight")}
    assert expected == {name for name in without.source.stored_names() if name.endswith("v_input.weight")}
    assert len(expected) == 2  # of sizes 32 and 48
    assert all(without.source.stored(name) == with_weights.source.stored(name) for name in expected)


def test_experts_are_transformed_with_all_tokens_and_with_their_own(qwen3_moe: Small) -> None:
    rotations = "SpinQuantModifier: {rotations: [R4], transform_type: random-hadamard}"
    job = prepared(qwen3_moe, rotations, ROUNDED)
    downs = [one.module for one in job.source.transforms.transforms]
    assert len(downs) == 3 * 4
    assert all(name.endswith("down_proj") for name in downs)
    plain = run_weights(qwen3_moe, qwen3_moe.weights, inputs())["logits"]
    job.weights.load(job.model, job.artifact.manifest.parameters, torch.device("cpu"))
    for seen in (False, True):
        values: dict[str, Any] = dict(inputs())
        with torch.no_grad(), all_tokens_seen(job.model) if seen else torch.no_grad():
            for subgraph in job.artifact.subgraphs:
                values |= subgraph.forward(job.model, **{name: values[name] for name in subgraph.input_names})
        torch.testing.assert_close(values["logits"], plain, rtol=1e-4, atol=1e-5)


def test_modules_with_inputs_of_single_numbers_are_found() -> None:
    program = """\
def forward(self, x, *, run):
    up = self.get_submodule("mlp.up")(x)
    gate = self.get_submodule("mlp.gate")(x)
    act = torch.ops.aten.silu.default(gate)
    both = torch.ops.aten.mul.Tensor(act, up)
    down = self.get_submodule("mlp.down")(both)
    size = torch.ops.aten.sym_size.int(up, 0)
    view = torch.ops.aten.view.default(up, [size, -1])
    low = self.get_submodule("low")(view)
    mean = torch.ops.aten.mean.dim(up, [-1], True)
    norm = torch.ops.aten.mul.Tensor(up, mean)
    normed = self.get_submodule("after_norm")(norm)
    added = torch.ops.aten.add.Tensor(x, down)
    stream = self.get_submodule("stream")(added)
    return {"x": stream}
"""
    linears = ["mlp.up", "mlp.gate", "mlp.down", "low", "after_norm", "stream"]
    assert inner_linears(program, linears) == ["mlp.down"]


def test_awq_leaves_transformed_inputs(narrow_llama: Small) -> None:
    awq, rounding = "AWQModifier: {}", f"QuantizationModifier: {{{NARROW_W4}}}"
    with pytest.raises(RecipeError, match=r"has nothing to rescale .* a transform rotates the inputs"):
        runtime.calibrate(
            narrow_llama.load(),
            weights=narrow_llama.weights,
            recipe=of(QUIP, awq, rounding),
            batches=token_batches(),
            out="unused",
        )


@pytest.mark.parametrize(
    ("modifier", "complaint"),
    [
        (
            "QuIPModifier: {transform_type: hadamard}",
            "the group v on model.layers.0.mlp.* needs a power of two, not 48",
        ),
        ("QuIPModifier: {transform_block_size: 7}", "blocks of 7 do not divide 32 features"),
        ("QuIPModifier: {transform_type: random-matrix}", "transform_type random-matrix, and readers do not agree"),
        ("QuIPModifier: {randomize: true}", "has randomize, and readers have one matrix"),
        ("QuIPModifier: {targets: ['re:.*none']}", "the rotation v matches no module"),
        ("QuIPModifier: {targets: ['re:.*mlp$']}", "input of model.layers.0.mlp cannot be transformed"),
        (
            "SpinQuantModifier: {rotations: [R4], transform_type: random-hadamard}\nQuIPModifier: {}",
            "the groups R4 and v both apply to model.layers.0.mlp.down_proj",
        ),
    ],
)
def test_recipes_that_are_rejected(narrow_llama: Small, modifier: str, complaint: str) -> None:
    with pytest.raises(RecipeError, match=complaint):
        prepared(narrow_llama, modifier, ROUNDED)


@pytest.mark.parametrize(
    ("modifier", "can_ignore"),
    [
        ("QuIPModifier: {transform_block_size: 7}", True),
        ("SpinQuantModifier: {rotations: [R4], transform_block_size: 7}", False),  # it has no ignore list
    ],
)
def test_sizes_that_do_not_fit_recommend_what_the_modifier_has(
    narrow_llama: Small, modifier: str, can_ignore: bool
) -> None:
    with pytest.raises(RecipeError, match="do not divide") as caught:
        prepared(narrow_llama, modifier, ROUNDED)
    assert ("to ignore" in str(caught.value)) == can_ignore


ONLINE = {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": "input"}]}


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ("v", "transform_config must be a mapping, not 'v'"),
        ({"config_groups": {}, "code": 1}, "unknown field 'code'"),
        ({"config_groups": {"../v": ONLINE}}, "invalid name"),
        ({"config_groups": {"v": {**ONLINE, "type": "__import__('os')"}}}, 'type "__import__.* is not hadamard'),
        ({"config_groups": {"v": {**ONLINE, "type": "random-matrix"}}}, "type 'random-matrix' of the group v is not"),
        ({"config_groups": {"v": {**ONLINE, "randomize": True}}}, "permutations are not supported"),
        ({"config_groups": {"v": {**ONLINE, "head_dim": 2**40}}}, "is not a size up to 131072"),
        ({"config_groups": {"v": {**ONLINE, "head_dim": True}}}, "is not a size"),
        ({"config_groups": {"v": {**ONLINE, "precision": "torch.int8"}}}, "precision 'int8'"),
        ({"config_groups": {"v": {**ONLINE, "seed": 1}}}, "unknown field 'seed'"),
        ({"config_groups": {"v": {**ONLINE, "apply": [{"targets": ["Linear"], "location": "weight"}]}}}, "location"),
        ({"config_groups": {"v": {**ONLINE, "apply": [{"targets": [1], "location": "input"}]}}}, "list of at most"),
        ({"config_groups": {"v": {**ONLINE, "apply": [{"targets": "re:(", "location": "input"}]}}}, "not a valid reg"),
        ({"config_groups": {"v": {**ONLINE, "apply": {}}}}, "must be a list"),
    ],
)
def test_untrusted_configs(config: Any, complaint: str) -> None:
    with pytest.raises(TransformConfigError, match=complaint):
        read_transform_config(config)


@pytest.mark.parametrize(
    ("name", "changes", "complaint"),
    [
        ("R3", {"head_dim": None}, "the group R3 on .*self_attn needs a head_dim"),
        ("R3", {"apply": [place("q_attn", target="re:.*self_attn$")]}, "must be transformed by one group"),
        ("R3", {"apply": [place("k_cache", target="re:.*attn$", inverse=True)]}, "needs a head_dim, and no inverse"),
        ("R4", {"apply": [place("input", target="re:.*down_proj$")] * 2}, "two places of the group R4 apply to input"),
        ("R4", {"apply": [place("input", target="re:")]}, "input of the whole model cannot be transformed"),
    ],
)
def test_untrusted_places(
    rotated: Path, narrow_llama: Small, tmp_path: Path, name: str, changes: Any, complaint: str
) -> None:
    shutil.copytree(rotated, tmp_path / "model")
    config = json.loads((rotated / "config.json").read_text())
    config["quantization_config"]["transform_config"]["config_groups"][name] |= changes
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=complaint):
        run_weights(narrow_llama, tmp_path / "model", inputs())


def _scaled(tensors: dict[str, torch.Tensor], key: str) -> None:
    tensors[key] = tensors[key] * 2


def _turned(tensors: dict[str, torch.Tensor], key: str) -> None:
    tensors[key][3] = tensors[key][4]


def _cut(tensors: dict[str, torch.Tensor], key: str) -> None:
    tensors[key] = tensors[key][:8].contiguous()


def _gone(tensors: dict[str, torch.Tensor], key: str) -> None:
    del tensors[key]


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (_scaled, "not a known Hadamard matrix"),
        (_turned, "not a known Hadamard matrix"),
        (_cut, "needs a floating point matrix of size 16|a matrix of size 16"),
        (_gone, "missing tensor 'model.layers.0.*.v_input.weight'"),
    ],
)
def test_untrusted_matrices(
    quip: Path,
    narrow_llama: Small,
    tmp_path: Path,
    spoil: Callable[[dict[str, torch.Tensor], str], None],
    complaint: str,
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "config.json").write_bytes((quip / "config.json").read_bytes())
    tensors = dict(load_file(quip / "model.safetensors"))
    spoil(tensors, "model.layers.0.self_attn.q_proj.v_input.weight")
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=complaint):
        run_weights(narrow_llama, copy, inputs())
    with pytest.raises(WeightsError, match=complaint):
        runtime.dequantize(copy, out=tmp_path / "plain")


def test_what_readers_do_not_compute(narrow_llama: Small) -> None:
    job = prepared(narrow_llama, WHOLE.replace("{", "{ignore: ['re:.*k_proj', lm_head], "), ROUNDED)
    module = job.model.get_submodule("model.layers.0.mlp.down_proj")
    module._parameters["bias"] = torch.nn.Parameter(torch.zeros(1))
    found = list(transform_limits(job.source.transforms, job.model, {"model.layers.0.mlp.up_proj"}, has_cache=True))
    for part in (
        "they ignore transform_config",
        "a bias and a transform: model.layers.0.mlp.down_proj",
        "ignores transforms of experts and computes wrong numbers: model.layers.0.mlp.up_proj",
        "only some are transformed: model.layers.0.self_attn.k_proj",
    ):
        assert any(part in text for text in found), (part, found)
    assert not list(transform_limits(ModelTransforms(), job.model, (), has_cache=True))
