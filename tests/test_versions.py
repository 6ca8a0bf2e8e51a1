"""The minimum versions that pyproject.toml declares are those that docs/versions.md states."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.minimums import declared, minimums, pins

PAGE = Path(__file__).resolve().parents[1] / "docs" / "versions.md"


def test_the_document_states_the_declared_minimums() -> None:
    section = PAGE.read_text(encoding="utf-8").partition("## Tested combinations")[0]
    stated = dict(re.findall(r"^\| ([\w-]+) \| ([\d.]+) \|", section, re.MULTILINE))
    assert stated == minimums(declared())


def test_the_document_states_the_supported_pythons() -> None:
    project = declared()["project"]
    versions = [line.rpartition(" ")[2] for line in project["classifiers"] if " :: Python :: 3." in line]
    newest = int(versions[-1].partition(".")[2])
    assert project["requires-python"] == f">={versions[0]},<3.{newest + 1}"
    assert f"Python {versions[0]} to {versions[-1]}." in PAGE.read_text(encoding="utf-8")


def test_pins_are_exact_and_keep_their_marker() -> None:
    lines = pins(declared())
    assert "triton==3.6; platform_system == 'Linux'" in lines
    assert len(lines) == len(minimums(declared()))
    assert all(">" not in line and "==" in line for line in lines)


@pytest.mark.parametrize(
    ("line", "message"), [("torch", "another form than name>=version"), ("torch==2", "another form")]
)
def test_a_requirement_without_a_minimum_is_an_error(line: str, message: str) -> None:
    project = {"build-system": {"requires": [line]}, "project": {"dependencies": [], "optional-dependencies": {}}}
    with pytest.raises(ValueError, match=message):
        minimums(project)
