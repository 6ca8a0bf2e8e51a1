"""Parts of a small checkpoint, as workers without a shared directory write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from runtime.checkpoint.dtypes import dtype_name
from runtime.checkpoint.layout import Layout
from runtime.checkpoint.parts import write_part
from runtime.checkpoint.stored import Stored
from runtime.checkpoint.writer import ShardWriter
from runtime.workers.group import Alone, Workers
from tests.runtime.worker_threads import in_threads

COMPANIONS = {"config.json": b'{"a": 1}\n', "LICENSE": b"", "1_Pooling/config.json": b"{}", "a.py": b"x = 1\n"}
RUN = "c" * 64
TENSORS = {
    f"{layer}.{name}": torch.arange(layer, layer + count, dtype=dtype).reshape(-1, columns)
    for layer in range(6)
    for name, count, columns, dtype in (
        ("weight", 40, 5, torch.float32),
        ("scale", 8, 1, torch.bfloat16),
        ("shape", 2, 2, torch.int64),
        ("empty", 0, 3, torch.float32),
    )
}


def _write(workers: Workers, directory: Path, *, parts: bool, max_shard_bytes: int) -> None:
    stored = (Stored(name, dtype_name(one.dtype), tuple(one.shape)) for name, one in TENSORS.items())
    directory.mkdir(parents=True)
    writer = ShardWriter(directory, Layout(stored, max_shard_bytes), workers, parts=parts)
    for name, tensor in TENSORS.items():
        writer.write(name, tensor)
    writer.finish()
    for name, data in COMPANIONS.items() if not workers.rank else ():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(data)
    if parts:
        write_part(directory, writer, RUN)


def write_whole(directory: Path, max_shard_bytes: int = 400) -> Path:
    """Write the checkpoint by one worker."""
    _write(Alone(), directory, parts=False, max_shard_bytes=max_shard_bytes)
    return directory


def write_parts(folder: Path, size: int, max_shard_bytes: int = 400) -> list[Path]:
    """Write all parts of the checkpoint into a folder."""
    paths = [folder / f"out.part-{rank}-of-{size}" for rank in range(size)]
    in_threads(size, lambda workers: _write(workers, paths[workers.rank], parts=True, max_shard_bytes=max_shard_bytes))
    return paths


def tree_bytes(directory: Path) -> dict[str, bytes]:
    """Every file under a directory."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def change_table(part: Path, **changes: Any) -> None:
    """Overwrite entries of a part's table."""
    path = part / "part.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
