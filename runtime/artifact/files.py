"""Read the files of an artifact's directory: regular files that its manifest lists, each opened once and read once.

The bytes that are compared with the manifest are the bytes that run: nothing is read again from the disk afterwards.
Files are opened relative to their directory's descriptor and never through a link, so that a path cannot be redirected
between the check and the read.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

from runtime.artifact.encoding import sha256
from runtime.artifact.manifest import MANIFEST_NAME, FileEntry, Manifest
from runtime.errors import ArtifactError

FILES_LIMIT = 20_000
_PARTS_LIMIT, _PATH_LIMIT = 16, 400
# Limits for one file and for all together, except constants: files are read completely before they are checked.
_FILE_LIMIT_BYTES, _TOTAL_LIMIT_BYTES = 2**28, 2**30
# Opening a pipe must not wait for its other end.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\Z")
# Allowed besides programs: files that describe a model or its tokenizer. No library loads code from these.
_KINDS = (".py", ".json", ".txt", ".model", ".jinja", ".tiktoken")
CONSTANTS_NAME = "constants.safetensors"
# A signature covers the manifest, so it cannot be listed there.
SIGNATURE_NAME = "signature.json"
_SIGNATURE_LIMIT_BYTES = 64 * 2**20


def read_contents(root: Path, manifest: Manifest) -> dict[str, bytes]:
    """Read every listed file of an artifact and compare its size and digest.

    Args:
        root: the artifact's directory.
        manifest: lists the files.

    Returns:
        Content by path, in the manifest's order.

    Raises:
        ArtifactError: for a file that is damaged, missing, not listed or not a regular file.
    """
    listed = _listed(root, manifest.files)
    with _opened(root) as folder:
        present = dict.fromkeys(_present(root, folder, listed))
        for name in listed:
            if name not in present:
                raise ArtifactError(f"{root} is incomplete: {name} is missing", hint="copy or compile it again")
        return {name: _verified(root, folder, entry) for name, entry in listed.items()}


def read_manifest_bytes(root: Path, limit: int) -> bytes:
    """Read the manifest file.

    Raises:
        ArtifactError: when it is missing, not a regular file, or too large.
    """
    with _opened(root) as folder:
        try:
            return _read(root, folder, MANIFEST_NAME, limit)
        except FileNotFoundError as error:
            raise ArtifactError(f"{root} is not an artifact: it has no {MANIFEST_NAME}") from error


def read_signature(root: Path) -> bytes | None:
    """Read the signature file; None when the artifact has none.

    Raises:
        ArtifactError: when it is not a regular file or too large.
    """
    with _opened(root) as folder:
        try:
            return _read(root, folder, SIGNATURE_NAME, _SIGNATURE_LIMIT_BYTES)
        except FileNotFoundError:
            return None


@contextlib.contextmanager
def _opened(root: Path) -> Iterator[int]:
    try:
        # The artifact's directory may be a link; the files in it may not.
        folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        what = f"{root} is not a directory"
        raise ArtifactError(what, hint="an artifact is a directory that seqbuild compile wrote") from error
    try:
        yield folder
    finally:
        os.close(folder)


def _listed(root: Path, files: Collection[FileEntry]) -> dict[str, FileEntry]:
    if len(files) > FILES_LIMIT:
        raise ArtifactError(f"{root} lists {len(files)} files, more than the {FILES_LIMIT} allowed")
    listed: dict[str, FileEntry] = {}
    total = 0
    for entry in files:
        total += entry.bytes if entry.path != CONSTANTS_NAME else 0
        if entry.path != CONSTANTS_NAME and (entry.bytes > _FILE_LIMIT_BYTES or total > _TOTAL_LIMIT_BYTES):
            raise ArtifactError(
                f"{root} lists {entry.path[:_PATH_LIMIT]} with {entry.bytes} bytes, {total} in all: more than the "
                f"{_FILE_LIMIT_BYTES} for one file and {_TOTAL_LIMIT_BYTES} for all that are allowed"
            )
        parts = entry.path[: _PATH_LIMIT + 1].split("/")
        if len(entry.path) > _PATH_LIMIT or len(parts) > _PARTS_LIMIT:
            raise ArtifactError(f"{root} lists a file with a path of {len(entry.path)} characters: {parts[0][:40]}/...")
        if not all(map(_PART.match, parts)) or entry.path in (MANIFEST_NAME, SIGNATURE_NAME):
            raise ArtifactError(
                f"{root} lists a file with the path {entry.path!r}, which leaves the directory or is not plain"
            )
        if entry.path in listed:
            raise ArtifactError(f"{root} lists {entry.path} twice")
        if not entry.path.endswith(_KINDS) and entry.path != CONSTANTS_NAME:
            raise ArtifactError(f"{root} lists {entry.path}, which has an unsupported file type")
        listed[entry.path] = entry
    return listed


def _present(root: Path, folder: int, listed: Collection[str]) -> Iterator[str]:
    """Yield the names of the files in a folder; raise an error for the first that is not allowed."""
    folders = {name.rpartition("/")[0] for name in listed}
    folders |= {folder[:end] for folder in folders for end, part in enumerate(folder) if part == "/"}
    pending = [""]
    while pending:
        prefix = pending.pop()
        descriptor = os.open(prefix, _FOLDER, dir_fd=folder) if prefix else os.dup(folder)
        try:
            with os.scandir(descriptor) as found:
                entries = sorted(found, key=lambda entry: entry.name)
                for entry in entries:
                    name = f"{prefix}/{entry.name}" if prefix else entry.name
                    status = entry.stat(follow_symlinks=False)
                    _require_plain(root, name, status)
                    if stat.S_ISDIR(status.st_mode):
                        if name in folders:
                            pending.append(name)
                        elif name not in listed:
                            raise _unlisted(root, _first_inside(root, name))
                    elif name in listed:
                        yield name
                    elif name not in (MANIFEST_NAME, SIGNATURE_NAME):
                        raise _unlisted(root, name)
        finally:
            os.close(descriptor)


def _unlisted(root: Path, name: str) -> ArtifactError:
    return ArtifactError(f"{root} contains {name}, which its manifest does not list", hint="remove it")


def _first_inside(root: Path, name: str) -> str:
    """Name an unexpected directory in messages: by the first file in it, if that is easily found."""
    for _ in range(8):
        inner = sorted(os.listdir(root / name))
        if not inner:
            break
        name = f"{name}/{inner[0]}"
        if not stat.S_ISDIR(os.lstat(root / name).st_mode):
            break
    return name


def _require_plain(root: Path, name: str, status: os.stat_result) -> None:
    if stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
        raise ArtifactError(
            f"{root / name} is not a plain file: it has {status.st_nlink} hard links",
            hint="a file with several hard links can be changed from elsewhere; copy the artifact (cp -r)",
        )
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise ArtifactError(f"{root / name} is not a plain file", hint="artifacts must not contain links or devices")


def _verified(root: Path, folder: int, entry: FileEntry) -> bytes:
    data = _read(root, folder, entry.path, max(entry.bytes, 0))
    if len(data) != entry.bytes or sha256(data) != entry.sha256:
        raise ArtifactError(
            f"{root / entry.path} is damaged: its content does not match the manifest",
            hint="copy or compile it again; nothing of it was executed",
        )
    return data


def _read(root: Path, folder: int, name: str, limit: int) -> bytes:
    """Read a file; of one longer than `limit`, only enough to show that it is."""
    *outer, last = name.split("/")
    opened: list[int] = []
    try:
        for part in outer:
            folder = os.open(part, _FOLDER, dir_fd=folder)
            opened.append(folder)
        file = os.open(last, _FILE, dir_fd=folder)
        opened.append(file)
        status = os.fstat(file)
        _require_plain(root, name, status)
        if not stat.S_ISREG(status.st_mode):
            raise FileNotFoundError(name)
        if status.st_size > limit:
            raise ArtifactError(
                f"{root / name} is damaged: its content does not match the manifest, or is too large",
                hint="copy or compile it again; nothing of it was executed",
            )
        with os.fdopen(os.dup(file), "rb") as stream:
            return stream.read(status.st_size + 1)
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ArtifactError(f"{root / name} is not a plain file, or cannot be read: {error.strerror}") from error
    finally:
        for descriptor in opened:
            os.close(descriptor)
