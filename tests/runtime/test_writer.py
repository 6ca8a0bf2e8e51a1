from __future__ import annotations

import errno
import json
import os
from collections import namedtuple
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from runtime.checkpoint.dtypes import DTYPES, dtype_name
from runtime.checkpoint.layout import Layout
from runtime.checkpoint.stored import BITS, Stored
from runtime.checkpoint.writer import ShardWriter, require_space
from runtime.errors import OutputError
from tests.runtime.small import raw_bytes, read_tensors


def numbers(count: int, start: int = 0) -> torch.Tensor:
    """`count` float32 numbers, 4 bytes each."""
    return torch.arange(start, start + count, dtype=torch.float32)


def lay_out(tensors: Mapping[str, torch.Tensor], max_shard_bytes: int = 10**9) -> Layout:
    stored = (Stored(name, dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items())
    return Layout(stored, max_shard_bytes)


def write(folder: Path, tensors: Mapping[str, torch.Tensor], **options: Any) -> ShardWriter:
    writer = ShardWriter(folder, lay_out(tensors, **options))
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    return writer


EVERYTHING = {
    "view": numbers(12).reshape(3, 4).t()[1:],
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 3),
    "float8": torch.randn(8).to(torch.float8_e4m3fn),
    "bfloat16": torch.randn(4, 3).bfloat16(),
    "bool": torch.tensor([True, False]),
    "int64": torch.tensor([2**62, -1]),
    "needs grad": torch.ones(2, requires_grad=True),
    'quoted "é\\': torch.ones(1, dtype=torch.int8),
}


def test_one_shard_has_no_index(tmp_path: Path) -> None:
    tensors = {"b": numbers(3), "a": numbers(2)}
    writer = write(tmp_path, tensors)
    writer.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_tensor("b").tolist() == [0.0, 1.0, 2.0]
    assert writer.layout.total_bytes == 20
    assert writer.layout.file_bytes == (tmp_path / "model.safetensors").stat().st_size


def test_a_shard_is_closed_before_it_grows_too_large(tmp_path: Path) -> None:
    tensors = {name: numbers(count) for name, count in {"a": 4, "b": 6, "c": 1, "huge": 100, "d": 2}.items()}
    write(tmp_path, tensors, max_shard_bytes=40).finish()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index == {
        "metadata": {"total_size": 452},
        "weight_map": {
            "a": "model-00001-of-00004.safetensors",
            "b": "model-00001-of-00004.safetensors",
            "c": "model-00002-of-00004.safetensors",
            "d": "model-00004-of-00004.safetensors",
            "huge": "model-00003-of-00004.safetensors",
        },
    }
    for name, shard in index["weight_map"].items():
        with safe_open(tmp_path / shard, framework="pt") as file:
            assert name in file.keys()  # noqa: SIM118
    assert len(list(tmp_path.iterdir())) == 5


def test_a_tensor_is_on_disk_at_once(tmp_path: Path) -> None:
    tensors = {str(index): numbers(8, start=index) for index in range(5)}
    writer = ShardWriter(tmp_path, lay_out(tensors, max_shard_bytes=70))
    for name in ("3", "0", "4", "1", "2"):
        writer.write(name, tensors[name])
        assert any(raw_bytes(tensors[name]) in path.read_bytes() for path in tmp_path.iterdir())
        assert torch.equal(writer.read(name), tensors[name])


def test_a_shard_has_the_bytes_that_safetensors_gives_it_in_whatever_order_it_is_written(tmp_path: Path) -> None:
    for dtype in DTYPES.values():
        name = f"of {dtype}"
        EVERYTHING[name] = torch.ones(3, 1).to(dtype)
    tensors = {name: tensor.detach().contiguous() for name, tensor in EVERYTHING.items() if "fnuz" not in name}
    save_file(tensors, tmp_path / "expected", metadata={"format": "pt"})
    folder = tmp_path / "out"
    folder.mkdir()
    writer = ShardWriter(folder, lay_out(tensors))
    for name in reversed(tensors):
        writer.write(name, tensors[name])
    writer.finish()
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "expected").read_bytes()


def test_any_tensor_goes_through_unchanged(tmp_path: Path) -> None:
    write(tmp_path, EVERYTHING).finish()
    found = read_tensors(tmp_path)
    assert sorted(found) == sorted(EVERYTHING)
    for name, tensor in EVERYTHING.items():
        assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype)
        assert raw_bytes(found[name].reshape(-1)) == raw_bytes(tensor.detach().reshape(-1)), name


def test_bytes_of_a_dtype_that_torch_has_not_go_through(tmp_path: Path) -> None:
    data = bytes(range(6))
    writer = ShardWriter(tmp_path, Layout([Stored("a", "F6_E2M3", (8,))], 100))
    assert BITS["F6_E2M3"] == 6
    writer.write_bytes("a", [memoryview(data)[:4], memoryview(data)[4:]])
    writer.finish()
    with safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
        assert file.get_slice("a").get_shape() == [8]
    assert (tmp_path / "model.safetensors").read_bytes().endswith(data)


def test_another_process_goes_on_with_the_same_shards(tmp_path: Path) -> None:
    tensors = {"a": numbers(4), "b": numbers(6), "c": numbers(1)}
    first = ShardWriter(tmp_path, lay_out(tensors))
    first.write("a", tensors["a"])
    first.write("b", numbers(6, start=7))  # unfinished, and written anew
    first.sync()
    first.close()
    second = ShardWriter(tmp_path, lay_out(tensors))
    second.take_as_written(["a"])
    assert [second.is_written(name) for name in tensors] == [True, False, False]
    for name in ("b", "c"):
        second.write(name, tensors[name])
    second.finish()
    found = read_tensors(tmp_path)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_a_tensor_of_another_kind_than_was_laid_out_is_a_bug(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, lay_out({"a": numbers(4)}))
    for wrong in (numbers(3), numbers(4).double(), numbers(4).reshape(2, 2)):
        with pytest.raises(AssertionError, match="a was to"):
            writer.write("a", wrong)
    with pytest.raises(AssertionError, match="never written: a"):
        writer.finish()


def test_a_checkpoint_without_tensors_is_a_valid_file(tmp_path: Path) -> None:
    write(tmp_path, {}).finish()
    assert read_tensors(tmp_path) == {}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_an_error_of_the_operating_system_keeps_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(*args: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(OSError) as caught:
        write(tmp_path, {"a": numbers(1)})
    assert caught.value.errno == number


def test_space_is_compared_on_the_disk_of_the_nearest_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def disk_usage(path: Path) -> tuple[int, int, int]:
        asked.append(path)
        return namedtuple("Usage", "total used free")(10_000, 5_000, 5_000)

    monkeypatch.setattr("shutil.disk_usage", disk_usage)
    require_space(tmp_path / "not" / "there", 5_000)
    with pytest.raises(OutputError, match=r"not/there needs at least 5\.0 kB, but its disk has 5\.0 kB left"):
        require_space(tmp_path / "not" / "there", 5_001)
    assert asked == [tmp_path, tmp_path]
