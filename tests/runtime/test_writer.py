from __future__ import annotations

import errno
import json
from collections import namedtuple
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from runtime.errors import OutputError
from runtime.writer import ShardWriter, require_space
from tests.runtime.small import raw_bytes, read_tensors


def numbers(count: int, start: int = 0) -> torch.Tensor:
    """`count` float32 numbers, 4 bytes each."""
    return torch.arange(start, start + count, dtype=torch.float32)


def test_one_shard_has_no_index(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path)
    writer.add("b", numbers(3))
    writer.add("a", numbers(2))
    assert list(tmp_path.iterdir()) == []  # it waits for its shard to fill
    writer.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_tensor("b").tolist() == [0.0, 1.0, 2.0]
    assert writer.total_bytes == 20


def test_a_shard_is_closed_before_it_grows_too_large(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, max_shard_bytes=40)
    for name, count in {"a": 4, "b": 6, "c": 1, "huge": 100, "d": 2}.items():
        writer.add(name, numbers(count))
        assert name in writer
    writer.finish()
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


def test_memory_holds_one_shard_at_most(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, max_shard_bytes=40)
    for index in range(5):
        writer.add(str(index), numbers(8))
        assert len(list(tmp_path.iterdir())) == index


def test_any_tensor_goes_through_unchanged(tmp_path: Path) -> None:
    tensors = {
        "view": numbers(12).reshape(3, 4).t()[1:],
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "float8": torch.randn(8).to(torch.float8_e4m3fn),
        "bfloat16": torch.randn(4, 3).bfloat16(),
        "bool": torch.tensor([True, False]),
        "int64": torch.tensor([2**62, -1]),
        "needs grad": torch.ones(2, requires_grad=True),
    }
    writer = ShardWriter(tmp_path)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.finish()
    found = read_tensors(tmp_path)
    assert sorted(found) == sorted(tensors)
    for name, tensor in tensors.items():
        assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype)
        assert raw_bytes(found[name].reshape(-1)) == raw_bytes(tensor.detach().reshape(-1)), name


def test_a_checkpoint_without_tensors_is_a_valid_file(tmp_path: Path) -> None:
    ShardWriter(tmp_path).finish()
    assert read_tensors(tmp_path) == {}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_an_error_of_the_operating_system_keeps_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise SafetensorError(f"Error while serializing: I/O error: what the disk said (os error {number})")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    writer = ShardWriter(tmp_path)
    writer.add("a", numbers(1))
    with pytest.raises(OSError) as caught:
        writer.finish()
    assert (caught.value.errno, caught.value.filename) == (number, str(tmp_path / "shard-00000.safetensors"))


def test_another_error_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise SafetensorError("the header is too large")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    writer = ShardWriter(tmp_path)
    writer.add("a", numbers(1))
    with pytest.raises(OutputError, match=r"shard-00000\.safetensors: the header is too large"):
        writer.finish()


def test_space_is_compared_on_the_disk_of_the_nearest_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def disk_usage(path: Path) -> tuple[int, int, int]:
        asked.append(path)
        return namedtuple("Usage", "total used free")(10_000, 5_000, 5_000)

    monkeypatch.setattr("shutil.disk_usage", disk_usage)
    require_space(tmp_path / "not" / "there", 5_000)
    with pytest.raises(OutputError, match=r"not/there takes 5\.0 kB at least, and its disk has 5\.0 kB left"):
        require_space(tmp_path / "not" / "there", 5_001)
    assert asked == [tmp_path, tmp_path]
