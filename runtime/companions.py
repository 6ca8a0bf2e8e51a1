"""Which files of a model's directory belong to a checkpoint besides config and tensors.

    copied       what describes tokenizer, chat templates, processors and generation (by suffix); licences and notices;
                 folders of chat templates, of further tokenizers, and of sentence-transformers' modules
    left out     weights in any form and their indices, code, adapters, what other tools say of their quantization,
                 hidden files, model cards (they describe the original weights), links that lead outside

Code that a model brings is copied from the artifact, where it was allowed, and not from here.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from runtime.source_checks import ADAPTER_FILES, QUANTIZATION_FILES

_KINDS = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".spm", ".vocab", ".codes", ".tokenizer")
_NUMBERED_MODEL = re.compile(r"tokenizer\.model\.v[0-9]+(m[0-9]+)?")  # of Mistral's own tokenizers
_LICENCE = re.compile(
    r"(.*[-_])?(licen[cs]es?|notices?|copying|copyright|use[-_]policy)([-_.].*)?", re.IGNORECASE | re.DOTALL
)
_LICENCE_KINDS = ("", ".txt", ".md", ".rst", ".html", ".pdf")
_WEIGHT_KINDS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".onnx", ".npz", ".ckpt")
_NOT_COPIED = (*_WEIGHT_KINDS, ".py", ".index.json")
_NEVER_COPIED = (
    *ADAPTER_FILES,  # readers load other weights on top
    *QUANTIZATION_FILES,  # describe a quantization that the result does not have
    "trainer_state.json",  # of a training, not of the model
    "params.json",  # describes the original weights in Mistral's and Meta's own form
)
_LARGEST_BYTES = 128 * 2**20
_TEMPLATES = "additional_chat_templates"
_TOKENIZER = "tokenizer_config.json"
_MODULE = re.compile(r"[0-9]{1,3}_[A-Za-z0-9]{1,64}")  # of sentence-transformers: 1_Pooling, 2_Dense
_MODULE_FILES = ("config.json", "model.safetensors")


def may_be_copied(name: str) -> bool:
    """Whether a file of this name may lie in a checkpoint without changing what readers make of it."""
    return not name.startswith(".") and not name.endswith(_NOT_COPIED) and name not in _NEVER_COPIED


def companion_files(directory: Path) -> list[tuple[str, Path]]:
    """The files that go with a checkpoint: names relative to its directory, and where they are, sorted by name."""
    home = directory.resolve()
    found = {
        path.name: path
        for path in directory.iterdir()
        if may_be_copied(path.name) and _is_companion(path.name) and _is_inside(path, home) and _is_small(path)
    }
    for folder in directory.iterdir():
        if folder.is_dir() and not folder.name.startswith(".") and home in folder.resolve().parents:
            found.update({f"{folder.name}/{path.name}": path for path in _of_folder(folder, home)})
    return sorted(found.items())


def copy_companions(source: Path, target: Path) -> None:
    """Copy them, without replacing what is there already; the copies are files, not links."""
    for name, path in companion_files(source):
        copy = target / name
        if not copy.exists():
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)


def _of_folder(folder: Path, home: Path) -> Iterator[Path]:
    paths = [path for path in folder.iterdir() if _is_inside(path, home)]
    if folder.name == _TEMPLATES:
        yield from (path for path in paths if path.suffix == ".jinja" and _is_small(path))
    elif _MODULE.fullmatch(folder.name):
        # The weights of such a module are no part of the model: they are copied as they are.
        yield from (path for path in paths if path.name in _MODULE_FILES)
    elif any(path.name == _TOKENIZER for path in paths) and not any(path.suffix in _WEIGHT_KINDS for path in paths):
        yield from (path for path in paths if may_be_copied(path.name) and _is_companion(path.name) and _is_small(path))


def _is_companion(name: str) -> bool:
    suffix = Path(name).suffix.lower()
    is_licence = _LICENCE.fullmatch(name) is not None
    if _NUMBERED_MODEL.fullmatch(name):
        return True
    return suffix in _KINDS or (is_licence and (suffix in _LICENCE_KINDS or suffix[1:].isdigit()))


def _is_small(path: Path) -> bool:
    return path.stat().st_size <= _LARGEST_BYTES


def _is_inside(path: Path, home: Path) -> bool:
    """Whether this is a regular file of the directory: none elsewhere that a link leads to, but for the hub's cache."""
    if not path.is_file():
        return False
    target = path.resolve()
    is_of_hub = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
    return home in target.parents or is_of_hub
