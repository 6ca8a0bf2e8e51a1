"""Formats of data files: what is read from each, and what damaged ones say."""

from __future__ import annotations

import gzip
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

import runtime.data.file_formats as formats
from runtime.data.file_formats import DataFile, format_of, read_records
from runtime.data.options import DataOptions
from runtime.data.samples import load_tokens
from runtime.data.tokenization import prepare_data
from runtime.errors import DataError, UsageError

LINES = b'{"text": "a"}\n{"text": "b"}\n'


def documents(path: Path, *columns: str, name: str | None = None) -> list[Any]:
    kind = name or format_of(path)
    assert kind is not None
    found = read_records(DataFile(path=path, name=path.name, format=kind), columns)
    return [record().content for record in found]


def written(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", LINES),
        ("x.ndjson.gz", LINES),
        ("X.JSONL", b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n\n")),
        ("x.json", LINES),
        ("x.json", b'["a", "b"]'),
        ("x.json", b'[{"text": "a"}, {"text": "b"}]'),
        ("x.json.gz", b'\xef\xbb\xbf[\n {"text": "a"},\n {"text": "b"}\n]\n'),
        ("x.json", b'{"version": 1, "data": [{"text": "a"}, {"text": "b"}]}'),
        ("x.csv", b"text,n\na,1\nb,2\n"),
        ("x.csv.gz", b"\xef\xbb\xbftext,n\r\na,1\r\n\r\nb,2\r\n"),
        ("x.csv", b'n;text\n1;"a"\n2;b'),
        ("x.tsv", b"text\tn\na\t1\nb\n"),
    ],
)
def test_formats(tmp_path: Path, name: str, content: bytes) -> None:
    assert documents(written(tmp_path / name, content)) == ["a", "b"]


def test_one_record_of_json_is_a_document(tmp_path: Path) -> None:
    message = {"role": "user", "content": "hi"}
    for content in (json.dumps({"messages": [message]}), json.dumps({"messages": [message]}, indent=1)):
        assert documents(written(tmp_path / "x.json", content.encode())) == [[message]]


def test_a_table_has_quoted_fields_of_any_length(tmp_path: Path) -> None:
    long = "x" * 200_000
    content = f'text,other\n"two\nlines, and ""quotes""",1\n"{long}",2\n,3\n'.encode()
    assert documents(written(tmp_path / "x.csv", content)) == ['two\nlines, and "quotes"', long, ""]


def test_messages_of_a_table_are_json(tmp_path: Path) -> None:
    chat = '[{""role"": ""user"", ""content"": ""hi""}]'
    path = written(tmp_path / "x.csv", f'chat\n"{chat}"\n'.encode())
    assert documents(path, "messages=chat") == [[{"role": "user", "content": "hi"}]]


def test_a_parquet_has_nested_null_binary_and_dictionary_values(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    messages = [[{"role": "user", "content": "hi", "name": None}], [{"role": "user", "content": "x", "name": "n"}]]
    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.table({"messages": messages, "image.bytes": [b"\xff", None]}), path)
    assert documents(path) == [[{"role": "user", "content": "hi"}], [{"role": "user", "content": "x", "name": "n"}]]
    values = pyarrow.array(["a", None, "b"]).dictionary_encode()
    parquet.write_table(pyarrow.table({"text": values, "b.c": [b"d", b"\xc3\xa9", b"f"]}), path)
    assert documents(path) == ["a", "", "b"]
    assert documents(path, "b.c") == ["d", "é", "f"]
    parquet.write_table(pyarrow.table({"translation": [{"en": "a", "de": "b"}]}), path)
    assert documents(path, "translation.de") == ["b"]
    parquet.write_table(pyarrow.table({"text": ["a"], "b.c": ["d"]}), path)
    with pytest.raises(DataError, match=r"has no column 'nope' \(its columns are \['text', 'b.c'\]\)"):
        documents(path, "nope")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", "text".encode("utf-16"), r"x.txt is UTF-16, not UTF-8 \(convert it: iconv"),
        ("x.jsonl", '{"text": "a"}'.encode("utf-16-le"), "x.jsonl is binary or UTF-16: it has many zero bytes"),
        ("x.csv", b"text\na\x00b\n", "line 2 of x.csv has a zero byte"),
        ("x.csv", b"text\n\xff\n", "x.csv is not UTF-8"),
        ("x.csv", b'text\n"open\n', "x.csv is not a valid table"),
        ("x.csv", b"text\na,b\n", "row 1 of x.csv has 2 fields, but the first line has 1"),
        ("x.csv", b"a,a\n1,2\n", "x.csv has two columns of one name"),
        ("x.csv", b"a,b\n1,2\n", r"row 1 of x.csv has neither text nor messages \(its fields are \['a', 'b'\]"),
        ("x.json", b'{"a": 1', "x.json is not JSON"),
        ("x.json", b"[" * 200_000, "x.json is not JSON"),
        ("x.json", b"3", "x.json must be a JSON array or object, not int"),
        ("x.json", b'[{"text": "a"}, 3]', "record 2 of x.json must be a JSON object, not int"),
        ("x.jsonl", b'{"text": NaN, "a": 1}\n{"text": 3}', "text of line 2 of x.jsonl must be a string, not int"),
        ("x.jsonl.gz", None, "x.jsonl.gz is not a valid gzip file"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(LINES)[:-9] if content is None else content)
    with pytest.raises(DataError, match=message):
        documents(path)


def test_columns_of_a_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x.txt is text and has no columns \(leave --column out\)"):
        documents(written(tmp_path / "x.txt", b"a"), "text")


def test_lines_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "_LONGEST_LINE", 16)
    monkeypatch.setattr(formats, "_LONGEST_JSON", 16)
    for name, message in (("x.jsonl", "line 2 of x.jsonl is longer"), ("x.csv", "line 2 of x.csv is longer")):
        with pytest.raises(DataError, match=message):
            documents(written(tmp_path / name, b'"text"\n"' + b"x" * 30))
    with pytest.raises(DataError, match=r"x.json is larger than 512 MiB .*jq"):
        documents(written(tmp_path / "x.json", b'["' + b"x" * 30 + b'"]'))


