"""Find an artifact that has been compiled, without building the model or importing torch.

The input key of an artifact needs the model: its class, the files that define it, the targets it names. So a
compilation leaves a small record beside its artifact, under a key of what was asked for, of which nothing needs the
model. The record says what the artifact's manifest is, and which library files the model was made of; a request is a
hit when all of them are as they were, and so is every file of the artifact.
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
    """What a compilation did.

    Attributes:
        path: the artifact.
        manifest: its table of contents.
        is_cached: whether it was there already.
        seconds: how long it took.
        remarks: what else a user should know, a line each.
    """

    path: Path
    manifest: Manifest
    is_cached: bool
    seconds: float
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """What a compilation leaves for the next one.

    Attributes:
        request: the ingredients of the request, by name.
        input_key: the artifact's.
        manifest: sha256 of its manifest file.
        sources: the library files that the model is made of, module name to sha256.
    """

    request: Mapping[str, str]
    input_key: str
    manifest: str
    sources: Mapping[str, str]


def request(source: Source, options: Options, model_code: Mapping[str, bytes]) -> dict[str, str]:
    """All that a request consists of, by name: as `cache.ingredients`, before the model is known.

    Args:
        source: the model's description on disk.
        options: what is asked for.
        model_code: the files of the model's own code, by path.

    Raises:
        DataError: when there is no such sample.
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
    """The artifact that this request was answered with, if all is as it was then.

    Args:
        parts: of the request.
        name: of the model.
        out: where artifacts are.

    Returns:
        The artifact; None when something is not, or is not known, as it was.
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
    """The same from a model's name, as `seqbuild.build.build` takes it; None where that has to build.

    Raises:
        ModelError: when there is no such model, or it needs code that nobody has allowed to run.
    """
    source = resolve_source(model, revision=revision)
    with own_code_of(source, is_allowed=trust_remote_code) as own:
        return recall(request(source, options, own.files if own is not None else {}), source.name, out)


def remember(parts: Mapping[str, str], path: Path, manifest: Manifest, sources: Mapping[str, str]) -> None:
    """Leave a record for the next such request. A place that takes none costs time then, and nothing else."""
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
    """Whether a record says that a compilation made this artifact: the request's own, or, where it has none, that of
    another request with the same input key. What stands in an artifact itself proves nothing.

    Args:
        parts: of the request.
        out: where artifacts are.
        manifest: that of the artifact.
    """
    own = record_path(out, parts)
    others = sorted(path for path in out.glob(f".*{RECORD_SUFFIX}") if path != own)
    known = (record for path in (own, *others) if (record := read_record(path)) is not None)
    made = next((record for record in known if record.input_key == manifest.input_key), None)
    return made is not None and made.manifest == sha256(manifest.to_bytes())


def record_path(out: Path, parts: Mapping[str, str]) -> Path:
    """Where the record of a request is."""
    return out / f".{sha256(canonical(dict(parts)))[:32]}{RECORD_SUFFIX}"


def read_record(path: Path) -> Record | None:
    """A record, None where there is none or it is damaged."""
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
    """Note that a record was of use, for `seqbuild cache prune`."""
    try:
        os.utime(record_path(out, parts))
    except OSError:
        return


def _texts(table: Mapping[Any, Any]) -> dict[str, str]:
    return {str(key): str(value) for key, value in table.items()}
