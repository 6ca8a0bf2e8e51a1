"""The notebook of examples/ runs from its first cell to its last, and shows what its text says."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]


def printed(notebook: nbformat.NotebookNode) -> list[str]:
    """What each code cell of a notebook prints."""
    cells = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    return ["".join(output.text for output in outputs if output.get("name") == "stdout") for outputs in cells]


def numbers(text: str) -> dict[str, float]:
    return {name: float(value) for name, value in (line.split()[:2] for line in text.splitlines())}


def test_it_runs_and_its_results_are_as_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "examples" / "quantize.ipynb", as_version=4)
    stored = printed(notebook)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT / "examples")}}).execute()
    done = printed(notebook)
    assert [len(text.splitlines()) for text in done] == [len(text.splitlines()) for text in stored]
    assert done[0] == stored[0]
    perplexity = numbers(done[-2])
    assert perplexity == pytest.approx(numbers(stored[-2]), rel=0.02)  # another processor rounds in another order
    assert perplexity["original"] < perplexity["gptq"] < perplexity["rtn"]
