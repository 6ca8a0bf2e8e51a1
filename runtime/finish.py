"""The files of a checkpoint besides its tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.grammar import SOURCE_LIMIT_BYTES

if TYPE_CHECKING:
    from runtime.artifact import Artifact
    from runtime.checkpoint import Checkpoint

_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".py", ".index.json")


def write_companions(
    directory: Path, artifact: Artifact, checkpoint: Checkpoint, quantization_config: dict[str, Any]
) -> None:
    """Write config.json with the quantization config, and copy tokenizer, generation config and their kin.

    The checkpoint's own files go before the artifact's: they belong to the weights.

    Args:
        directory: of the new checkpoint.
        artifact: brings config and tokenizer, for a checkpoint that is nothing but tensors.
        checkpoint: the original.
        quantization_config: for config.json.
    """
    config = checkpoint.config or json.loads((artifact.path / "config.json").read_text(encoding="utf-8"))
    text = json.dumps(config | {"quantization_config": quantization_config}, indent=2, ensure_ascii=False)
    (directory / "config.json").write_text(text + "\n", encoding="utf-8")
    for folder in (checkpoint.directory, artifact.path):
        for path in sorted(folder.iterdir()):
            target = directory / path.name
            is_wanted = path.is_file() and not path.name.startswith(".") and not path.name.endswith(_NOT_COPIED)
            if is_wanted and not target.exists() and _is_companion(path, folder == artifact.path):
                target.write_bytes(path.read_bytes())


def _is_companion(path: Path, is_artifact: bool) -> bool:
    """From an artifact everything beside the config; from a model directory what readers look for."""
    if is_artifact:
        return path.suffix != ".safetensors"
    kinds = (".json", ".jinja", ".txt", ".model", ".tiktoken")
    return path.suffix in kinds and path.stat().st_size <= 32 * SOURCE_LIMIT_BYTES
