"""Read documents from text files: one from a `.txt` file, one from each line or row of `.jsonl` and `.parquet`.

A record has `text`, or `messages` for a chat template, or a pair for an encoder-decoder model: `source` (or `input`)
and `target`. `text` takes precedence. Text is UTF-8, with or without a byte order mark. Documents of white space are
skipped, and so are pairs with one half of white space.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from runtime.data.media import Medium
from runtime.data.media_rows import MEDIA_FIELDS, with_media
from runtime.errors import DataError
from runtime.host.regular_files import open_regular, read_regular

_SOURCES = ("source", "input")
_FIELDS = ("text", "messages", *_SOURCES, "target", *MEDIA_FIELDS)
_ROWS_AT_A_TIME = 16  # of a parquet file, in which a few compressed bytes can be a text of megabytes


@dataclass(frozen=True, slots=True)
class Document:
    """A text, a conversation, or a pair of source and target.

    Attributes:
        where: its file and line, for messages.
        content: a text, or the messages of a conversation, each with the fields that the chat template reads.
        target: the text that an encoder-decoder model should generate for `content`; None for other documents.
        media: the images, sounds and videos of the document, in the order of their places in its messages.
    """

    where: str
    content: str | list[dict[str, Any]]
    target: str | None = None
    media: tuple[Medium, ...] = ()

    @property
    def is_blank(self) -> bool:
        """Whether a text of the document is white space."""
        texts = [text for text in (self.content, self.target) if isinstance(text, str)]
        return not self.media and not all(text.strip() for text in texts)


def read_documents(path: Path) -> Iterator[Document]:
    """Read the documents of one file, in order.

    Raises:
        DataError: the file is missing, empty, of an unknown kind or damaged, or a record is not a document.
    """
    require_file(path)
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise DataError(
            f"unsupported extension {path.suffix!r} of {path}",
            hint="supported are .txt, .jsonl, .parquet and .safetensors",
        )
    for document in readers[path.suffix](path):
        if not document.is_blank:
            yield document


def require_file(path: Path) -> None:
    """Raise a `DataError` unless `path` is a readable file that is not empty."""
    try:
        with open_regular(path) as file:
            is_empty = not file.read(1)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    if is_empty:
        raise DataError(f"{path} is empty")


def require_pairs(documents: Sequence[Document]) -> None:
    """Raise a `DataError` unless each document has a target."""
    alone = next((document for document in documents if document.target is None), None)
    if alone is not None:
        raise DataError(
            f"{alone.where} has no target, but other records have one", hint="put pairs into a file of their own"
        )


def _read_txt(path: Path) -> Iterator[Document]:
    yield Document(str(path), _decoded(read_regular(path), str(path)))


def _read_jsonl(path: Path) -> Iterator[Document]:
    with open_regular(path) as lines:
        for number, line in enumerate(lines, start=1):
            where = f"line {number} of {path}"
            text = _decoded(line, where)
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where} is not JSON: {error}") from error
            if not isinstance(record, dict):
                raise DataError(f"{where} must be a JSON object, not {type(record).__name__}")
            yield _as_document(record, where, path.parent)


def _read_parquet(path: Path) -> Iterator[Document]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise DataError(f"reading {path} requires pyarrow", hint="pip install pyarrow") from error
    try:
        with open_regular(path) as opened, parquet.ParquetFile(opened) as file:
            names = file.schema_arrow.names
            columns = [name for name in _FIELDS if name in names]
            if not columns:
                raise DataError(f"{path} has no column text or messages", hint=f"its columns are {names}")
            number = 0
            for batch in file.iter_batches(batch_size=_ROWS_AT_A_TIME, columns=columns):
                for row in range(batch.num_rows):
                    number += 1
                    (record,) = batch.slice(row, 1).to_pylist()
                    yield _as_document(record, f"row {number} of {path}", path.parent)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(f"{path} is not a valid parquet file: {error}") from error


def _as_document(record: Mapping[str, Any], where: str, base: Path) -> Document:
    document = _text_of(record, where)
    content, media = with_media(document.content, record, where, base)
    return replace(document, content=content, media=media)


def _text_of(record: Mapping[str, Any], where: str) -> Document:
    text, messages = record.get("text"), record.get("messages")
    if isinstance(text, str):
        return Document(where, text)
    if text is not None:
        raise DataError(f"text of {where} must be a string, not {type(text).__name__}")
    if messages is None and record.get("target") is not None:
        return _as_pair(record, where)
    if messages is None and any(record.get(name) for name in MEDIA_FIELDS):
        return Document(where, "")
    if messages is None:
        raise DataError(f"{where} has neither text nor messages", hint=f"its fields are {list(record)}")
    if not isinstance(messages, list) or not messages or not all(isinstance(item, dict) for item in messages):
        raise DataError(
            f"messages of {where} must be a list of objects",
            hint='each message looks like {"role": "user", "content": "..."}',
        )
    return Document(where, messages)


def _as_pair(record: Mapping[str, Any], where: str) -> Document:
    source = next((record[name] for name in _SOURCES if record.get(name) is not None), None)
    for name, text in (("source", source), ("target", record["target"])):
        if not isinstance(text, str):
            raise DataError(
                f"{name} of {where} must be a string, not {type(text).__name__}",
                hint='a pair looks like {"source": "...", "target": "..."}',
            )
    assert isinstance(source, str)
    return Document(where, source, target=record["target"])


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = f"byte {content[error.start]:#04x} at position {error.start}"
        raise DataError(f"{where} is not UTF-8: {byte}", hint="convert it to UTF-8") from error
