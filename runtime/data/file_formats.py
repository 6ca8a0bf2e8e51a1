"""Read the records of one file: `.txt`, `.json`, `.jsonl`, `.csv`, `.tsv` and `.parquet`, all but the last also `.gz`.

Text is UTF-8, with or without a byte order mark. A `.txt` is one document; one of more than 64 MiB is cut into pieces
at line ends. A `.json` file is an array of objects or strings, an object with one list, one record, or in fact JSON
lines. The first line of a `.csv` has the names of its columns; the separator is a comma, or a semicolon or tab if the
names have no comma.

Records are parsed only when they are used, so that skipping some of a large file costs little. No file is read as a
whole but `.json`, which therefore has a limit.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

from runtime.data.documents import Document, as_document
from runtime.data.media import MEDIA_FIELDS
from runtime.data.records import FIELDS, chosen_columns
from runtime.errors import DataError, UsageError
from runtime.host.regular_files import open_regular, reason_of

Record: TypeAlias = Callable[[], Document]  # parses the record

TEXT, JSON, JSONL, CSV, TSV, PARQUET = "text", "json", "jsonl", "csv", "tsv", "parquet"
FORMATS = (TEXT, JSON, JSONL, CSV, TSV, PARQUET)
SUFFIXES = {
    ".txt": TEXT,
    ".json": JSON,
    ".jsonl": JSONL,
    ".ndjson": JSONL,
    ".csv": CSV,
    ".tsv": TSV,
    ".parquet": PARQUET,
}
SUPPORTED = ".txt, .json, .jsonl, .csv, .tsv, .parquet and .safetensors"
_GZIP, _GZIP_SUFFIX = b"\x1f\x8b", ".gz"
_PARQUET_MAGIC = b"PAR1"
_PEEK_BYTES = 4096
_LONGEST_LINE = 2**28  # bytes
_LONGEST_TEXT, _PIECE_BYTES = 2**26, 2**18
_LONGEST_JSON = 2**29
_LONGEST_FIELD = 2**28  # characters of a table's field; the csv module's own limit is 128 KiB
_ROWS_AT_A_TIME = 16  # of a parquet file, in which a few compressed bytes can be a text of megabytes


@dataclass(frozen=True, kw_only=True, slots=True)
class DataFile:
    """A file of records.

    Attributes:
        path: where it is.
        name: what messages call it.
        format: one of `FORMATS`.
    """

    path: Path
    name: str
    format: str


def format_of(path: Path) -> str | None:
    """Return the format that a file name states; None for an unsupported one."""
    name = path.name.lower()
    suffix = Path(name.removesuffix(_GZIP_SUFFIX)).suffix
    return None if name.endswith(_GZIP_SUFFIX) and suffix == ".parquet" else SUFFIXES.get(suffix)


def require_format(name: str | None) -> None:
    """Raise a `UsageError` for an unknown name of a format."""
    if name is not None and name not in FORMATS:
        raise UsageError(f"--format must be one of {', '.join(FORMATS)}; got {name!r}")


def sniffed_format(path: Path) -> str:
    """Determine the format of data without a file name: Parquet, JSON, JSON lines or else text."""
    with open_regular(path) as opened:
        if opened.read(len(_PARQUET_MAGIC)) == _PARQUET_MAGIC:
            return PARQUET
    try:
        with _opened(path) as file:
            first = file.peek(_PEEK_BYTES)[:_PEEK_BYTES].removeprefix(codecs.BOM_UTF8).lstrip()[:1]
            if first == b"{":
                return JSONL if _is_json(file.readline(_LONGEST_LINE)) else JSON
    except (OSError, EOFError, zlib.error):
        return TEXT  # the reader of any format reports it
    return JSON if first == b"[" else TEXT


def read_records(file: DataFile, columns: Sequence[str]) -> Iterator[Record]:
    """Read the records of a file, in order.

    Raises:
        DataError: the file cannot be read or is damaged; parsing a record raises it if that is no document.
    """
    readers = {TEXT: _read_text, JSON: _read_json, JSONL: _read_lines, CSV: _read_table, TSV: _read_table}
    try:
        if file.format == PARQUET:
            yield from _read_parquet(file, columns)
            return
        with _opened(file.path) as opened:
            _require_utf8(opened.peek(_PEEK_BYTES)[:_PEEK_BYTES], file.name)
            yield from readers[file.format](opened, file, columns)
    except (EOFError, zlib.error) as error:
        raise DataError(f"{file.name} is not a valid gzip file: {error}", hint="compress it again") from error
    except OSError as error:
        raise DataError(f"{file.name} cannot be read: {reason_of(error)}") from error


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[io.BufferedReader]:
    """Open a file for reading its uncompressed bytes."""
    with open_regular(path) as raw:
        file = cast("io.BufferedReader", raw)
        if file.peek(len(_GZIP))[: len(_GZIP)] != _GZIP:
            yield file
            return
        with gzip.GzipFile(fileobj=file) as unpacked, io.BufferedReader(cast("Any", unpacked)) as buffered:
            yield buffered


def _require_utf8(start: bytes, name: str) -> None:
    is_utf16 = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    if is_utf16 or (len(start) >= 8 and start.count(0) * 4 >= len(start)):
        raise DataError(
            f"{name} is UTF-16, not UTF-8" if is_utf16 else f"{name} is binary or UTF-16: it has many zero bytes",
            hint="convert it: iconv -f UTF-16 -t UTF-8",
        )


def _read_text(opened: io.BufferedReader, file: DataFile, columns: Sequence[str]) -> Iterator[Record]:
    if columns:
        raise DataError(f"{file.name} is text and has no columns", hint="leave --column out")
    content = opened.read(_LONGEST_TEXT + 1)
    if len(content) <= _LONGEST_TEXT:
        yield partial(_text_document, content, file.name)
        return
    source = io.BufferedReader(cast("Any", _Prefixed(content, opened)))
    number = 0
    while piece := source.read(_PIECE_BYTES):
        number += 1
        piece += source.readline(_PIECE_BYTES)
        for _ in range(3):  # a line without an end can be cut within a character
            if _is_inside_character(piece):
                piece += source.read(1)
        yield partial(_text_document, piece, f"piece {number} of {file.name}")


class _Prefixed(io.RawIOBase):
    """Bytes that were read already, followed by the rest of their file."""

    def __init__(self, start: bytes, rest: BinaryIO) -> None:
        self._parts: list[BinaryIO] = [io.BytesIO(start), rest]

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while self._parts:
            found = self._parts[0].read(len(buffer))
            if found:
                buffer[: len(found)] = found
                return len(found)
            self._parts.pop(0)
        return 0


def _is_inside_character(piece: bytes) -> bool:
    """Whether bytes of UTF-8 end in the middle of a character."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    decoder.decode(piece[-4:])
    return bool(decoder.getstate()[0])


