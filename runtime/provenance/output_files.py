"""The files of a quantized checkpoint, listed with their digests and compared with that list. Torch is not needed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import msgspec

from runtime.console import human_bytes
from runtime.errors import WeightsError
from runtime.host.regular_files import reason_of
from runtime.provenance.hashing import plain_pieces
from runtime.provenance.record import (
    CARD_NAME,
    RECORD_NAME,
    FileDigest,
    OutputFacts,
    ProvenanceRecord,
    encode_record,
    read_record,
)
from runtime.status import doing

_NOT_LISTED = (CARD_NAME, RECORD_NAME)  # people edit the card, and a file cannot state its own digest
_WEIGHTS = ".safetensors"
_MOST_SHOWN = 3
_COPY_AGAIN = "copy or download it again"


def listed_files(directory: Path, known: Mapping[str, str]) -> tuple[FileDigest, ...]:
    """List all files of a checkpoint except its card and its record; digests that are `known` are not computed."""
    found = []
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        name = path.relative_to(directory).as_posix()
        if name not in _NOT_LISTED:
            digest = known[name] if name in known else digest_of(path)
            found.append(FileDigest(name=name, bytes=path.stat().st_size, sha256=digest))
    return tuple(sorted(found, key=lambda file: file.name))


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a regular file.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    for piece in plain_pieces(path):
        digest.update(piece)
    return digest.hexdigest()


def complete_joined(directory: Path) -> None:
    """Add the list of files to the record of a checkpoint that was joined from parts; parts without a record have none.

    Raises:
        WeightsError: the record of the part is damaged.
    """
    if (directory / RECORD_NAME).is_file():
        record = read_record(directory)
        doing("computing digests of the files")
        output = OutputFacts(bytes=record.output.bytes, files=listed_files(directory, {}))
        (directory / RECORD_NAME).write_bytes(encode_record(msgspec.structs.replace(record, output=output)))


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedOutput:
    """A quantized checkpoint whose files are those of its record."""

    record: ProvenanceRecord
    num_files: int
    num_bytes: int


def is_output(path: Path) -> bool:
    """Whether a path is a directory with a record, so that it is no artifact."""
    return (path / RECORD_NAME).is_file()


def check_output(directory: Path) -> CheckedOutput:
    """Compare the files of a quantized checkpoint with its record, which reads all of them.

    Raises:
        WeightsError: a file is missing, differs, or holds weights that the record does not list.
    """
    record = read_record(directory)
    if not record.output.files:
        raise WeightsError(f"{directory / RECORD_NAME} lists no files", hint="join the parts of the checkpoint first")
    total, done, problems = sum(file.bytes for file in record.output.files), 0, []
    for file in record.output.files:
        doing(f"checking {human_bytes(done)} of {human_bytes(total)}")
        problem = _problem_with(directory, file)
        problems += [f"{file.name} {problem}"] if problem else []
        done += file.bytes
    listed = {file.name for file in record.output.files}
    others = (path.relative_to(directory).as_posix() for path in sorted(directory.rglob(f"*{_WEIGHTS}")))
    problems += [f"{name} is not listed in {RECORD_NAME}" for name in others if name not in listed]
    if problems:
        more = f", and {len(problems) - _MOST_SHOWN} more" if len(problems) > _MOST_SHOWN else ""
        text = ", ".join(problems[:_MOST_SHOWN]) + more
        raise WeightsError(f"{directory} is not the checkpoint that was written: {text}", hint=_COPY_AGAIN)
    return CheckedOutput(record=record, num_files=len(record.output.files), num_bytes=total)


def _problem_with(directory: Path, file: FileDigest) -> str:
    """Say in what a file differs from the record; empty if it is the same."""
    parts = PurePosixPath(file.name).parts
    if not parts or file.name.startswith("/") or ".." in parts or "\0" in file.name:
        return "is not the name of a file in it"
    path = directory / file.name
    try:
        size = path.stat().st_size
        if size != file.bytes:
            return f"has {size} bytes instead of {file.bytes}"
        return "" if digest_of(path) == file.sha256 else "has other content"
    except FileNotFoundError:
        return "is missing"
    except (OSError, ValueError) as error:  # a name that no file can have
        return f"cannot be read: {reason_of(error)}"
