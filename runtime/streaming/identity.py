"""Everything that decides the bytes of a run's result, by name: a resumed run must agree in all of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from runtime.dtypes import bytes_of
from runtime.regular_files import read_regular

if TYPE_CHECKING:
    from runtime.artifact import Artifact
    from runtime.checkpoint import Checkpoint
    from runtime.recipe import Recipe

_NUM_SAMPLES = 4096
_SAMPLE_BYTES = 1024


def run_identity(
    *,
    artifact: Artifact,
    checkpoint: Checkpoint,
    recipe: Recipe,
    batches: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
) -> dict[str, str]:
    """The ingredients of a run.

    Args:
        artifact: by its digest.
        checkpoint: by the sizes, times and headers of its files, some numbers of each tensor, and the content of the
            files that go with it. Reading it all would take as long as the run's own reading.
        recipe: by its text.
        batches: by their content.
        options: others that matter, by name.
    """
    return {
        "artifact": hashlib.sha256(artifact.manifest.to_bytes()).hexdigest(),
        "checkpoint": _checkpoint_digest(checkpoint),
        "recipe": hashlib.sha256(recipe.text.encode()).hexdigest(),
        "data": _data_digest(batches),
        "torch": torch.__version__,
        **{name: str(value) for name, value in options.items()},
    }


def _checkpoint_digest(checkpoint: Checkpoint) -> str:
    digest = hashlib.sha256()
    for path in checkpoint.shards:
        facts = path.stat()
        digest.update(f"{path.name} {facts.st_size} {facts.st_mtime_ns}\n".encode())
    keys = list(checkpoint)
    for key in keys[:: -(-len(keys) // _NUM_SAMPLES) or 1]:
        stored = checkpoint.stored(key)
        digest.update(f"{key} {stored.dtype} {stored.shape}\n".encode())
        digest.update(checkpoint.sample(key, _SAMPLE_BYTES))
    for path in _companions(checkpoint.directory):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        digest.update(read_regular(path))
    return digest.hexdigest()


def _companions(directory: Path) -> list[Path]:
    kinds = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py")
    return [path for path in sorted(directory.iterdir()) if path.is_file() and path.suffix in kinds]


def _data_digest(batches: Sequence[Mapping[str, Any]]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            leaves, spec = pytree.tree_flatten(batch[name])
            digest.update(f"{name} {spec}\n".encode())
            for leaf in leaves:
                if isinstance(leaf, torch.Tensor):
                    digest.update(f"{leaf.dtype} {list(leaf.shape)}\n".encode())
                    digest.update(bytes_of(leaf.cpu().contiguous()))
                else:
                    digest.update(f"{leaf!r}\n".encode())
    return digest.hexdigest()
