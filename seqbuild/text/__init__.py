"""The text that calibrates a model when no data is given, and text for evaluation that shares no document with it."""

from pathlib import Path

_DIRECTORY = Path(__file__).parent


def builtin_text() -> Path:
    """Return the built-in calibration text, about 100,000 tokens in most vocabularies.

    A line is `{"text", "source"}`, or `{"messages", "source"}` for a conversation, a few of them with `tools`. Books,
    documentation, code and conversations alternate, so that the first samples, and samples at equal distances, contain
    all of them. `LICENSES.md` beside the file states origin and licence of each `source`.
    """
    return _DIRECTORY / "calibration.jsonl"


def builtin_evaluation_text() -> Path:
    """Return the built-in evaluation text, about 20,000 tokens in most vocabularies, in the same form."""
    return _DIRECTORY / "evaluation.jsonl"
