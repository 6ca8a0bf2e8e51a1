"""Write and copy the files of a checkpoint other than its tensors: config.json, tokenizer, code."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.checkpoint.source_checks import ADAPTER_FILES, QUANTIZATION_FILES
from runtime.checkpoint.source_formats import without_quantization
from runtime.host.hub import is_inside

if TYPE_CHECKING:
    from runtime.artifact.parts import ArtifactParts
    from runtime.checkpoint.reader import Checkpoint


def write_companions(
    directory: Path, artifact: ArtifactParts, checkpoint: Checkpoint, quantization_config: dict[str, Any]
) -> None:
    """Write config.json with the quantization config, and copy the other files that belong to a model.

    The checkpoint's own files take precedence over the artifact's, because they belong to the weights. The model's own
    code comes from the artifact, because that is the code that was allowed and that ran.

    Args:
        directory: of the new checkpoint.
        artifact: provides config and tokenizer for a checkpoint that contains only tensors.
        checkpoint: the original.
        quantization_config: for config.json.
    """
    compiled = json.loads(artifact.companions.get("config.json", b"{}").decode("utf-8"))
    config = without_quantization(checkpoint.config or compiled) | {"quantization_config": quantization_config}
    if artifact.model_code is not None:
        config["auto_map"] = _local(compiled.get("auto_map", {}))
        for name, data in artifact.model_code.files.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(data)
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (directory / "config.json").write_text(text + "\n", encoding="utf-8")
    copy_companions(checkpoint.directory, directory)
    for name, data in artifact.companions.items():
        if may_be_copied(name) and not (directory / name).exists():
            (directory / name).write_bytes(data)


def _local(auto_map: Any) -> Any:
    """Rewrite an auto_map so that it refers to code in the same directory (drops `owner/name--`)."""
    if isinstance(auto_map, dict):
        return {kind: _local(value) for kind, value in auto_map.items()}
    if isinstance(auto_map, list):
        return [_local(value) for value in auto_map]
    return auto_map.rpartition("--")[2] if isinstance(auto_map, str) else auto_map


_KINDS = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".spm", ".vocab", ".codes", ".tokenizer")
_NUMBERED_MODEL = re.compile(r"tokenizer\.model\.v[0-9]+(m[0-9]+)?")  # of Mistral's own tokenizers
_LICENCE = re.compile(
    r"(.*[-_])?(licen[cs]es?|notices?|copying|copyright|use[-_]policy)([-_.].*)?", re.IGNORECASE | re.DOTALL
)
_LICENCE_KINDS = ("", ".txt", ".md", ".rst", ".html", ".pdf")
_WEIGHT_KINDS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".onnx", ".npz", ".ckpt")
_NOT_COPIED = (*_WEIGHT_KINDS, ".py", ".index.json")
_NEVER_COPIED = (
    *ADAPTER_FILES,  # readers would load other weights on top
    *QUANTIZATION_FILES,  # describe a quantization that the result does not have
    "trainer_state.json",  # of a training, not of the model
    "seqbuild.json",  # describes another run
    "params.json",  # describes the original weights in Mistral's and Meta's own form
)
_LARGEST_BYTES = 128 * 2**20
_TEMPLATES = "additional_chat_templates"
_TOKENIZER = "tokenizer_config.json"
_MODULE = re.compile(r"[0-9]{1,3}_[A-Za-z0-9]{1,64}")  # of sentence-transformers: 1_Pooling, 2_Dense
_MODULE_FILES = ("config.json", "model.safetensors")


def may_be_copied(name: str) -> bool:
    """Whether a file of this name can be in a checkpoint without changing how readers load it."""
    return not name.startswith(".") and not name.endswith(_NOT_COPIED) and name not in _NEVER_COPIED


def is_own_code(path: Path, directory: Path) -> bool:
    """Whether a file is code of the model in a checkpoint's directory; only readers may execute it."""
    return path.suffix == ".py" and is_inside(path, directory.resolve()) and _is_small(path)


def companion_files(directory: Path) -> list[tuple[str, Path]]:
    """List the companion files of a checkpoint, sorted: their names relative to its directory, and their paths."""
    home = directory.resolve()
    found = {
        path.name: path
        for path in directory.iterdir()
        if may_be_copied(path.name) and _is_companion(path.name) and is_inside(path, home) and _is_small(path)
    }
    for folder in directory.iterdir():
        if folder.is_dir() and not folder.name.startswith(".") and home in folder.resolve().parents:
            found.update({f"{folder.name}/{path.name}": path for path in _of_folder(folder, home)})
    return sorted(found.items())


def copy_companions(source: Path, target: Path) -> None:
    """Copy the companion files as files, not links; existing files are not replaced."""
    for name, path in companion_files(source):
        copy = target / name
        if not copy.exists():
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)


def _of_folder(folder: Path, home: Path) -> Iterator[Path]:
    paths = [path for path in folder.iterdir() if is_inside(path, home)]
    if folder.name == _TEMPLATES:
        yield from (path for path in paths if path.suffix == ".jinja" and _is_small(path))
    elif _MODULE.fullmatch(folder.name):
        # The weights of such a module are not part of the model: they are copied unchanged.
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
