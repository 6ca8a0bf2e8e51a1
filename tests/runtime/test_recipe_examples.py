"""What `python -m runtime recipes` shows can be run as it stands."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from runtime.cli.app import app
from runtime.formats.presets import PRESETS
from runtime.recipe.examples import EXAMPLES, example, preset_line
from runtime.recipe.recipe import Recipe


@pytest.mark.parametrize("name", [*EXAMPLES, *PRESETS])
def test_every_example_is_a_recipe(name: str) -> None:
    plan = Recipe.from_text(example(name), "example")
    schemes = [group.scheme for group in plan.groups]
    assert schemes or plan.cache is not None
    if name in PRESETS:
        assert schemes[0].weights.num_bits in (2, 3, 4, 5, 6, 7, 8)
        assert preset_line(name).startswith(f"{schemes[0].weights.num_bits} bit ")
    assert bool(plan.transforms) is (name in ("awq", "smoothquant"))


def test_the_list_has_a_line_for_each() -> None:
    run = CliRunner().invoke(app, ["recipes"])
    assert run.exit_code == 0
    lines = run.output.splitlines()
    assert [line.split()[0] for line in lines[1 : 1 + len(PRESETS)]] == list(PRESETS)
    assert f"algorithms  {', '.join(EXAMPLES)}" in lines


def test_one_is_shown_in_any_case() -> None:
    run = CliRunner().invoke(app, ["recipes", "nvfp4"])
    assert run.exit_code == 0
    assert "scheme: NVFP4\n" in run.output
    assert CliRunner().invoke(app, ["recipes", "Awq"]).output == example("awq")
