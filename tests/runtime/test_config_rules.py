"""Infinity and NaN, which JSON does not have, as transformers writes them into config.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from runtime.artifact.config_policy import check_config, require_possible
from runtime.errors import ArtifactError


@pytest.mark.parametrize("number", ["inf", "-inf", "nan"])
def test_what_transformers_saves_is_a_config(number: str, tmp_path: Path) -> None:
    transformers.Mamba2Config(num_hidden_layers=2, time_step_limit=(0.0, float(number))).save_pretrained(tmp_path)
    check_config({"config.json": (tmp_path / "config.json").read_bytes()}, has_own_code=False)


@pytest.mark.parametrize("entry", ["num_hidden_layers", "hidden_size", "num_experts"])
@pytest.mark.parametrize("number", ["Infinity", "NaN"])
def test_no_model_is_that_large(entry: str, number: str) -> None:
    with pytest.raises(ArtifactError, match=f"{entry} = (inf|nan), and no model has more"):
        require_possible({entry: {"__float__": number}}, "config.json")


@pytest.mark.parametrize(
    "table",
    [
        {"a": {"__float__": "Infinity", "b": 1}},
        {"a": {"__float__": "huge"}},
        {"a": {"__float__": {"b": 1}}},
        {"__class__": "x"},
    ],
)
def test_other_names_of_python_are_refused(table: dict[str, object]) -> None:
    with pytest.raises(ArtifactError, match="which is not a valid entry"):
        check_config({"config.json": json.dumps(table).encode()}, has_own_code=False)
