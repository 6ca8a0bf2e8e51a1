"""Find an existing artifact without building the model or importing torch.

The input key of an artifact depends on the model: its class, the files that define it, its default targets. Therefore a
compilation leaves a small record beside its artifact, under a key of the request, which does not depend on the model.
The record contains the digest of the manifest and the library files that define the model. A request is a hit if these
and all files of the artifact are unchanged.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.artifact.encoding import FORMAT_VERSION, MANIFEST_LIMIT_BYTES, canonical, sha256
from runtime.artifact.files import read_contents, read_manifest_bytes
from runtime.artifact.manifest import Manifest
from runtime.errors import ArtifactError, DataError, SeqbuildError
from runtime.host.publish import write_file
from runtime.host.regular_files import read_regular
from runtime.language.library_sources import changed_sources
from seqbuild.cache import key as cache
from seqbuild.model.own_code import own_code_of
from seqbuild.model.source import Source, resolve_source
from seqbuild.options import Options

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
    seconds: float
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


def request(source: Source, options: Options, model_code: Mapping[str, bytes]) -> dict[str, str]:
    """Return all ingredients of a request by name, as `cache.ingredients` does, before the model is built.

    Args:
        source: the model's description on disk.
        options: the options of the compilation.
        model_code: the files of the model's own code, by path.

    Raises:
        DataError: if the sample file does not exist.
    """
    parts = {
        "format": ".".join(map(str, FORMAT_VERSION)),
        **cache.source_ingredients(source, model_code),
        "seqbuild_source": cache.own_digest(),
        "attn_implementation": str(options.attn_implementation or "the model's own"),
        "targets": json.dumps(list(options.targets)),
        "ignore": json.dumps(list(options.ignore)),
        "auto_ignore": json.dumps(options.auto_ignore),
        "leaves": options.leaves,
        "targets_per_subgraph": str(options.targets_per_subgraph),
        "sample": _sample(options),
    }
    return parts | {f"version_{name}": version for name, version in cache.versions().items()}


def _sample(options: Options) -> str:
    if options.sample is None:
        return "made up, text only" if options.text_only else "made up"
    try:
        return sha256(read_regular(options.sample))
    except OSError as error:
        raise DataError(f"the sample {options.sample} cannot be read: {error.strerror}") from error


def recall(parts: Mapping[str, str], name: str, out: Path) -> Compiled | None:
    """Return the artifact of an earlier identical request, if nothing has changed since.

    Args:
        parts: the ingredients of the request.
        name: the model's name.
        out: the directory of artifacts.

    Returns:
        The artifact, or None if anything has changed or is unknown.
    """
    start = time.perf_counter()
    record = read_record(record_path(out, parts))
    if record is None or dict(record.request) != dict(parts) or changed_sources(record.sources):
        return None
    path = out / f"{name}-{record.input_key[:12]}"
    try:
        data = read_manifest_bytes(path, MANIFEST_LIMIT_BYTES)
        if sha256(data) != record.manifest:
            return None
        manifest = Manifest.from_bytes(data, str(path))
        read_contents(path, manifest)  # as they were when they were checked
    except (ArtifactError, OSError):
        return None
    if changed_sources(manifest.sources):
        return None
    _touch(out, parts)
    return Compiled(path=path, manifest=manifest, is_cached=True, seconds=time.perf_counter() - start)


def recalled(
    model: str, options: Options, *, out: Path, revision: str | None = None, trust_remote_code: bool = False
) -> Compiled | None:
    """Recall an artifact from a model's name, with the arguments of `seqbuild.build.build`; None if a build is needed.

    Raises:
        ModelError: if there is no such model, or it needs code that is not allowed to run.
    """
    source = resolve_source(model, revision=revision)
    with own_code_of(source, is_allowed=trust_remote_code) as own:
        return recall(request(source, options, own.files if own is not None else {}), source.name, out)


def remember(parts: Mapping[str, str], path: Path, manifest: Manifest, sources: Mapping[str, str]) -> None:
    """Write a record for later requests. If the directory is not writable, later requests are only slower."""
    record = {
        "request": dict(parts),
        "input_key": manifest.input_key,
        "manifest": sha256(manifest.to_bytes()),
        "sources": dict(sources),
    }
    try:
        write_file(record_path(path.parent, parts), (json.dumps(record, indent=1, sort_keys=True) + "\n").encode())
    except (SeqbuildError, OSError):
        return


def vouched(parts: Mapping[str, str], out: Path, manifest: Manifest) -> bool:
    """Return whether a record confirms that a compilation made this artifact.

    This is the record of the request or, if missing, of another request with the same input key. The content of an
    artifact itself proves nothing.

    Args:
        parts: the ingredients of the request.
        out: the directory of artifacts.
        manifest: the artifact's manifest.
    """
    own = record_path(out, parts)
    others = sorted(path for path in out.glob(f".*{RECORD_SUFFIX}") if path != own)
    known = (record for path in (own, *others) if (record := read_record(path)) is not None)
    made = next((record for record in known if record.input_key == manifest.input_key), None)
    return made is not None and made.manifest == sha256(manifest.to_bytes())


def record_path(out: Path, parts: Mapping[str, str]) -> Path:
    """Return the path of a request's record."""
    return out / f".{sha256(canonical(dict(parts)))[:32]}{RECORD_SUFFIX}"


def read_record(path: Path) -> Record | None:
    """Read a record; None if it is missing or damaged."""
    try:
        table: Any = json.loads(read_regular(path))
        record = Record(
            request=_texts(table["request"]),
            input_key=str(table["input_key"]),
            manifest=str(table["manifest"]),
            sources=_texts(table["sources"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return record


def _touch(out: Path, parts: Mapping[str, str]) -> None:
    """Mark a record as used, for `seqbuild cache prune`."""
    try:
        os.utime(record_path(out, parts))
    except OSError:
        return


def _texts(table: Mapping[Any, Any]) -> dict[str, str]:
    return {str(key): str(value) for key, value in table.items()}
