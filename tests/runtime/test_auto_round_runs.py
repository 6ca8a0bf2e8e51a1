"""Runs with AutoRound: what gradients reach, what they do not, and what a run leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import runtime
from runtime.calibration import Calibration
from runtime.chain import LoadedSubgraph
from runtime.checkpoint.reader import Checkpoint
from runtime.errors import DataError, RecipeError
from runtime.planning.request import plan_artifact
from runtime.recipe.modifiers import AutoRoundOptions
from runtime.weights.parameters import Weights
from tests.runtime.small import (
    NARROW,
    VOCABULARY,
    Small,
    Stop,
    calibrate,
    make_small,
    nameless_bytes,
    read_tensors,
    recipe,
    run_weights,
    stop_at,
    token_batches,
)

_GROUPS = "{num_bits: 3, type: int, symmetric: true, strategy: group, group_size: 16}"
W3 = f"config_groups: {{a: {{targets: [Linear], weights: {_GROUPS}}}}}"


def auto_round(text: str = "", scheme: str = W3, ignore: str = "lm_head") -> runtime.Recipe:
    return recipe(f"{scheme}, ignore: [{ignore}]{text}", modifier="AutoRoundModifier")


def algorithms(found: Calibration) -> dict[str, str]:
    return {report.name: report.algorithm for report in found.modules}


def error_of_the_first_block(small: Small, weights: Path) -> float:
    """The squared error on the calibration data."""
    artifact = small.load()
    subgraph = artifact.subgraphs[0]
    models = []
    for checkpoint in (Checkpoint(small.weights), Checkpoint(weights)):
        models.append(artifact.empty_model())
        source = Weights(artifact, checkpoint, torch.float32, models[-1])
        source.load(models[-1], subgraph.entry.parameters, torch.device("cpu"))
    total = 0.0
    for batch in token_batches():
        inputs = {name: batch[name] for name in subgraph.input_names}
        with torch.no_grad():
            expected, found = (subgraph.forward(model, **inputs) for model in models)
        name = subgraph.entry.output_names[-1]
        assert expected[name].shape == (*batch["input_ids"].shape, NARROW["hidden_size"])
        total += float((expected[name] - found[name]).square().sum())
    return total


@pytest.fixture(scope="module")
def tuned(narrow_llama: Small, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Calibration]:
    """A run of twenty steps for each block."""
    out = tmp_path_factory.mktemp("tuned") / "out"
    return out, calibrate(narrow_llama, auto_round(", iters: 20"), out)


def test_tuned_blocks_are_closer_to_the_original(
    narrow_llama: Small, tuned: tuple[Path, Calibration], tmp_path: Path
) -> None:
    out, found = tuned
    assert set(algorithms(found).values()) == {"auto_round"}
    assert {(report.fallback, report.scheme) for report in found.modules} == {("", "3 bit int weights in groups of 16")}
    assert all(report.loss > 0 and report.num_tokens == 366 for report in found.modules)
    calibrate(narrow_llama, recipe(f"{W3}, ignore: [lm_head]", modifier="GPTQModifier"), tmp_path / "gptq")
    calibrate(narrow_llama, recipe(f"{W3}, ignore: [lm_head]"), tmp_path / "rtn")
    paths = (out, tmp_path / "gptq", tmp_path / "rtn")
    tuned_error, *others = [error_of_the_first_block(narrow_llama, path) for path in paths]
    assert tuned_error < 0.95 * min(others)


def test_no_step_from_the_nearest_is_rounding_to_nearest(narrow_llama: Small, tmp_path: Path) -> None:
    calibrate(narrow_llama, auto_round(", iters: 0, disable_opt_rtn: true"), tmp_path / "tuned")
    calibrate(narrow_llama, recipe(f"{W3}, ignore: [lm_head]"), tmp_path / "rtn")
    tuned, nearest = read_tensors(tmp_path / "tuned"), read_tensors(tmp_path / "rtn")
    assert tuned.keys() == nearest.keys()
    assert [name for name in tuned if not torch.equal(tuned[name], nearest[name])] == []


def test_the_seed_decides_and_a_killed_run_has_the_same_bytes(
    narrow_llama: Small, tuned: tuple[Path, Calibration], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = auto_round(", iters: 20")
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_at(patch, 100, Stop)  # in the middle of a block
        calibrate(narrow_llama, whole, tmp_path / "stopped")
    resumed = calibrate(narrow_llama, whole, tmp_path / "stopped", resume=True)
    assert resumed.resumed_at >= 1
    assert nameless_bytes(tmp_path / "stopped") == nameless_bytes(tuned[0])
    calibrate(narrow_llama, auto_round(", iters: 20, seed: 1"), tmp_path / "other")
    name = "model.layers.1.mlp.down_proj.weight_packed"
    assert not torch.equal(read_tensors(tmp_path / "other")[name], read_tensors(tuned[0])[name])


def test_products_in_bfloat16_are_used_where_they_are_fast_and_work(
    narrow_llama: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = iter("abcdefg")

    def tuned_bytes(extra: str, *, is_fast: bool) -> bytes:
        monkeypatch.setattr("runtime.quantize.block_tuning.multiplies_bfloat16", lambda device: is_fast)
        out = tmp_path / next(names)
        calibrate(narrow_llama, auto_round(f", iters: 4{extra}"), out)
        return (out / "model.safetensors").read_bytes()

    exact = tuned_bytes(", amp: false", is_fast=True)
    assert tuned_bytes("", is_fast=False) == exact
    mixed = tuned_bytes("", is_fast=True)
    assert mixed != exact
    assert tuned_bytes("", is_fast=True) == mixed

    forward = torch.nn.Linear.forward

    def in_place(self: torch.nn.Linear, values: torch.Tensor) -> torch.Tensor:
        product = forward(self, values)
        return torch.zeros(product.shape).index_add_(0, torch.arange(len(product)), product)  # requires equal dtypes

    monkeypatch.setattr(torch.nn.Linear, "forward", in_place)
    exact = tuned_bytes(", amp: false", is_fast=True)
    assert tuned_bytes("", is_fast=True) == exact


def test_embeddings_in_bfloat16_are_followed_by_layer_norms(tmp_path: Path) -> None:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 1, "n_head": 2}
    bloom = make_small(tmp_path, "BloomForCausalLM", "BloomConfig", sizes, dtype=torch.bfloat16)
    found = calibrate(bloom, auto_round(", iters: 2"), tmp_path / "out")
    assert {report.fallback for report in found.modules} == {""}


def test_tokens_that_do_not_count_change_nothing(narrow_llama: Small, tmp_path: Path) -> None:
    outs = []
    for number in range(2):
        batches = token_batches(((4, 24), (4, 24)))
        for batch in batches:
            batch["attention_mask"][:2, 16:] = 0
            batch["input_ids"][:2, 16:] = 7 + number
        outs.append(tmp_path / str(number))
        calibrate(narrow_llama, auto_round(", iters: 6"), outs[-1], batches=batches)
    one, two = map(read_tensors, outs)
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def test_a_head_is_tuned_alone(narrow_llama: Small, tmp_path: Path) -> None:
    found = calibrate(narrow_llama, auto_round(", iters: 2", ignore="none"), tmp_path / "out")
    reasons = {report.name: report.fallback for report in found.modules if report.fallback}
    assert reasons == {"lm_head": "tuned alone: its step has no block"}
    assert algorithms(found)["lm_head"] == "auto_round"


def test_code_without_gradients_is_tuned_module_by_module(
    narrow_llama: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward: Callable[..., Any] = LoadedSubgraph.forward

    def detached(self: LoadedSubgraph, model: Any, **inputs: Any) -> Any:
        with torch.no_grad():  # as code of a model may do
            return forward(self, model, **inputs)

    monkeypatch.setattr(LoadedSubgraph, "forward", detached)
    found = calibrate(narrow_llama, auto_round(", iters: 2"), tmp_path / "out")
    assert {report.algorithm for report in found.modules} == {"auto_round"}
    assert all(report.fallback.startswith("tuned alone: its outputs do not depend") for report in found.modules)
    assert any("model.layers.0: each module is tuned alone" in text for text in found.remarks)


@pytest.mark.parametrize("all_experts", [True, False])
def test_experts_are_tuned(qwen3_moe: Small, tmp_path: Path, all_experts: bool) -> None:
    found = calibrate(
        qwen3_moe,
        auto_round(", iters: 4"),
        tmp_path / "out",
        moe_calibrate_all_experts=all_experts,
        statistics_memory=1,
    )
    assert set(algorithms(found).values()) == {"auto_round"}
    assert len([name for name in algorithms(found) if ".experts." in name]) == 3 * 4 * 3
    few = calibrate(
        qwen3_moe,
        auto_round(", iters: 1"),
        tmp_path / "few",
        batches=token_batches(((1, 6),)),
        moe_calibrate_all_experts=all_experts,
    )
    reasons = [report.fallback for report in few.modules if ".experts." in report.name]
    assert all("fewer than it has input features" in reason or "no calibration token" in reason for reason in reasons)


def test_other_modifiers_of_the_same_block(llama: Small, tmp_path: Path) -> None:
    plan = runtime.Recipe.from_text(
        "AWQModifier: {}\n"
        "AutoRoundModifier: {targets: ['re:.*(q|k|v|up)_proj$'], scheme: W4A16_ASYM, iters: 3}\n"
        "GPTQModifier: {targets: ['re:.*(o|gate|down)_proj$'], scheme: W8A8}\n",
        "recipe.yaml",
    )
    found = calibrate(llama, plan, tmp_path / "out")
    kinds = {name.rpartition(".")[2]: algorithm for name, algorithm in algorithms(found).items()}
    assert kinds == {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "up_proj"), "auto_round"),
        **dict.fromkeys(("o_proj", "gate_proj", "down_proj"), "gptq"),
    }
    run_weights(llama, tmp_path / "out", token_batches()[0])


@pytest.mark.parametrize("scheme", ["W8A8", "NVFP4", "MXFP4", "FP8_BLOCK"])
def test_inputs_are_rounded_as_readers_do(llama: Small, tmp_path: Path, scheme: str) -> None:
    text = f"targets: Linear, scheme: {scheme}, ignore: [lm_head]"
    found = calibrate(llama, recipe(f"{text}, iters: 2", modifier="AutoRoundModifier"), tmp_path / "out")
    assert set(algorithms(found).values()) == {"auto_round"}
    assert {report.fallback for report in found.modules} == {""}


def test_gradients_pass_a_rounded_cache(llama: Small, tmp_path: Path) -> None:
    cache = "kv_cache_scheme: {num_bits: 8, type: float, strategy: tensor, symmetric: true, dynamic: false}"
    text = f"targets: Linear, scheme: W2A16, ignore: [lm_head], {cache}, iters"
    tensors = []
    for iters in (0, 20):
        calibrate(llama, recipe(f"{text}: {iters}", modifier="AutoRoundModifier"), tmp_path / str(iters))
        tensors.append(read_tensors(tmp_path / str(iters)))
    names = [f"model.layers.0.self_attn.{part}_proj.weight_packed" for part in "kv"]
    assert [name for name in names if torch.equal(tensors[0][name], tensors[1][name])] == []


def test_the_recipe_that_ran_is_complete(tuned: tuple[Path, Calibration]) -> None:
    plan = runtime.Recipe.from_file(tuned[0] / "recipe.yaml")
    assert plan.groups[0].tuning == AutoRoundOptions(iters=20)
    assert "batch_size: 8" in (tuned[0] / "recipe.yaml").read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (", iters: -1", "iters must be an integer from 0 to 1000000, not -1"),
        (", lr: 2", "lr must be a number above 0 and at most 1, or null, not 2"),
        (", device_ids: '0,1'", "device_ids '0,1' is not supported: a run uses one device for each worker"),
        (", dampening_frac: 0.1", "unknown key 'dampening_frac'"),
    ],
)
def test_invalid_fields_are_rejected(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        auto_round(text)
    assert message in str(error.value)


def test_the_plan_counts_gradients_and_rejects_workers(llama: Small) -> None:
    options: dict[str, Any] = {"num_samples": 64, "seq_len": 128, "batch_size": 4}
    text = "targets: Linear, scheme: W4A16, ignore: [lm_head]"
    artifact = llama.load()
    plain = recipe(text, modifier="GPTQModifier")
    few, many = (recipe(f"{text}, iters: {iters}", modifier="AutoRoundModifier") for iters in (50, 200))
    solved, short, long = (plan_artifact(artifact, recipe=one, **options).plan.steps[1] for one in (plain, few, many))
    num_weights = 4 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 256)  # in float32
    kept = 3 * 4 * 64 * 128 * 128  # the outputs of the block, and what the original model has before and after it
    assert 5 * num_weights < short.device - solved.device - kept < 30 * num_weights  # the host counts this process too
    assert long.device == short.device
    passes = 3 * 2 * 50 + 7 * 16, 3 * 2 * 200 + 7 * 16
    ratio = (long.seconds["solve"] - solved.seconds["solve"]) / (short.seconds["solve"] - solved.seconds["solve"])
    assert ratio == pytest.approx(passes[1] / passes[0], rel=0.2)
    with pytest.raises(RecipeError, match="AutoRoundModifier runs on one worker; this run has 2"):
        plan_artifact(artifact, recipe=few, workers=2, **options)


def test_what_cannot_be_tuned_is_an_error_before_the_run(narrow_llama: Small, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="needs calibration data"):
        calibrate(narrow_llama, auto_round(), tmp_path / "out", batches=[])
    plan = runtime.Recipe.from_text(
        f"AutoRoundModifier: {{config_groups: {{a: {{targets: ['re:.*q_proj'], weights: {_GROUPS}}}}}}}\n"
        f"s_stage: {{s_modifiers: {{AutoRoundModifier: {{iters: 3, config_groups: "
        f"{{b: {{targets: ['re:.*k_proj'], weights: {_GROUPS}}}}}}}}}}}\n",
        "recipe.yaml",
    )
    with pytest.raises(RecipeError, match="AutoRoundModifiers have different options"):
        calibrate(narrow_llama, plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()
