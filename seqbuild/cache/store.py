"""Lock an artifact; list and prune a directory of artifacts, their records and remains of interrupted compilations."""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from runtime.artifact.check import read_manifest
from runtime.artifact.manifest import MANIFEST_NAME, Manifest
from runtime.errors import ArtifactError, OutputError
from runtime.host.publish import DAMAGED, PARTIAL, disk_errors
from seqbuild.cache.recall import RECORD_SUFFIX, Record, read_record

_NAME = re.compile(r".+-[0-9a-f]{12}\Z")
_LEFT = re.compile(rf"\.(.+-[0-9a-f]{{12}})\.[^.]+({re.escape(PARTIAL)}|{re.escape(DAMAGED)})\Z")
_LEFT_RECORD = re.compile(rf"\.\..+{re.escape(RECORD_SUFFIX)}\.[^.]+{re.escape(PARTIAL)}\Z")
_LOCK = re.compile(r"\.(.+-[0-9a-f]{12})\.lock\Z")


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """An artifact in the directory.

    Attributes:
        path: its directory.
        manifest: its table of contents; None if damaged.
        damage: a description of the damage, if any.
        num_bytes: the size of all its files.
        used: the time of its last compilation or reuse, in seconds since 1970.
    """

    path: Path
    manifest: Manifest | None
    damage: str
    num_bytes: int
    used: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Pruned:
    """A removed item: its path, the reason, and its size."""

    path: Path
    why: str
    num_bytes: int


def entries(out: Path) -> list[Entry]:
    """List the artifacts under `out`, by name. Only their manifests are read.

    Raises:
        OutputError: if the directory does not exist.
    """
    records = _records(out)
    found = []
    for path in _listed(out):
        if path.is_symlink() or not path.is_dir() or not _NAME.match(path.name) or path.name.startswith("."):
            continue
        if not (path / MANIFEST_NAME).exists():
            continue
        manifest, damage = None, ""
        try:
            manifest = read_manifest(path)
        except ArtifactError as error:
            damage = error.message
        key = manifest.input_key if manifest is not None else None
        mine = [file for file, record in records.items() if record.input_key == key]
        used = max(file.stat().st_mtime for file in (path, *mine))
        found.append(Entry(path=path, manifest=manifest, damage=damage, num_bytes=_num_bytes(path), used=used))
    return found


def nearest(ingredients: Mapping[str, str], known: Sequence[Entry]) -> tuple[Path, dict[str, tuple[str, str]]] | None:
    """Return the artifact that differs in the fewest ingredients, and its value and the given one for each of these.

    Of several, this is the first by name; None if there is no undamaged artifact.
    """
    found: list[tuple[Path, dict[str, tuple[str, str]]]] = []
    for entry in known:
        if entry.manifest is not None:
            theirs = entry.manifest.ingredients
            names = dict.fromkeys((*ingredients, *theirs))
            pairs = {name: (theirs.get(name, "missing"), ingredients.get(name, "missing")) for name in names}
            found.append((entry.path, {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}))
    return min(found, key=lambda each: len(each[1]), default=None)


def prune(
    out: Path, *, older_than_s: float | None = None, max_bytes: int | None = None, everything: bool = False
) -> Iterator[Pruned]:
    """Remove remains of interrupted compilations, and the selected artifacts, except those that a compilation is using.

    Args:
        out: the directory.
        older_than_s: remove artifacts not used for this many seconds.
        max_bytes: remove the least recently used artifacts until the others fit this size.
        everything: remove all artifacts.

    Raises:
        OutputError: if something cannot be removed.
    """
    known = sorted(entries(out), key=lambda entry: (-entry.used, entry.path.name))
    kept, now = 0, time.time()
    for entry in known:
        why = "--all was given" if everything else ""
        if not why and older_than_s is not None and now - entry.used > older_than_s:
            why = f"not used for {(now - entry.used) / 86400:.1f} days"
        if not why and max_bytes is not None and kept + entry.num_bytes > max_bytes:
            why = "it exceeds --max-size"
        if not why:
            kept += entry.num_bytes
            continue
        with locked(entry.path, wait=False) as is_locked:
            if is_locked:
                yield _pruned(entry.path, why, entry.num_bytes)
    yield from _leftovers(out)


def _leftovers(out: Path) -> Iterator[Pruned]:
    """Remove remains of interrupted compilations, and records and locks without an artifact; yield the remains."""
    for path in _listed(out):
        match = _LEFT.match(path.name)
        if match is not None and path.is_dir() and not path.is_symlink():
            with locked(out / match[1], wait=False) as is_locked:
                if is_locked:
                    why = "it was damaged" if match[2] == DAMAGED else "its compilation was killed"
                    yield _pruned(path, why, _num_bytes(path))
        elif _LEFT_RECORD.match(path.name) and path.is_file():
            # A process that is writing it now loses its record, without further consequences.
            yield _pruned(path, "its compilation was killed", path.lstat().st_size)
    for path in _listed(out):
        if path.name.endswith(RECORD_SUFFIX) and read_record(path) is None:
            _remove(path)
    keys = {entry.manifest.input_key for entry in entries(out) if entry.manifest is not None}
    for path, record in _records(out).items():
        if record.input_key not in keys:
            _remove(path)
    for path in _listed(out):
        match = _LOCK.match(path.name)
        if match is not None and not (out / match[1]).exists():
            with locked(out / match[1], wait=False) as is_locked:
                if is_locked:
                    _remove(path)


def _pruned(path: Path, why: str, num_bytes: int) -> Pruned:
    """Remove a path and return what was removed."""
    _remove(path)
    return Pruned(path=path, why=why, num_bytes=num_bytes)


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Let one process at a time make or remove the artifact at `path`.

    Args:
        path: the artifact's directory, which need not exist.
        wait: wait for another process that has the lock; else yield False.
    """
    lock, is_locked = FileLock(path.parent / f".{path.name}.lock", mode=0o666), True
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=-1 if wait else 0)
        except Timeout:
            is_locked = False
    try:
        yield is_locked
    finally:
        lock.release()


def _remove(path: Path) -> None:
    """Remove a path. A directory is renamed first, so that no partial directory is visible."""
    with disk_errors(path):
        if path.is_dir():
            hidden = path if path.name.startswith(".") else path.with_name(f".{path.name}.removed{PARTIAL}")
            path.rename(hidden)
            shutil.rmtree(hidden)
        else:
            path.unlink(missing_ok=True)


def _listed(out: Path) -> list[Path]:
    if not out.is_dir():
        raise OutputError(
            f"there is no directory {out}", hint="pass the directory that seqbuild compile wrote to with --out"
        )
    return sorted(out.iterdir())


def _records(out: Path) -> dict[Path, Record]:
    found = {path: read_record(path) for path in _listed(out) if path.name.endswith(RECORD_SUFFIX)}
    return {path: record for path, record in found.items() if record is not None}


def _num_bytes(path: Path) -> int:
    return sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())
