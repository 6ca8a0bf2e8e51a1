"""Signatures: who made an artifact, asked before anything of it runs."""

from __future__ import annotations

import base64
import json
import shutil
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

import runtime
import seqbuild.cli.app
from runtime.artifact.files import SIGNATURE_NAME
from runtime.artifact.signature import REQUIRED
from runtime.chain import check
from runtime.errors import ArtifactError, SignatureError
from seqbuild.ship.sign import sign_artifact
from tests.attacks.attack import watched
from tests.runtime.artifacts import files, manifest, write
from tests.runtime.place import Run

PEM = serialization.Encoding.PEM


def key_pair(folder: Path, name: str, curve: ec.EllipticCurve, password: bytes | None = None) -> tuple[Path, Path]:
    key = ec.generate_private_key(curve)
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    secret = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    private.write_bytes(key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, secret))
    public.write_bytes(key.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return key_pair(tmp_path_factory.mktemp("keys"), "ours", ec.SECP256R1())


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return key_pair(tmp_path_factory.mktemp("keys"), "others", ec.SECP384R1())


@pytest.fixture
def signed(tmp_path: Path, keys: tuple[Path, Path]) -> Path:
    root = write(tmp_path / "artifact")
    assert sign_artifact(root, private_key=keys[0]) == root / SIGNATURE_NAME
    return root


def load(root: Path, key: Path | None = None) -> runtime.Artifact:
    return runtime.load(root, allow_version_skew=True, public_key=key)


def refused(root: Path, key: Path | None, pattern: str) -> None:
    with watched(root) as seen, pytest.raises(SignatureError, match=pattern):
        load(root, key)
    allowed = ("wrote '/", "os.remove", "shutil.rmtree")  # a private copy, which is gone again
    assert [event for event in seen if not event.startswith(allowed) or str(root) in event] == []


def test_a_signed_artifact_runs(signed: Path, keys: tuple[Path, Path]) -> None:
    assert len(load(signed, keys[1]).subgraphs) == 2
    assert len(load(signed).subgraphs) == 2
    check(signed)


def test_signing_changes_no_other_byte(tmp_path: Path, keys: tuple[Path, Path], signed: Path) -> None:
    plain = write(tmp_path / "plain")
    for path in plain.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (signed / path.relative_to(plain)).read_bytes()


def test_an_unsigned_artifact_is_refused(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    refused(write(tmp_path / "artifact"), keys[1], "is not signed, and a signature")


def test_another_key_is_refused(signed: Path, others: tuple[Path, Path]) -> None:
    refused(signed, others[1], "is not valid for")


@pytest.mark.parametrize("name", sorted(files()))
def test_tampering_with_fitting_digests_is_refused(name: str, signed: Path, keys: tuple[Path, Path]) -> None:
    """Whoever changes a file can make the manifest fit, and not the signature."""
    changed = {**files(), name: files()[name] + b"\n"}
    if name == "constants.safetensors":
        changed[name] = changed[name][:-1].replace(b"\x80?", b"\x00@")
    write(signed, changed)
    refused(signed, keys[1], "is not valid for")


def test_a_changed_manifest_is_refused(signed: Path, keys: tuple[Path, Path]) -> None:
    write(signed, targets_per_subgraph=2)
    refused(signed, keys[1], "Hash mismatch for")


def test_a_file_more_or_less_is_refused(signed: Path, keys: tuple[Path, Path]) -> None:
    write(signed, {**files(), "vocab.txt": b"more"})
    refused(signed, keys[1], "Extra files")
    (signed / "vocab.txt").unlink()
    less = {name: data for name, data in files().items() if name != "subgraphs/001.py"}
    (signed / "subgraphs/001.py").unlink()
    write(signed, less, subgraphs=manifest().subgraphs[:1])
    refused(signed, keys[1], "Missing files")


def test_a_signature_of_another_artifact_is_refused(tmp_path: Path, signed: Path, keys: tuple[Path, Path]) -> None:
    other = write(tmp_path / "other", targets_per_subgraph=2)
    shutil.copy(signed / SIGNATURE_NAME, other / SIGNATURE_NAME)
    refused(other, keys[1], "Hash mismatch")


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"null", b"\x80\x04", b'{"dsseEnvelope": {}}', b"[" * 100_000])
def test_broken_signatures_are_refused(data: bytes, signed: Path, keys: tuple[Path, Path]) -> None:
    (signed / SIGNATURE_NAME).write_bytes(data)
    refused(signed, keys[1], "is not valid for")


def test_a_payload_that_was_edited_is_refused(signed: Path, keys: tuple[Path, Path]) -> None:
    """Such as one that says that more files are to be passed over."""
    bundle = json.loads((signed / SIGNATURE_NAME).read_bytes())
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    statement["predicate"]["serialization"]["ignore_paths"].append("subgraphs")
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    (signed / SIGNATURE_NAME).write_text(json.dumps(bundle))
    refused(signed, keys[1], "is not valid for")


