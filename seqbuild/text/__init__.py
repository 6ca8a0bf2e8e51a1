"""The text that calibrates a model when no data is given, and text for evaluation that shares no passage with it."""

from pathlib import Path

_DIRECTORY = Path(__file__).parent


def builtin_text() -> Path:
    """Return the built-in calibration text, about 90,000 tokens in a large vocabulary.

    A line is `{"text", "source"}`, or `{"messages", "source"}` for a conversation. Books, documentation, code and
    conversations alternate, so that the first samples, and samples at equal distances, contain all of them. Messages
    have only the roles that every chat template accepts, user and assistant. `LICENSES.md` beside the file states the
    origin and licence of each `source`.
    """
    return _DIRECTORY / "calibration.jsonl"


def builtin_evaluation_text() -> Path:
    """Return the built-in evaluation text, about 20,000 tokens in a large vocabulary, in the same form."""
    return _DIRECTORY / "evaluation.jsonl"