def _text_document(content: bytes, where: str) -> Document:
    return Document(where, _decoded(content, where))


def _read_lines(opened: io.BufferedReader, file: DataFile, columns: Sequence[str]) -> Iterator[Record]:
    number = 0
    while line := opened.readline(_LONGEST_LINE):
        number += 1
        if len(line) == _LONGEST_LINE and not line.endswith(b"\n"):
            raise DataError(f"line {number} of {file.name} is longer than 256 MiB", hint="cut it into several records")
        if line.strip():
            yield partial(_line_document, line, f"line {number} of {file.name}", columns)


def _line_document(line: bytes, where: str, columns: Sequence[str]) -> Document:
    text = _decoded(line, where)
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}") from error
    return _json_document(record, where, columns)


def _json_document(record: Any, where: str, columns: Sequence[str]) -> Document:
    if not isinstance(record, (dict, str)):
        raise DataError(f"{where} must be a JSON object, not {type(record).__name__}")
    return as_document(record, where, columns)


def _read_json(opened: io.BufferedReader, file: DataFile, columns: Sequence[str]) -> Iterator[Record]:
    first = opened.readline(_LONGEST_LINE)
    rest = opened.peek(1)
    source = io.BufferedReader(cast("Any", _Prefixed(first, opened)))
    if rest and _is_json(first):
        yield from _read_lines(source, file, columns)
        return
    content = source.read(_LONGEST_JSON + 1)
    if len(content) > _LONGEST_JSON:
        raise DataError(f"{file.name} is larger than 512 MiB", hint="convert it to JSON lines: jq -c '.[]'")
    try:
        value = json.loads(_decoded(content, file.name))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file.name} is not JSON: {error}", hint="pass --format for other data") from error
    for number, record in enumerate(_records_of(value, file.name), start=1):
        yield partial(_json_document, record, f"record {number} of {file.name}", columns)


