"""Scale groups of mixtures: who belongs to them, and that scaling by them changes nothing."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import runtime
from runtime.checkpoint.reader import Checkpoint
from runtime.experts.split import SplitArtifact, expert_of, siblings_of, split_experts
from runtime.model.experts import Experts
from runtime.weights.parameters import Weights
from seqbuild.manifest.experts.probe import ExpertProbe
from seqbuild.manifest.experts.proportional import input_readings, proportional_rows
from tests.runtime.small import Small, calibrate, make_small, read_tensors, run_weights, token_batches
from tests.runtime.test_expert_models import MODELS, NUM_EXPERTS, SIZES
from tests.scaling import scaled
from tests.sweep import sweep
from tests.tiny_models import run_chain

FAMILIES = {
    **MODELS,
    "phimoe": ("PhimoeForCausalLM", "PhimoeConfig", {"num_local_experts": NUM_EXPERTS}),
    "ernie4_5_moe": (
        "Ernie4_5_MoeForCausalLM",
        "Ernie4_5_MoeConfig",
        {
            "moe_num_experts": NUM_EXPERTS,
            "moe_k": 2,
            "moe_intermediate_size": 16,
            "moe_num_shared_experts": 1,
            "mlp_layer_types": ["dense", "sparse"],
        },
    ),
    # Routing by groups, with a bias that corrects the scores.
    "deepseek_v3": (
        MODELS["deepseek_v3"][0],
        MODELS["deepseek_v3"][1],
        {**MODELS["deepseek_v3"][2], "n_group": 2, "topk_group": 1},
    ),
}
USUAL = ("qwen2_moe", "mixtral", "gpt_oss")
NAMES = [name if name in USUAL else pytest.param(name, marks=pytest.mark.wide) for name in FAMILIES]
# Experts without weights hand on what they read, so it cannot be scaled.
FIXED_INPUTS = ("longcat_flash",)
# What is between the matrices has a clamp or adds a number, so it is not proportional to either half; in which modules.
NOT_OPENED = {"gpt_oss": "", "inkling2_text": "", "step3p7": "layers.1."}
IGNORED = "lm_head, 're:.*dt_proj', 're:.*classifier', 're:.*[.]weight_proj'"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Small]:
    known: dict[str, Small] = {}

    def make(name: str) -> Small:
        if name not in known:
            class_name, config, sizes = FAMILIES[name]
            is_seeing = "vision_config" in sizes
            root = tmp_path_factory.mktemp(name)
            all_sizes = sizes if is_seeing else {**SIZES, **sizes}
            known[name] = make_small(root, class_name, config, all_sizes, text_only=is_seeing)
        return known[name]

    return make


def apart(small: Small) -> SplitArtifact:
    artifact = split_experts(small.load(), Checkpoint(small.weights))
    assert isinstance(artifact, SplitArtifact)
    return artifact


@pytest.mark.parametrize("name", NAMES)
def test_scaling_by_powers_of_two_changes_no_bit(made: Callable[[str], Small], name: str) -> None:
    small = made(name)
    artifact = apart(small)
    model = artifact.empty_model(torch.float32)
    source = Weights(artifact, Checkpoint(small.weights), torch.float32, model)
    source.load(model, artifact.manifest.parameters, torch.device("cpu"))
    (batch,) = token_batches(((2, 19),))
    before = run_chain(artifact.subgraphs, model, dict(batch))["logits"]
    experts = expert_of(artifact)
    parameters = {key: value for key, value in model.named_parameters() if not value.is_meta}
    generator = torch.Generator().manual_seed(0)
    done: dict[str, str] = {}
    for group in artifact.manifest.scale_groups:
        if not group.producer or not any(module in experts for module in group.modules):
            continue
        done.update(dict.fromkeys(group.modules, group.producer))
        if group.offset:
            continue  # what is stored is the distance from one, which rounds
        for changed, tensor in scaled(parameters, group, generator).items():
            assert not torch.equal(parameters[changed], tensor)
            parameters[changed].data = tensor
    after = run_chain(artifact.subgraphs, model, dict(batch))["logits"]
    assert torch.equal(before, after)
    used = {key for entry in artifact.manifest.subgraphs for key in entry.parameters}
    reached = [module for module in experts if f"{module}.weight" in used]
    lasts = [module for module in reached if module.endswith(("down_proj", "w2"))]
    fixed = NOT_OPENED.get(name, "nothing")
    assert all((module in done) is (fixed not in module) for module in lasts)
    firsts = [module for module in reached if module not in lasts]
    assert firsts
    assert all((module in done) is (name not in FIXED_INPUTS) for module in firsts)


@pytest.mark.parametrize(
    "modifiers",
    [
        "QuantizationModifier: {targets: Linear, scheme: NVFP4, ignore: [IGNORED]}",
        pytest.param(
            "QuantizationModifier: {targets: Linear, scheme: NVFP4A16, ignore: [IGNORED]}", marks=pytest.mark.wide
        ),
        "GPTQModifier: {targets: Linear, scheme: NVFP4, ignore: [IGNORED]}",
        pytest.param(
            "AWQModifier: {}\nQuantizationModifier: {targets: Linear, scheme: NVFP4A16, ignore: [IGNORED]}",
            marks=pytest.mark.wide,
        ),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_pairs_share_global_scales(made: Callable[[str], Small], name: str, modifiers: str, tmp_path: Path) -> None:
    """VLLM keeps one global scale for both halves of an expert's first matrix."""
    ignored = IGNORED + (", 're:.*conv1d', 're:.*mamba'" if name == "jamba" else "")
    text = modifiers.replace("IGNORED", ignored)
    calibrate(made(name), runtime.Recipe.from_text(text, "recipe.yaml"), tmp_path / "out")
    tensors = read_tensors(tmp_path / "out")
    pairs = [
        (key, re.sub(r"\.gate_proj\.", ".up_proj.", re.sub(r"\.w1\.", ".w3.", key)))
        for key in tensors
        if re.search(r"\.(gate_proj|w1)\.(weight|input)_global_scale$", key)
    ]
    assert len([key for key, _ in pairs if re.search(r"\.\d+\.(gate_proj|w1)\.weight", key)]) >= NUM_EXPERTS
    for gate, up in pairs:
        assert torch.equal(tensors[gate], tensors[up]), gate
    of_experts = {float(tensors[key]) for key, _ in pairs if re.search(r"\.\d+\.(gate_proj|w1)\.weight", key)}
    assert len(of_experts) > NUM_EXPERTS // 2  # each expert has its own


