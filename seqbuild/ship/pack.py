"""Pack a bundle (`runtime.artifact.bundle`) reproducibly: equal files give equal bytes."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import runtime
from runtime.artifact.bundle import (
    ARTIFACT,
    BUNDLE_NAME,
    DATA,
    FORMAT,
    FORMAT_VERSION,
    README_NAME,
    RECIPE,
    REQUIREMENTS_NAME,
    RUNTIME,
    SUMS_NAME,
    WEIGHTS,
)
from runtime.artifact.check import check_artifact
from runtime.artifact.files import SIGNATURE_NAME, read_signature
from runtime.artifact.manifest import MANIFEST_NAME, Manifest
from runtime.checkpoint.companions import companion_files
from runtime.data.token_file import SUFFIX, read_token_file
from runtime.errors import UsageError, WeightsError
from runtime.host.hub import weights_directory
from runtime.host.publish import disk_errors, make_readable, publish_directory, require_free
from runtime.host.regular_files import file_digest, open_regular, require_regular, require_regular_entries
from runtime.recipe.named import recipe_of
from runtime.status import doing

# Packages that a host installs; all other imports of the runtime are dependencies of these.
REQUIRED = ("torch", "transformers", "accelerate", "safetensors", "msgspec", "compressed-tensors", "plotly", "jinja2")
_RUNTIME_KINDS = (".py", ".yaml", ".j2", ".css", ".js")
_KINDS = (".safetensors", ".json", ".jinja", ".txt", ".model", ".tiktoken", ".py")
_README = """\
# {model}, ready for calibration

On a host with the libraries in requirements.txt (`pip install -r requirements.txt`, from a network or a folder of
wheels), run in this directory

    {command}

to write the quantized checkpoint to `quantized/`. Nothing is downloaded, and nothing is written elsewhere.

    python -m runtime doctor .{weights}     check this host and the bundle before a run
    sha256sum --check --quiet SHA256SUMS    check that the bundle is complete and unchanged

Contents:

    artifact/        the compiled model; {signature}
    recipe.yaml      the quantization recipe
{data}    runtime/         the program, version {version}
"""


def pack(
    artifact: str | os.PathLike[str],
    *,
    recipe: str | os.PathLike[str],
    out: str | os.PathLike[str],
    data: str | os.PathLike[str] | None = None,
    weights: str | os.PathLike[str] | None = None,
) -> Path:
    """Make a bundle and return its path.

    Args:
        artifact: a directory written by `seqbuild compile`.
        recipe: the recipe file, or the name of a preset or an algorithm.
        out: the bundle: a directory, or a file if the name ends in `.tar`.
        data: a token file written by `seqbuild data`; None for a recipe without statistics.
        weights: the checkpoint's directory or hub id; None leaves it out of the bundle.

    Raises:
        ArtifactError, RecipeError, DataError, WeightsError: for invalid contents.
        OutputError: if the bundle cannot be written.
    """
    root, path = Path(artifact), Path(out)
    checked = check_artifact(root)
    parsed = recipe_of(recipe)
    if data is not None:
        if Path(data).suffix != SUFFIX:
            raise UsageError(f"{data} is not a token file", hint="make one from texts with seqbuild data")
        read_token_file(Path(data))
    doing("writing the bundle")
    files: dict[str, Path | bytes] = {f"{ARTIFACT}/{MANIFEST_NAME}": checked.manifest_bytes}
    files |= {f"{ARTIFACT}/{name}": content for name, content in checked.contents.items()}
    signature = read_signature(root)
    if signature is not None:
        files[f"{ARTIFACT}/{SIGNATURE_NAME}"] = signature
    files |= {f"{RUNTIME}/{name}": source for name, source in _runtime_files()}
    files[RECIPE] = parsed.text.encode("utf-8")
    if data is not None:
        files[DATA] = Path(data)
    if weights is not None:
        directory = weights_directory(weights)
        files |= {f"{WEIGHTS}/{name}": source for name, source in _weight_files(directory).items()}
    requirements = {name: importlib.metadata.version(name).partition("+")[0] for name in REQUIRED}
    files[REQUIREMENTS_NAME] = "".join(f"{name}=={version}\n" for name, version in requirements.items()).encode()
    files[README_NAME] = _readme(
        checked.manifest, has_data=data is not None, has_weights=weights is not None, is_signed=signature is not None
    )
    if path.suffix == ".tar":
        return _write_tar(path, files, requirements)
    with publish_directory(path) as partial:
        _fill(partial, files, requirements)
    return path


def _runtime_files() -> Iterator[tuple[str, Path]]:
    folder = Path(runtime.__file__).resolve().parent
    for source in sorted(folder.rglob("*")):
        if source.suffix in _RUNTIME_KINDS or source.name in ("operators.txt", "py.typed"):
            yield source.relative_to(folder).as_posix(), source


def _weight_files(directory: Path) -> dict[str, Path]:
    """Return the checkpoint's files and their companions, and no others, by relative name."""
    require_regular_entries(directory)
    found = [path for path in sorted(directory.iterdir()) if path.is_file() and path.suffix in _KINDS]
    if not any(path.suffix == ".safetensors" for path in found):
        raise WeightsError(f"{directory} contains no safetensors checkpoint")
    files = {path.name: path for path in found if not path.name.startswith(".")} | dict(companion_files(directory))
    return dict(sorted(files.items()))


