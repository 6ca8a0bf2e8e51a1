"""What the card of the source states is read defensively, and nothing of its prose is taken over."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from runtime.provenance.record import CardFacts
from runtime.provenance.source_model import card_facts, hub_origin

HEADER = """---
license: Apache-2.0
language:
- en
- no
- zh
- en
pipeline_tag: text-generation
base_model: some/other
tags: [chat]
---
# The best model
"""
REFUSED = {
    "nothing": "",
    "no header": "# A model\nlicense: mit\n",
    "no end": "---\nlicense: mit\n",
    "no YAML": "---\na: [\n---\n",
    "a list": "---\n- license\n---\n",
    "a scalar": "---\nlicense\n---\n",
    "code": "---\nlicense: !!python/object/apply:os.system ['true']\n---\n",
    "aliases": "---\na: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(
        f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
        for before, name in zip("abcdefg", "bcdefgh", strict=True)
    )
    + "---\n",
    "nested": "---\nlicense: " + "[" * 2000 + "\n---\n",
    "too long": "---\na: " + "x" * 2**16 + "\nlicense: mit\n---\n",
    "types": "---\nlicense: {a: b}\nlanguage: {en: 1}\npipeline_tag: [text]\nlicense_link: 7\n---\n",
    "injection": '---\nlicense: "mit\\nbase_model: evil"\nlanguage: ["en\\n- x", "<b>"]\npipeline_tag: "a b"\n---\n',
    "bytes": "---\n\x00\n---\n",
}


def test_single_words_are_taken_over(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(HEADER)
    expected = CardFacts(license="apache-2.0", language=("en", "no", "zh"), pipeline_tag="text-generation")
    assert card_facts(tmp_path) == expected
    (tmp_path / "README.md").write_bytes(b"\xef\xbb\xbf" + HEADER.replace("\n", "\r\n").encode())
    assert card_facts(tmp_path) == expected
    text = "---\nlicense: other\nlicense_name: tiny (v2)\nlicense_link: https://example.org/a\nlanguage: de\n---\n\xff"
    (tmp_path / "README.md").write_text(text, encoding="latin-1")
    assert card_facts(tmp_path) == CardFacts(
        license="other", license_name="tiny (v2)", license_link="https://example.org/a", language=("de",)
    )


@pytest.mark.parametrize("name", REFUSED)
def test_anything_else_is_left_out(tmp_path: Path, name: str) -> None:
    (tmp_path / "README.md").write_text(REFUSED[name])
    assert card_facts(tmp_path) == CardFacts()


def test_a_card_must_be_a_file(tmp_path: Path) -> None:
    assert card_facts(tmp_path) == CardFacts()
    os.mkfifo(tmp_path / "README.md")
    assert card_facts(tmp_path) == CardFacts()


def test_the_id_is_that_of_a_snapshot_in_the_hubs_cache(tmp_path: Path) -> None:
    commit = "a1" * 20
    for folder, repo in {
        "models--owner--na--me": "",
        "models--owner--name": "owner/name",
        "models--gpt2": "gpt2",
    }.items():
        snapshot = tmp_path / folder / "snapshots" / commit
        snapshot.mkdir(parents=True)
        assert hub_origin(snapshot) == ((repo, commit) if repo else ("", ""))
    (tmp_path / "link").symlink_to(snapshot)
    assert hub_origin(tmp_path / "link") == ("gpt2", commit)
    assert hub_origin(tmp_path) == hub_origin(Path("/")) == ("", "")
