"""Find the files and data sets of a source, and read their documents."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TextIO

from runtime.data.documents import Document, require_file
from runtime.data.file_formats import (
    SUFFIXES,
    SUPPORTED,
    DataFile,
    Record,
    format_of,
    read_records,
    require_format,
    sniffed_format,
)
from runtime.data.hub_datasets import cached_parts, directory_parts, is_saved, saved_parts
from runtime.data.sources import STANDARD_INPUT, DataPart, DataSource
from runtime.errors import DataError, UsageError
from runtime.host.hub import is_id
from runtime.host.regular_files import file_digest, reason_of

_CHUNK_BYTES = 2**20
_STANDARD_INPUT = "standard input"
# Copies of standard input, by the stream that was read; removed when the process ends.
_SPOOLED: list[tuple[TextIO, tempfile._TemporaryFileWrapper[bytes]]] = []


def parts_of(source: DataSource) -> list[DataPart]:
    """Return the files or the data set of a source, in the order in which they are read.

    Raises:
        DataError: nothing is there, or it is not supported.
        UsageError: a setting does not apply to the source.
    """
    require_format(source.format)
    if source.location == STANDARD_INPUT:
        _require_no_split(source, _STANDARD_INPUT)
        return [_standard_input(source)]
    path = Path(source.location)
    if is_saved(path):
        return saved_parts(source, path)
    if os.path.isdir(path) and not format_of(path):  # a directory named x.txt is a mistake
        if source.is_of_data_set:
            return directory_parts(source, path)
        return _directory(source, path)
    if not os.path.lexists(path) and format_of(path) is None and is_id(source.location):
        return cached_parts(source)
    require_file(path)
    _require_no_split(source, str(path))
    name = source.format or format_of(path)
    if name is None:
        raise DataError(
            f"unsupported extension {path.suffix!r} of {path}",
            hint=f"supported are {SUPPORTED}; for another name pass --format",
        )
    return [_file_part(DataFile(path=path, name=str(path), format=name), path.name, source)]


def _require_no_split(source: DataSource, name: str) -> None:
    if source.is_of_data_set:
        raise UsageError(
            f"{name} is a file, which has no split, config or revision", hint="these are for data sets and directories"
        )


def _directory(source: DataSource, root: Path) -> list[DataPart]:
    """Return the supported files in a directory and those below it, except hidden and empty ones."""
    found = []
    for path in sorted(_files_below(root), key=lambda path: path.relative_to(root).as_posix()):
        name = format_of(path)
        if name is not None and (source.format is None or source.format == name) and path.stat().st_size:
            file = DataFile(path=path, name=str(path), format=name)
            found.append(_file_part(file, path.relative_to(root).as_posix(), source))
    if not found:
        raise DataError(f"{root} has no data files", hint=f"supported are {', '.join(SUFFIXES)}")
    return found


def _files_below(root: Path) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be read: {reason_of(error)}") from error

    for folder, folders, names in os.walk(root, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(folder, name)
            if not name.startswith(".") and os.path.isfile(path):
                yield path


def _file_part(file: DataFile, name: str, source: DataSource) -> DataPart:
    before = _state(file)

    def digest() -> str:
        try:
            found = file_digest(file.path)
        except OSError as error:
            raise DataError(f"{file.name} cannot be read: {reason_of(error)}") from error
        if _state(file) != before:
            raise DataError(f"{file.name} changed while it was read", hint="try again when nothing writes to it")
        return found

    return DataPart(name=name, records=partial(_records, file, source.columns), digest=digest)


def _records(file: DataFile, columns: tuple[str, ...]) -> Iterator[Record]:
    require_file(file.path)
    base = Path() if file.name == _STANDARD_INPUT else file.path.parent
    return (partial(_based, record, base) for record in read_records(file, columns))


def _based(record: Record, base: Path) -> Document:
    return record().relative_to(base)


def _state(file: DataFile) -> tuple[int, ...]:
    try:
        found = os.stat(file.path)
    except OSError as error:
        raise DataError(f"{file.name} cannot be read: {reason_of(error)}") from error
    return found.st_ino, found.st_size, found.st_mtime_ns


def _standard_input(source: DataSource) -> DataPart:
    if sys.stdin is None or sys.stdin.isatty():
        state = "closed" if sys.stdin is None else "a terminal"
        raise UsageError(f"standard input is {state}", hint="pipe data into the command, or pass a file")
    path = _spooled(sys.stdin)
    if not path.stat().st_size:
        raise DataError("standard input is empty")
    name = source.format or sniffed_format(path)
    return _file_part(DataFile(path=path, name=_STANDARD_INPUT, format=name), _STANDARD_INPUT, source)


def _spooled(stream: TextIO) -> Path:
    """Copy a stream to a temporary file, because a pipe can be read only once; return the copy if there is one."""
    for known, file in _SPOOLED:
        if known is stream:
            return Path(file.name)
    spooled = tempfile.NamedTemporaryFile(prefix="seqbuild-")  # noqa: SIM115
    try:
        while chunk := stream.buffer.read(_CHUNK_BYTES):
            spooled.write(chunk)
        spooled.flush()
    except OSError as error:
        raise DataError(f"standard input cannot be read: {reason_of(error)}") from error
    _SPOOLED.append((stream, spooled))
    return Path(spooled.name)
