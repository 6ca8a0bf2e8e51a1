from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import nn

import runtime
import seqbuild.build
from runtime.artifact import LoadedSubgraph
from runtime.calibration import ModuleReport
from tests.runtime.small import (
    NARROW,
    Small,
    calibrate,
    directory_bytes,
    load_transformers,
    raw_bytes,
    read_tensors,
    recipe,
    run_transformers,
    run_weights,
    save_model,
    token_batches,
)
from tests.tiny_models import minilm_directory, tiny_model

LAYER = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LAYER += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
GROUPS_OF_16 = "{num_bits: 4, type: int, symmetric: true, strategy: group, group_size: 16}"
NARROW_W4 = f"config_groups: {{a: {{targets: [Linear], weights: {GROUPS_OF_16}}}}}, ignore: [lm_head]"
W3 = "{num_bits: 3, type: int, symmetric: true, strategy: group, group_size: 64}"
RECIPES = {
    "W4A16": "targets: Linear, scheme: W4A16, ignore: [lm_head]",
    "W4A16_ASYM": "targets: Linear, scheme: W4A16_ASYM, ignore: [lm_head]",
    "W8A8": "targets: Linear, scheme: W8A8, ignore: [lm_head]",
    "FP8_DYNAMIC": "targets: Linear, scheme: FP8_DYNAMIC, ignore: [lm_head]",
    "W3": f"config_groups: {{a: {{targets: [Linear], weights: {W3}}}}}, ignore: [lm_head]",
    "with head": "targets: Linear, scheme: W4A16",
}


