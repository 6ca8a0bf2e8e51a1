"""Modules that see nothing but zeros are rounded and said; modules that no token reaches end a run that can go on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import runtime
from runtime.streaming.report import summary_lines
from tests.runtime.small import (
    NARROW_W4,
    Small,
    calibrate,
    directory_bytes,
    read_tensors,
    recipe,
    token_batches,
    unpacked,
)

O_PROJ = "model.layers.1.self_attn.o_proj"
V_PROJ = "model.layers.1.self_attn.v_proj"
STATIC = "targets: Linear, scheme: FP8, ignore: [lm_head]"
ALGORITHMS = {
    "gptq": f"GPTQModifier: {{{NARROW_W4}}}",
    "gptq, refined": f"GPTQModifier: {{{NARROW_W4}, refine: 1}}",
    "awq": f"AWQModifier: {{}}\nQuantizationModifier: {{{NARROW_W4}}}",
    "awq and gptq": f"AWQModifier: {{}}\nGPTQModifier: {{{NARROW_W4}}}",
    "smoothquant": f"SmoothQuantModifier: {{}}\nGPTQModifier: {{{NARROW_W4}}}",
    "observer": "GPTQModifier: {" + NARROW_W4.replace("group_size: 16", "group_size: 16, observer: imatrix_mse") + "}",
    "static": f"QuantizationModifier: {{{STATIC}}}",
    "static gptq": f"GPTQModifier: {{{STATIC}}}",
}


def changed(small: Small, directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    shutil.copytree(small.weights, directory)
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("name", ALGORITHMS)
def test_inputs_of_nothing_but_zeros(narrow_llama: Small, tmp_path: Path, name: str) -> None:
    weights = changed(narrow_llama, tmp_path / "model", lambda tensors: tensors[f"{V_PROJ}.weight"].zero_())
    plan = runtime.Recipe.from_text(ALGORITHMS[name], "recipe.yaml")
    said: list[str] = []
    result = calibrate(narrow_llama, plan, tmp_path / "out", weights=weights, progress=said.append)
    text = f"warning: all inputs of {O_PROJ} are zero: rounded to nearest"
    assert text in said
    assert text in list(summary_lines(result))
    report = next(report for report in result.modules if report.name == O_PROJ)
    assert (report.algorithm, report.error, report.loss) == ("rtn", 0.0, 0.0)
    assert report.num_tokens == 366
    if name == "gptq":
        tensors, plain = read_tensors(tmp_path / "out"), load_file(weights / "model.safetensors")
        weight = plain[f"{O_PROJ}.weight"]
        step = (weight.unflatten(1, (-1, 16)).abs().amax(dim=2) / 7.5).repeat_interleave(16, dim=1)
        assert bool(((unpacked(tensors, O_PROJ) - weight).abs() <= step * 0.5001).all())
        others = [report.algorithm for report in result.modules if report.name != O_PROJ]
        assert others == ["gptq"] * len(others)


def test_a_pruned_expert(qwen3_moe: Small, tmp_path: Path) -> None:
    expert = "model.layers.0.mlp.experts.2"

    def prune(tensors: dict[str, torch.Tensor]) -> None:
        for part in ("gate_proj", "up_proj", "down_proj"):
            tensors[f"{expert}.{part}.weight"].zero_()

    weights = changed(qwen3_moe, tmp_path / "model", prune)
    result = calibrate(qwen3_moe, recipe(NARROW_W4, modifier="GPTQModifier"), tmp_path / "out", weights=weights)
    algorithms = {report.name: report.algorithm for report in result.modules if report.name.startswith(expert)}
    assert algorithms == {f"{expert}.gate_proj": "gptq", f"{expert}.up_proj": "gptq", f"{expert}.down_proj": "rtn"}
    assert any(
        remark.startswith("warning: all inputs of") and f"{expert}.down_proj" in remark for remark in result.remarks
    )
    assert all(bool(torch.isfinite(tensor.float()).all()) for tensor in read_tensors(tmp_path / "out").values())


def starved(tensors: dict[str, torch.Tensor]) -> None:
    """The router of the second layer never chooses the last expert: its row opposes whatever the others like."""
    gate = tensors["model.layers.1.mlp.gate.weight"]
    gate[-1] = 0
    gate[:-1] = 0
    tensors["model.layers.1.mlp.gate.weight"] = gate  # all equal: the first ones are taken


class TestAnExpertThatNoTokenReaches:
    """With `moe_calibrate_all_experts=False`, in the second of three layers."""

    def run(self, small: Small, weights: Path, out: Path, text: str, **options: Any) -> Any:
        plan = runtime.Recipe.from_text(text, "recipe.yaml")
        batches = token_batches()
        options = {"moe_calibrate_all_experts": False, **options}
        return calibrate(small, plan, out, weights=weights, batches=batches, **options)

    @pytest.mark.parametrize("bound", [None, 1])
    def test_the_error_comes_early_and_the_run_can_go_on(
        self, qwen3_moe: Small, tmp_path: Path, bound: int | None
    ) -> None:
        weights = changed(qwen3_moe, tmp_path / "model", starved)
        out = tmp_path / "out"
        options = {"statistics_memory": bound}
        message = (
            r"no calibration token reached model\.layers\.1\.mlp\.experts\.\d+\.\w+.*fallback: rtn.*1 finished sub"
        )
        solved: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            real = runtime.quantize.solves.solve_tiles

            def solve(weights: Any, *args: Any, **kwargs: Any) -> Any:
                solved.extend(f"{len(weight)} rows" for weight in weights)
                return real(weights, *args, **kwargs)

            patch.setattr("runtime.quantize.solves.solve_tiles", solve)
            with pytest.raises(runtime.DataError, match=message):
                self.run(qwen3_moe, weights, out, f"GPTQModifier: {{{NARROW_W4}}}", **options)
        experts = 3 * 4  # of a layer; all of the second one's are spared
        assert len(solved) == 4 + experts + 0
        assert sorted(path.name for path in tmp_path.iterdir()) == [".out.run.partial", "model"]
        text = f"# an expert is missing\nGPTQModifier: {{{NARROW_W4}, fallback: rtn}}"
        result = self.run(qwen3_moe, weights, out, text, resume=True, **options)
        assert result.resumed_at == 1
        whole = self.run(qwen3_moe, weights, tmp_path / "whole", text, **options)
        assert whole.resumed_at == 0
        assert directory_bytes(out) == directory_bytes(tmp_path / "whole")
        assert any("no calibration token reached it" in remark for remark in result.remarks)
        unreached = {report.name for report in result.modules if not report.num_tokens}
        reason = "no calibration token reached it"
        assert {report.name for report in result.modules if report.fallback == reason} == unreached
        assert result.modules == whole.modules

    def test_a_static_scale_needs_a_token(self, qwen3_moe: Small, tmp_path: Path) -> None:
        weights = changed(qwen3_moe, tmp_path / "model", starved)
        with pytest.raises(
            runtime.DataError, match=r"reached model\.layers\.1\..*, so its static input scale is undef"
        ):
            self.run(qwen3_moe, weights, tmp_path / "out", f"QuantizationModifier: {{{STATIC}}}")

    def test_other_changes_are_another_run(self, qwen3_moe: Small, tmp_path: Path) -> None:
        weights = changed(qwen3_moe, tmp_path / "model", starved)
        with pytest.raises(runtime.DataError, match=r"reached model\.layers\.1\.mlp\.experts\.0\.gate_proj"):
            self.run(qwen3_moe, weights, tmp_path / "out", f"GPTQModifier: {{{NARROW_W4}}}")
        text = f"GPTQModifier: {{{NARROW_W4}, fallback: rtn, dampening_frac: 0.02}}"
        with pytest.raises(runtime.OutputError, match="differs from the interrupted one in the recipe"):
            self.run(qwen3_moe, weights, tmp_path / "out", text, resume=True)

    def test_fewer_tokens_than_the_recipe_asks_for(self, qwen3_moe: Small, tmp_path: Path) -> None:
        weights = changed(qwen3_moe, tmp_path / "model", starved)
        text = f"GPTQModifier: {{{NARROW_W4}, min_tokens: 1}}"
        with pytest.raises(
            runtime.DataError,
            match=r"received 0 tokens, fewer than the recipe's min_tokens: 1 .*1 finished subgraph is",
        ):
            self.run(qwen3_moe, weights, tmp_path / "out", text)
        result = self.run(qwen3_moe, weights, tmp_path / "out", text.replace("1}", "1, fallback: rtn}"), resume=True)
        assert result.resumed_at == 1
