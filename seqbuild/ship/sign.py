"""Sign an artifact or its bundle after checking its content."""

from __future__ import annotations

import os
from pathlib import Path

from runtime.artifact.check import check_artifact
from runtime.artifact.files import SIGNATURE_NAME
from runtime.artifact.manifest import MANIFEST_NAME
from runtime.artifact.signature import make_signature
from runtime.host.publish import write_file


def sign_artifact(
    artifact: str | os.PathLike[str], *, private_key: str | os.PathLike[str], password: str | None = None
) -> Path:
    """Check an artifact, write its signature beside the manifest, replacing an existing one, and return the file.

    Args:
        artifact: the artifact's directory.
        private_key: a PEM file with an elliptic curve key.
        password: the private key's password, if any.

    Raises:
        ArtifactError: if the artifact is invalid; it is not signed then.
        SignatureError: if the key cannot be used, or model-signing is not installed.
        OutputError: if the signature cannot be written.
    """
    root = Path(artifact)
    checked = check_artifact(root)
    files = {MANIFEST_NAME: checked.manifest_bytes, **checked.contents}
    signature = make_signature(root.resolve().name, files, Path(private_key), password)
    write_file(root / SIGNATURE_NAME, signature)
    return root / SIGNATURE_NAME
