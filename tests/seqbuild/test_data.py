from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from runtime.data.samples import load_tokens
from runtime.errors import DataError, OutputError, UsageError
from seqbuild.ship.tokens import tokenize_files


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    """Two files; with the test tokenizer 4 + 3 tokens."""
    (tmp_path / "b.txt").write_text("abc")
    (tmp_path / "a.jsonl").write_text('{"text": "de"}\n')
    return [tmp_path / "b.txt", tmp_path / "a.jsonl"]


def test_files_become_one_token_file_in_the_order_given(
    tmp_path: Path, byte_tokenizer_dir: Path, texts: list[Path]
) -> None:
    out = tmp_path / "calib.safetensors"

    written = tokenize_files(byte_tokenizer_dir, texts, num_samples=None, seq_len=3, pack=True, out=out)
    read = load_tokens(out)

    # <bos> is 0 and a byte b is 2 + b: <bos> a b, c <bos> d; the e is left over.
    assert [sample.tolist() for sample in read.samples] == [[0, 99, 100], [101, 0, 102]]
    assert read.digest == written.digest == hashlib.sha256(out.read_bytes()).hexdigest()
    assert read.origin == written.origin
    assert read.origin.tokenizer == byte_tokenizer_dir.name
    assert read.origin.sources == (
        ("b.txt", hashlib.sha256(b"abc").hexdigest()),
        ("a.jsonl", hashlib.sha256(b'{"text": "de"}\n').hexdigest()),
    )


def test_the_same_texts_in_another_folder_give_the_same_bytes(
    tmp_path: Path, byte_tokenizer_dir: Path, texts: list[Path]
) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    copies = [Path(shutil.copy(path, folder)) for path in texts]
    outs = [tmp_path / "1.safetensors", folder / "2.safetensors"]
    for files, out in zip((texts, copies), outs, strict=True):
        tokenize_files(byte_tokenizer_dir, files, num_samples=2, seq_len=None, pack=False, out=out)
    assert outs[0].read_bytes() == outs[1].read_bytes()


def test_a_tokenizer_is_found_in_the_local_hub_cache(
    tmp_path: Path, byte_tokenizer_dir: Path, texts: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    model = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(byte_tokenizer_dir, model / "snapshots" / commit)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    data = tokenize_files("someone/tiny", texts, num_samples=1, seq_len=2, pack=True, out=tmp_path / "x.safetensors")

    assert [sample.tolist() for sample in data.samples] == [[0, 99]]
    assert data.origin.tokenizer == "someone/tiny"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("someone/elsewhere", 'the tokenizer of .someone/elsewhere.*hf download someone/elsewhere --include "'),
        ("./no/such/folder", "there is no tokenizer at ./no/such/folder"),
        ("a/b/c", "there is no tokenizer at a/b/c"),
        ("", "no tokenizer given"),
    ],
)
def test_an_unknown_tokenizer_is_refused(tmp_path: Path, texts: list[Path], name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        tokenize_files(name, texts, num_samples=1, seq_len=2, pack=True, out=tmp_path / "x.safetensors")


def test_a_bad_place_or_no_files_are_refused_before_any_work(
    tmp_path: Path, texts: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("seqbuild.ship.tokens.prepare_data", None)
    (tmp_path / "folder.safetensors").mkdir()
    for out, error in (("x.bin", UsageError), ("folder.safetensors", OutputError)):
        with pytest.raises(error, match=out.replace(".", "[.]")):
            tokenize_files(tmp_path, texts, num_samples=1, seq_len=2, pack=True, out=tmp_path / out)
    with pytest.raises(UsageError, match="no data given"):
        tokenize_files(tmp_path, [], num_samples=1, seq_len=2, pack=True, out=tmp_path / "x.safetensors")