def test_siblings_are_of_one_expert(made: Callable[[str], Small]) -> None:
    artifact = apart(made("mixtral"))
    siblings = siblings_of(artifact)
    prefix = "model.layers.0.mlp.experts"
    assert siblings[f"{prefix}.0.w1"] == siblings[f"{prefix}.0.w3"] != siblings[f"{prefix}.0.w2"]
    assert siblings[f"{prefix}.0.w1"] != siblings[f"{prefix}.1.w1"]
    assert len({siblings[f"model.layers.0.self_attn.{name}_proj"] for name in "qkv"}) == 1


def experts(body: str) -> ExpertProbe:
    """Two experts of width 4 with 6 features inside, that calculate what this says."""
    from runtime.language.program import compile_program

    module = Experts(
        num_experts=2, stacked=("both", "down"), inputs=("h", "i", "w"), accumulator="hidden", is_column=True
    )
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    source = f"def forward(self, hidden, weights, both, down, *, run):\n{lines}\n    return {{'output': output}}\n"
    module.__dict__["program"] = compile_program(source, "expert.py")
    return ExpertProbe(module, {"both": (2, 12, 4), "down": (2, 4, 6)})


LINEAR = "torch.ops.aten.linear.default"
SPLIT = f"both_1 = {LINEAR}(hidden, both)\ngate, up = torch.ops.aten.chunk.default(both_1, 2, -1)\n"
DOWN = f"output = {LINEAR}(product, down)"


@pytest.mark.parametrize(
    ("body", "rows"),
    [
        ("product = torch.ops.aten.silu.default(gate) * up", range(6, 12)),
        ("product = gate * torch.ops.aten.gelu.default(up)", range(6)),
        ("product = torch.ops.aten.relu.default(up) * torch.ops.aten.sigmoid.default(gate)", range(6, 12)),
        ("product = torch.ops.aten.silu.default(gate) * (up + 1)", None),
        ("product = torch.ops.aten.silu.default(gate) * torch.ops.aten.clamp.default(up, -1000.0, 1000.0)", None),
        ("product = torch.ops.aten.silu.default(gate) * up * up", None),
    ],
)
def test_what_the_last_matrix_reads_is_proportional_to(body: str, rows: Any) -> None:
    probe = experts(f"{SPLIT}{body}\n{DOWN}")
    found = proportional_rows(probe)
    assert (found and list(found.rows)) == (list(rows) if rows is not None else None)
    assert [(reading.name, reading.axis) for reading in input_readings(probe)] == [("both", 2)]


