from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from runtime.data.samples import load_tokens, save_tokens
from runtime.data.token_file import DataOrigin, read_token_file
from runtime.errors import DataError, OutputError, UsageError

ORIGIN = DataOrigin(
    tokenizer="tiny",
    tokenizer_digest="ab" * 32,
    vocab_size=10,
    sources=(("a.txt", "cd" * 32), ("b.txt", "ef")),
)
SAMPLES = (torch.tensor([1, 2, 3]), torch.tensor([4, 5]), torch.tensor([9, 0, 6]))
METADATA = {
    "version": "1.0",
    "tokenizer": "tiny",
    "tokenizer_digest": "ab",
    "vocab_size": 10,
    "seq_len": 3,
    "sources": [["a.txt", "cd"]],
}


def expected_bytes() -> bytes:
    """The file of SAMPLES and ORIGIN by the specification, byte for byte."""
    inner = (
        '{"seq_len":3,"sources":[["a.txt","' + "cd" * 32 + '"],["b.txt","ef"]],"tokenizer":"tiny",'
        '"tokenizer_digest":"' + "ab" * 32 + '","version":"1.0","vocab_size":10}'
    )
    header = (
        '{"__metadata__":{"seqbuild_tokens":' + json.dumps(inner) + "},"
        '"offsets":{"dtype":"I64","shape":[4],"data_offsets":[0,32]},'
        '"tokens":{"dtype":"I32","shape":[8],"data_offsets":[32,64]}}'
    ).encode()
    header += b" " * (-len(header) % 8)
    return (
        struct.pack("<Q", len(header))
        + header
        + struct.pack("<4q", 0, 3, 5, 8)
        + struct.pack("<8i", 1, 2, 3, 4, 5, 9, 0, 6)
    )


def write_file(path: Path, tensors: dict[str, torch.Tensor] | None = None, **changes: Any) -> Path:
    """A token file as no code of ours would write it."""
    whole = {"tokens": torch.arange(5), "offsets": torch.tensor([0, 3, 5])} | (tensors or {})
    metadata = {"seqbuild_tokens": json.dumps(METADATA | changes)}
    path.write_bytes(save(whole, metadata=metadata))
    return path


def test_the_bytes_are_those_of_the_specification(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"

    data = save_tokens(path, SAMPLES, seq_len=3, origin=ORIGIN)

    assert path.read_bytes() == expected_bytes()
    assert data.digest == hashlib.sha256(expected_bytes()).hexdigest()
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.safetensors"]


def test_another_process_writes_the_same_bytes(tmp_path: Path) -> None:
    program = (
        "import sys, torch; from pathlib import Path; from runtime.data.samples import load_tokens, save_tokens\n"
        "data = load_tokens(sys.argv[1])\n"
        "save_tokens(Path(sys.argv[2]), data.samples, seq_len=data.seq_len, origin=data.origin)\n"
    )
    first, second = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    first.write_bytes(expected_bytes())
    command = [sys.executable, "-c", program, str(first), str(second)]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
    assert second.read_bytes() == expected_bytes()


def test_reading_gives_back_what_the_specification_says(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(expected_bytes())

    data = read_token_file(path)

    assert [sample.tolist() for sample in data.samples] == [[1, 2, 3], [4, 5], [9, 0, 6]]
    assert {sample.dtype for sample in data.samples} == {torch.int64}
    assert data.digest == hashlib.sha256(expected_bytes()).hexdigest()
    assert (data.path, data.seq_len, data.origin) == (path, 3, ORIGIN)


def test_int64_tokens_unknown_keys_and_later_minor_versions_are_read(tmp_path: Path) -> None:
    path = write_file(tmp_path / "x.safetensors", {"weights": torch.zeros(2)}, version="1.7", new=[1])
    assert [sample.tolist() for sample in read_token_file(path).samples] == [[0, 1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, [[1, 2, 3], [4, 5], [9, 0, 6]]),
        ({"pack": False, "seq_len": 3}, [[1, 2, 3], [4, 5], [9, 0, 6]]),
        ({"seq_len": 2}, [[1, 2], [4, 5], [9, 0]]),
        ({"num_samples": 2}, [[1, 2, 3], [4, 5]]),
        ({"num_samples": 1, "seq_len": 1, "vocab_size": 10}, [[1]]),
    ],
)
def test_samples_can_be_fewer_and_shorter(tmp_path: Path, arguments: dict[str, Any], expected: list[list[int]]) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(expected_bytes())
    assert [sample.tolist() for sample in load_tokens(path, **arguments).samples] == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seq_len": 4}, "were cut at 3 tokens, but 4 are required"),
        ({"num_samples": 4}, "has 3 samples, but 4 are required"),
        ({"vocab_size": 9}, "token id 9, but the model's vocabulary has 9 entries"),
    ],
)
def test_samples_cannot_be_more_or_longer(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(expected_bytes())
    with pytest.raises(DataError, match=message):
        load_tokens(path, **arguments)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"offsets": torch.tensor([1, 3, 5])}, "offsets do not increase from 0 to the 5 tokens"),
        ({"offsets": torch.tensor([0, 3, 4])}, "offsets do not increase"),
        ({"offsets": torch.tensor([0, 3, 6])}, "offsets do not increase"),
        ({"offsets": torch.tensor([0, 3, 3, 5])}, "offsets do not increase"),
        ({"offsets": torch.tensor([0, 4, 3, 5])}, "offsets do not increase"),
        ({"offsets": torch.tensor([0, 2**63 - 1, -(2**63), 5])}, "offsets do not increase"),
        ({"offsets": torch.tensor([0])}, "offsets do not increase"),
        ({"offsets": torch.tensor([], dtype=torch.int64)}, "offsets do not increase"),
        (
            {"offsets": torch.tensor([0]), "tokens": torch.tensor([], dtype=torch.int32)},
            "offsets do not increase",
        ),
        ({"offsets": torch.tensor([0, 5], dtype=torch.int32)}, r"offsets is torch.int32 of shape \(2,\)"),
        ({"offsets": torch.tensor([[0, 5]])}, r"offsets is torch.int64 of shape \(1, 2\)"),
        ({"tokens": torch.arange(5.0)}, r"tokens is torch.float32 of shape \(5,\)"),
        ({"tokens": torch.tensor(5)}, r"tokens is torch.int64 of shape \(\)"),
        ({"tokens": torch.tensor([0, 1, -1, 3, 4])}, "token id -1 is outside its vocabulary of 10"),
        ({"tokens": torch.tensor([0, 1, 10, 3, 4])}, "token id 10 is outside its vocabulary of 10"),
    ],
)
def test_tensors_that_break_the_format_are_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], message: str
) -> None:
    path = write_file(tmp_path / "x.safetensors", tensors)
    with pytest.raises(DataError, match=message):
        read_token_file(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "3.0"}, "has token file version 3.0, but this release reads 1.2 and 2.0"),
        ({"version": "2.0"}, "num_samples is None"),
        ({"version": None}, "has no version"),
        ({"version": 1}, "has no version"),
        ({"seq_len": 2}, "a sample has 3 tokens, but seq_len is 2"),
        ({"seq_len": 0}, "seq_len is 0"),
        ({"seq_len": True}, "seq_len is True"),
        ({"seq_len": "3"}, "seq_len is '3'"),
        ({"vocab_size": 4.0}, "vocab_size is 4.0"),
        ({"vocab_size": None}, "vocab_size is None"),
        ({"tokenizer": 1}, "tokenizer is not a string"),
        ({"tokenizer_digest": None}, "tokenizer_digest is not a string"),
        ({"sources": {}}, "sources is not a list of pairs"),
        ({"sources": [["a", "b", "c"]]}, "sources is not a list of pairs"),
        ({"sources": [["a", 1]]}, "sources is not a list of pairs"),
    ],
)
def test_metadata_that_breaks_the_format_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write_file(tmp_path / "x.safetensors", **changes)
    with pytest.raises(DataError, match=message):
        read_token_file(path)


