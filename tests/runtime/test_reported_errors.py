"""The error that a run reports for a module is ‖WX−QX‖/‖WX‖: beside an explicit forward in float64."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import runtime
from runtime.algorithms.output_squares import NUM_SAMPLED, gram_square
from runtime.calibration import Calibration
from runtime.quantize.statistics import InputStatistics, Needs
from tests.runtime.small import Small, calibrate, load_transformers, read_tensors, token_batches

LAYER = "model.layers.0"
READS_NORM = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
OTHERS = ("self_attn.o_proj", "mlp.down_proj")
ASYM = (
    "config_groups: {a: {targets: [Linear], weights: {num_bits: 3, type: int, symmetric: false, strategy: group, "
    "group_size: 32}}}, ignore: [lm_head, 're:model.layers.[12].*']"
)
OBSERVER = ASYM.replace("group_size: 32", "group_size: 32, observer: imatrix_mse")
CHANNEL = (
    "config_groups: {a: {targets: [Linear], weights: {num_bits: 4, strategy: channel}}}, "
    "ignore: [lm_head, 're:model.layers.[12].*']"
)
NVFP4, FP8, W4A16, W8A8 = (
    f"targets: Linear, scheme: {scheme}, ignore: [lm_head, 're:model.layers.[12].*']"
    for scheme in ("NVFP4", "FP8", "W4A16", "W8A8")
)

WEIGHTS_ALONE = {
    "gptq": f"GPTQModifier: {{{W4A16}}}",
    "gptq without order": f"GPTQModifier: {{{ASYM}, actorder: null}}",
    "gptq, static order": f"GPTQModifier: {{{ASYM}, actorder: static}}",
    "gptq, refined": f"GPTQModifier: {{{ASYM}, refine: 1}}",
    "gptq by channel": f"GPTQModifier: {{{CHANNEL}}}",
    "gptq, NVFP4": f"GPTQModifier: {{{NVFP4}}}",
    "observer": f"QuantizationModifier: {{{OBSERVER}}}",
    "NVFP4": f"QuantizationModifier: {{{NVFP4}}}",
    "FP8": f"QuantizationModifier: {{{FP8}}}",
    "no data": f"QuantizationModifier: {{{ASYM}}}",
}
RESCALING = {
    "awq with clipping": f"AWQModifier: {{}}\nQuantizationModifier: {{{ASYM}}}",
    "awq": f"AWQModifier: {{clip: false}}\nQuantizationModifier: {{{CHANNEL}}}",
    "awq and gptq": f"AWQModifier: {{}}\nGPTQModifier: {{{ASYM}}}",
    "smoothquant": f"SmoothQuantModifier: {{}}\nQuantizationModifier: {{{W8A8}}}",
    "smoothquant, static": f"SmoothQuantModifier: {{}}\nQuantizationModifier: {{{FP8}}}",
    "smoothquant and gptq": f"SmoothQuantModifier: {{}}\nGPTQModifier: {{{W8A8}}}",
}


def masked_batches() -> list[dict[str, Any]]:
    """Half of some samples is padding, and a loss mask leaves out every fifth token."""
    batches = token_batches()
    for batch in batches:
        batch["attention_mask"][::2, 20:] = 0
        batch["loss_mask"] = torch.ones_like(batch["input_ids"])
        batch["loss_mask"][:, ::5] = 0
    return batches


def measured_inputs(model: Any, name: str, batches: list[dict[str, Any]]) -> torch.Tensor:
    """What transformers hands to a module for the tokens that count, [T, I] in float64."""
    kept: list[torch.Tensor] = []
    masks = [(batch["attention_mask"] * batch.get("loss_mask", 1)).bool() for batch in batches]

    def keep(_: Any, args: tuple[torch.Tensor, ...]) -> None:
        kept.append(args[0].double()[masks[len(kept)]])

    handle = model.get_submodule(name).register_forward_pre_hook(keep)
    with torch.no_grad():
        for batch in batches:
            model(**{key: value for key, value in batch.items() if key != "loss_mask"}, use_cache=False)
    handle.remove()
    return torch.cat(kept)


def error_of(weight: torch.Tensor, quantized: torch.Tensor, inputs: torch.Tensor) -> float:
    output = inputs.double() @ weight.double().T
    return float((output - inputs.double() @ quantized.double().T).norm() / output.norm())


def reported(result: Calibration, name: str) -> float:
    return next(report.error for report in result.modules if report.name == name)


@pytest.mark.parametrize(
    ("name", "is_masked"), [*((name, False) for name in WEIGHTS_ALONE), ("gptq, NVFP4", True), ("FP8", True)]
)
def test_the_error_is_that_of_an_explicit_forward(llama: Small, tmp_path: Path, name: str, is_masked: bool) -> None:
    batches = masked_batches() if is_masked else token_batches()
    plan = runtime.Recipe.from_text(WEIGHTS_ALONE[name], "recipe.yaml")
    result = calibrate(llama, plan, tmp_path / "out", batches=batches)
    before, dense = load_transformers(llama.weights), read_dense(tmp_path / "out")
    for own in READS_NORM + OTHERS:
        module = f"{LAYER}.{own}"
        weight, quantized = before.get_parameter(f"{module}.weight").detach(), dense[f"{module}.weight"]
        assert len(weight) > 63
        inputs = measured_inputs(before, module, batches)
        if name == "no data":
            inputs = torch.eye(weight.shape[1])
        assert reported(result, module) == pytest.approx(error_of(weight, quantized, inputs), rel=5e-3), module
        report = next(report for report in result.modules if report.name == module)
        assert report.num_tokens == (0 if name == "no data" else len(inputs))
        loss = (inputs.double() @ (weight - quantized).double().T).square().sum()
        assert report.loss == pytest.approx(float(loss), rel=1e-2)


@pytest.mark.parametrize("name", RESCALING)
def test_so_it_is_after_rescaling(llama: Small, tmp_path: Path, name: str) -> None:
    """Inputs are divided by what norms were divided by."""
    plan = runtime.Recipe.from_text(RESCALING[name], "recipe.yaml")
    result = calibrate(llama, plan, tmp_path / "out")
    before, after, dense = (
        load_transformers(llama.weights),
        read_tensors(tmp_path / "out"),
        read_dense(tmp_path / "out"),
    )
    for own in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj"):  # others make channels that are rescaled
        module = f"{LAYER}.{own}"
        norm = f"{LAYER}.{'input' if 'attn' in own else 'post_attention'}_layernorm.weight"
        factors = before.get_parameter(norm).detach().double() / after[norm].double()
        weight, quantized = before.get_parameter(f"{module}.weight").detach().double(), dense[f"{module}.weight"]
        inputs = measured_inputs(before, module, token_batches())
        expected = error_of(weight, quantized / factors, inputs)
        if name == "smoothquant and gptq":
            assert expected < 0.02
        assert reported(result, module) == pytest.approx(expected, rel=5e-3), module
    assert max(report.error for report in result.modules) < 1


# Without the rescaling inside of an expert, whose factors the checkpoint does not show.
NORM_ALONE = (
    "AWQModifier: {mappings: [{smooth_layer: 're:.*layers.0.post_attention_layernorm$', "
    "balance_layers: ['re:.*layers.0.mlp.experts.*.gate_proj$', 're:.*layers.0.mlp.experts.*.up_proj$']}]}"
)


@pytest.mark.parametrize("all_tokens", [True, False])
@pytest.mark.parametrize(
    "modifier", ["GPTQModifier: {%s}", "QuantizationModifier: {%s}", f"{NORM_ALONE}\nQuantizationModifier: {{%s}}"]
)
def test_so_it_is_for_experts(qwen3_moe: Small, tmp_path: Path, modifier: str, all_tokens: bool) -> None:
    scheme = ASYM.replace("group_size: 32", "group_size: 16")
    if modifier.startswith("Quantization"):
        scheme = FP8
    scheme = re.sub(r"ignore: .*\]", "ignore: [lm_head, 're:.*mlp.gate$', 're:model.layers.[12].*']", scheme)
    plan = runtime.Recipe.from_text(modifier % scheme, "recipe.yaml")
    result = calibrate(qwen3_moe, plan, tmp_path / "out", moe_calibrate_all_experts=all_tokens)
    model: Any = load_transformers(qwen3_moe.weights)
    hidden = measured_inputs(model, f"{LAYER}.mlp", token_batches()).float()
    plain = read_tensors(qwen3_moe.weights)
    chosen = (hidden @ plain[f"{LAYER}.mlp.gate.weight"].float().T).topk(model.config.num_experts_per_tok).indices
    dense, norm = read_dense(tmp_path / "out"), f"{LAYER}.post_attention_layernorm.weight"
    factors = plain[norm].double() / read_tensors(tmp_path / "out")[norm].double()
    for expert in range(model.config.num_experts):
        name = f"{LAYER}.mlp.experts.{expert}"
        gate, up, down = (plain[f"{name}.{part}.weight"].double() for part in ("gate_proj", "up_proj", "down_proj"))
        seen = hidden.double() if all_tokens else hidden[(chosen == expert).any(dim=1)].double()
        middle = torch.nn.functional.silu(seen @ gate.T) * (seen @ up.T)
        for part, weight, inputs in (("gate_proj", gate, seen), ("up_proj", up, seen), ("down_proj", down, middle)):
            module = f"{name}.{part}"
            report = next(report for report in result.modules if report.name == module)
            assert report.num_tokens == len(inputs)
            quantized = dense[f"{module}.weight"]
            expected = error_of(weight, quantized if part == "down_proj" else quantized / factors, inputs)
            assert report.error == pytest.approx(expected, rel=1e-2), module


def read_dense(weights: Path) -> dict[str, torch.Tensor]:
    """The weights of quantized modules as compressed-tensors makes them plain."""
    import json

    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    config = json.loads((weights / "config.json").read_text())["quantization_config"]
    (scheme,) = QuantizationConfig.model_validate(config).config_groups.values()
    compressor: Any = BaseCompressor.get_value_from_registry(config["format"])
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in read_tensors(weights).items():
        module, _, part = name.rpartition(".")
        parts.setdefault(module, {})[part] = tensor
    return {
        f"{module}.weight": compressor.decompress(found, scheme)["weight"]
        for module, found in parts.items()
        if "weight_scale" in found
    }


def test_of_many_tokens_a_sample_that_is_spread_evenly() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(5000, 640, generator=generator) * torch.rand(5000, 1, generator=generator)
    weight, error = torch.randn(70, 640, generator=generator), torch.randn(70, 640, generator=generator) / 10
    found = InputStatistics(640, Needs(channels=True), torch.device("cpu"))
    for part in torch.split(inputs, 777):
        found.add(part, None)
    stride = 8  # 5000 tokens are too many for 1, 2 and 4
    assert len(inputs[::stride]) <= NUM_SAMPLED < len(inputs[:: stride // 2])
    taken = inputs[::stride].double()
    share = len(inputs) / len(taken)
    size = found.output_square(weight)
    loss = found.output_square(weight, weight - error)
    assert size == pytest.approx(float((taken @ weight.double().T).square().sum()) * share, rel=1e-5)
    assert loss == pytest.approx(float((taken @ error.double().T).square().sum()) * share, rel=1e-5)
    found.scale(torch.full((640,), 2.0))
    assert found.output_square(weight) == pytest.approx(size / 4, rel=1e-5)


def test_of_many_rows_some_that_are_spread_evenly() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, weight = torch.randn(200, 64, generator=generator), torch.randn(1100, 64, generator=generator)
    error = torch.randn(1100, 64, generator=generator) / 10
    found = InputStatistics(64, Needs(hessian=True), torch.device("cpu"))
    found.add(inputs, None)

    def exact(rows: torch.Tensor) -> float:
        return float((rows.double() @ inputs.double().T).square().sum())

    taken = weight[::3]  # 1100 rows are too many for every second
    share = len(weight) / len(taken)
    assert found.output_square(weight) == pytest.approx(exact(taken) * share, rel=1e-5)
    assert found.output_square(weight, weight - error) == pytest.approx(exact(error[::3]) * share, rel=1e-4)
    assert found.output_square(weight[:512]) == pytest.approx(exact(weight[:512]), rel=1e-5)


def test_few_tokens_are_all_taken() -> None:
    inputs = torch.randn(NUM_SAMPLED, 640, generator=torch.Generator().manual_seed(0))
    found = InputStatistics(640, Needs(channels=True), torch.device("cpu"))
    found.add(inputs, None)
    assert found.output_square(torch.eye(640)) == pytest.approx(float(inputs.double().square().sum()), rel=1e-6)


@pytest.mark.parametrize("width", [5, 1024, 1500, 2100])
def test_half_of_a_gram_matrix_is_enough(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    inputs = torch.randn(60, width, generator=generator)
    rows = torch.randn(7, width, generator=generator)
    exact = float((rows.double() @ inputs.double().T).square().sum())
    assert gram_square(rows, inputs.T @ inputs) == pytest.approx(exact, rel=1e-5)


def test_the_summary_tells_errors_of_outputs_from_those_of_weights(llama: Small, tmp_path: Path) -> None:
    from runtime.streaming.report import summary_lines

    for name, title in (("FP8", "output error (‖WX−QX‖/‖WX‖)"), ("no data", "weight error (‖W−Q‖/‖W‖)")):
        result = calibrate(llama, runtime.Recipe.from_text(WEIGHTS_ALONE[name], "recipe.yaml"), tmp_path / name)
        titles = [line for line in summary_lines(result) if line.startswith("Largest")]
        assert len(titles) == 1
        assert title in titles[0]
