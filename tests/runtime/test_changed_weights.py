"""Weights that are cut short, overwritten or replaced while they are read: one error, and a run that can go on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from runtime.checkpoint.reader import Checkpoint
from runtime.checkpoint.stored_table import StoredTable
from runtime.errors import WeightsError
from tests.runtime.small import NARROW_W4, Small, calibrate, read_tensors, recipe

GPTQ = recipe(NARROW_W4, modifier="GPTQModifier")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(b"\0" * 100)


class When:
    """Does something when a subgraph of this number is finished."""

    def __init__(self, index: int, action: Callable[[], None]) -> None:
        self.index, self.action = index, action

    def tell(self, event: str, **facts: Any) -> None:
        if event == "subgraph" and facts["index"] == self.index:
            self.action()


@pytest.mark.parametrize("spoil", [cut, empty, overwrite])
def test_a_run_ends_with_one_error_and_goes_on_later(
    narrow_llama: Small, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    weights = Path(shutil.copytree(narrow_llama.weights, tmp_path / "weights"))
    shard, original = weights / "model.safetensors", narrow_llama.weights / "model.safetensors"
    before = os.stat(shard)
    watcher = When(1, lambda: spoil(shard))
    with pytest.raises(WeightsError, match=r"model\.safetensors was changed while it was read.*--resume"):
        calibrate(narrow_llama, GPTQ, tmp_path / "out", weights=weights, watchers=[watcher])
    assert not (tmp_path / "out").exists()
    shutil.copyfile(original, shard)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert calibrate(narrow_llama, GPTQ, tmp_path / "out", weights=weights, resume=True).resumed_at
    calibrate(narrow_llama, GPTQ, tmp_path / "whole", weights=weights)
    found, expected = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "whole"))
    assert found == expected


def make(folder: Path) -> tuple[Checkpoint, dict[str, torch.Tensor]]:
    """A checkpoint of more shards than are open at a time."""
    folder.mkdir()
    tensors = {f"t{number:02}": torch.full((40, 10), float(number)) for number in range(20)}
    index = {}
    for name, tensor in tensors.items():
        save_file({name: tensor}, folder / f"{name}.safetensors")
        index[name] = f"{name}.safetensors"
    (folder / "model.safetensors.index.json").write_text(str({"weight_map": index}).replace("'", '"'))
    return Checkpoint(folder), tensors


READS: dict[str, Callable[[Checkpoint, str], object]] = {
    "read": lambda checkpoint, key: checkpoint.read(key),
    "rows": lambda checkpoint, key: checkpoint.read_rows(key, 30, 10),
    "pieces": lambda checkpoint, key: list(checkpoint.pieces(key)),
    "sample": lambda checkpoint, key: checkpoint.sample(key, 100),
    "table": lambda checkpoint, key: torch.nn.functional.embedding(torch.tensor([39]), checkpoint.table(key)),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
@pytest.mark.parametrize("key", ["t00", "t19"])  # one whose file was closed, and one whose file is open
def test_every_way_to_read_sees_it(tmp_path: Path, read: Callable[[Checkpoint, str], object], key: str) -> None:
    checkpoint, _ = make(tmp_path / "a")
    read(checkpoint, "t01")
    cut(tmp_path / "a" / f"{key}.safetensors")
    with pytest.raises(WeightsError, match=rf"{key}\.safetensors was changed while it was read: it had \d+ bytes"):
        read(checkpoint, key)


def test_a_file_in_the_place_of_another_is_not_mixed_with_it(tmp_path: Path) -> None:
    checkpoint, tensors = make(tmp_path / "a")
    other = tmp_path / "other"
    for key in ("t00", "t19"):
        save_file({key: tensors[key] + 1}, other)
        os.replace(other, tmp_path / "a" / f"{key}.safetensors")
    assert torch.equal(checkpoint.read("t19"), tensors["t19"])  # it is still open
    with pytest.raises(WeightsError, match=r"t00\.safetensors was changed while it was read"):
        checkpoint.read("t00")
    (tmp_path / "a" / "t01.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"t01\.safetensors cannot be read: No such file"):
        checkpoint.read("t01")


def test_few_files_are_open_at_a_time(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    checkpoint, tensors = make(tmp_path / "a")
    for key, tensor in tensors.items():
        assert torch.equal(checkpoint.read(key), tensor)
    assert len(os.listdir("/proc/self/fd")) - before <= 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_table_on_disk_is_as_one_in_memory(tmp_path: Path, dtype: torch.dtype) -> None:
    table = torch.randn(50, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    save_file({"table": table}, tmp_path / "model.safetensors")
    stored = Checkpoint(tmp_path).table("table")
    assert isinstance(stored, StoredTable) and stored.shape == table.shape and stored.dtype == dtype
    generator = torch.Generator().manual_seed(2)
    lookups = [torch.randint(0, 50, (3, 7), generator=generator), torch.tensor([[49, 0], [0, 49]]), torch.tensor(3)]
    lookups += [torch.zeros(2, 0, dtype=torch.int64), torch.arange(50), torch.tensor([5, 4], dtype=torch.int32)]
    for ids in lookups:
        for padding in (None, 0):
            found = torch.nn.functional.embedding(ids, stored, padding_idx=padding)
            assert type(found) is torch.Tensor
            assert torch.equal(found, torch.nn.functional.embedding(ids, table, padding_idx=padding))
    assert torch.equal(stored + 1, table + 1) and torch.equal(stored.float(), table.float())
    for wrong in (50, -1):
        with pytest.raises(IndexError, match="index out of range"):
            torch.nn.functional.embedding(torch.tensor([wrong]), stored)
    embedding = torch.nn.Embedding(50, 6, dtype=dtype)
    embedding.weight = torch.nn.Parameter(stored)
    assert torch.equal(embedding(torch.arange(50)), table)


def test_the_first_layer_reads_the_rows_that_it_looks_up(narrow_llama: Small) -> None:
    table = Checkpoint(narrow_llama.weights).table("model.embed_tokens.weight")
    rows: list[int] = []
    assert table is not None
    real = table.read_rows
    table.read_rows = lambda first, memory: rows.append(first) or real(first, memory)  # type: ignore[func-returns-value]
    found = torch.nn.functional.embedding(torch.tensor([7, 200, 7, 8]), table)
    assert rows == [7, 200]
    assert torch.equal(found, read_tensors(narrow_llama.weights)["model.embed_tokens.weight"][[7, 200, 7, 8]])
