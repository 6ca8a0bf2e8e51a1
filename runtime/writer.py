"""Write a checkpoint in shards, as its tensors come.

Tensors are gathered until a shard is full, then written and forgotten, so that memory holds one shard at most. The
index is written at the end, when the number of shards is known.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.checkpoint import INDEX_NAME, SINGLE_NAME
from runtime.console import human_bytes
from runtime.errors import OutputError
from runtime.publish import make_readable

if TYPE_CHECKING:
    import torch

DEFAULT_SHARD_BYTES = 2 * 10**9


class ShardWriter:
    """Gathers tensors into safetensors shards under `directory`.

    Args:
        directory: exists, and holds no checkpoint yet.
        max_shard_bytes: a shard is closed before a tensor would make it larger.
    """

    def __init__(self, directory: Path, max_shard_bytes: int = DEFAULT_SHARD_BYTES) -> None:
        self.directory = directory
        self.max_shard_bytes = max_shard_bytes
        self.total_bytes = 0
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._written: dict[str, None] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._written

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take a tensor; it goes to disk with its shard.

        Raises:
            OutputError: when the shard cannot be written.
            OSError: likewise, where the operating system says why.
        """
        assert name not in self._written, f"tensor {name} is written twice"
        num_bytes = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + num_bytes > self.max_shard_bytes:
            self._flush()
        self._pending[name] = tensor.detach().cpu().contiguous()
        self._pending_bytes += num_bytes
        self.total_bytes += num_bytes
        self._written[name] = None

    def finish(self) -> None:
        """Write the last shard, give the shards their names, and write the index where there are several."""
        if self._pending or not self._shards:
            self._flush()
        if len(self._shards) == 1:
            self._partial(0).rename(self.directory / SINGLE_NAME)
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            shard = f"model-{number + 1:05d}-of-{len(self._shards):05d}.safetensors"
            self._partial(number).rename(self.directory / shard)
            weight_map.update(dict.fromkeys(names, shard))
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (self.directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _flush(self) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        path = self._partial(len(self._shards))
        try:
            save_file(self._pending, path, metadata={"format": "pt"})
        except SafetensorError as error:
            number = re.search(r"\(os error (\d+)\)", str(error))  # it wraps what the operating system said
            if number is not None:
                raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
            raise OutputError(f"cannot write {path}: {error}") from error
        make_readable(path)
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _partial(self, number: int) -> Path:
        return self.directory / f"shard-{number:05d}.safetensors"


def require_space(path: Path, num_bytes: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Args:
        path: where the checkpoint will be; it and its parents need not exist.
        num_bytes: what it takes at least.

    Raises:
        OutputError: stating both numbers.
    """
    place = next((folder for folder in (path, *path.absolute().parents) if folder.is_dir()), Path("/"))
    free = shutil.disk_usage(place).free
    if free < num_bytes:
        raise OutputError(
            f"{path} takes {human_bytes(num_bytes)} at least, and its disk has {human_bytes(free)} left",
            hint="make room, or choose another place",
        )
