"""A bundle: one directory with everything an offline host needs to calibrate, except the libraries.

    bundle.json         table of contents, with the digest of every file
    README.md           the command to run
    SHA256SUMS          the same digests, for `sha256sum -c`
    requirements.txt    the libraries, pinned
    artifact/           the artifact, including its signature
    runtime/            this package
    recipe.yaml         the quantization recipe
    data.safetensors    tokenized calibration data
    weights/            the checkpoint, if it was packed

Inside the directory, `python -m runtime calibrate .` needs no options.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.artifact.manifest import MANIFEST_NAME
from runtime.errors import ArtifactError, UsageError
from runtime.host.hub import resolve_directory
from runtime.host.regular_files import file_digest, is_there, read_text

BUNDLE_NAME, SUMS_NAME, REQUIREMENTS_NAME, README_NAME = "bundle.json", "SHA256SUMS", "requirements.txt", "README.md"
ARTIFACT, RUNTIME, RECIPE, DATA, WEIGHTS, RESULT = (
    *("artifact", "runtime", "recipe.yaml", "data.safetensors", "weights", "quantized"),
)
FORMAT, FORMAT_VERSION = "seqbuild-bundle", 1
_LIMIT_BYTES = 64 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Bundle:
    """The table of contents of a bundle.

    Attributes:
        root: its directory.
        files: size in bytes and sha256 of every file by path, except the files that hold digests.
        requirements: version of each distribution on the machine that packed the bundle.
        data: whether calibration data was packed.
        weights: whether the checkpoint was packed.
    """

    root: Path
    files: Mapping[str, tuple[int, str]]
    requirements: Mapping[str, str]
    data: bool
    weights: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """The input and output paths of a calibration; its data arguments may name data sets."""

    artifact: Path
    weights: Path
    recipe: Path
    data: tuple[str, ...]
    out: Path


def is_bundle(path: Path) -> bool:
    """Whether the path is the directory of a bundle, not of an artifact."""
    return (path / BUNDLE_NAME).is_file() and not (path / MANIFEST_NAME).exists()


def artifact_of(path: Path) -> Path:
    """Return the path of the artifact: the path itself, or the artifact inside a bundle."""
    return path / ARTIFACT if is_bundle(path) else path


def find_job(
    path: Path,
    *,
    weights: str | None,
    recipe: Path | None,
    data: tuple[str, ...],
    out: Path | None,
    revision: str | None = None,
) -> Job:
    """Resolve the paths of a calibration: the user's options first, then the bundle.

    Args:
        path: an artifact or a bundle; small files of a bundle are compared with their digests.
        weights: the user's directory or hub id; None for the bundle's.
        recipe: the user's recipe; None for the bundle's.
        data: the user's data arguments; empty for the bundle's.
        out: the user's output directory; None for that of the bundle.
        revision: of the hub id `weights`.

    Raises:
        ArtifactError: when the bundle is damaged.
        UsageError: when a required path is neither given nor packed.
    """
    directory = None
    if is_bundle(path):
        bundle = read_bundle(path)
        for name in damaged(bundle, with_weights=False):
            raise ArtifactError(f"{name} of the bundle {path} is damaged or missing", hint="copy the bundle again")
        if recipe is None and RECIPE not in bundle.files:
            raise ArtifactError(f"{path / BUNDLE_NAME} lists no {RECIPE}", hint="pass --recipe")
        if weights is None and bundle.weights:
            _require_listed(bundle, WEIGHTS)
        recipe = recipe or path / RECIPE
        data = data or ((str(path / DATA),) if bundle.data else ())
        directory = path / WEIGHTS if bundle.weights else None
        out = out or path / RESULT
    missing = {"--weights": weights or directory, "--recipe": recipe, "--out": out}
    for option, value in missing.items():
        if value is None:
            raise UsageError(f"Missing option '{option}'", hint="pass it, or pass a bundle that contains it")
    if weights is not None:
        directory = resolve_directory(weights, revision=revision, what="weights")
    elif revision is not None:
        raise UsageError(f"--revision {revision} requires a hub id", hint="pass one with --weights, or leave it out")
    assert directory is not None and recipe is not None and out is not None
    return Job(artifact=artifact_of(path), weights=directory, recipe=recipe, data=data, out=out)


def _require_listed(bundle: Bundle, folder: str) -> None:
    """Reject files in a folder of a bundle that its table of contents does not list."""
    for path in sorted((bundle.root / folder).rglob("*")):
        name = path.relative_to(bundle.root).as_posix()
        if name not in bundle.files and (path.is_symlink() or not path.is_dir()):
            raise ArtifactError(f"{path} is not a file of the bundle: {BUNDLE_NAME} does not list it", hint="remove it")


def read_bundle(root: Path) -> Bundle:
    """Read a bundle's table of contents.

    Raises:
        ArtifactError: when the directory is not a bundle.
    """
    path = root / BUNDLE_NAME
    try:
        if path.stat().st_size > _LIMIT_BYTES:
            raise ValueError("it is too large")
        table: Any = json.loads(read_text(path))
        if table["format"] != FORMAT or table["format_version"] != FORMAT_VERSION:
            raise ValueError(f"it has the format {table['format']!r}, version {table['format_version']!r}")
        files = {str(name): (int(size), str(digest)) for name, (size, digest) in table["files"].items()}
        for name in files:
            if any(part in ("", ".", "..") for part in name.split("/")) or "\\" in name or "\0" in name:
                raise ValueError(f"it lists the invalid path {name!r}")
        return Bundle(
            root=root,
            files=files,
            requirements={str(name): str(version) for name, version in table["requirements"].items()},
            data=DATA in files,
            weights=any(name.startswith(f"{WEIGHTS}/") for name in files),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ArtifactError(
            f"{path} is not the table of contents of a bundle: {error}", hint="copy the bundle again"
        ) from error


def damaged(bundle: Bundle, *, with_weights: bool) -> list[str]:
    """List the files that differ from what was packed.

    Args:
        bundle: the table of contents.
        with_weights: compare the digests of the weights, too, which reads all of them; otherwise only their sizes.
    """
    found = []
    for name, (size, digest) in bundle.files.items():
        path = bundle.root / name
        is_read = with_weights or not name.startswith(f"{WEIGHTS}/")
        try:
            is_same = not path.is_symlink() and is_there(path) and path.stat().st_size == size
            if not is_same or (is_read and file_digest(path) != digest):
                found.append(name)
        except OSError:
            found.append(name)
    return found
