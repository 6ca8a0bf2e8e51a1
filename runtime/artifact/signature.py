"""Sign artifacts and verify signatures with the `model-signing` package and elliptic curve keys, offline.

A signature is one more file of the artifact, `signature.json`, a Sigstore bundle that any user of that package can
verify without seqbuild. It lists every other file with its sha256. It is verified against a private copy of the bytes
that the check has read, so that the code that runs is the code that was signed.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime.artifact.encoding import sha256
from runtime.errors import SignatureError
from runtime.host.publish import write_files
from runtime.host.regular_files import require_regular

REQUIRED = "SEQBUILD_REQUIRE_SIGNATURE"
_INSTALL = "pip install 'model-signing>=1.1' pyopenssl, or seqbuild-llm[sign]; on a host without a network from wheels"


def required_keys(public_keys: Sequence[Path] = ()) -> tuple[Path, ...]:
    """List the required keys: the key set in the host's environment, then those of the run.

    No option removes the host's key: an artifact must have been signed with every key.
    """
    host = os.environ.get(REQUIRED)
    return tuple(dict.fromkeys(([Path(host)] if host is not None else []) + list(public_keys)))


def verify_signature(name: str, contents: Mapping[str, bytes], signature: bytes | None, public_key: Path) -> None:
    """Reject contents that the owner of a key has not signed.

    Args:
        name: the signed directory's name in messages.
        contents: every file except the signature, by path.
        signature: content of the signature file; None if it is missing.
        public_key: a PEM file of an elliptic curve key.

    Raises:
        SignatureError: also when the key cannot be read, or the `model-signing` package is not installed.
    """
    if signature is None:
        raise SignatureError(
            f"{name} is not signed, and a signature for {public_key} is required",
            hint="sign it with seqbuild sign and the private key; nothing of the artifact was executed",
        )
    _require_key(public_key, "public")
    signing = _package()
    with _copied(name, contents) as folder:
        place = folder.parent / "signature"
        place.write_bytes(signature)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                verifier = signing.verifying.Config().use_elliptic_key_verifier(public_key=public_key)
                verifier.set_hashing_config(signing.hashing.Config().use_file_serialization())
                verifier.verify(folder, place)
            _require_all(signature, contents)
        except MemoryError:
            raise
        except Exception as error:  # the package and its dependencies raise many kinds of errors
            why = " ".join(str(error).split())[:300] or type(error).__name__
            raise SignatureError(
                f"the signature of {name} is not valid for {public_key}: {why}",
                hint="nothing of the artifact was executed",
            ) from error


def make_signature(name: str, contents: Mapping[str, bytes], private_key: Path, password: str | None = None) -> bytes:
    """Sign contents that have been checked.

    Args:
        name: the directory's name.
        contents: every file except the signature, by path.
        private_key: a PEM file of an elliptic curve key (P-256, P-384 or P-521).
        password: of the private key.

    Raises:
        SignatureError: when the key cannot be used, or the package is not installed.
    """
    _require_key(private_key, "private")
    signing = _package()
    with _copied(name, contents) as folder:
        place = folder.parent / "signature"
        secret = password.encode() if password is not None else None
        try:
            signer = signing.signing.Config().use_elliptic_key_signer(private_key=private_key, password=secret)
            signer.set_hashing_config(signing.hashing.Config().use_file_serialization())
            signer.sign(folder, place)
        except MemoryError:
            raise
        except Exception as error:
            why = " ".join(str(error).split())[:300] or type(error).__name__
            if isinstance(error, AttributeError):  # raised by the package for keys of another kind
                why = "it is not an elliptic curve key"
            make = "openssl ecparam -name prime256v1 -genkey -noout -out key.pem"
            raise SignatureError(
                f"cannot sign with {private_key}: {why}", hint=f"use an elliptic curve key in PEM format: {make}"
            ) from error
        return place.read_bytes()


def _require_key(path: Path, kind: str) -> None:
    try:
        require_regular(path)
    except FileNotFoundError as error:
        raise SignatureError(f"the {kind} key {path} does not exist", hint="pass a file in PEM format") from error
    except OSError as error:
        raise SignatureError(f"the {kind} key {path} cannot be read: {error.strerror}") from error


@contextlib.contextmanager
def _copied(name: str, contents: Mapping[str, bytes]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="seqbuild-") as private:
        folder = Path(private, name or "artifact")
        write_files(folder, contents)
        yield folder


def _require_all(signature: bytes, contents: Mapping[str, bytes]) -> None:
    """Reject a signature that does not cover every file: the format allows it to ignore some."""
    statement = json.loads(base64.b64decode(json.loads(signature)["dsseEnvelope"]["payload"]))
    resources = statement["predicate"]["resources"]
    signed = {str(entry["name"]): (str(entry["algorithm"]), str(entry["digest"])) for entry in resources}
    if signed != {path: ("sha256", sha256(data)) for path, data in contents.items()}:
        raise ValueError("it covers other files")


def _package() -> Any:
    try:
        import model_signing
    except ImportError as error:
        raise SignatureError(
            f"signatures require the package model-signing, which cannot be imported: {error}", hint=_INSTALL
        ) from error
    return model_signing
