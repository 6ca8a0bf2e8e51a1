"""Several sources, random order, bounded memory, default lengths, and what is printed about samples."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import runtime.data.tokenization as tokenization
import seqbuild.cli.app
from runtime.data.documents import Document
from runtime.data.mixing import Enough, interleaved, read_in_order, read_shuffled, shares, spread
from runtime.data.options import DataOptions, data_sources
from runtime.data.preview import preview_lines, summary_line
from runtime.data.samples import load_data
from runtime.data.sources import DataSource, parse_source
from runtime.data.tokenization import PreparedData, prepare_data
from runtime.errors import DataError, UsageError
from tests.runtime.place import Run, assert_refused

ROOT = Path(__file__).parents[2]


def jsonl(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def letters(path: Path, text: str) -> Path:
    return jsonl(path, *({"text": letter} for letter in text))


def prepared(tokenizer: Path, *sources: Any, **options: Any) -> PreparedData:
    return prepare_data(DataOptions(sources=sources, **options), tokenizer)


def text_of(found: PreparedData) -> str:
    """The letters of samples that have one each, after a BOS."""
    return "".join(chr(sample.tolist()[1] - 2) for sample in found.tokens.samples)


# Arguments.


def test_a_source_may_have_settings(tmp_path: Path) -> None:
    assert parse_source("owner/name::config=en,split=train[:512],revision=r") == DataSource(
        location="owner/name", config="en", split="train[:512]", revision="r"
    )
    assert parse_source("C:\\x.jsonl::weight=0.5,column=prompt=a,column=completion=b") == DataSource(
        location="C:\\x.jsonl", weight=0.5, columns=("prompt=a", "completion=b")
    )
    odd = tmp_path / "a::weight=2"
    odd.write_text("x")
    for given in (str(odd), odd):
        assert parse_source(given) == DataSource(location=str(odd))
    assert parse_source("x:y.txt").location == "x:y.txt"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a::wait=1", "a::wait=1 has the invalid setting 'wait=1' .*weight, format, split"),
        ("a::weight", "invalid setting 'weight'"),
        ("::weight=1", "invalid setting"),
        ("a::weight=0", "has the weight '0' .*above 0"),
        ("a::weight=nan", "has the weight 'nan'"),
        ("a::weight=inf", "has the weight 'inf'"),
        ("a::format=doc", "--format must be one of text, json"),
        ("", "the data argument is ''"),
        ("https://huggingface.co/datasets/a/b/tree/main", "is a URL, .*pass the id of the data set: a/b"),
        ("hf://datasets/a/b", "is a URL, .*pass the id of the data set: a/b"),
        ("https://example.org/x.jsonl", "is a URL, and nothing is downloaded .*download it"),
        ("some text " * 999, "the data argument has 9,990 characters, beginning with 'some text"),
    ],
)
def test_invalid_settings(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_source(text)


def test_settings_for_all_sources(tmp_path: Path) -> None:
    path = letters(tmp_path / "x.jsonl", "a")
    options = DataOptions(sources=(path, "owner/name", "o/n::split=test"), split="train", columns=("c",))
    file, first, second = data_sources(options)
    assert (file.split, first.split, second.split) == (None, "train", "test")
    assert {source.columns for source in (file, first, second)} == {("c",)}
    for wrong, message in (
        (DataOptions(sources=(path,), split="train"), "split 'train' applies to data sets"),
        (DataOptions(sources=(path,), seed=3), "--seed 3 has no effect without --shuffle"),
        (DataOptions(), "no data given"),
    ):
        with pytest.raises(UsageError, match=message):
            data_sources(wrong)


# Choice.


@pytest.mark.parametrize(
    ("weights", "available", "required", "most", "expected"),
    [
        ([1, 1], [9, 9], 4, None, [2, 2]),
        ([7, 3], [99, 99], 10, None, [7, 3]),
        ([1, 1, 1], [9, 9, 9], 4, None, [2, 1, 1]),
        ([0.5, 0.5], [10, 4], None, None, [4, 4]),
        ([3, 1], [6, 9], None, None, [6, 2]),
        ([1, 1], [99, 99], None, 10, [5, 5]),
    ],
)
def test_shares(weights: list[float], available: list[int], required: Any, most: Any, expected: list[int]) -> None:
    assert shares(weights, available, required, most) == expected


def test_a_share_that_a_source_does_not_have() -> None:
    with pytest.raises(DataError, match="source 2 has 1 samples, but its weight requires 5"):
        shares([1, 1], [9, 1], 10, None)


def test_samples_are_mixed_by_weight(tmp_path: Path, byte_tokenizer_dir: Path) -> None:
    large, small = letters(tmp_path / "a.jsonl", "abcdefgh"), letters(tmp_path / "b.jsonl", "STUVWXYZ")
    sources = (f"{large}::weight=3", f"{small}::weight=1")
    for pack in (True, False):
        found = prepared(byte_tokenizer_dir, *sources, num_samples=8, seq_len=2, pack=pack)
        assert text_of(found) == "abScefWg"
        assert [count for _, count in found.summary.shares] == [6, 2]
    assert summary_line(found.tokens, found.summary).endswith(f"from {large} 75%, {small} 25%")
    with pytest.raises(DataError, match="requires 12"):
        prepared(byte_tokenizer_dir, *sources, num_samples=16, seq_len=2)


def test_without_weights_sources_are_joined_in_order(tmp_path: Path, byte_tokenizer_dir: Path) -> None:
    paths = letters(tmp_path / "a.jsonl", "abc"), letters(tmp_path / "b.jsonl", "de")
    found = prepared(byte_tokenizer_dir, *paths, seq_len=4)
    assert [sample.tolist() for sample in found.tokens.samples] == [[0, 99, 0, 100], [0, 101, 0, 102]]
    assert found.summary.num_left == 2
    assert [count for _, count in found.summary.shares] == [2, 0]
    assert text_of(prepared(byte_tokenizer_dir, *paths, pack=False)) == "abcde"


def test_interleaved_and_spread() -> None:
    assert interleaved([[1, 2, 3, 4], ["a", "b"]]) == [1, "a", 2, 3, "b", 4]
    assert spread(3, 10) == [0, 3, 6]


EXPECTED = ("gecbhfaijd", "bgdfahejic")  # sorted by the first 8 bytes of the SHA-256 of "0 0", "0 1" ...


def test_a_seed_states_an_order_that_every_process_has(tmp_path: Path, byte_tokenizer_dir: Path) -> None:
    path = letters(tmp_path / "x.jsonl", "abcdefghij")
    orders = {
        seed: text_of(prepared(byte_tokenizer_dir, path, pack=False, shuffle=True, seed=seed)) for seed in (None, 0, 1)
    }
    assert orders == {None: EXPECTED[0], 0: EXPECTED[0], 1: EXPECTED[1]}
    first = text_of(prepared(byte_tokenizer_dir, path, pack=False, shuffle=True, num_samples=4))
    assert first == EXPECTED[0][:4]
    packed = prepared(byte_tokenizer_dir, path, seq_len=2, shuffle=True, seed=1, num_samples=4)
    assert text_of(packed) == EXPECTED[1][:4]


# Memory.


def records(count: int, parsed: list[int] | None = None) -> Iterator[tuple[int, Any]]:
    def parse(number: int) -> Document:
        if parsed is not None:
            parsed.append(number)
        return Document(str(number), "x" * 10 if number % 7 else " ")

    return ((0, partial(parse, number)) for number in range(count))


def test_of_a_large_source_evenly_spread_records_are_kept() -> None:
    parsed: list[int] = []
    enough = Enough(num_documents=4, num_characters=100, large=0)
    found = read_in_order(records(10_000, parsed), enough)
    numbers = [int(document.where) for _, document in found.documents]
    assert 10 <= len(numbers) <= 20
    assert numbers == sorted(numbers)
    gaps = [after - before for before, after in pairwise(numbers)]
    assert max(gaps) <= 2 * min(gaps) + 1
    assert numbers[-1] > 8_000
    assert (found.num_records, found.is_whole) == (10_000, False)
    assert len(parsed) < 300  # others are not parsed
    assert read_in_order(records(20), enough).is_whole
    assert len(read_in_order(records(10_000), None).documents) == 10_000 - 1429


def test_of_a_large_source_the_first_of_a_random_order_are_kept() -> None:
    parsed: list[int] = []
    whole = read_shuffled(records(3000), None, 5)
    part = read_shuffled(records(3000, parsed), Enough(num_documents=4, num_characters=100, large=0), 5)
    assert part.documents == whole.documents[:10]
    assert (part.is_whole, whole.is_whole) == (False, True)
    assert len(parsed) < 300


def test_a_large_source_is_remarked(tmp_path: Path, byte_tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenization, "_LARGE_CHARACTERS", 10)
    path = letters(tmp_path / "x.jsonl", "abcdefgh" * 40)
    found = prepared(byte_tokenizer_dir, path, num_samples=2, seq_len=2, pack=False)
    (remark,) = found.summary.remarks
    assert remark.startswith(f"{path} is large: only ")
    assert remark.endswith(" evenly spread records of 320 were used")
    # As many documents as samples are kept, however long they are.
    assert len(prepared(byte_tokenizer_dir, path, num_samples=99, seq_len=2, pack=False).tokens.samples) == 99


# Lengths.


def test_the_default_length_is_the_models(tmp_path: Path, byte_tokenizer_dir: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(byte_tokenizer_dir, directory)
    path = tmp_path / "x.txt"
    path.write_text("x" * 5000)

    def length() -> int | None:
        found = prepared(directory, path, default_length=2048)
        assert {len(sample) for sample in found.tokens.samples} == {found.seq_len}
        return found.seq_len

    assert length() == 2048
    (directory / "config.json").write_text(json.dumps({"text_config": {"max_position_embeddings": 512}}))
    assert length() == 512
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 300}))
    assert length() == 300


def test_a_text_shorter_than_the_default_is_one_sample(tmp_path: Path, byte_tokenizer_dir: Path) -> None:
    path = letters(tmp_path / "x.jsonl", "abc")
    found = prepared(byte_tokenizer_dir, path, default_length=2048)
    assert [len(sample) for sample in found.tokens.samples] == [6]
    assert found.summary.remarks == (f"{path} has 6 tokens, which become one sample of less than 2048",)
    with pytest.raises(DataError, match=r"0 windows of 9 tokens \(6 tokens in all\)"):
        prepared(byte_tokenizer_dir, path, seq_len=9)


# What is printed.


def test_summary_and_previews(tmp_path: Path, byte_tokenizer_dir: Path) -> None:
    from runtime.data.tokenizer import load_tokenizer

    path = jsonl(tmp_path / "x.jsonl", {"text": "a\n\x1b[31mb"}, {"text": None}, {"text": "cdefghijklm" * 9})
    found = prepared(byte_tokenizer_dir, path, pack=False, seq_len=20)
    assert summary_line(found.tokens, found.summary) == (
        "2 samples, 29 tokens; lengths 9 to 20, median 14; 1 blank record skipped; 1 document cut at the maximum length"
    )
    lines = preview_lines(found.tokens.samples, 1, load_tokenizer(byte_tokenizer_dir))
    assert lines == ["sample 1 of 2: 9 tokens", r"  <bos>a\n\x1b[31mb", "  special tokens: <bos> at 0"]
    assert preview_lines([torch.tensor([5, 7])], 3, None) == ["sample 1 of 1: 2 tokens", "  ids: 5 7"]
    (long,) = (line for line in preview_lines([torch.arange(2000)], 1, None) if "ids" in line)
    assert len(long) < 600


def test_the_command_prints_previews_and_replaces_nothing(tmp_path: Path, byte_tokenizer_dir: Path, run: Run) -> None:
    csv = tmp_path / "qa.csv"
    csv.write_text("ask,reply\nhi,yo\nhello,\n")
    out = tmp_path / "x.safetensors"
    command = ["data", str(byte_tokenizer_dir), str(csv), "-o", str(out), "--no-pack", "--show", "3"]
    columns = ["--column", "question=ask", "--column", "answer=reply"]
    code, said, complaint = run([*command, *columns, "--shuffle", "--seed", "2"], seqbuild.cli.app.main)
    assert (code, complaint) == (0, "")
    assert "  u:hi<eos>a:yo<eos>" in said.splitlines()
    assert "  special tokens: <eos> at 4, 9" in said.splitlines()
    assert said.splitlines()[-1].startswith(f"{out}: ")
    before = out.read_bytes()
    refused = run([*command, *columns], seqbuild.cli.app.main)
    assert_refused(refused, f"{out} already exists (pass --force", program="seqbuild")
    assert out.read_bytes() == before
    other = run([*command, "--column", "nope", "--force"], seqbuild.cli.app.main)
    assert_refused(other, "no column 'nope'", "['ask', 'reply']", program="seqbuild")
    assert out.read_bytes() == before
    tokens = run([*command[:2], str(out), *command[3:], "--force"], seqbuild.cli.app.main)
    assert_refused(tokens, "is a token file already", program="seqbuild")


def test_token_files_are_not_mixed(tmp_path: Path, byte_tokenizer_dir: Path) -> None:
    with pytest.raises(UsageError, match=r"the token file x.safetensors cannot be mixed with other data"):
        load_data(DataOptions(sources=("x.safetensors", "y.txt")), byte_tokenizer_dir)


def test_the_options_load_neither_torch_nor_a_data_library() -> None:
    program = (
        "import sys, runtime.cli.options\n"
        "assert not {'torch', 'transformers', 'datasets', 'pyarrow', 'numpy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
