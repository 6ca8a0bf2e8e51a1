"""Open input files. An input is a regular file, or a link to one.

A named pipe, a socket or a terminal would make a run wait for somebody who writes into it, and a device may never end;
a pipe can also be read only once, while most inputs are read twice or mapped. So these are rejected at once:
`/dev/stdin` is accepted where it is redirected from a file, and a process substitution (`<(command)`) never.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO, TextIO

# Opening a pipe must not wait for its other end; a terminal must not become that of this process.
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
# What libraries read from a model's or a tokenizer's directory under names of their own.
_READ_BY_LIBRARIES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".safetensors", ".py")


class NotRegularError(OSError):
    """An input that is no regular file; `strerror` says what it is."""


def descriptor_of(path: str | os.PathLike[str]) -> int:
    """Open a regular file to read it; the caller closes the descriptor.

    Raises:
        NotRegularError: for a pipe, socket, device or directory.
        OSError: when it cannot be opened.
    """
    require_regular(path)  # opening a socket fails with a code that says nothing, and opening some devices has effects
    descriptor = os.open(path, _FLAGS)
    try:
        _require(os.fstat(descriptor), path)  # it may have been exchanged since
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file to read bytes from it.

    Raises:
        NotRegularError: for a pipe, socket, device or directory.
        OSError: when it cannot be opened.
    """
    return os.fdopen(descriptor_of(path), "rb")


def read_regular(path: str | os.PathLike[str]) -> bytes:
    """The content of a regular file.

    Raises:
        NotRegularError: for a pipe, socket, device or directory.
        OSError: when it cannot be read.
    """
    with open_regular(path) as file:
        return file.read()


def read_text(path: str | os.PathLike[str]) -> str:
    """The content of a regular file in UTF-8.

    Raises:
        NotRegularError: for a pipe, socket, device or directory.
        OSError: when it cannot be read.
        UnicodeDecodeError: when it is not UTF-8.
    """
    return read_regular(path).decode("utf-8")


def is_there(path: str | os.PathLike[str]) -> bool:
    """Whether there is a regular file; False where there is nothing.

    Raises:
        NotRegularError: for a pipe, socket, device or directory, which must not be passed over as if it were not there.
    """
    try:
        require_regular(path)
    except NotRegularError:
        raise
    except (OSError, ValueError):
        return False
    return True


def require_regular(path: str | os.PathLike[str]) -> None:
    """Check a file that a library will open by its name.

    Raises:
        NotRegularError: for a pipe, socket, device or directory.
        OSError: when there is none.
    """
    _require(os.stat(path), path)


def require_regular_entries(directory: Path) -> None:
    """Check a directory from which libraries read files under names of their own: a model's, or a tokenizer's.

    Raises:
        NotRegularError: for the first entry with the name of a file that is a pipe, socket, device or directory.
        OSError: when the directory cannot be read.
    """
    for name in sorted(os.listdir(directory)):
        if name.endswith(_READ_BY_LIBRARIES):
            is_there(directory / name)  # a link that leads nowhere is for those who need it to complain about


def open_to_append(path: str | os.PathLike[str]) -> TextIO:
    """Open a text file to add lines to it; a device that takes text, such as `/dev/null`, will do.

    Raises:
        NotRegularError: for a pipe, whose reader this would wait for, a socket or a directory.
        OSError: when it cannot be opened.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0)
    with contextlib.suppress(FileNotFoundError):
        _require_not_pipe(os.stat(path), path)
    descriptor = os.open(path, flags | getattr(os, "O_NOCTTY", 0), 0o666)
    try:
        _require_not_pipe(os.fstat(descriptor), path)
        os.set_blocking(descriptor, True)
        return os.fdopen(descriptor, "a", encoding="utf-8")
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
        raise NotRegularError(errno.EINVAL, f"it is {kind}, and a regular file is needed", os.fspath(path))
