"""The demo's trained model, quantized in every way: no algorithm may get worse than what it is there to beat.

Bounds are wide, so that another version of torch does not cross them; an algorithm that is broken does.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import runtime
from runtime.recipe.recipe import Recipe
from seqbuild.build import build

DEMO = Path(__file__).resolve().parents[2] / "demo"
W3, W2 = (f"targets: Linear, scheme: W{bits}A16, ignore: [lm_head]" for bits in (3, 2))
W8A8 = "targets: Linear, scheme: W8A8, ignore: [lm_head]"

RECIPES = {
    "rtn 3": f"QuantizationModifier: {{{W3}}}",
    "mse 3": f"QuantizationModifier: {{{W3}, weight_observer: mse}}",
    "gptq 3": f"GPTQModifier: {{{W3}}}",
    "awq 3": f"AWQModifier: {{}}\nQuantizationModifier: {{{W3}}}",
    "awq gptq 3": f"AWQModifier: {{}}\nGPTQModifier: {{{W3}}}",
    "rtn 2": f"QuantizationModifier: {{{W2}}}",
    "gptq 2": f"GPTQModifier: {{{W2}}}",
    "refined 2": f"GPTQModifier: {{{W2}, refine: 2}}",
    "w8a8": f"GPTQModifier: {{{W8A8}}}",
    "smooth w8a8": f"SmoothQuantModifier: {{smoothing_strength: 0.8}}\nGPTQModifier: {{{W8A8}}}",
    "nvfp4": "QuantizationModifier: {targets: Linear, scheme: NVFP4, ignore: [lm_head]}",
    "fp8": "QuantizationModifier: {targets: Linear, scheme: FP8, ignore: [lm_head]}",
}


@pytest.fixture(scope="module")
def loss(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], float]:
    """How much a recipe adds to the model's perplexity, in parts of it."""
    folder = tmp_path_factory.mktemp("quality")
    artifact = runtime.load(build(DEMO / "model", out=folder / "artifacts").path)

    def tokens(name: str, count: int) -> list[dict[str, object]]:
        data = runtime.load_tokens(
            DEMO / "text" / f"{name}.jsonl", tokenizer_dir=DEMO / "model", num_samples=count, seq_len=256
        )
        return runtime.batches(data.samples, 8)  # type: ignore[no-any-return]

    calib, held_out = tokens("calib", 16), tokens("eval", 16)
    original = runtime.evaluate(artifact, weights=DEMO / "model", batches=held_out).perplexity
    known: dict[str, float] = {}

    def measure(name: str) -> float:
        if name not in known:
            out = folder / name.replace(" ", "-")
            plan = Recipe.from_text(RECIPES[name], name)
            runtime.calibrate(artifact, weights=DEMO / "model", recipe=plan, batches=calib, out=out)
            known[name] = runtime.evaluate(artifact, weights=out, batches=held_out).perplexity / original - 1
        return known[name]

    return measure


@pytest.mark.parametrize(
    ("better", "worse", "part"),
    [
        ("gptq 3", "rtn 3", 0.8),
        ("mse 3", "rtn 3", 0.95),
        ("awq 3", "rtn 3", 0.9),
        pytest.param("awq gptq 3", "rtn 3", 0.9, marks=pytest.mark.wide),
        ("gptq 2", "rtn 2", 0.6),
        ("refined 2", "gptq 2", 0.98),
        ("rtn 3", "rtn 2", 0.5),
    ],
)
def test_one_is_better_than_the_other(loss: Callable[[str], float], better: str, worse: str, part: float) -> None:
    assert loss(better) < part * loss(worse)


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        pytest.param("w8a8", 0.01, marks=pytest.mark.wide),
        *(("smooth w8a8", 0.01), ("fp8", 0.03), ("nvfp4", 0.12), ("gptq 3", 0.15)),
    ],
)
def test_little_is_lost(loss: Callable[[str], float], name: str, bound: float) -> None:
    assert -0.01 < loss(name) < bound
