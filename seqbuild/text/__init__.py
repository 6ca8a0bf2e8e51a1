"""The built-in text."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parents[2] / "demo" / "text"


def builtin_text() -> Path:
    """Return the file with the built-in calibration text."""
    return _FOLDER / "calib.jsonl"


def builtin_evaluation_text() -> Path:
    """Return the file with the built-in evaluation text, whose documents are not in the calibration text."""
    return _FOLDER / "eval.jsonl"
