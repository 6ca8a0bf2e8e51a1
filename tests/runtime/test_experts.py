"""A mixture's experts apart: the same numbers, each measured and quantized, and back under the checkpoint's names."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from runtime.artifact.manifest import LeafKind
from runtime.checkpoint.reader import Checkpoint
from runtime.errors import ArtifactError, DataError
from runtime.experts.split import SplitArtifact, split_experts
from runtime.model.experts import Experts
from runtime.model.leaves import build_leaf
from runtime.weights.parameters import Weights
from tests.runtime.small import (
    DEEPSEEK,
    NARROW_W4,
    RECIPES,
    Small,
    calibrate,
    directory_bytes,
    make_small,
    read_tensors,
    recipe,
    run_weights,
    token_batches,
)
from tests.tiny_models import assert_same, run_chain

NAMES = ("qwen3_moe", "mixtral", "deepseek_v3")


@pytest.fixture(scope="session")
def deepseek_v3(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return make_small(tmp_path_factory.mktemp("deepseek"), "DeepseekV3ForCausalLM", "DeepseekV3Config", DEEPSEEK)


@pytest.fixture(params=NAMES)
def mixture(request: pytest.FixtureRequest) -> Small:
    small: Small = request.getfixturevalue(request.param)
    return small


def gptq(extra: str = "") -> Any:
    return recipe(f"{NARROW_W4}{extra}", modifier="GPTQModifier")


def outputs(small: Small, *, apart: bool, batch: dict[str, Any]) -> dict[str, Any]:
    checkpoint, artifact = Checkpoint(small.weights), small.load()
    if apart:
        artifact = split_experts(artifact, checkpoint)
        assert isinstance(artifact, SplitArtifact)
    model = artifact.empty_model(torch.float32)
    source = Weights(artifact, checkpoint, torch.float32, model)
    source.load(model, artifact.manifest.parameters, torch.device("cpu"))
    return run_chain(artifact.subgraphs, model, batch)


def test_apart_they_calculate_the_same(mixture: Small) -> None:
    for batch in token_batches(((2, 23), (1, 7))):
        whole = outputs(mixture, apart=False, batch=dict(batch))
        assert_same(outputs(mixture, apart=True, batch=dict(batch)), whole)


def test_every_matrix_is_a_module_with_one_tensor_of_the_checkpoint(mixture: Small) -> None:
    checkpoint = Checkpoint(mixture.weights)
    artifact = split_experts(mixture.load(), checkpoint)
    entries = [entry for name, entry in artifact.manifest.parameters.items() if ".experts." in name]
    keys = [key for key in checkpoint if ".experts." in key]
    assert sorted(source for entry in entries for source in entry.sources) == sorted(keys)
    assert all(entry.conversion < 0 and entry.shape == checkpoint.shape(entry.sources[0]) for entry in entries)


def test_each_is_quantized_under_the_name_that_it_has_in_the_checkpoint(mixture: Small, tmp_path: Path) -> None:
    result = calibrate(mixture, gptq(), tmp_path / "out")
    keys = [key for key in Checkpoint(mixture.weights) if re.search(r"experts\.\d+\.", key)]
    found = read_tensors(tmp_path / "out")
    assert keys
    for key in keys:
        assert f"{key}_packed" in found
        assert key not in found
    experts = [module for module in result.modules if re.search(r"experts\.\d+\.", module.name)]
    assert len(experts) == len(keys)
    assert all(module.algorithm == "gptq" and module.num_tokens > 0 for module in experts)
    assert not any("fused" in remark for remark in result.remarks)


@pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24), reason="older ones load no quantized experts"
)
def test_transformers_loads_what_was_written(mixture: Small, tmp_path: Path) -> None:
    calibrate(mixture, gptq(), tmp_path / "out")
    (batch,) = token_batches(((2, 23),))
    config = transformers.CompressedTensorsConfig(dequantize=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that the config is given twice
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=config).eval()
    model.config._experts_implementation = "eager"
    with torch.no_grad():
        expected = model(**batch, use_cache=False).logits
    torch.testing.assert_close(run_weights(mixture, tmp_path / "out", batch)["logits"], expected)


def test_memory_for_statistics_changes_passes_and_nothing_else(qwen3_moe: Small, tmp_path: Path) -> None:
    passes: list[int] = []

    class Counting:
        def tell(self, kind: str, **facts: Any) -> None:
            if kind == "batch":
                passes.append(facts["index"])

    for bound in (None, 1):
        out = tmp_path / str(bound)
        passes.append(-1)
        calibrate(qwen3_moe, gptq(), out, statistics_memory=bound, watchers=[Counting()])
    begin = passes.index(-1, 1)
    assert len(passes) - begin > 2 * begin  # one expert of four at a time
    assert directory_bytes(tmp_path / "None") == directory_bytes(tmp_path / "1")


def test_all_tokens_are_seen_or_only_an_experts_own(qwen3_moe: Small, tmp_path: Path) -> None:
    total = sum(batch["input_ids"].numel() for batch in token_batches())
    seen = {}
    for is_all in (True, False):
        result = calibrate(qwen3_moe, gptq(), tmp_path / str(is_all), moe_calibrate_all_experts=is_all)
        seen[is_all] = {m.name: m.num_tokens for m in result.modules if "experts" in m.name}
    assert set(seen[True].values()) == {total}
    gates = [count for name, count in seen[False].items() if "layers.0." in name and name.endswith("gate_proj")]
    assert sum(gates) == 2 * total  # each token goes to two experts
    assert max(gates) < total


def test_padding_is_not_seen_by_experts(qwen3_moe: Small, tmp_path: Path) -> None:
    batches = token_batches()
    for batch in batches:
        batch["attention_mask"][:, -5:] = 0
    kept = sum(int(batch["attention_mask"].sum()) for batch in batches)
    for is_all in (True, False):
        result = calibrate(qwen3_moe, gptq(), tmp_path / str(is_all), batches=batches, moe_calibrate_all_experts=is_all)
        gates = [m.num_tokens for m in result.modules if "layers.0." in m.name and "experts" in m.name]
        counts = [m.num_tokens for m in result.modules if re.search(r"layers\.0\..*gate_proj", m.name)]
        assert sum(counts) == (4 if is_all else 2) * kept
        assert max(gates) <= kept


class TestStarvedExperts:
    """Experts that see fewer tokens of their own than the recipe asks for."""

    @pytest.fixture
    def bound(self, qwen3_moe: Small, tmp_path: Path) -> int:
        """One token more than the expert that sees the fewest."""
        result = calibrate(qwen3_moe, gptq(), tmp_path / "routed", moe_calibrate_all_experts=False)
        return min(module.num_tokens for module in result.modules) + 1

    @pytest.fixture
    def fewest(self, qwen3_moe: Small, bound: int, tmp_path: Path) -> Callable[..., Any]:
        def run(extra: str = "") -> Any:
            plan = gptq(f", min_tokens: {bound}{extra}")
            return calibrate(qwen3_moe, plan, tmp_path / "out", moe_calibrate_all_experts=False)

        return run

    def test_too_few_tokens_are_an_error_where_the_recipe_says_so(self, fewest: Callable[..., Any]) -> None:
        with pytest.raises(DataError, match="min_tokens"):
            fewest()

    def test_or_are_rounded_to_nearest(self, fewest: Callable[..., Any]) -> None:
        result = fewest(", fallback: rtn")
        assert {module.algorithm for module in result.modules} == {"gptq", "rtn"}
        assert any("rounded to nearest" in remark for remark in result.remarks)

    def test_or_are_measured_on_all_tokens(self, fewest: Callable[..., Any], bound: int) -> None:
        result = fewest(", fallback: all_tokens")
        assert {module.algorithm for module in result.modules} == {"gptq"}
        assert min(module.num_tokens for module in result.modules) >= bound
        assert any("measured on all" in remark for remark in result.remarks)


def test_inputs_are_rounded_as_readers_round_them(qwen3_moe: Small, tmp_path: Path) -> None:
    calibrate(qwen3_moe, recipe(RECIPES["FP8_DYNAMIC"]), tmp_path / "out")
    (batch,) = token_batches(((2, 23),))
    rounded = run_weights(qwen3_moe, tmp_path / "out", batch)["logits"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Experts, "_hooked", lambda *args, **options: contextlib.nullcontext())
        plain = run_weights(qwen3_moe, tmp_path / "out", batch)["logits"]
    assert not torch.equal(rounded, plain)


def test_experts_that_are_not_quantized_stay_stacked(qwen3_moe: Small, tmp_path: Path) -> None:
    plan = recipe(NARROW_W4.replace("lm_head", 'lm_head, "re:.*experts.*"'), modifier="GPTQModifier")
    result = calibrate(qwen3_moe, plan, tmp_path / "out")
    assert not any("experts" in module.name for module in result.modules)
    found, before = read_tensors(tmp_path / "out"), read_tensors(qwen3_moe.weights)
    assert all(torch.equal(found[key], before[key]) for key in before if ".experts." in key)


def test_the_plan_counts_what_experts_need_and_its_bound(qwen3_moe: Small) -> None:
    from runtime.planning.request import plan_artifact

    sizes: dict[str, Any] = {"num_samples": 8, "seq_len": 32, "batch_size": 2, "recipe": gptq()}
    free, _, _ = plan_artifact(qwen3_moe.load(), **sizes)
    bounded, _, _ = plan_artifact(qwen3_moe.load(), statistics_bytes=1, **sizes)
    # q, k and v share one sum of 32 x 32, o has one; experts share one, and each has one of 16 x 16 for itself. Beside
    # each is the upper half of its total, with the diagonal, while a lane is summed up.
    upper = [32 * 33 // 2, 16 * 17 // 2]
    assert free.statistics_bytes == 4 * (3 * (32 * 32 + upper[0]) + 4 * (16 * 16 + upper[1]))
    assert bounded.statistics_bytes < free.statistics_bytes


USUAL: dict[str, tuple[int | str, ...]] = {
    "num_experts": (3,),
    "stacked": ("up", "inner.down"),
    "inputs": ("states", "index", "weights"),
    "accumulator": ("hidden",),
    "is_column": (1,),
}


def leaf_of_experts(**options: tuple[int | str, ...]) -> LeafKind:
    arguments = ("hidden_states", "weights", "up", "inner_down")
    return LeafKind(kind="Experts", options={**USUAL, **options}, program="leaves/000.py", arguments=arguments)


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({}, ((3, 4, 8), (3, 8, 4))),
        ({"num_identity": (2,)}, ((5, 4, 8), (3, 8, 4))),
        ({"flat": ("up", "inner.down"), "num_dims": (3,)}, ((12, 8), (12, 8))),
    ],
)
def test_experts_are_built_as_they_are_described(
    options: dict[str, tuple[int | str, ...]], sizes: tuple[tuple[int, ...], ...]
) -> None:
    shapes = dict(zip(("up", "inner.down"), sizes, strict=True))
    module = build_leaf(leaf_of_experts(**options), "a.leaf", shapes, None)
    assert isinstance(module, Experts)
    assert {name: tuple(parameter.shape) for name, parameter in module.named_parameters()} == shapes
    assert [tuple(module.own(name, 2).shape) for name in shapes] == [
        (4, 8),
        (8, 4) if sizes[1][1:] == (8, 4) else (4, 8),
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"num_experts": (4,)},
        {"num_experts": (0,)},
        {"num_experts": ("3",)},
        {"num_identity": (-1,)},
        {"num_identity": (2**40,)},
        {"num_identity": (1,), "is_column": (0,)},
        {"num_dims": (4,)},
        {"flat": ("other",)},
        {"stacked": ("up", "forward.down")},
        {"stacked": ("up", "..")},
        {"accumulator": ("float64",)},
        {"inputs": ("states",)},
    ],
)
def test_experts_that_are_none_are_refused(options: dict[str, tuple[int | str, ...]]) -> None:
    kind = leaf_of_experts(**options)
    shapes = dict(zip(map(str, kind.options["stacked"]), ((3, 4, 8), (3, 8, 4)), strict=True))
    with pytest.raises(ArtifactError, match=r"describes a\.leaf as a Experts that cannot be built"):
        build_leaf(kind, "a.leaf", shapes, None)


def test_experts_refuse_states_of_other_dimensions() -> None:
    module = build_leaf(leaf_of_experts(), "a.leaf", {"up": (3, 4, 8), "inner.down": (3, 8, 4)}, None)
    with pytest.raises(ArtifactError, match="must have 2 dimensions, got 3"):
        module(torch.zeros(1, 2, 8), torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1))
