"""The identity of a run: everything that decides the bytes of its result. A resumed run must have the same one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from runtime.checkpoint.companions import companion_files
from runtime.checkpoint.dtypes import bytes_of
from runtime.errors import RecipeError, UsageError
from runtime.host.regular_files import read_regular
from runtime.streaming.journal import differences

if TYPE_CHECKING:
    from runtime.chain import Artifact
    from runtime.checkpoint.reader import Checkpoint
    from runtime.recipe.recipe import Recipe
    from runtime.workers.group import Workers

_NUM_SAMPLES = 4096
_SAMPLE_BYTES = 1024
_MAY_CHANGE = ("fallback", "min_tokens")  # in a recipe, before a run is resumed
_TIMES = "modification times of the checkpoint"


def run_identity(
    *,
    artifact: Artifact,
    checkpoint: Checkpoint,
    recipe: Recipe,
    batches: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
) -> dict[str, str]:
    """Return a digest or a value for each ingredient of a run, by name.

    Args:
        artifact: its manifest counts.
        checkpoint: sizes, times and headers of its files count, some numbers of each tensor, and the content of its
            companions. Reading all of it would take as long as the run's own reading.
        recipe: its content counts, except `fallback` and `min_tokens`.
        batches: their content counts.
        options: others that decide the result, by name.
    """
    return {
        "artifact": hashlib.sha256(artifact.manifest.to_bytes()).hexdigest(),
        "checkpoint": _checkpoint_digest(checkpoint),
        _TIMES: _times_digest(checkpoint),
        "recipe": hashlib.sha256(_lasting_text(recipe).encode()).hexdigest(),
        "data": _data_digest(batches),
        "torch": torch.__version__,
        **{name: str(value) for name, value in options.items()},
    }


def run_digest(identity: Mapping[str, str]) -> str:
    """Return one digest of an identity, which is the same on all workers."""
    text = json.dumps({name: value for name, value in identity.items() if name != _TIMES})
    return hashlib.sha256(text.encode()).hexdigest()


def require_same_inputs(identity: Mapping[str, str], workers: Workers) -> None:
    """Compare the identities of the run on all workers; the times of copied files may differ.

    Raises:
        UsageError: on every worker, naming one that differs and the ingredients.
    """
    found = workers.exchange({name: value for name, value in identity.items() if name != _TIMES})
    for rank, other in enumerate(found):
        if other != found[0]:
            named = differences(found[0], other, ("on worker 0", f"on worker {rank}"))
            raise UsageError(
                f"worker {rank} differs from worker 0 in {named}",
                hint="all workers need the same artifact, weights, recipe, data, options and version of torch",
            )


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


def _times_digest(checkpoint: Checkpoint) -> str:
    times = [path.stat().st_mtime_ns for path in checkpoint.shards]
    return hashlib.sha256(json.dumps(times).encode()).hexdigest()


def _companions(directory: Path) -> list[tuple[str, Path]]:
    code = [(path.name, path) for path in sorted(directory.glob("*.py")) if path.is_file()]
    return companion_files(directory) + code


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
