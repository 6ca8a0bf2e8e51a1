"""The identity of a run: everything that decides the bytes of its result. A resumed run must have the same one."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from runtime.checkpoint.companions import companion_files
from runtime.checkpoint.dtypes import bytes_of
from runtime.errors import RecipeError
from runtime.host.regular_files import read_regular
from runtime.workers.comparison import FILE_TIMES

if TYPE_CHECKING:
    from runtime.chain import Artifact
    from runtime.checkpoint.reader import Checkpoint
    from runtime.recipe.recipe import Recipe

_NUM_SAMPLES = 4096
_SAMPLE_BYTES = 1024
_MAY_CHANGE = ("fallback", "min_tokens")  # in a recipe, before a run is resumed


def run_identity(
    *,
    artifact: Artifact,
    checkpoint: Checkpoint,
    recipe: Recipe | None,
    batches: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
) -> dict[str, str]:
    """Return a digest or a value for each ingredient of a run, by name.

    Args:
        artifact: its manifest counts.
        checkpoint: sizes and headers of its files count, some numbers of each tensor, and the content of its
            companions. Reading all of it would take as long as the run's own reading; so the times of its files count
            as well, on the same host.
        recipe: its content counts, except `fallback` and `min_tokens`; None for an evaluation.
        batches: their content counts.
        options: others that decide the result, by name.
    """
    return {
        "artifact": hashlib.sha256(artifact.manifest.to_bytes()).hexdigest(),
        **checkpoint_identity(checkpoint),
        **({"recipe": hashlib.sha256(_lasting_text(recipe).encode()).hexdigest()} if recipe is not None else {}),
        "data": data_digest(batches),
        "torch": torch.__version__,
        **{name: str(value) for name, value in options.items()},
    }


def checkpoint_identity(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the ingredients of a run that come from its checkpoint."""
    return {"checkpoint": _checkpoint_digest(checkpoint), FILE_TIMES: _file_times(checkpoint)}


def run_digest(identity: Mapping[str, str]) -> str:
    """Return one digest of an identity, which is the same on all workers."""
    text = json.dumps({name: value for name, value in identity.items() if name != FILE_TIMES})
    return hashlib.sha256(text.encode()).hexdigest()


def _lasting_text(recipe: Recipe) -> str:
    """The content of a recipe without the fields that may change: these decide whether a module that saw too few tokens
    ends the run, which no finished module did.
    """
    from runtime.recipe.yaml import parse

    try:
        value = parse(recipe.text, origin=recipe.source)
    except RecipeError:  # a recipe that was created in Python
        return recipe.text
    return json.dumps(_without(value, _MAY_CHANGE), default=str)


def _without(value: Any, keys: Collection[str]) -> Any:
    if isinstance(value, dict):
        return {key: _without(entry, keys) for key, entry in value.items() if key not in keys}
    return [_without(entry, keys) for entry in value] if isinstance(value, list) else value


def _checkpoint_digest(checkpoint: Checkpoint) -> str:
    digest = hashlib.sha256()
    for path in checkpoint.shards:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
    keys = list(checkpoint)
    for key in keys[:: -(-len(keys) // _NUM_SAMPLES) or 1]:
        stored = checkpoint.stored(key)
        digest.update(f"{key} {stored.dtype} {stored.shape}\n".encode())
        digest.update(checkpoint.sample(key, _SAMPLE_BYTES))
    for name, path in _companions(checkpoint.directory):
        digest.update(f"{name} {path.stat().st_size}\n".encode())
        digest.update(read_regular(path))
    return digest.hexdigest()


def _file_times(checkpoint: Checkpoint) -> str:
    """The host, and a digest of the times when the files of the checkpoint were changed last."""
    times = [path.stat().st_mtime_ns for path in checkpoint.shards]
    return f"{socket.gethostname()} {hashlib.sha256(json.dumps(times).encode()).hexdigest()}"


def _companions(directory: Path) -> list[tuple[str, Path]]:
    code = [(path.name, path) for path in sorted(directory.glob("*.py")) if path.is_file()]
    return companion_files(directory) + code


def data_digest(batches: Sequence[Mapping[str, Any]]) -> str:
    """Return the digest of the content of batches."""
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