def test_a_signature_that_passes_files_over_is_refused(signed: Path, keys: tuple[Path, Path]) -> None:
    """Made by the right key with other tools, for a part of the files only."""
    import model_signing

    hashing = model_signing.hashing.Config().use_file_serialization()
    hashing.set_ignored_paths(paths=[signed / "subgraphs", signed / SIGNATURE_NAME])
    signer = model_signing.signing.Config().use_elliptic_key_signer(private_key=keys[0])
    signer.set_hashing_config(hashing).sign(signed, signed.parent / "partial")
    shutil.move(signed.parent / "partial", signed / SIGNATURE_NAME)
    refused(signed, keys[1], "is not valid for")


def test_the_package_itself_verifies_it(signed: Path, keys: tuple[Path, Path]) -> None:
    """A user who does not trust seqbuild needs it not."""
    import model_signing

    hashing = model_signing.hashing.Config().use_file_serialization()
    hashing.set_ignored_paths(paths=[signed / SIGNATURE_NAME])
    verifier = model_signing.verifying.Config().use_elliptic_key_verifier(public_key=keys[1])
    verifier.set_hashing_config(hashing).verify(signed, signed / SIGNATURE_NAME)


def test_a_host_that_asks_for_signatures(
    signed: Path, keys: tuple[Path, Path], others: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(REQUIRED, str(keys[1]))
    assert len(load(signed).subgraphs) == 2
    assert len(load(signed, keys[1]).subgraphs) == 2
    refused(signed, others[1], "is not valid for")
    monkeypatch.setenv(REQUIRED, str(others[1]))
    refused(signed, None, "is not valid for")
    refused(signed, keys[1], "is not valid for")  # what a user asks for does not replace the host's
    (signed / SIGNATURE_NAME).unlink()
    refused(signed, None, "is not signed")
    monkeypatch.setenv(REQUIRED, "")
    refused(signed, None, "is not signed")
    monkeypatch.setenv(REQUIRED, str(signed / "nothing"))
    refused(signed, None, "is not signed")


def test_keys_that_are_none(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    refused(signed, tmp_path / "nothing.pub", "nothing.pub does not exist")
    (tmp_path / "odd.pub").write_text("no key")
    refused(signed, tmp_path / "odd.pub", "is not valid for")
    refused(signed, keys[0], "is not valid for")
    plain = rsa.generate_private_key(65537, 2048)
    private = plain.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (tmp_path / "rsa.pem").write_bytes(private)
    edwards = ed25519.Ed25519PrivateKey.generate()
    private = edwards.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (tmp_path / "edwards.pem").write_bytes(private)
    with pytest.raises(SignatureError, match=r"the private key .*nothing.* does not exist"):
        sign_artifact(signed, private_key=tmp_path / "nothing")
    for key in (tmp_path / "odd.pub", keys[1]):
        with pytest.raises(SignatureError, match=f"cannot sign with .*{key.name}"):
            sign_artifact(signed, private_key=key)
    for name in ("rsa", "edwards"):
        with pytest.raises(SignatureError, match=r"cannot sign with .*: it is not an elliptic curve key"):
            sign_artifact(signed, private_key=tmp_path / f"{name}.pem")


def test_a_key_with_a_password(tmp_path: Path, run: Run) -> None:
    private, public = key_pair(tmp_path, "secret", ec.SECP521R1(), b"open sesame")
    root = write(tmp_path / "artifact")
    (tmp_path / "password").write_text("open sesame\n")
    arguments = ["sign", str(root), "--private-key", str(private)]
    code, _, complaint = run(arguments, seqbuild.cli.app.main)
    assert code == 2
    assert "secret.pem: Password" in complaint
    assert not (root / SIGNATURE_NAME).exists()
    assert run([*arguments, "--password-file", str(tmp_path / "password")], seqbuild.cli.app.main)[0] == 0
    load(root, public)


def test_what_is_not_right_is_not_signed(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    root = write(tmp_path / "artifact", {**files(), "subgraphs/000.py": b"import os\n"})
    with pytest.raises(ArtifactError, match="anything but one function"):
        sign_artifact(root, private_key=keys[0])
    assert not (root / SIGNATURE_NAME).exists()


def test_without_the_package(signed: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    refused(signed, keys[1], r"signatures require the package model-signing.*pip install")
    assert len(load(signed).subgraphs) == 2


def test_on_the_command_line(signed: Path, keys: tuple[Path, Path], others: tuple[Path, Path], run: Run) -> None:
    usual = ["check", str(signed), "--allow-version-skew"]
    code, said, _ = run(usual)
    assert (code, "signature" in said) == (0, False)
    code, said, _ = run([*usual, "--public-key", str(keys[1])])
    assert (code, "signature: valid for every required key" in said) == (0, True)
    code, said, complaint = run([*usual, "--public-key", str(others[1])])
    assert (code, said) == (2, "")
    assert "is not valid for" in complaint
    for command in ("calibrate", "evaluate"):
        rest = {"calibrate": ["--recipe", "r", "-o", "o"], "evaluate": ["--data", "d"]}[command]
        if command == "calibrate":
            (signed.parent / "r").write_text("QuantizationModifier: {targets: Linear, scheme: W4A16}")
            rest = ["--recipe", str(signed.parent / "r"), "-o", str(signed.parent / "o")]
        arguments = [command, str(signed), "--weights", str(signed), *rest, "--device", "cpu", "--allow-version-skew"]
        code, _, complaint = run([*arguments, "--require-signature", str(others[1])])
        assert (code, "is not valid for" in complaint) == (2, True), complaint
