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
    """Check an artifact and put a signature of it beside its manifest; one that is there is replaced.

    Args:
        artifact: its directory.
        private_key: a file in PEM, of an elliptic curve key.
        password: of the private key.

    Returns:
        The signature's file.

    Raises:
        ArtifactError: when the artifact is not right; nothing is signed then.
        SignatureError: when the key cannot be used, or model-signing is not installed.
        OutputError: when the signature cannot be written.
    """
    root = Path(artifact)
    checked = check_artifact(root)
    files = {MANIFEST_NAME: checked.manifest_bytes, **checked.contents}
    signature = make_signature(root.resolve().name, files, Path(private_key), password)
    write_file(root / SIGNATURE_NAME, signature)
    return root / SIGNATURE_NAME
