"""Check an artifact: its manifest, the digest of every file, the grammar of every program, and the consistency of its
tables, in this order. No part of it is executed or imported (docs/format.md, "What a reader must do").
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime.artifact.cached_values import wrong_cached
from runtime.artifact.chain_order import MOST_SUBGRAPHS
from runtime.artifact.config_policy import check_config
from runtime.artifact.constants import check_constants
from runtime.artifact.encoding import MANIFEST_LIMIT_BYTES
from runtime.artifact.files import read_contents, read_manifest_bytes, read_signature
from runtime.artifact.manifest import MANIFEST_NAME, ConversionEntry, Manifest, SubgraphEntry
from runtime.artifact.own_code import ModelCode, check_model_code
from runtime.artifact.signature import required_keys, verify_signature
from runtime.artifact.tables import check_tables
from runtime.errors import ArtifactError, VersionError
from runtime.language.grammar import Allowed, check_program
from runtime.language.library_sources import changed_sources
from runtime.language.opaque import require_harmless
from runtime.language.operators import check_operators
from runtime.status import doing

_SOURCES_SHOWN = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """The contents of an artifact that passed every check.

    Attributes:
        manifest: the table of contents.
        manifest_bytes: the content of the manifest file.
        contents: content of every listed file by path, as it was when its digest was compared.
        sources: the text of every program, by file.
        operators: that the programs call, each with a file that calls it.
        code: the model's own code; None for a model that is part of transformers.
        signed: whether a signature was required and is valid.
    """

    manifest: Manifest
    manifest_bytes: bytes
    contents: Mapping[str, bytes]
    sources: Mapping[str, str]
    operators: Mapping[str, str]
    code: ModelCode | None
    signed: bool = False


def check_artifact(root: Path, public_keys: Sequence[Path] = ()) -> Checked:
    """Check an artifact without executing or importing any part of it.

    Args:
        root: its directory.
        public_keys: keys that must each have signed it, in addition to the host's own (`signature.REQUIRED`).

    Raises:
        ArtifactError: naming the file and the problem.
        SignatureError: when the signature of one of the keys is missing or invalid.
    """
    doing("checking the artifact")
    data = read_manifest_bytes(root, MANIFEST_LIMIT_BYTES)
    manifest = Manifest.from_bytes(data, str(root / MANIFEST_NAME))
    if len(manifest.subgraphs) > MOST_SUBGRAPHS:  # before each is compared with its code
        raise ArtifactError(f"{root} has {len(manifest.subgraphs)} subgraphs, and 1 to {MOST_SUBGRAPHS} are supported")
    contents = read_contents(root, manifest)
    keys = required_keys(public_keys)
    for key in keys:
        verify_signature(root.resolve().name, {MANIFEST_NAME: data, **contents}, read_signature(root), key)
    code = check_model_code(manifest, contents)
    own_modules = code.modules if code is not None else ()
    operators, sources = check_programs(manifest, contents, own_modules)
    named = sources.keys() | set(manifest.model.code)
    for path in contents:
        if path.endswith(".py") and path not in named:
            raise ArtifactError(f"{path} is Python code that {root / MANIFEST_NAME} does not list as a program")
    check_tables(manifest)
    for wrong in wrong_cached(manifest, sources):
        raise ArtifactError(wrong)
    check_config(contents, has_own_code=code is not None)
    check_constants(contents, manifest.constants)
    check_operators(operators)
    return Checked(
        manifest=manifest,
        manifest_bytes=data,
        contents=contents,
        sources=sources,
        operators=operators,
        code=code,
        signed=bool(keys),
    )


def check_programs(
    manifest: Manifest, contents: Mapping[str, bytes], own_modules: Sequence[str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Check all programs; the model's own code is checked elsewhere.

    Args:
        manifest: the table of contents.
        contents: every file of the artifact by path.
        own_modules: modules of the model's own code.

    Returns:
        The operators that the programs call, each with a file that calls it, and the text of every program, by file.

    Raises:
        ArtifactError: naming the file, the line and the construct that is not allowed.
    """
    operators: dict[str, str] = {}
    sources: dict[str, str] = {}
    for file, allowed in dict.fromkeys(_programs(manifest, own_modules)):
        if file not in contents:
            raise ArtifactError(f"{file} is named as a program but not listed among the artifact's files")
        if file in manifest.model.code:
            raise ArtifactError(f"{file} is named as a program and as the model's own code")
        for operator in check_program(contents[file], allowed, file):
            operators.setdefault(operator, file)
        sources[file] = contents[file].decode("ascii")
    for step in manifest.opaque_steps:
        require_harmless(step, (manifest.model.module,), own_modules)
    return operators, sources