@pytest.mark.parametrize("metadata", ["", "[" * 100_000, "[]", "7", "null", '{"version": 1'])
def test_metadata_that_is_no_object_is_refused(tmp_path: Path, metadata: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(save({"tokens": torch.arange(5)}, metadata={"seqbuild_tokens": metadata}))
    with pytest.raises(DataError, match="is not a valid token file"):
        read_token_file(path)


@pytest.mark.parametrize("missing", ["tokens", "offsets"])
def test_a_missing_tensor_is_refused(tmp_path: Path, missing: str) -> None:
    tensors = {"tokens": torch.arange(5), "offsets": torch.tensor([0, 5])}
    del tensors[missing]
    path = tmp_path / "x.safetensors"
    path.write_bytes(save(tensors, metadata={"seqbuild_tokens": json.dumps(METADATA | {"seq_len": 5})}))
    with pytest.raises(DataError, match=f"has no tensor {missing}"):
        read_token_file(path)


def test_other_safetensors_files_are_no_token_files(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for metadata in (None, {"format": "pt"}):
        path.write_bytes(save({"tokens": torch.arange(5)}, metadata=metadata))
        with pytest.raises(DataError, match="is a safetensors file but not a token file"):
            read_token_file(path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    whole = expected_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match="is empty" if length == 0 else "not a valid safetensors file"):
            read_token_file(path)


@settings(max_examples=300, deadline=None)
@given(position=st.integers(0, len(expected_bytes()) - 1), value=st.integers(0, 255))
def test_a_changed_byte_gives_ids_of_the_vocabulary_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "changed.safetensors"
    content = bytearray(expected_bytes())
    content[position] = value
    path.write_bytes(content)
    try:
        data = read_token_file(path)
    except DataError:
        return
    assert sum(len(sample) for sample in data.samples) == 8
    assert all(0 <= token < data.origin.vocab_size for sample in data.samples for token in sample.tolist())


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OutputError, match=r"cannot write .*x.safetensors: the disk is full"):
            save_tokens(path, SAMPLES, seq_len=3, origin=ORIGIN)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.safetensors"]

    save_tokens(path, SAMPLES, seq_len=3, origin=ORIGIN)
    assert path.read_bytes() == expected_bytes()


def test_places_that_cannot_be_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "a.txt").touch()
    for name, error, message in (
        ("x.bin", UsageError, "x.bin is not the name of a token file"),
        ("folder.safetensors", OutputError, "folder.safetensors is a directory"),
        ("a.txt/x.safetensors", OutputError, "a.txt is not a directory"),
    ):
        with pytest.raises(error, match=message):
            save_tokens(tmp_path / name, SAMPLES, seq_len=3, origin=ORIGIN)
