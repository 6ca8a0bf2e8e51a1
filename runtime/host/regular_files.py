"""Open input files, which must be regular files or links to such.

Reading a named pipe, a socket or a terminal waits for a writer, and a device may never end; a pipe can also be read
only once, while most inputs are read twice or mapped. So these are rejected at once: `/dev/stdin` is accepted if it is
redirected from a file, and a process substitution (`<(command)`) never.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from pathlib import Path
from typing import BinaryIO

# Opening a pipe must not wait for its other end; a terminal must not become the controlling terminal of this process.
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
_CHUNK_BYTES = 2**20
_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
# Endings of the files that libraries open by themselves in a model's or a tokenizer's directory.
_READ_BY_LIBRARIES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".safetensors", ".py")


class NotRegularError(OSError):
    """An input that is not a regular file; `strerror` says what it is."""


def reason_of(error: BaseException) -> str:
    """Say why a file could not be read or parsed, without the path that the caller's message names."""
    return getattr(error, "strerror", None) or str(error)


def descriptor_of(path: str | os.PathLike[str]) -> int:
    """Open a regular file for reading; the caller closes the descriptor.

    Raises:
        NotRegularError: for a pipe, socket, device or directory.
        OSError: if it cannot be opened.
    """
    require_regular(path)  # opening a socket fails with an unclear code, and opening some devices has effects
    descriptor = os.open(path, _FLAGS)
    try:
        _require(os.fstat(descriptor), path)  # the file may have been replaced since
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading bytes; raises as `descriptor_of`."""
    return os.fdopen(descriptor_of(path), "rb")


def read_regular(path: str | os.PathLike[str]) -> bytes:
    """Read the content of a regular file; raises as `descriptor_of`."""
    with open_regular(path) as file:
        return file.read()


def file_digest(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a regular file in hexadecimal, reading it in pieces; raises as `descriptor_of`."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a regular file in UTF-8; raises as `descriptor_of`, and UnicodeDecodeError if it is not UTF-8."""
    return read_regular(path).decode("utf-8")


def is_there(path: str | os.PathLike[str]) -> bool:
    """Whether a regular file exists; False if nothing exists at the path.

    Raises:
        NotRegularError: for a pipe, socket, device or directory, which must not be treated as missing.
    """
    try:
        require_regular(path)
    except NotRegularError:
        raise
    except (OSError, ValueError):
        return False
    return True


def require_regular(path: str | os.PathLike[str]) -> None:
    """Require a regular file, before a library opens it by its name.

    Raises:
        NotRegularError: for a pipe, socket, device or directory.
        OSError: if it does not exist.
    """
    _require(os.stat(path), path)


def require_regular_entries(directory: Path) -> None:
    """Require regular files in a model's or a tokenizer's directory, before libraries open them by themselves.

    Raises:
        NotRegularError: for the first entry with such a name that is a pipe, socket, device or directory.
        OSError: if the directory cannot be read.
    """
    for name in sorted(os.listdir(directory)):
        if name.endswith(_READ_BY_LIBRARIES):
            is_there(directory / name)  # a broken link is an error only for the code that needs the file


def open_to_append(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file for appending, without a buffer; a character device such as `/dev/null` is accepted.

    Raises:
        NotRegularError: for a pipe, which would wait for its reader, a socket or a directory.
        OSError: if it cannot be opened.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0)
    with contextlib.suppress(FileNotFoundError):
        _require_not_pipe(os.stat(path), path)
    descriptor = os.open(path, flags | getattr(os, "O_NOCTTY", 0), 0o666)
    try:
        _require_not_pipe(os.fstat(descriptor), path)
        os.set_blocking(descriptor, True)
        return os.fdopen(descriptor, "ab", buffering=0)
    except BaseException:
        os.close(descriptor)
        raise


def _require_not_pipe(status: os.stat_result, path: str | os.PathLike[str]) -> None:
    if not stat.S_ISCHR(status.st_mode):
        _require(status, path)


def _require(status: os.stat_result, path: str | os.PathLike[str]) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise NotRegularError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "a special file")
        raise NotRegularError(errno.EINVAL, f"it is {kind}, but a regular file is required", os.fspath(path))
