"""The command `check`, which both command lines have: of an artifact, or of a quantized checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import runtime.cli.options as given
from runtime.cli.run import require_output
from runtime.console import human_bytes, say

Checked = Annotated[
    Path,
    typer.Argument(
        metavar="DIRECTORY", help="Written by seqbuild compile or seqbuild pack, or a quantized checkpoint."
    ),
]


def check(
    artifact: Checked,
    public_key: given.PublicKey = None,
    allow_version_skew: given.Skew = False,
) -> None:
    """Check an artifact without executing any of its code, or the files of a quantized checkpoint."""
    from runtime.provenance.output_files import is_output

    require_output()
    if is_output(artifact):
        _check_output(artifact, public_key)
    else:
        _check_artifact(artifact, public_key, allow_version_skew)


def _check_output(path: Path, public_key: Path | None) -> None:
    """Compare a quantized checkpoint with its record."""
    from runtime.errors import UsageError
    from runtime.provenance.output_files import check_output
    from runtime.provenance.record import RECORD_NAME

    if public_key is not None:
        raise UsageError(f"{path} is a quantized checkpoint, which has no signature", hint="leave out --public-key")
    found = check_output(path)
    record = found.record
    say(f"{path}: valid; {found.num_files} files, {human_bytes(found.num_bytes)}, match {RECORD_NAME}")
    name = " ".join((record.model.hub_id or record.model.name).split())
    say(f"source: {name}, sha256 {record.weights.sha256 or 'not computed'}")
    say(f"recipe: {', '.join(record.recipe.modifiers)}, {len(record.modules)} modules, sha256 {record.recipe.sha256}")


def _check_artifact(artifact: Path, public_key: Path | None, allow_version_skew: bool) -> None:
    from runtime.artifact.bundle import artifact_of
    from runtime.artifact.check import check_artifact, check_versions

    found = check_artifact(artifact_of(artifact), [public_key] if public_key is not None else [])
    manifest = found.manifest
    check_versions(manifest, allow_version_skew=allow_version_skew)
    say(f"{artifact}: valid; {len(manifest.files)} files and {len(found.sources)} programs match the manifest")
    if found.signed:
        say("signature: valid for every required key")
    say(f"model: {manifest.model.class_name} from {manifest.model.module}, {len(manifest.subgraphs)} subgraphs")
    say(f"input key: {manifest.input_key}")
    say(f"opaque steps: {', '.join(manifest.opaque_steps) or 'none'}")
    if manifest.model.code:
        say(f"the model's own code (not executed): {', '.join(manifest.model.code)}")
