"""The tables of docs/readers.md, between its two marks."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clients.models import MODELS
from clients.schemes import SCHEMES

if TYPE_CHECKING:
    from clients.readers import Found

BEGIN = "<!-- written by tests/clients/readers.py --update: begin -->"
END = "<!-- end -->"


def update(path: Path, found: Sequence[Found], no_vllm: str) -> None:
    """Replace what stands between the marks."""
    text = path.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    tail = rest.partition(END)[2]
    body = "\n".join(lines(found, no_vllm))
    path.write_text(f"{head}{BEGIN}\n\n{body}\n\n{END}{tail}", encoding="utf-8")


def lines(found: Sequence[Found], no_vllm: str) -> Iterator[str]:
    import torch

    today = datetime.date.today().isoformat()
    yield f"*{today}, torch {torch.__version__.split('+')[0]}, Python {platform.python_version()}, CPU.*"
    if no_vllm:
        yield f"\nvLLM was not tried: {no_vllm}."
    for reader in dict.fromkeys(entry.reader for entry in found):
        own = [entry for entry in found if entry.reader == reader]
        yield f"\n### {reader}\n"
        models = [name for name in MODELS if any(entry.made.model == name for entry in own)]
        yield "| scheme | " + " | ".join(models) + " |"
        yield "|---|" + "---|" * len(models)
        for scheme in ("", *SCHEMES):
            cells = {entry.made.model: cell(entry) for entry in own if entry.made.scheme == scheme}
            if cells:
                yield f"| {scheme or 'original'} | " + " | ".join(cells.get(name, "-") for name in models) + " |"
        yield from refusals(own)


def cell(entry: Found) -> str:
    """The difference in perplexity, or what went wrong."""
    if entry.perplexity:
        difference = f"{100 * (entry.perplexity / entry.made.perplexity - 1):+.2f} %"
        return difference if entry.verdict == "equal" else f"**differs**, {difference}"
    return entry.verdict if entry.is_good else f"**{entry.verdict}**"


def refusals(found: Sequence[Found]) -> Iterator[str]:
    """What is said where a checkpoint is refused, or read in part; each message once."""
    messages: dict[str, list[str]] = {}
    for entry in found:
        if entry.verdict in ("refused", "incomplete"):
            messages.setdefault(f"{entry.verdict}: `{entry.details[:160]}`", []).append(entry.made.name)
    if messages:
        yield ""
    for message, names in messages.items():
        more = f" and {len(names) - 2} more" if len(names) > 2 else ""
        yield f"- {', '.join(names[:2])}{more}: {message}".replace(" | ", ", ")
