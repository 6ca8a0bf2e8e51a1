"""How deep mixtures of experts are traced by default: down to their experts, whatever else must be called whole."""

from __future__ import annotations

from pathlib import Path

import pytest

import runtime
from runtime.experts.split import SplitArtifact, split_experts
from seqbuild.build import build
from tests import zoo

MULTIMODAL = (
    "aria",
    "deepseek_ocr2",
    "dots3_note",
    "ernie4_5_vl_moe",
    "glm4v_moe",
    "glm5_next",
    "hy_v4_vl",
    "inkling2",
    "inkling2_loop",
    "inkling_mm_model",
    "kimi_k25",
    "llama4",
    "minimax_m3_vl",
    "mistral4",
    "mistral_large4",
    "muse_spark",
    "nemotron_h_omni",
    "qwen3_5_moe",
    "qwen3_omni_moe_thinker",
    "qwen3_vl_moe",
    "qwen4_exp",
    "step3p7",
    "unlimited_ocr",
)
CASES = {case.name: case for case in zoo.cases()}
TEXT = ("causal LM/minimax", "causal LM/deepseek_v4", "causal LM/qwen4_exp")
NAMES = [
    name if name == "causal LM/minimax" else pytest.param(name, marks=pytest.mark.wide)
    for name in (*TEXT, *(f"image-text-to-text/{model_type}" for model_type in MULTIMODAL))
]


@pytest.mark.parametrize("name", NAMES)
def test_every_stack_of_experts_comes_apart(name: str, tmp_path: Path) -> None:
    case = CASES.get(name)
    if case is None or zoo.unusable(case):
        pytest.skip("not in this version of transformers, or not to be built here")
    zoo.small_config(case).save_pretrained(tmp_path / "model")
    found = build(tmp_path / "model", out=tmp_path)
    assert found.manifest.policy == "linear"

    artifact = split_experts(runtime.load(found.path))
    assert isinstance(artifact, SplitArtifact)
    model = zoo.small_model(case)
    stacked = [
        key
        for key, value in model.named_parameters()
        if value.dim() == 3 and ".experts." in key and "vision" not in key
    ]
    apart = {f"{owner}.{own}" for owner, split in artifact.mixtures.items() for own in split.stacks}
    used = {key for entry in found.manifest.subgraphs for key in entry.parameters}
    assert [key for key in stacked if key in used and key not in apart] == []
    assert apart


def test_what_is_asked_for_is_done(tmp_path: Path) -> None:
    zoo.small_config(CASES["causal LM/minimax"]).save_pretrained(tmp_path / "model")
    assert build(tmp_path / "model", out=tmp_path, leaves="target").manifest.policy == "target"
