"""Find existing artifacts: by the record of an identical request, without building the model, or by the input key.

A compilation leaves a small record beside its artifact, named by the digest of the request's ingredients
(`seqbuild.cache.key`). The record contains the digest of the manifest and the library files that define the model. A
request is a hit if these and all files of the artifact are unchanged.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.artifact.check import check_artifact
from runtime.artifact.encoding import MANIFEST_LIMIT_BYTES, sha256
from runtime.artifact.files import read_contents, read_manifest_bytes
from runtime.artifact.manifest import Manifest
from runtime.errors import ArtifactError, SeqbuildError
from runtime.host.publish import write_file
from runtime.host.regular_files import read_regular
from runtime.language.library_sources import changed_sources
from seqbuild.cache.key import Compilation, digest

RECORD_SUFFIX = ".request"


@dataclass(frozen=True, kw_only=True, slots=True)
class Compiled:
    """Result of a compilation.

    Attributes:
        path: the artifact.
        manifest: its table of contents.
        is_cached: whether the artifact already existed.
        seconds: the elapsed time.
        remarks: further information for the user, one line each.
    """

    path: Path
    manifest: Manifest
    is_cached: bool
    seconds: float = 0.0
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """Record of a compilation, used by later requests.

    Attributes:
        request: the ingredients of the request, by name.
        input_key: the artifact's.
        manifest: sha256 of its manifest file.
        sources: the library files that define the model, module name to sha256.
    """

    request: Mapping[str, str]
    input_key: str
    manifest: str
    sources: Mapping[str, str]


def recall(compilation: Compilation, request: Mapping[str, str]) -> Compiled | None:
    """Return the artifact of an earlier identical request; None if there is none, or anything has changed since."""
    file = record_path(compilation.options.out, request)
    record = read_record(file)
    if record is None or dict(record.request) != dict(request) or changed_sources(record.sources):
        return None
    path = compilation.artifact_path(record.input_key)
    try:
        data = read_manifest_bytes(path, MANIFEST_LIMIT_BYTES)
        if sha256(data) != record.manifest:
            return None
        manifest = Manifest.from_bytes(data, str(path))
        read_contents(path, manifest)  # compares digests; the content itself was checked when it was compiled
    except (ArtifactError, OSError):
        return None
    if changed_sources(manifest.sources):
        return None
    with contextlib.suppress(OSError):  # the directory may not be writable
        os.utime(file)  # `seqbuild cache prune` reads it as the time of the last use
    return Compiled(path=path, manifest=manifest, is_cached=True)


def find_artifact(path: Path, key: str) -> Manifest | None:
    """Return the manifest of the complete artifact with this key at `path`, if its library sources are unchanged.

    Raises:
        ArtifactError: if the existing artifact is damaged.
    """
    if not path.is_dir():
        return None
    found = check_artifact(path).manifest
    return found if found.input_key == key and not changed_sources(found.sources) else None


def remember(request: Mapping[str, str], path: Path, manifest: Manifest, sources: Mapping[str, str]) -> None:
    """Write a record for later requests. If the directory is not writable, later requests are only slower."""
    digest_of_manifest = sha256(manifest.to_bytes())
    record = Record(
        request=dict(request), input_key=manifest.input_key, manifest=digest_of_manifest, sources=dict(sources)
    )
    text = json.dumps(dataclasses.asdict(record), indent=1, sort_keys=True) + "\n"
    try:
        write_file(record_path(path.parent, request), text.encode())
    except (SeqbuildError, OSError):
        return


def is_recorded(request: Mapping[str, str], out: Path, manifest: Manifest) -> bool:
    """Return whether a record confirms that a compilation made this artifact.

    This is the record of the request or, if missing, of another request with the same input key. The content of an
    artifact itself proves nothing.
    """
    own = record_path(out, request)
    others = sorted(path for path in out.glob(f".*{RECORD_SUFFIX}") if path != own)
    known = (record for path in (own, *others) if (record := read_record(path)) is not None)
    made = next((record for record in known if record.input_key == manifest.input_key), None)
    return made is not None and made.manifest == sha256(manifest.to_bytes())


def record_path(out: Path, request: Mapping[str, str]) -> Path:
    """Return the path of a request's record."""
    return out / f".{digest(request)[:32]}{RECORD_SUFFIX}"


def read_record(path: Path) -> Record | None:
    """Read a record; None if it is missing or damaged."""
    try:
        table: Any = json.loads(read_regular(path))
        return Record(
            request=_texts(table["request"]),
            input_key=str(table["input_key"]),
            manifest=str(table["manifest"]),
            sources=_texts(table["sources"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _texts(table: Mapping[Any, Any]) -> dict[str, str]:
    return {str(key): str(value) for key, value in table.items()}
