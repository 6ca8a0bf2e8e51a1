"""Describe samples in one line, and show the text of the first ones."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from statistics import median
from typing import TYPE_CHECKING

from runtime.data.named_tensors import NamedSamples
from runtime.terminal import printable

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from runtime.data.token_file import Tokenized
    from runtime.data.tokenization import DataSummary

_LONGEST_TEXT, _MOST_TOKENS, _MOST_SOURCES = 480, 12, 6


def summary_line(tokens: Tokenized | NamedSamples, summary: DataSummary | None = None) -> str:
    """Describe samples in one line: their number, tokens and lengths, and what was left out."""
    lengths = [len(sample) for sample in (tokens.texts if isinstance(tokens, NamedSamples) else tokens.samples)]
    masks, targets = (None, None) if isinstance(tokens, NamedSamples) else (tokens.masks, tokens.targets)
    besides = "" if targets is None else f", and {sum(map(len, targets)):,} target tokens"
    parts = [f"{len(tokens.samples):,} samples, {sum(lengths):,} tokens{besides}"]
    if not lengths:
        return "; ".join(parts)
    if min(lengths) == max(lengths):
        parts.append(f"{lengths[0]:,} tokens each")
    else:
        parts.append(f"lengths {min(lengths):,} to {max(lengths):,}, median {median(lengths):,.0f}")
    if masks is not None:
        parts.append(f"{sum(int(mask.sum()) for mask in masks):,} tokens count in statistics")
    if summary is not None:
        parts += _facts(summary)
    return "; ".join(parts)


def _facts(summary: DataSummary) -> list[str]:
    """State what was left out, and the shares of the sources."""
    facts = (
        (summary.num_blank, "blank record", " skipped"),
        (summary.num_cut, "document", " cut at the maximum length"),
        (summary.num_left, "token", " at the end dropped"),
        (summary.num_merged, "system message", " merged into the user's, as the chat template requires"),
    )
    found = [f"{count:,} {noun}{'' if count == 1 else 's'}{what}" for count, noun, what in facts if count]
    total = sum(count for _, count in summary.shares)
    if len(summary.shares) > 1:
        shown = [f"{name} {count / total:.0%}" for name, count in summary.shares[:_MOST_SOURCES]]
        rest = len(summary.shares) - len(shown)
        found.append("from " + ", ".join(shown) + (f" and {rest} more" if rest else ""))
    return found


def preview_lines(samples: Sequence[Tensor], count: int, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """Describe the first samples: their text, or without a tokenizer their ids, and where special tokens are."""
    lines = []
    for number, sample in enumerate(islice(samples, count), start=1):
        ids = sample.tolist()
        lines.append(f"sample {number} of {len(samples)}: {len(ids):,} tokens")
        if tokenizer is None:
            lines.append(f"  ids: {_shortened(' '.join(map(str, ids)))}")
            continue
        lines.append(f"  {_shortened(_escaped(str(tokenizer.decode(ids))))}")
        lines.append(f"  special tokens: {_special(ids, tokenizer) or 'none'}")
    return lines


def _special(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    special = set(tokenizer.all_special_ids)
    places: dict[int, list[int]] = {}
    for place, token_id in enumerate(ids):
        if token_id in special:
            places.setdefault(token_id, []).append(place)
    found = []
    for token_id, at in places.items():
        shown = ", ".join(map(str, at[:_MOST_TOKENS])) + (
            f" and {len(at) - _MOST_TOKENS} more" if at[_MOST_TOKENS:] else ""
        )
        found.append(f"{_escaped(str(tokenizer.convert_ids_to_tokens(token_id)))} at {shown}")
    return "; ".join(found)


def _escaped(text: str) -> str:
    return printable(text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r"))


def _shortened(text: str) -> str:
    half = _LONGEST_TEXT // 2
    return text if len(text) <= _LONGEST_TEXT else f"{text[:half]} ... {text[-half:]}"
