from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import runtime
from runtime.chain import LoadedSubgraph
from tests.runtime.small import (
    NARROW_W4,
    RECIPES,
    Small,
    calibrate,
    directory_bytes,
    load_transformers,
    raw_bytes,
    read_tensors,
    recipe,
    run_transformers,
    run_weights,
    token_batches,
    unpacked,
)

LAYER = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LAYER += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def reference_gptq(weight_OI: torch.Tensor, inputs_TI: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The paper's algorithm 1 in float64: 4 bits, static groups, columns by falling diagonal, dampening 0.01.

    Returns:
        The dequantized weight, and for each row how close a number came to the middle between two grid points.
    """
    weight_OI, inputs_TI = weight_OI.double(), inputs_TI.double()
    scale_OI = weight_OI.unflatten(1, (-1, group)).abs().amax(dim=2).div(7.5).float().double()
    scale_OI = scale_OI.repeat_interleave(group, dim=1)
    hessian_II = inputs_TI.T @ inputs_TI
    order = hessian_II.diagonal().argsort(descending=True)
    hessian_II = hessian_II[order][:, order] + 0.01 * hessian_II.diagonal().mean() * torch.eye(len(order))
    upper_II = torch.linalg.cholesky(torch.linalg.inv(hessian_II), upper=True)
    work_OI, scale_OI, done_OI = weight_OI[:, order].clone(), scale_OI[:, order], torch.empty_like(weight_OI)
    margin_O = torch.ones(len(weight_OI), dtype=torch.float64)
    for k in range(len(order)):
        ratio_O = work_OI[:, k] / scale_OI[:, k]
        is_clamped_O = ratio_O.floor().clamp(-8, 7) == ratio_O.ceil().clamp(-8, 7)
        margin_O = torch.minimum(margin_O, (ratio_O - ratio_O.floor() - 0.5).abs() + is_clamped_O)
        quantized_O = ratio_O.round().clamp(-8, 7) * scale_OI[:, k]
        error_O = (work_OI[:, k] - quantized_O) / upper_II[k, k]
        work_OI[:, k:] -= error_O[:, None] * upper_II[k, k:]
        done_OI[:, order[k]] = quantized_O
    return done_OI.float(), margin_O


def inputs_of(model: Any, names: list[str], batches: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """What transformers hands to modules, all tokens joined: [T, I]."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen[name].append(args[0].flatten(0, -2))
        )
        for name in names
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


