"""The example in docs/modifiers.md works as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from tests.runtime.small import NARROW_W4, Small, calibrate, read_tensors, recipe, unpacked

PAGE = Path(__file__).parents[2] / "docs" / "modifiers.md"


def example() -> Any:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, str(PAGE), "exec"), names)
    return names["ClipOutliers"]


def test_outliers_are_clipped_before_they_are_rounded(narrow_llama: Small, tmp_path: Path) -> None:
    plan = recipe(NARROW_W4)
    done = calibrate(narrow_llama, plan, tmp_path / "out", own_modifiers=[example()(limit=1.5)])
    calibrate(narrow_llama, plan, tmp_path / "plain")
    assert sum("weights clipped" in remark for remark in done.remarks) == len(done.modules)
    original, after = read_tensors(narrow_llama.weights), read_tensors(tmp_path / "out")
    name = "model.layers.0.self_attn.q_proj"
    weight = original[f"{name}.weight"]
    bound = 1.5 * weight.std(dim=1, keepdim=True)
    expected = weight.clamp(-bound, bound).reshape(len(weight), -1, 16).abs().amax(-1) / 7.5
    torch.testing.assert_close(after[f"{name}.weight_scale"], expected)
    assert not torch.equal(unpacked(after, name), unpacked(read_tensors(tmp_path / "plain"), name))


def test_one_that_finds_nothing_changes_nothing(narrow_llama: Small, tmp_path: Path) -> None:
    calibrate(narrow_llama, recipe(NARROW_W4), tmp_path / "out", own_modifiers=[example()(limit=100.0)])
    calibrate(narrow_llama, recipe(NARROW_W4), tmp_path / "plain")
    one, two = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "plain")
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