def _readme(manifest: Manifest, *, has_data: bool, has_weights: bool, is_signed: bool) -> bytes:
    own = " --trust-remote-code" if manifest.model.code and not manifest.is_portable else ""
    weights = "" if has_weights else " --weights MODEL_DIR"
    text = _README.format(
        model=manifest.model.class_name,
        command=f"python -m runtime calibrate .{weights}{own}",
        weights=weights,
        data="    data.safetensors the tokenized text\n" if has_data else "",
        version=runtime.__version__,
        signature="signed; --require-signature PUBLIC_KEY verifies it" if is_signed else "not signed",
    )
    return text.encode("utf-8")


def _fill(folder: Path, files: dict[str, Path | bytes], requirements: dict[str, str]) -> None:
    """Write the files, then the lists of their sizes and digests."""
    listed: dict[str, tuple[int, str]] = {}
    for name, content in sorted(files.items()):
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            place.write_bytes(content)
        else:
            require_regular(content)
            shutil.copyfile(content, place)
        listed[name] = (place.stat().st_size, file_digest(place))
    table = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "requirements": requirements,
        "files": {name: list(entry) for name, entry in listed.items()},
    }
    (folder / BUNDLE_NAME).write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    sums = {name: digest for name, (_, digest) in listed.items()} | {BUNDLE_NAME: file_digest(folder / BUNDLE_NAME)}
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
    (folder / SUMS_NAME).write_text(lines, encoding="utf-8")


def _write_tar(path: Path, files: dict[str, Path | bytes], requirements: dict[str, str]) -> Path:
    """Write the bundle as one tar file with fixed times, users and order."""
    if path.exists():
        require_free(path)  # raises an error that names the existing item
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".partial", dir=path.parent) as private:
            folder, whole = Path(private, "bundle"), Path(private, "tar")
            folder.mkdir()
            _fill(folder, files, requirements)
            with whole.open("wb") as file:
                with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
                    for source in sorted(folder.rglob("*")):
                        _add(tar, source, f"{path.stem}/{source.relative_to(folder).as_posix()}")
                file.flush()
                os.fsync(file.fileno())
            make_readable(whole)
            os.replace(whole, path)
    return path


def _add(tar: tarfile.TarFile, source: Path, name: str) -> None:
    entry = tarfile.TarInfo(name)
    if source.is_dir():
        entry.type, entry.mode = tarfile.DIRTYPE, 0o755
        tar.addfile(entry, io.BytesIO())
        return
    entry.size, entry.mode = source.stat().st_size, 0o644
    with open_regular(source) as file:
        tar.addfile(entry, file)
