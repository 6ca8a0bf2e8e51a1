"""The built-in text: complete, licensed, and valid for every tokenizer."""

from __future__ import annotations

import json
import re
import shutil
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import runtime
from seqbuild.text import builtin_evaluation_text, builtin_text

Record = dict[str, Any]
BOTH = [builtin_text(), builtin_evaluation_text()]
SIZES = {"calibration.jsonl": (300_000, 400_000), "evaluation.jsonl": (60_000, 100_000)}


def records(path: Path) -> list[Record]:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert all(line.strip() for line in lines)
    return [json.loads(line) for line in lines]


def strings(value: Any) -> list[str]:
    """All strings of a record, keys included."""
    if isinstance(value, str):
        return [value]
    parts = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    return [text for part in parts for text in strings(part)]


@pytest.mark.parametrize("path", BOTH, ids=lambda path: path.name)
def test_records_have_known_fields_and_the_files_their_size(path: Path) -> None:
    smallest, largest = SIZES[path.name]
    assert smallest <= path.stat().st_size <= largest
    for record in records(path):
        assert set(record) in ({"text", "source"}, {"messages", "source"})
        assert all(text.strip() for text in [record["source"], record.get("text", "text")])


@pytest.mark.parametrize("path", BOTH, ids=lambda path: path.name)
@pytest.mark.parametrize("template", ["strict", "none"])
def test_every_tokenizer_reads_every_record(
    path: Path, template: str, byte_tokenizer_dir: Path, tmp_path: Path
) -> None:
    """With a template that rejects other roles than user and assistant, as Gemma's does, and without a template."""
    shutil.copytree(byte_tokenizer_dir, tmp_path / "tokenizer")
    chat_template = tmp_path / "tokenizer" / "chat_template.jinja"
    assert chat_template.is_file()
    if template == "none":
        chat_template.unlink()
    data = runtime.load_tokens(path, tokenizer_dir=tmp_path / "tokenizer", pack=False)
    found = records(path)
    assert len(data.samples) == len(found)
    for record, sample in zip(found, data.samples, strict=True):
        text = bytes((sample[sample >= 2] - 2).tolist()).decode()  # each byte is a token, its number plus two
        expected = [record["text"]] if "text" in record else [message["content"] for message in record["messages"]]
        assert all(part in text for part in expected)


def test_every_source_has_a_licence_and_every_licence_a_source() -> None:
    notices = builtin_text().with_name("LICENSES.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `([\w-]+)` \|", notices, re.MULTILINE)
    sources = {record["source"] for path in BOTH for record in records(path)}
    assert Counter(listed) - Counter(["source"] * 3) == Counter(sources)  # three tables have a header


def test_evaluation_shares_no_paragraph_with_calibration() -> None:
    calibration, evaluation = (
        {
            paragraph.strip()
            for record in records(path)
            for message in record.get("messages", [{"content": record.get("text")}])
            for paragraph in message["content"].split("\n\n")
            if len(paragraph.strip()) > 80
        }
        for path in BOTH
    )
    assert len(calibration) > 1000
    assert len(evaluation) > 200
    assert not calibration & evaluation


@pytest.mark.parametrize("path", BOTH, ids=lambda path: path.name)
def test_texts_have_no_control_characters_addresses_or_paths(path: Path) -> None:
    private = re.compile(r"[\w.+-]+@(?!example\.)[\w-]+\.\w{2,}|/(?:root|work|tmp|home)/")
    for record in records(path):
        for text in strings(record):
            odd = {
                char for char in text if unicodedata.category(char) in ("Cc", "Co", "Cs", "Cn") and char not in "\n\t"
            }
            assert not odd | (set(text) & {"\ufeff", "\ufffd", "\u200b"}), record["source"]
            assert not private.search(text), record["source"]


@pytest.mark.parametrize("path", BOTH, ids=lambda path: path.name)
def test_conversations_alternate(path: Path) -> None:
    """User and assistant take turns: some templates reject other roles, which the user could not change here."""
    found = [record["messages"] for record in records(path) if "messages" in record]
    assert len(found) >= len(records(path)) // 4
    for messages in found:
        assert re.fullmatch(r"(UA)+", "".join(message["role"][0].upper() for message in messages))
        assert all(set(message) == {"role", "content"} and message["content"].strip() for message in messages)


def test_any_part_of_the_text_is_a_mixture() -> None:
    """Books, documentation, code and conversations in each eighth of the file."""
    found = records(builtin_text())
    size = len(found) // 8
    for start in range(0, size * 8, size):
        part = found[start : start + size]
        assert len({record["source"] for record in part}) >= 6
        talks = sum("messages" in record for record in part)
        assert size // 5 <= talks <= size * 3 // 4
