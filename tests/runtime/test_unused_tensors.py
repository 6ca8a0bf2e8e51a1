"""Tensors of a checkpoint that its model does not use are kept to the bit, listed under `ignore` and reported once."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils import match_name
from safetensors.torch import save_file

import runtime
from runtime.evaluation import evaluate
from seqbuild.build import build
from tests.runtime.small import (
    DEEPSEEK,
    NARROW,
    NARROW_W4,
    Small,
    calibrate,
    load_transformers,
    read_tensors,
    recipe,
    token_batches,
)

Tensors = dict[str, torch.Tensor]
GPTQ = recipe(NARROW_W4, modifier="GPTQModifier")


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def with_extra(small: Small, target: Path, extra: Tensors, **entries: Any) -> Path:
    """A copy of the model with more tensors, and more entries in its config."""
    shutil.copytree(small.weights, target)
    save_file({**read_tensors(target), **extra}, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | entries))
    return target


def is_ignored(out: Path, module: str) -> bool:
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    return any(match_name(module, pattern) for pattern in QuantizationConfig(**config).ignore)


def check(small: Small, weights: Path, out: Path, extra: Tensors, modules: list[str]) -> None:
    """Quantize, and compare what was left over with what is there."""
    result = calibrate(small, GPTQ, out, weights=weights)
    about = [remark for remark in result.remarks if "does not use" in remark]
    assert len(about) == 1
    assert f"{len(extra)} tensors" in about[0]
    written = read_tensors(out)
    for name, tensor in extra.items():
        assert written[name].dtype == tensor.dtype
        assert torch.equal(written[name], tensor)
    assert [module for module in modules if not is_ignored(out, module)] == []
    quantized = [name.removesuffix(".weight_packed") for name in written if name.endswith(".weight_packed")]
    assert quantized
    assert [module for module in quantized if is_ignored(out, module)] == []
    lines: list[str] = []
    evaluate(small.load(), weights=out, batches=token_batches(), progress=lines.append)
    assert sum("does not use" in line for line in lines) == 1


def mtp_layer() -> Tensors:
    """The layer that predicts one more token, behind the last of three, as DeepSeek names it."""
    name = "model.layers.3"
    width = NARROW["hidden_size"]
    return {
        f"{name}.eh_proj.weight": random(width, 2 * width),
        f"{name}.enorm.weight": random(width),
        f"{name}.self_attn.o_proj.weight": random(width, 64),
        f"{name}.mlp.gate.e_score_correction_bias": random(4),
        f"{name}.mlp.experts.0.gate_proj.weight": random(16, width),
        f"{name}.mlp.experts.1.gate_proj.weight": random(16, width),
        f"{name}.mlp.shared_experts.up_proj.weight": random(16, width),
        f"{name}.shared_head.head.weight": random(64, width),
    }


def test_a_layer_behind_the_last(small: Callable[..., Small], tmp_path: Path) -> None:
    deepseek = small("DeepseekV3ForCausalLM", "DeepseekV3Config", {**DEEPSEEK, "num_nextn_predict_layers": 1})
    extra = mtp_layer()
    weights = with_extra(deepseek, tmp_path / "model", extra)
    modules = [name.removesuffix(".weight") for name, tensor in extra.items() if tensor.dim() == 2]
    check(deepseek, weights, tmp_path / "out", extra, modules)
    assert not is_ignored(tmp_path / "out", "model.layers.2.mlp.experts.0.gate_proj")


def test_stacked_experts_beside_the_model(qwen3_moe: Small, tmp_path: Path) -> None:
    extra = {
        "mtp.fc.weight": random(32, 64),
        "mtp.layers.0.mlp.experts.gate_up_proj": random(4, 32, 32),
        "mtp.layers.0.mlp.experts.down_proj": random(4, 32, 16),
        "mtp.norm.weight": random(32),
    }
    weights = with_extra(qwen3_moe, tmp_path / "model", extra)
    experts = "mtp.layers.0.mlp.experts"
    modules = ["mtp.fc", experts, f"{experts}.gate_up_proj", f"{experts}.0.up_proj", f"{experts}.3.down_proj"]
    check(qwen3_moe, weights, tmp_path / "out", extra, modules)


def test_heads_biases_and_tables(narrow_llama: Small, tmp_path: Path) -> None:
    extra = {
        "v_head.summary.weight": random(1, 32),
        "v_head.summary.bias": random(1),
        "model.layers.1.mlp.up_proj.bias": random(48),
        "model.layers.0.extra_table": random(5, 6),
        "model.layers.0.self_attn.masked_bias": torch.tensor(-1e9),
        "score.weight": random(3, 32).to(torch.float16),
    }
    weights = with_extra(narrow_llama, tmp_path / "model", extra)
    check(narrow_llama, weights, tmp_path / "out", extra, ["v_head.summary", "score", "model.layers.0.extra_table"])
    transformers_logits = load_transformers(tmp_path / "out")(**token_batches()[0]).logits
    assert bool(torch.isfinite(transformers_logits).all())


def test_a_head_beside_a_base_model(narrow_llama: Small, tmp_path: Path) -> None:
    weights = with_extra(narrow_llama, tmp_path / "model", {}, architectures=["LlamaModel"])
    base = Small(weights=weights, artifact=build(weights, out=tmp_path / "artifacts").path)
    assert base.load().manifest.model.class_name == "LlamaModel"
    result = calibrate(base, GPTQ, tmp_path / "out")
    assert [remark for remark in result.remarks if "does not use 1 tensors" in remark and "lm_head.weight" in remark]
    written = read_tensors(tmp_path / "out")
    assert torch.equal(written["lm_head.weight"], read_tensors(weights)["lm_head.weight"])
    assert is_ignored(tmp_path / "out", "lm_head")


@pytest.mark.parametrize("suffix", ["weight_scale", "qweight"])
def test_what_says_that_a_weight_is_quantized_is_an_error(narrow_llama: Small, tmp_path: Path, suffix: str) -> None:
    extra = {f"model.layers.0.mlp.up_proj.{suffix}": torch.ones(1)}
    weights = with_extra(narrow_llama, tmp_path / "model", extra)
    with pytest.raises(runtime.WeightsError, match=re.escape(next(iter(extra)))):
        calibrate(narrow_llama, GPTQ, tmp_path / "out", weights=weights)
    assert not (tmp_path / "out").exists()


def test_a_tensor_that_quantization_makes_as_well_is_an_error(narrow_llama: Small, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.k_scale"
    weights = with_extra(narrow_llama, tmp_path / "model", {name: torch.ones(1)})
    cache = "kv_cache_scheme: {num_bits: 8, type: float, strategy: tensor, dynamic: false, symmetric: true}"
    with pytest.raises(runtime.WeightsError, match=f"'{name}', and quantization makes one of that name"):
        calibrate(narrow_llama, recipe(f"{NARROW_W4}, {cache}"), tmp_path / "out", weights=weights)


def test_experts_of_the_wrong_number_are_an_error(qwen3_moe: Small, tmp_path: Path) -> None:
    extra = {"model.layers.1.mlp.experts.4.up_proj.weight": random(16, 32)}
    weights = with_extra(qwen3_moe, tmp_path / "model", extra)
    with pytest.raises(runtime.WeightsError, match=r"the artifact expects only 4 members of model\.layers\.1\.mlp"):
        calibrate(qwen3_moe, GPTQ, tmp_path / "out", weights=weights)