@pytest.fixture(scope="module")
def gptq_run(narrow_llama: Small, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("gptq") / "out"
    return out, calibrate(narrow_llama, recipe(NARROW_W4, modifier="GPTQModifier"), out)


def test_second_layer_equals_float64_gptq_on_the_inputs_that_the_quantized_first_layer_gives(
    narrow_llama: Small, gptq_run: tuple[Path, Any]
) -> None:
    tensors = read_tensors(gptq_run[0])
    first, second = ([f"model.layers.{index}.{name}" for name in LAYER] for index in (0, 1))
    original = load_transformers(narrow_llama.weights)
    replaced = load_transformers(narrow_llama.weights)
    for name in first:
        with torch.no_grad():
            replaced.get_submodule(name).get_parameter("weight").copy_(unpacked(tensors, name))

    inputs, stale = (inputs_of(model, second, token_batches()) for model in (replaced, original))
    for name in second:
        weight_OI = original.get_submodule(name).get_parameter("weight").detach()
        expected_OI, margin_O = reference_gptq(weight_OI, inputs[name], 16)
        # The runtime computes in float32: a number between two grid points may fall to either.
        is_certain = margin_O > 1e-4
        assert is_certain.float().mean() > 0.9
        got_OI = unpacked(tensors, name)
        torch.testing.assert_close(got_OI[is_certain], expected_OI[is_certain], rtol=1e-6, atol=0)
        wrong_OI, _ = reference_gptq(weight_OI, stale[name], 16)
        assert (got_OI != wrong_OI).float().mean() > 0.01, "inputs of the unquantized layer would give the same"


def test_report_states_loss_and_tokens(narrow_llama: Small, gptq_run: tuple[Path, Any]) -> None:
    out, result = gptq_run
    names = [f"model.layers.{index}.{name}" for index in range(3) for name in LAYER]
    assert [report.name for report in result.modules] == names
    assert {(report.algorithm, report.damping, report.num_tokens) for report in result.modules} == {("gptq", 0.01, 366)}
    assert result.path == out
    assert result.unreached == ()
    tensors = read_tensors(out)
    assert result.num_bytes == sum(tensor.nbytes for tensor in tensors.values())

    name = "model.layers.0.self_attn.q_proj"  # its inputs are those of the original model
    original = load_transformers(narrow_llama.weights)
    inputs_TI = inputs_of(original, [name], token_batches())[name].double()
    change_OI = (unpacked(tensors, name) - original.get_submodule(name).get_parameter("weight")).double()
    loss = (inputs_TI @ change_OI.T).square().sum().item()
    assert result.modules[0].loss == pytest.approx(loss, rel=1e-4)


def test_gptq_beats_round_to_nearest_where_it_matters(
    narrow_llama: Small, gptq_run: tuple[Path, Any], tmp_path: Path
) -> None:
    calibrate(narrow_llama, recipe(NARROW_W4), tmp_path / "rtn")
    seen = token_batches()[0]
    truth, gptq, rtn = (run_transformers(path, seen) for path in (narrow_llama.weights, gptq_run[0], tmp_path / "rtn"))
    assert (gptq - truth).square().mean() < (rtn - truth).square().mean()


@pytest.mark.parametrize("modifier", ["QuantizationModifier", "GPTQModifier"])
@pytest.mark.parametrize("scheme", RECIPES)
def test_transformers_loads_it_and_computes_the_same_to_the_bit(
    llama: Small, tmp_path: Path, scheme: str, modifier: str
) -> None:
    """Both run the same operations in the same order, so nothing less than equality would do."""
    out = tmp_path / "out"
    result = calibrate(llama, recipe(RECIPES[scheme], modifier=modifier), out)
    assert len(result.modules) == (22 if scheme == "with head" else 21)
    inputs = token_batches([(2, 17)], seed=5)[0]
    got, expected = run_weights(llama, out, inputs)["logits"], run_transformers(out, inputs)
    assert torch.equal(got, expected)
    assert not torch.equal(got, run_transformers(llama.weights, inputs))


def test_decompressed_weights_are_those_the_run_went_on_with(
    narrow_llama: Small, gptq_run: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Round to nearest for the first layer, GPTQ for the second: what the second one's hooks see tells."""
    seen: dict[str, torch.Tensor] = {}
    real = LoadedSubgraph.forward

    def forward(self: LoadedSubgraph, model: nn.Module, **inputs: Any) -> dict[str, Any]:
        for name in LAYER:
            weight = model.get_submodule(f"model.layers.0.{name}").get_parameter("weight")
            if not weight.is_meta:
                seen[f"model.layers.0.{name}"] = weight.detach().clone()  # the last pass wins: propagation
        return real(self, model, **inputs)

    monkeypatch.setattr(LoadedSubgraph, "forward", forward)
    calibrate(narrow_llama, recipe(NARROW_W4, modifier="GPTQModifier"), tmp_path / "out")
    assert directory_bytes(tmp_path / "out") == directory_bytes(gptq_run[0])
    loaded = load_transformers(tmp_path / "out")
    with torch.no_grad():
        loaded(**token_batches()[0])  # the first run unpacks the weights
    for name, weight in seen.items():
        assert torch.equal(weight, loaded.get_submodule(name).get_parameter("weight")), name
        assert torch.equal(weight, unpacked(read_tensors(tmp_path / "out"), name)), name


def test_generates_with_its_tokenizer_and_chat_template(llama: Small, tmp_path: Path) -> None:
    out = tmp_path / "out"
    calibrate(llama, recipe(RECIPES["W4A16"]), out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "u:hi<eos>"
    inputs = tokenizer("ab", return_tensors="pt")
    assert inputs["input_ids"].tolist() == [[0, 2 + ord("a"), 2 + ord("b")]]
    tokens = load_transformers(out).generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=3, do_sample=False
    )
    assert 4 <= tokens.shape[1] <= 6
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (llama.weights / name).read_bytes(), name
    before, after = (json.loads((path / "config.json").read_text()) for path in (llama.weights, out))
    config = after.pop("quantization_config")
    assert after == before
    assert (config["quant_method"], config["format"], config["ignore"]) == (
        "compressed-tensors",
        "pack-quantized",
        ["lm_head"],
    )


def test_what_is_not_quantized_is_not_changed_by_a_bit(sharded_llama: Small, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = calibrate(sharded_llama, recipe(RECIPES["W4A16"]), out, max_shard_bytes=100_000, dtype=torch.float32)
    before, after = read_tensors(sharded_llama.weights), read_tensors(out)
    quantized = [f"{report.name}.weight" for report in result.modules]
    assert sorted(name for name in before if name not in after) == sorted(quantized)
    for name, tensor in before.items():
        if name not in quantized:
            assert (after[name].dtype, raw_bytes(after[name])) == (tensor.dtype, raw_bytes(tensor)), name
    assert {after[f"{name}_scale"].dtype for name in quantized} == {torch.bfloat16}
    inputs = token_batches([(2, 17)])[0]
    assert torch.equal(run_weights(sharded_llama, out, inputs)["logits"], run_transformers(out, inputs))


def test_several_shards_have_an_index(sharded_llama: Small, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = calibrate(sharded_llama, recipe(RECIPES["W8A8"]), out, max_shard_bytes=100_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    names = sorted(path.name for path in out.glob("*.safetensors"))
    count = len(names)
    assert count > 3
    assert names == [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    assert index["metadata"] == {"total_size": result.num_bytes}
    assert list(index["weight_map"]) == sorted(read_tensors(out))
    for path in out.glob("*.safetensors"):
        is_single = len([name for name in index["weight_map"].values() if name == path.name]) == 1
        assert is_single or path.stat().st_size < 100_000 + 20_000  # and the header
    assert not list(out.glob(".*"))


def test_same_run_gives_the_same_bytes(sharded_llama: Small, tmp_path: Path) -> None:
    for name in ("one", "two"):
        plan = recipe(RECIPES["W4A16_ASYM"], modifier="GPTQModifier")
        calibrate(sharded_llama, plan, tmp_path / name, max_shard_bytes=150_000)
    assert directory_bytes(tmp_path / "one") == directory_bytes(tmp_path / "two")


def test_a_callers_inference_mode_changes_nothing(
    narrow_llama: Small, gptq_run: tuple[Path, Any], tmp_path: Path
) -> None:
    with torch.inference_mode():
        calibrate(narrow_llama, recipe(NARROW_W4, modifier="GPTQModifier"), tmp_path / "out")
    assert directory_bytes(tmp_path / "out") == directory_bytes(gptq_run[0])


def test_shards_of_source_and_output_change_no_tensor(llama: Small, tmp_path: Path) -> None:
    model = load_transformers(llama.weights)
    model.save_pretrained(tmp_path / "shards", max_shard_size="150KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    plan = recipe(RECIPES["W4A16"], modifier="GPTQModifier")
    calibrate(llama, plan, tmp_path / "one")
    artifact = llama.load()
    options = {"recipe": plan, "batches": token_batches(), "max_shard_bytes": 60_000}
    runtime.calibrate(artifact, weights=tmp_path / "shards", out=tmp_path / "two", **options)
    one, two = read_tensors(tmp_path / "one"), read_tensors(tmp_path / "two")
    assert list(one) == sorted(two)
    assert all(raw_bytes(one[name]) == raw_bytes(two[name]) for name in one)


@pytest.mark.parametrize(("umask", "file_mode", "directory_mode"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_permissions_follow_the_umask(
    narrow_llama: Small, tmp_path: Path, umask: int, file_mode: int, directory_mode: int
) -> None:
    before = os.umask(umask)
    try:
        calibrate(narrow_llama, recipe(NARROW_W4), tmp_path / "out", max_shard_bytes=20_000)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == directory_mode
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()} == {file_mode}