def _is_json(line: bytes) -> bool:
    """Whether one line is a whole JSON object."""
    try:
        return isinstance(json.loads(line.decode("utf-8-sig")), dict)
    except (ValueError, RecursionError):
        return False


def _records_of(value: Any, name: str) -> list[Any]:
    """Return the list of records of a JSON file."""
    if isinstance(value, dict):
        lists = [item for item in value.values() if isinstance(item, list)]
        is_record = any(field in value for field in FIELDS)
        value = [value] if is_record or len(lists) != 1 else lists[0]
    if not isinstance(value, list):
        raise DataError(f"{name} must be a JSON array or object, not {type(value).__name__}")
    return value


def _read_table(opened: io.BufferedReader, file: DataFile, columns: Sequence[str]) -> Iterator[Record]:
    limit = csv.field_size_limit(_LONGEST_FIELD)
    text = io.TextIOWrapper(opened, encoding="utf-8-sig", newline="")
    try:
        lines = _table_lines(text, file.name)
        first = next(lines, "")
        marks = [mark for mark in (",", ";", "\t") if mark in first]
        separator = "\t" if file.format == TSV or marks[:1] == ["\t"] else (marks or [","])[0]
        rows = csv.reader(_followed(first, lines), delimiter=separator, strict=True)
        names = next(rows, [])
        if len(set(names)) < len(names):
            raise DataError(f"{file.name} has two columns of one name", hint=f"its columns are {names}")
        for number, row in enumerate((row for row in rows if row), start=1):
            where = f"row {number} of {file.name}"
            if len(row) > len(names):
                raise DataError(f"{where} has {len(row)} fields, but the first line has {len(names)}")
            record = dict.fromkeys(names) | {name: field or None for name, field in zip(names, row, strict=False)}
            yield partial(as_document, record, where, columns)
    except csv.Error as error:
        raise DataError(f"{file.name} is not a valid table: {error}", hint="check its quotation marks") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file.name} is not UTF-8: {error.reason}", hint="convert it to UTF-8") from error
    finally:
        csv.field_size_limit(limit)
        text.detach()


def _table_lines(text: io.TextIOWrapper, name: str) -> Iterator[str]:
    number = 0
    while line := text.readline(_LONGEST_LINE):
        number += 1
        if len(line) == _LONGEST_LINE and not line.endswith("\n"):
            raise DataError(f"line {number} of {name} is longer than 256 MiB", hint="cut it into several records")
        if "\0" in line:  # Python 3.10 rejects it
            raise DataError(f"line {number} of {name} has a zero byte", hint="remove it, or convert UTF-16 to UTF-8")
        yield line


def _followed(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _read_parquet(file: DataFile, columns: Sequence[str]) -> Iterator[Record]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise DataError(f"reading {file.name} requires pyarrow", hint="pip install pyarrow") from error
    try:
        with open_regular(file.path) as opened, parquet.ParquetFile(opened) as table:
            names: list[str] | None = chosen_columns(table.schema_arrow.names, columns, file.name)
            if names is not None and any("." in name for name in names):
                names = None  # all columns: pyarrow takes a dot for the path of a part of a column
            number = 0
            for batch in table.iter_batches(batch_size=_ROWS_AT_A_TIME, columns=names):
                for row in range(batch.num_rows):
                    number += 1
                    yield partial(_row_document, batch, row, f"row {number} of {file.name}", columns)
    except FileNotFoundError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(f"{file.name} is not a valid parquet file: {error}") from error


def _row_document(batch: Any, row: int, where: str, columns: Sequence[str]) -> Document:
    import pyarrow

    try:
        (record,) = batch.slice(row, 1).to_pylist()
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        raise DataError(f"{where} cannot be read: {error}") from error
    fields = {column.partition("=")[2] or column: column.partition("=")[0] for column in columns}
    texts = {
        name: _decoded(value, where)
        for name, value in record.items()
        if isinstance(value, bytes) and fields.get(name, name) not in MEDIA_FIELDS
    }
    return as_document(record | texts, where, columns)


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = f"byte {content[error.start]:#04x} at position {error.start}"
        raise DataError(f"{where} is not UTF-8: {byte}", hint="convert it to UTF-8") from error
