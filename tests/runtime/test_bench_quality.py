"""The benchmark of quality: its intervals and divergences against known distributions, its recipes and its table."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from runtime.errors import RecipeError
from runtime.recipe.recipe import Recipe
from tests.bench.bootstrap import paired_interval
from tests.bench.quality_judge import divergence, losses
from tests.bench.quality_recipes import AUTO_ROUND, OURS, REFERENCE, methods
from tests.bench.quality_tools import staged

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])
    return importlib.import_module("bench_quality")


def test_interval_of_normal_differences() -> None:
    generator = np.random.default_rng(1)
    shared, noise = generator.normal(5, 3, size=400), generator.normal(0.2, 0.5, size=400)
    found = paired_interval((shared + noise).tolist(), shared.tolist())
    expected = 1.96 * noise.std(ddof=1) / math.sqrt(400)  # of the normal distribution
    assert found.mean == pytest.approx(noise.mean())
    assert found.high - found.mean == pytest.approx(expected, rel=0.05)
    assert found.mean - found.low == pytest.approx(expected, rel=0.05)
    assert found.is_significant


def test_interval_covers_the_mean_as_often_as_it_says() -> None:
    generator = np.random.default_rng(2)
    missed = 0
    for _ in range(200):
        sample = generator.exponential(1.0, size=100)
        found = paired_interval(sample.tolist(), [1.0] * 100, resamples=1000)
        missed += found.is_significant
    assert 2 <= missed <= 24  # 5 % of 200, and somewhat more because the distribution is skewed


def test_interval_is_deterministic_and_antisymmetric() -> None:
    one, other = [1.0, 2.0, 4.0, 8.0], [1.5, 1.0, 4.0, 6.0]
    found, again = (paired_interval(one, other) for _ in range(2))
    assert found == again
    turned = paired_interval(other, one)
    assert turned.mean == -found.mean
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low), abs=1e-12)


@pytest.mark.parametrize("other", [[1.0], [1.0, 2.0, 3.0]])
def test_interval_rejects_lists_that_are_no_pairs(other: list[float]) -> None:
    with pytest.raises(ValueError, match="equally long"):
        paired_interval([1.0, 2.0], other)


def test_divergence_of_known_distributions() -> None:
    p, q = torch.tensor([[[0.5, 0.25, 0.25]]]), torch.tensor([[[0.25, 0.25, 0.5]]])
    # 0.5 log 2 + 0 - 0.25 log 2
    assert float(divergence(p.log() + 3, q.log() - 1)) == pytest.approx(0.25 * math.log(2), rel=1e-5)
    assert float(divergence(p.log(), p.log())) == 0
    logits = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.kl_div(
        (logits + 1).cos().log_softmax(-1), logits.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    assert torch.allclose(divergence(logits, (logits + 1).cos()), expected, atol=1e-5)


def test_losses_are_cross_entropies() -> None:
    logits = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(1))
    ids = torch.randint(11, (2, 5), generator=torch.Generator().manual_seed(2))
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    assert torch.allclose(losses(logits, ids), expected, atol=1e-6)


def test_every_recipe_is_read_or_names_what_is_missing() -> None:
    keys = [method.key(tool) for method in methods() for tool in method.tools]
    assert len(keys) == len(set(keys))
    for section in dict.fromkeys(method.section for method in methods()):
        if section != "average bits":
            assert any(m.section == section and m.name == REFERENCE and OURS in m.tools for m in methods())
    for method in methods():
        if AUTO_ROUND in method.tools:
            continue
        try:
            Recipe.from_text(staged(method.recipe), method.name)
        except RecipeError as error:
            assert any(part in str(error) for part in ("AutoRound", "target", "SpinQuant", "QuIP", "AutoBits", "W4A4"))


def test_table_and_its_place(bench: ModuleType) -> None:
    rows = {"nll": [500.0, 510.0, 490.0], "kl": [0.0, 0.0, 0.0], "count": 255}
    worse = {**rows, "nll": [510.0, 520.0, 500.0], "kl": [2.55] * 3, "wall_s": 1.0, "cpu_s": 2.0, "peak_bytes": 2**20}
    same = {**worse, "nll": rows["nll"]}
    section = "W4A16, groups of 128"
    known = {
        "original": rows,
        f"{section} | GPTQ | seqbuild": same,
        f"{section} | RTN | seqbuild": worse,
        f"{section} | AWQ | seqbuild": {"error": "no such modifier | AWQ"},
    }
    lines = list(bench.table(known))
    assert lines[0].startswith(f"Unquantized: {math.exp(500 / 255):.3f}, 3 windows.")
    assert f"| RTN | seqbuild | {math.exp(510 / 255):.3f} | +4.00 (+4.00 to +4.00) | 0.01000 | 1.0 | 2.0 | 1 |" in lines
    assert any(line.startswith("| AWQ | seqbuild | error: no such modifier / AWQ |") for line in lines)
    text = "a\n<!-- quality demo -->\nold\n<!-- end of quality -->\nb\n"
    assert bench.replaced(text, "demo", "new") == "a\n<!-- quality demo -->\n\nnew\n\n<!-- end of quality -->\nb\n"
    with pytest.raises(SystemExit, match="add them where the table belongs"):
        bench.replaced(text, "other", "new")