@pytest.mark.parametrize(
    "body",
    [
        f"{SPLIT}product = torch.ops.aten.silu.default(gate) * up\n{DOWN} + hidden",
        f"hidden_1 = torch.ops.aten.relu.default(hidden + 1)\n{SPLIT.replace('hidden', 'hidden_1')}"
        f"product = torch.ops.aten.silu.default(gate) * up\n{DOWN}",
    ],
)
def test_an_input_that_is_used_otherwise_cannot_be_scaled(body: str) -> None:
    assert input_readings(experts(body)) == ()


NARROW_W3 = "{num_bits: 3, type: int, symmetric: true, strategy: group, group_size: 16}"
ROUNDING = (
    f"QuantizationModifier: {{config_groups: {{a: {{targets: [Linear], weights: {NARROW_W3}}}}}, ignore: [IGNORED]}}"
)


AWQ, SMOOTH = "AWQModifier: {}", "SmoothQuantModifier: {smoothing_strength: 0.6}"


def by_token(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    return (one - two).square().mean(dim=-1)


@pytest.mark.parametrize(
    ("name", "transform"),
    sweep(
        [(name, transform) for name in FAMILIES for transform in (AWQ, SMOOTH)],
        *(("mixtral", SMOOTH), ("qwen2_moe", AWQ), ("gpt_oss", AWQ)),
    ),
)
def test_rescaled_experts_stay_the_model(
    made: Callable[[str], Small], name: str, transform: str, tmp_path: Path
) -> None:
    """With eight bits what is left of the difference is that of rounding, though every norm has changed: for most
    tokens, as a router in doubt may send others elsewhere.
    """
    small = made(name)
    fine = ROUNDING.replace("num_bits: 3", "num_bits: 8").replace("IGNORED", IGNORED)
    done = calibrate(small, runtime.Recipe.from_text(f"{transform}\n{fine}", "r.yaml"), tmp_path / "scaled")
    calibrate(small, runtime.Recipe.from_text(fine, "r.yaml"), tmp_path / "plain")
    (batch,) = token_batches(((2, 31),), seed=7)
    original, one, two = (
        run_weights(small, path, batch)["logits"].float()
        for path in (small.weights, tmp_path / "scaled", tmp_path / "plain")
    )
    assert by_token(one, original).median() < 2 * by_token(two, original).median()
    before, after = read_tensors(small.weights), read_tensors(tmp_path / "scaled")
    kept = [key for key in before if "norm" in key and key in after and torch.equal(before[key], after[key])]
    if name in ("mixtral", "qwen2_moe"):  # every norm but the last
        assert kept == ["model.norm.weight"]
        assert not [remark for remark in done.remarks if "does not rescale" in remark]
    if name == "gpt_oss" and transform.startswith("AWQ"):
        (remark,) = [remark for remark in done.remarks if "does not rescale" in remark]
        assert "experts.0.down_proj" in remark


def test_memory_and_tokens_of_their_own_change_passes_and_nothing_else(
    made: Callable[[str], Small], tmp_path: Path
) -> None:
    """However many experts are measured at a time, what they read is divided once; on their own tokens as well."""
    text = "AWQModifier: {}\n" + ROUNDING.replace("IGNORED", "lm_head")
    small, plan = made("mixtral"), runtime.Recipe.from_text(text, "r.yaml")
    calibrate(small, plan, tmp_path / "all")
    calibrate(small, plan, tmp_path / "few", statistics_memory=1)
    one, two = read_tensors(tmp_path / "all"), read_tensors(tmp_path / "few")
    assert all(torch.equal(tensor, two[key]) for key, tensor in one.items())
    done = calibrate(small, plan, tmp_path / "own", moe_calibrate_all_experts=False, statistics_memory=1)
    own = read_tensors(tmp_path / "own")
    name = "model.layers.0.post_attention_layernorm.weight"
    assert torch.equal(own[name], one[name])
    assert any(report.num_tokens < 366 for report in done.modules)


def test_a_whole_layer_of_experts_that_is_ignored_is_rescaled_with_the_rest(
    made: Callable[[str], Small], tmp_path: Path
) -> None:
    """Shared experts are quantized, the others are not: their weights are multiplied all the same."""
    small = made("qwen2_moe")
    text = "AWQModifier: {}\n" + ROUNDING.replace("IGNORED", "lm_head, 're:.*mlp.experts.*', 're:.*shared_expert_gate'")
    calibrate(small, runtime.Recipe.from_text(text, "r.yaml"), tmp_path / "out")
    before, after = read_tensors(small.weights), read_tensors(tmp_path / "out")
    norm = "model.layers.0.post_attention_layernorm.weight"
    factor = before[norm] / after[norm]
    assert not torch.equal(before[norm], after[norm])
    layer = "model.layers.0.mlp"
    for key in ("gate", "shared_expert_gate", "experts.1.gate_proj", "experts.3.up_proj"):
        name = f"{layer}.{key}.weight"
        torch.testing.assert_close(after[name], before[name] * factor)
    assert torch.equal(after[f"{layer}.experts.1.down_proj.weight"], before[f"{layer}.experts.1.down_proj.weight"])


def test_mappings_of_llm_compressor_find_experts(made: Callable[[str], Small], tmp_path: Path) -> None:
    named = """
AWQModifier:
  mappings:
    - {smooth_layer: 're:.*input_layernorm$', balance_layers: ['re:.*q_proj$', 're:.*k_proj$', 're:.*v_proj$']}
    - {smooth_layer: 're:.*v_proj$', balance_layers: ['re:.*o_proj$']}
    - smooth_layer: 're:.*post_attention_layernorm$'
      balance_layers: ['re:.*mlp.experts.*.gate_proj$', 're:.*mlp.experts.*.up_proj$']
    - {smooth_layer: 're:.*up_proj$', balance_layers: ['re:.*down_proj$']}
"""
    small, rest = made("qwen2_moe"), ROUNDING.replace("IGNORED", "lm_head")
    calibrate(small, runtime.Recipe.from_text(named + rest, "r.yaml"), tmp_path / "named")
    calibrate(small, runtime.Recipe.from_text(f"AWQModifier: {{}}\n{rest}", "r.yaml"), tmp_path / "found")
    one, two = read_tensors(tmp_path / "named"), read_tensors(tmp_path / "found")
    assert all(torch.equal(tensor, two[key]) for key, tensor in one.items())


def test_gptq_after_awq_sees_the_rescaled_inputs(made: Callable[[str], Small], tmp_path: Path) -> None:
    """One statistic serves both: what is solved is as good as without AWQ, and much better than round to nearest."""
    small = made("mixtral")
    gptq = ROUNDING.replace("QuantizationModifier", "GPTQModifier").replace("IGNORED", "lm_head")
    recipes = {"both": f"AWQModifier: {{}}\n{gptq}", "gptq": gptq}
    (batch,) = token_batches(((2, 31),), seed=7)
    original = run_weights(small, small.weights, batch)["logits"]
    losses = {}
    for name, text in recipes.items():
        calibrate(small, runtime.Recipe.from_text(text, "r.yaml"), tmp_path / name)
        losses[name] = float(by_token(run_weights(small, tmp_path / name, batch)["logits"], original).median())
    assert losses["both"] < 1.2 * losses["gptq"]


def test_attention_that_is_called_whole_has_siblings_by_name(made: Callable[[str], Small], tmp_path: Path) -> None:
    """Its artifact says which modules of experts read one tensor, and not which modules inside of attention do."""
    artifact = made("mixtral").load()
    groups = tuple(group for group in artifact.manifest.scale_groups if "self_attn" not in group.modules[0])
    assert groups != artifact.manifest.scale_groups
    artifact.manifest = dataclasses.replace(artifact.manifest, scale_groups=groups)
    plan = runtime.Recipe.from_text("QuantizationModifier: {targets: Linear, scheme: NVFP4A16, ignore: [lm_head]}", "r")
    result = runtime.calibrate(
        artifact, weights=made("mixtral").weights, recipe=plan, batches=token_batches(), out=tmp_path / "out"
    )
    tensors = read_tensors(tmp_path / "out")
    queries = [key for key in tensors if key.endswith("q_proj.weight_global_scale")]
    assert queries
    for key in queries:
        own = [float(tensors[key.replace("q_proj", name)]) for name in ("q_proj", "k_proj", "v_proj")]
        assert own == own[:1] * 3
    assert len({float(tensors[key]) for key in queries}) > 1  # each layer has its own
    (remark,) = (text for text in result.remarks if "modules that engines fuse by name" in text)
    assert "model.layers.0.self_attn.q_proj" in remark
    assert ".experts." not in remark


def test_a_mixture_of_one_expert_comes_apart(tmp_path: Path) -> None:
    sizes = {**SIZES, "num_local_experts": 1, "num_experts_per_tok": 1}
    small = make_small(tmp_path, "MixtralForCausalLM", "MixtralConfig", sizes)
    text = "QuantizationModifier: {targets: Linear, scheme: FP8_DYNAMIC, ignore: [lm_head]}"
    plan = runtime.Recipe.from_text(text, "r")
    calibrate(small, plan, tmp_path / "out")
    tensors = read_tensors(tmp_path / "out")
    for name in ("w1", "w2", "w3"):
        assert any(key.endswith(f"experts.0.{name}.weight_scale") for key in tensors)