def test_a_large_text_is_cut_into_pieces_at_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "_LONGEST_TEXT", 16)
    monkeypatch.setattr(formats, "_PIECE_BYTES", 8)
    text = "1234567\n8\n" + "é" * 10 + "\nend"
    found = documents(written(tmp_path / "x.txt", text.encode()))
    assert "".join(found) == text
    assert found[0] == "1234567\n8\n"
    assert len(found) > 2


# Sources of files.


def texts(tokenizer: Path, *sources: str | Path, **options: Any) -> list[str]:
    """The samples of unpacked data, which the test tokenizer writes as bytes after a BOS."""
    found = prepare_data(DataOptions(sources=sources, pack=False, **options), tokenizer)
    return [bytes(token - 2 for token in sample.tolist()[1:]).decode() for sample in found.tokens.samples]


def test_a_directory_is_read_in_sorted_order_without_hidden_files(tmp_path: Path, byte_tokenizer_dir: Path) -> None:
    root = tmp_path / "data"
    for name, content in {
        "b.jsonl": LINES,
        "a/z.txt": b"z",
        "a/.hidden.txt": b"hidden",
        ".git/x.txt": b"hidden",
        "a/notes.md": b"ignored",
        "empty.txt": b"",
        "c.csv.gz": b"text\nc\n",
    }.items():
        written(root / name, content)
    assert texts(byte_tokenizer_dir, str(root)) == ["z", "a", "b", "c"]
    found = load_tokens(root, tokenizer_dir=byte_tokenizer_dir, pack=False)
    assert [name for name, _ in found.origin.sources] == ["a/z.txt", "b.jsonl", "c.csv.gz"]
    assert texts(byte_tokenizer_dir, str(root), format="csv") == ["c"]
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="none has no data files"):
        texts(byte_tokenizer_dir, str(tmp_path / "none"))


def test_standard_input(tmp_path: Path, byte_tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def given(content: bytes, **options: Any) -> list[str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        return texts(byte_tokenizer_dir, "-", **options)

    assert given(LINES) == ["a", "b"]
    assert texts(byte_tokenizer_dir, "-") == ["a", "b"]  # the same stream again
    assert given(gzip.compress(LINES)) == ["a", "b"]
    for broken in (gzip.compress(LINES)[:-9], b"\x1f\x8bgarbage"):
        with pytest.raises(DataError, match="standard input"):
            given(broken)
    assert given(b' [{"text": "a"}]') == ["a"]
    assert given(b'{\n"text": "a"}') == ["a"]
    assert given(b"plain text") == ["plain text"]
    assert given(b"text\na\n", format="csv") == ["a"]
    with pytest.raises(DataError, match="standard input is empty"):
        given(b"")
    with pytest.raises(UsageError, match="standard input is given twice"):
        texts(byte_tokenizer_dir, "-", "-")
    with pytest.raises(UsageError, match="--format must be one of text, json"):
        given(b"x", format="xml")
    terminal = io.TextIOWrapper(io.BytesIO(b""))
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    with pytest.raises(UsageError, match="standard input is a terminal"):
        texts(byte_tokenizer_dir, "-")


def test_special_files_are_not_waited_for(tmp_path: Path, byte_tokenizer_dir: Path) -> None:
    os.mkfifo(tmp_path / "x.jsonl")
    with pytest.raises(DataError, match=r"x.jsonl cannot be read: it is a pipe"):
        texts(byte_tokenizer_dir, tmp_path / "x.jsonl")
    written(tmp_path / "real.txt", b"a")
    (tmp_path / "link.txt").symlink_to("real.txt")
    assert texts(byte_tokenizer_dir, tmp_path / "link.txt") == ["a"]


def test_a_file_that_changes_while_it_is_read(
    tmp_path: Path, byte_tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "x.jsonl", LINES)
    digest = formats.as_document

    def changing(*arguments: Any) -> Any:
        path.write_bytes(LINES * 2)
        return digest(*arguments)

    def removing(*arguments: Any) -> Any:
        path.unlink(missing_ok=True)
        return digest(*arguments)

    for change, message in ((changing, "changed while it was read"), (removing, "cannot be read: No such file")):
        monkeypatch.setattr(formats, "as_document", change)
        with pytest.raises(DataError, match=rf"x.jsonl {message}"):
            texts(byte_tokenizer_dir, path)


def test_the_name_of_another_extension(tmp_path: Path, byte_tokenizer_dir: Path) -> None:
    path = written(tmp_path / "dump.log", LINES)
    with pytest.raises(DataError, match=r"unsupported extension '.log' of .*pass --format"):
        texts(byte_tokenizer_dir, path)
    assert texts(byte_tokenizer_dir, path, format="jsonl") == ["a", "b"]
    assert texts(byte_tokenizer_dir, f"{path}::format=jsonl") == ["a", "b"]