def read_manifest(root: Path) -> Manifest:
    """Read and check only the manifest.

    Raises:
        ArtifactError: when it is missing or malformed.
    """
    return Manifest.from_bytes(read_manifest_bytes(root, MANIFEST_LIMIT_BYTES), str(root / MANIFEST_NAME))


def check_versions(manifest: Manifest, *, allow_version_skew: bool) -> None:
    """Compare the library sources that the artifact depends on with those on this host. Versions are compared only for
    artifacts that record no digests.

    Raises:
        VersionError: when they differ and `allow_version_skew` is false.
    """
    if allow_version_skew:
        return
    if manifest.is_portable:
        return  # no code of this host's transformers runs
    wanted, found = manifest.versions.get("transformers", ""), importlib.metadata.version("transformers")
    changed = changed_sources(manifest.sources)
    if not changed and (manifest.sources or wanted == found):
        return
    what = f"the artifact was compiled with transformers {wanted}, this host has {found}"
    if changed:
        shown = ", ".join(changed[:_SOURCES_SHOWN]) + (" and others" if len(changed) > _SOURCES_SHOWN else "")
        what += f", and {len(changed)} of the {len(manifest.sources)} source files it relies on differ: {shown}"
    mend = "restore the released files" if wanted == found else f"install transformers=={wanted}"
    raise VersionError(
        what,
        hint="layers are called as modules of transformers, so other sources may compute something else: "
        f"{mend}, compile again, or accept it with --allow-version-skew",
    )


def _programs(manifest: Manifest, own_modules: Sequence[str]) -> list[tuple[str, Allowed]]:
    """List the file of every program with the names that it may use."""
    programs = [(entry.file, _allowed(entry, own_modules)) for entry in manifest.subgraphs]
    programs += [(entry.file, _allowed_conversion(entry)) for entry in manifest.conversions]
    for kind in manifest.leaf_kinds:
        if kind.program:
            allowed = Allowed(input_names=kind.arguments, output_names=("output",), attributes=kind.attributes)
            programs.append((kind.program, allowed))
    return programs


def _allowed_conversion(entry: ConversionEntry) -> Allowed:
    names = tuple(f"source_{index}" for index in range(entry.num_sources))
    return Allowed(input_names=names, output_names=("value",))


def _allowed(entry: SubgraphEntry, own_modules: Sequence[str]) -> Allowed:
    inside = f"{entry.scope}." if entry.scope else ""
    outside = [n for n in (*entry.submodules, *entry.attributes, *entry.objects) if not n.startswith(inside)]
    if outside or (entry.arguments and len(entry.arguments) != len(entry.input_names)):
        raise ArtifactError(f"{entry.file} uses names outside of its scope, or has other inputs than its subgraph")
    relative = {
        kind: tuple(name.removeprefix(inside) for name in getattr(entry, kind))
        for kind in ("submodules", "attributes", "objects")
    }
    return Allowed(
        input_names=entry.arguments or entry.input_names,
        output_names=entry.results or entry.output_names,
        constants=entry.constants,
        opaque=entry.opaque,
        own_modules=tuple(own_modules),
        **relative,
    )