def unpacked(tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    """A 4 bit weight, taken apart by hand: eight numbers in an int32, the first lowest, each with 8 added."""
    packed, scale = tensors[f"{module}.weight_packed"], tensors[f"{module}.weight_scale"]
    rows, columns = tensors[f"{module}.weight_shape"].tolist()
    integers = torch.stack([(packed >> (4 * place)) & 15 for place in range(8)], dim=-1).reshape(rows, -1) - 8
    return integers[:, :columns] * scale.repeat_interleave(columns // scale.shape[1], dim=1)


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


# Memory and traffic.


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """How often each safetensors file is opened for reading."""
    counts: dict[str, int] = {}
    real = safetensors.safe_open

    def counting(path: Any, *args: Any, **kwargs: Any) -> Any:
        counts[Path(path).name] = counts.get(Path(path).name, 0) + 1
        return real(path, *args, **kwargs)

    monkeypatch.setattr(safetensors, "safe_open", counting)
    yield counts


def watch_loaded(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The names of the parameters that hold memory, at each step of the chain."""
    steps: list[list[str]] = []
    real = LoadedSubgraph.forward

    def forward(self: LoadedSubgraph, model: nn.Module, **inputs: Any) -> dict[str, Any]:
        tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
        stored = model.state_dict(keep_vars=True)
        loaded = [name for name, tensor in tensors.items() if name in stored and not tensor.is_meta]
        assert loaded == [name for name in stored if name in self.entry.parameters]
        steps.append(loaded)
        return real(self, model, **inputs)

    monkeypatch.setattr(LoadedSubgraph, "forward", forward)
    return steps


def test_calibration_holds_one_subgraph_and_opens_each_shard_once(
    sharded_llama: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: dict[str, int]
) -> None:
    steps = watch_loaded(monkeypatch)
    plan = recipe(RECIPES["W4A16"], modifier="GPTQModifier")
    calibrate(sharded_llama, plan, tmp_path / "out")
    # Three batches, each measured and then propagated, in two layers; nobody needs the last layer's outputs.
    assert [step[-1].split(".")[2] for step in steps] == ["0"] * 6 + ["1"] * 6 + ["2"] * 3
    assert opened == {path.name: 1 for path in sorted(sharded_llama.weights.glob("*.safetensors"))}


def test_evaluation_holds_one_subgraph_and_opens_each_shard_once(
    sharded_llama: Small, monkeypatch: pytest.MonkeyPatch, opened: dict[str, int]
) -> None:
    steps = watch_loaded(monkeypatch)
    runtime.evaluate(sharded_llama.load(), weights=sharded_llama.weights, batches=token_batches())
    assert len(steps) == 4 * 3
    assert opened == {path.name: 1 for path in sorted(sharded_llama.weights.glob("*.safetensors"))}


def test_round_to_nearest_runs_nothing(llama: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: LoadedSubgraph, model: nn.Module, **inputs: Any) -> dict[str, Any]:
        raise AssertionError("round-to-nearest measures nothing")

    monkeypatch.setattr(LoadedSubgraph, "forward", forward)
    without = calibrate(llama, recipe(RECIPES["W4A16"]), tmp_path / "without", batches=[])
    calibrate(llama, recipe(RECIPES["W4A16"]), tmp_path / "with")
    assert directory_bytes(tmp_path / "with") == directory_bytes(tmp_path / "without")
    assert without.modules[0] == ModuleReport(
        name="model.layers.0.self_attn.q_proj",
        algorithm="rtn",
        loss=without.modules[0].loss,
        damping=0.0,
        num_tokens=0,
    )


def test_nothing_is_propagated_past_the_last_module_that_is_measured(
    llama: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = watch_loaded(monkeypatch)
    plan = recipe("targets: ['re:model.layers.0.mlp'], scheme: W4A16", modifier="GPTQModifier")
    result = calibrate(llama, plan, tmp_path / "out")
    assert len(steps) == 3
    assert len(result.modules) == 3


# Other architectures.


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_experts_pass_through_and_attention_is_quantized(
    request: pytest.FixtureRequest, tmp_path: Path, name: str
) -> None:
    """transformers itself does not load experts that stay as they are beside packed weights, so the model that must
    be equalled is the original one, with the quantized weights put into it.
    """
    small: Small = request.getfixturevalue(name)
    out = tmp_path / "out"
    result = calibrate(small, recipe(NARROW_W4, modifier="GPTQModifier"), out)
    attention = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(3) for p in "qkvo"]
    assert [report.name for report in result.modules] == attention
    before, after = read_tensors(small.weights), read_tensors(out)
    kept = [key for key in before if key.removesuffix(".weight") not in attention]
    assert len([key for key in kept if ".experts.3." in key]) == 9
    assert all(raw_bytes(before[key]) == raw_bytes(after[key]) for key in kept)

    model = load_transformers(small.weights)
    with torch.no_grad():
        for module in attention:
            model.get_submodule(module).get_parameter("weight").copy_(unpacked(after, module))
        inputs = token_batches([(2, 17)])[0]
        expected = model(**inputs, use_cache=False).logits
    assert torch.equal(run_weights(small, out, inputs)["logits"], expected)


def test_experts_are_named_under_ignore_for_readers_to_whom_they_are_linear(qwen3_moe: Small, tmp_path: Path) -> None:
    calibrate(qwen3_moe, recipe(NARROW_W4), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    layers = [
        entry
        for index in range(3)
        for entry in (rf"re:model\.layers\.{index}\.mlp\.experts\.\d+\.", f"model.layers.{index}.mlp.gate")
    ]
    assert sorted(config["ignore"]) == sorted(["lm_head", *layers])


def test_experts_beside_float_weights_load_in_transformers(qwen3_moe: Small, tmp_path: Path) -> None:
    calibrate(qwen3_moe, recipe(RECIPES["FP8_DYNAMIC"]), tmp_path / "out")
    inputs = token_batches([(2, 17)])[0]
    got = run_weights(qwen3_moe, tmp_path / "out", inputs)["logits"]
    assert torch.equal(got, run_transformers(tmp_path / "out", inputs))


def test_gemma2(gemma2: Small, tmp_path: Path) -> None:
    calibrate(gemma2, recipe(NARROW_W4, modifier="GPTQModifier"), tmp_path / "out")
    inputs = token_batches([(2, 17)])[0]
    got = run_weights(gemma2, tmp_path / "out", inputs)["logits"]
    assert torch.equal(got, run_transformers(tmp_path / "out", inputs))


@pytest.mark.parametrize("modifier", ["QuantizationModifier", "GPTQModifier"])
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


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("modifier", ["QuantizationModifier", "GPTQModifier"])
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
    return small("LlavaForConditionalGeneration", "LlavaConfig", sizes)


def test_unreached_modules_stay_as_they_are_and_are_reported(llava: Small, tmp_path: Path) -> None:
    lines: list[str] = []
    result = calibrate(llava, recipe(NARROW_W4, modifier="GPTQModifier"), tmp_path / "out", progress=lines.append)
    assert len(result.modules) == 21
    assert all("language_model" in report.name for report in result.modules)
    assert len(result.unreached) == 2 * 6 + 2
    assert all("language_model" not in name for name in result.unreached)
    assert lines[0] == (
        f"left as they are, for the model never calls them: {', '.join(result.unreached[:3])} and 11 more"
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


# What is refused before anything runs, and what is left behind then: nothing.


@pytest.fixture
def no_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: LoadedSubgraph, model: nn.Module, **inputs: Any) -> dict[str, Any]:
        raise AssertionError("ran before everything was checked")

    monkeypatch.setattr(LoadedSubgraph, "forward", forward)


@pytest.mark.usefixtures("no_forward")
@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("targets: Linear, scheme: W4A16", runtime.RecipeError, "lm_head shares its weight with model.embed_tokens"),
        ("targets: lm_head, scheme: W4A16", runtime.RecipeError, "lm_head shares its weight with model.embed_tokens"),
        (
            "config_groups: {a: {targets: [Linear], weights: {num_bits: 4, type: int, symmetric: true, "
            "strategy: group, group_size: 96}}}, ignore: [lm_head]",
            runtime.RecipeError,
            "model.layers.0.self_attn.q_proj has 128 input features, which groups of 96 do not divide",
        ),
    ],
)
def test_recipes_that_the_model_cannot_follow(
    sharded_llama: Small, tmp_path: Path, text: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        calibrate(sharded_llama, recipe(text, modifier="GPTQModifier"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_head_that_is_tied_by_config_is_refused_even_if_the_checkpoint_holds_both(tmp_path: Path) -> None:
    """transformers then cannot load it: it ties by the config, and there is no weight to tie to."""
    from safetensors.torch import save_file

    config = transformers.LlamaConfig(**NARROW, tie_word_embeddings=True)
    weights = save_model(transformers.LlamaForCausalLM(config), tmp_path / "model")
    tensors = read_tensors(weights)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    save_file(tensors, weights / "model.safetensors", metadata={"format": "pt"})
    small = Small(weights=weights, artifact=seqbuild.build.build(weights, out=tmp_path).path)
    with pytest.raises(runtime.RecipeError, match="lm_head shares its weight with model.embed_tokens"):
        calibrate(small, recipe(NARROW_W4.replace("ignore: [lm_head]", "ignore: []")), tmp_path / "out")


@pytest.mark.usefixtures("no_forward")
def test_gptq_without_data_is_refused(llama: Small, tmp_path: Path) -> None:
    with pytest.raises(runtime.DataError, match="asks for GPTQ, which measures calibration data"):
        calibrate(llama, recipe(RECIPES["W4A16"], modifier="GPTQModifier"), tmp_path / "out", batches=[])
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_are_not_finite_name_the_module_and_leave_nothing(narrow_llama: Small, tmp_path: Path) -> None:
    model = load_transformers(narrow_llama.weights)
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.up_proj").get_parameter("weight")[3, 4] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(runtime.QuantizationError, match=r"model\.layers\.1\.mlp\.up_proj: .* not finite"):
        runtime.calibrate(
            narrow_llama.load(),
            weights=tmp_path / "broken",
            recipe=recipe(NARROW_W4, modifier="GPTQModifier"),
            batches=token_batches(),
            out=tmp_path / "out",
        )
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_a_disk_that_is_full_at_the_third_shard(
    narrow_llama: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, paths = safetensors.torch.save_file, []

    def save_file(tensors: Any, path: Path, **options: Any) -> None:
        paths.append(path)
        if len(paths) == 3:
            path.write_bytes(b"half")
            raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")
        real(tensors, path, **options)

    monkeypatch.setattr(safetensors.torch, "save_file", save_file)
    with pytest.raises(runtime.OutputError, match=r"cannot write .*out: the disk is full \(nothing was left behind\)"):
        calibrate(narrow_llama, recipe(NARROW_W4), tmp_path / "out", max_shard_bytes=10_000)
    assert len(paths) == 3
    assert list(tmp_path.iterdir()) == []


def test_a_module_that_is_loaded_but_never_called_cannot_be_measured(
    narrow_llama: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = narrow_llama.load()
    model = artifact.empty_model()
    mlp: Any = model.get_submodule("model.layers.1.mlp")

    def without_down_proj(hidden: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = mlp.act_fn(mlp.gate_proj(hidden)) * mlp.up_proj(hidden)
        return product @ mlp.down_proj.weight.T

    monkeypatch.setattr(mlp, "forward", without_down_proj)
    monkeypatch.setattr(artifact, "empty_model", lambda dtype: model)
    with pytest.raises(runtime.QuantizationError, match=r"model\.layers\.1\.mlp\.down_proj: .* no calibration batch"):
        runtime.calibrate(
            artifact,
            weights=narrow_llama.weights,
            recipe=recipe(NARROW_W4, modifier="GPTQModifier"),
            batches=token_batches(),
            out=tmp_path / "out",
        )
    assert list(tmp_path.iterdir()) == []
