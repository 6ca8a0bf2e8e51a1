"""Parts that another hand has prepared: names, sizes and links in them."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtime.checkpoint.layout import Layout
from runtime.checkpoint.parts import join_parts
from runtime.checkpoint.stored import Stored
from runtime.errors import OutputError, WeightsError
from tests.runtime.part_files import change_table, tree_bytes, write_parts

Table = dict[str, Any]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_parts(tmp_path_factory.mktemp("parts"), 2)


@pytest.fixture(scope="module")
def table(parts: list[Path]) -> Table:
    found: Table = json.loads((parts[0] / "part.json").read_text())
    return found


def copied(parts: list[Path], folder: Path, table: object) -> list[Path]:
    """Copy the parts, whose tables get the same tensors as the given one."""
    found = []
    for part in parts:
        target = folder / part.name
        for name, data in tree_bytes(part).items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(data)
        found.append(target)
    (found[0] / "part.json").write_text(table if isinstance(table, str) else json.dumps(table))
    return found


def refused(parts: list[Path], folder: Path, message: str, kind: type[Exception] = WeightsError) -> None:
    before = tree_bytes(folder)
    with pytest.raises(kind, match=message):
        join_parts(parts, folder / "out")
    assert tree_bytes(folder) == before and not (folder / "out").exists()


def tensor(*changed: Any) -> Callable[[Table], None]:
    """Change the first entries of the first tensor."""

    def change(table: Table) -> None:
        table["tensors"][0] = [*changed, *table["tensors"][0][len(changed) :]]

    return change


def companion(name: str, size: int = 1) -> Callable[[Table], None]:
    def change(table: Table) -> None:
        table["companions"] = {name: [size, 0]}

    return change


def entry(name: str, value: Any) -> Callable[[Table], None]:
    def change(table: Table) -> None:
        table[name] = value

    return change


DAMAGED = "part.json is damaged: "
NAMES = (
    "../evil",
    "/etc/passwd",
    "a/../../evil",
    "a//b",
    ".hidden",
    "a/.git/config",
    "",
    ".",
    "a\\..\\b",
    "a\nb",
    "a\0b",
)
OWN = ("model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "part.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *((companion(name), DAMAGED + "file .* of 1 bytes") for name in (*NAMES, *OWN, "a" * 256, "é" * 128)),
        (companion("config.json", 2**62 + 1), DAMAGED),
        (companion("config.json", -1), DAMAGED),
        (companion("config.json", 10), "config.json has 9 bytes, and 10 are expected"),
        (tensor("1.weight"), DAMAGED + "two tensors have the same name"),
        (tensor("__metadata__"), DAMAGED),
        (tensor("0.weight", "F33"), DAMAGED + "tensor 0.weight has dtype F33"),
        (tensor("0.weight", "F32", [-1, 5]), DAMAGED),
        (tensor("0.weight", "F32", [2**62, 2**62]), DAMAGED + "tensor 0.weight has"),
        (tensor("0.weight", "F32", [1] * 65), DAMAGED),
        (tensor("0.weight", "F32", [2**80]), DAMAGED),
        (tensor("0.weight", "F4", [3]), DAMAGED + "tensor 0.weight has 12 bits"),
        (tensor("0.weight", "F32", [8, 5], 2), DAMAGED + "tensor 0.weight is in part 2, and there are 2 parts"),
        (tensor("0.weight", "F32", [8, 5], -1), DAMAGED),
        (tensor("0.weight", "F32", [8.5, 5]), DAMAGED),
        (tensor("0.weight", "F32", "85"), DAMAGED),
        (tensor(None), DAMAGED),
        (tensor("0.weight", "F32", [8, 5], 0, "more"), DAMAGED),
        (tensor("0.weight", "F32", [8, 6]), "is truncated or not the file"),
        (tensor("0.weight", "F32", [5, 8]), "is truncated or not the file"),
        (tensor("renamed"), "is truncated or not the file"),
        (tensor("0.weight", "F32", [8, 5], 1), "needs one checksum for each tensor"),
        (entry("max_shard_bytes", 0), DAMAGED),
        (entry("max_shard_bytes", 1), "part-.*safetensors is missing"),
        (entry("max_shard_bytes", 2**63), DAMAGED),
        (entry("part", 2), DAMAGED + "part 2 of 2"),
        (entry("part", -1), DAMAGED),
        (entry("part", 1), "part.json is damaged: only part 0 has companions"),
        (entry("num_parts", 0), DAMAGED),
        (entry("num_parts", 2**40), "are parts of different runs"),
        (entry("run", 5), DAMAGED),
        (entry("checksums", []), "needs one checksum for each tensor"),
        (entry("checksums", ["a"]), DAMAGED),
        (entry("checksums", [0] * 12), "is damaged"),
        (entry("tensors", {}), DAMAGED),
        (entry("format", 2), "has format 2, and this version reads format 1"),
        (entry("format", "1"), DAMAGED),
        (entry("more", 1), DAMAGED),
    ],
)
def test_a_hostile_table_is_refused(
    parts: list[Path], table: Table, tmp_path: Path, change: Callable[[Table], None], message: str
) -> None:
    changed = copy.deepcopy(table)
    change(changed)
    refused(copied(parts, tmp_path, changed), tmp_path, message)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "[" * 10_000, '{"format": 1}', '{"format": 1e999}', "\udcff", "\0"]
)
def test_a_table_that_is_not_one_is_refused(parts: list[Path], tmp_path: Path, text: str) -> None:
    found = copied(parts, tmp_path, {})
    (found[0] / "part.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(found, tmp_path, DAMAGED)


def test_a_table_of_any_size_is_not_read(parts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.checkpoint.parts._LARGEST_TABLE", 100)
    refused(parts, tmp_path, "it has more than 100 bytes")


def test_a_sparse_file_of_any_size_does_not_fill_the_disk(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    size = 2**43
    rows = [["a", "U8", [size], 0]]
    table = {"format": 1, "run": "", "part": 0, "num_parts": 1, "max_shard_bytes": 1, "tensors": rows}
    (tmp_path / "part" / "part.json").write_text(json.dumps({**table, "checksums": [0], "companions": {}}))
    (shard,) = Layout([Stored("a", "U8", (size,))], 1, "part").shards
    file = tmp_path / "part" / shard.name
    file.write_bytes(shard.header)
    try:
        os.truncate(file, shard.num_bytes)
    except OSError:
        pytest.skip("this file system has no files of this size")
    with pytest.raises(OutputError, match=r"needs at least 8\.8 TB, but its disk has"):
        join_parts([tmp_path / "part"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["part.json", "part-00001-of-00002.safetensors", "config.json", "1_Pooling"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_links_and_pipes_are_refused(parts: list[Path], table: Table, tmp_path: Path, name: str, kind: str) -> None:
    found = copied(parts, tmp_path / "parts", table)
    (tmp_path / "elsewhere").mkdir()
    path, moved = found[0] / name, tmp_path / "elsewhere" / name
    path.rename(moved)
    path.symlink_to(moved) if kind == "link" else os.mkfifo(path)
    message = "is a link, which no part contains" if kind == "link" else "is not a regular file|is missing"
    with pytest.raises(WeightsError, match=message):
        join_parts(found, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "parts"]


def test_names_of_tensors_are_no_paths(tmp_path: Path) -> None:
    """A tensor may have any name; it only stands in a header."""
    for part in write_parts(tmp_path, 1):
        rows = json.loads((part / "part.json").read_text())["tensors"]
        change_table(part, tensors=[["../../evil", *rows[0][1:]], *rows[1:]])
        refused([part], tmp_path, "is truncated or not the file")
