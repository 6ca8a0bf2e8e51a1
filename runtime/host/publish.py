"""Publish a directory or file atomically: it appears under its name only when it is complete.

Everything is written next to its final place under a temporary name, flushed to disk, and renamed. A crash leaves at
most a directory or file whose name begins with a dot and ends in `.partial`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from runtime.errors import OutputError, SeqbuildError

PARTIAL, DAMAGED = ".partial", ".damaged"


@contextlib.contextmanager
def publish_directory(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a new directory that becomes `path` when the block ends without an exception.

    Args:
        path: the final name. An empty directory there is replaced.
        replace: also replace a directory that is not empty; it stays in place until the new one is complete.

    Raises:
        OutputError: if `path` exists, or cannot be written.
    """
    require_free(path, replace=replace)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=PARTIAL, dir=path.parent))
    try:
        with disk_errors(path):
            yield partial
            partial.chmod(0o777 & ~umask())
            flush_tree(partial)
            put_in_place(partial, path, replace=replace)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def move_aside(path: Path) -> Path:
    """Rename a damaged directory instead of deleting it.

    Returns:
        Its new name, next to the old one: it begins with a dot and ends in `.damaged`.

    Raises:
        OutputError: if it cannot be renamed.
    """
    with disk_errors(path):
        place = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=DAMAGED, dir=path.parent))
        os.replace(path, place)
        flush_one(path.parent)
    return place


def require_free(path: Path, *, replace: bool = False) -> None:
    """Require that a path does not exist, or is a directory that may be replaced.

    Raises:
        OutputError: naming the path.
    """
    with disk_errors(path):
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise OutputError(f"{path} exists and is not a directory", hint="choose another output")
        if path.is_dir() and any(path.iterdir()) and not replace:
            raise OutputError(f"output directory {path} is not empty", hint="choose another, or remove it")
        if path.is_dir() and (os.path.ismount(path) or path.resolve() in (Path.cwd(), *Path.cwd().parents)):
            # Publishing renames: a mount point cannot be renamed, and a shell in the directory would lose it.
            hint = f"choose a directory inside it, such as {path / 'out'}"
            raise OutputError(f"{path} is a mount point or the current directory and cannot be replaced", hint=hint)


def require_writable(path: Path) -> None:
    """Require that a new file or directory can be created, before the work that ends with it.

    Raises:
        OutputError: naming the directory that cannot be changed.
    """
    with disk_errors(path):
        parent = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
        if not parent.is_dir():
            raise OutputError(f"cannot write {path}: part of the path is not a directory", hint=f"{parent} is a file")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise OutputError(
                f"cannot write {path}: no permission to create files in {parent}", hint="choose another output"
            )


def require_outside(path: Path, *sources: Path) -> None:
    """Require an output outside the directories that the run reads, because writing would change them.

    Raises:
        OutputError: naming both directories.
    """
    for source in sources:
        if path.resolve().is_relative_to(source.resolve()):
            raise OutputError(
                f"output directory {path} is inside the input directory {source}", hint="choose another output"
            )


def write_file(path: Path, data: bytes) -> None:
    """Write a file atomically: `path` never has partial content.

    Raises:
        OutputError: if it cannot be written.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=PARTIAL, dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            make_readable(Path(name))
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files under a new directory, by their relative paths."""
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)


def put_in_place(partial: Path, path: Path, *, replace: bool = False) -> None:
    """Rename a complete directory to its final name, and flush the rename to disk."""
    if path.is_dir():
        if any(path.iterdir()) and not replace:
            raise OutputError(f"another process has written to output directory {path}", hint="choose another output")
        old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=PARTIAL, dir=path.parent))
        os.replace(path, old)
        try:
            os.replace(partial, path)
        except BaseException:
            os.replace(old, path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(partial, path)
    flush_one(path.parent)


def flush_tree(directory: Path) -> None:
    """Flush a directory and everything in it to disk."""
    for folder, _, names in os.walk(directory, topdown=False):
        for name in names:
            flush_one(Path(folder, name))
        flush_one(Path(folder))


def flush_one(path: Path) -> None:
    """Flush a file, or the entries of a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_readable(file: Path) -> None:
    """Give a temporary file, which only its owner can read, the permissions of an ordinary new file."""
    file.chmod(0o666 & ~umask())


def umask() -> int:
    """The process's umask: the permission bits that its new files do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def disk_errors(path: Path, hint: Callable[[], str] = lambda: "nothing was left behind") -> Iterator[None]:
    """Convert errors of the disk or its permissions to an OutputError; `hint` is called only for an error."""
    reasons = {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the disk quota is used up",
        errno.EFBIG: "a file is larger than the file system or ulimit -f allows",
        errno.EROFS: "the file system is read-only",
        errno.EACCES: "permission denied",
        errno.EPERM: "permission denied",
        errno.ENOTDIR: "part of the path is not a directory",
        errno.EEXIST: "part of the path is not a directory",
        errno.ENAMETOOLONG: "the name is too long",
    }
    try:
        yield
    except SeqbuildError:
        raise
    except OSError as error:
        if error.errno not in reasons:
            raise
        raise OutputError(f"cannot write {path}: {reasons[error.errno]}", hint=hint()) from error
