"""Data sets of the hub in the local cache, and directories that `datasets` wrote."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runtime.data.options import DataOptions
from runtime.data.tokenization import prepare_data
from runtime.errors import DataError, UsageError
from runtime.host.hub import is_id

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CARD = "---\nconfigs:\n"
for _config in ("main", "other"):
    CARD += f"- config_name: {_config}\n  data_files:\n"
    CARD += "".join(f"  - split: {split}\n    path: {_config}/{split}-*\n" for split in ("train", "test"))
CARD += "---\n# A data set\n"


@pytest.fixture(scope="module")
def library() -> Any:
    return pytest.importorskip("datasets")


@pytest.fixture
def hub(tmp_path: Path, library: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache of the hub, and of the library."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "prepared")
    (tmp_path / "hub").mkdir()
    library.disable_progress_bars()
    yield tmp_path / "hub"


def cached(hub: Path, name: str, files: dict[str, str]) -> Path:
    """Write a data set as `hf download` does."""
    folder = hub / f"datasets--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    for path, content in files.items():
        (snapshot / path).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / path).write_text(content)
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    return snapshot


def rows(letters: str) -> str:
    return "".join(json.dumps({"text": letter, "n": 1}) + "\n" for letter in letters)


def text(tokenizer: Path, *sources: str | Path, **options: Any) -> str:
    found = prepare_data(DataOptions(sources=sources, pack=False, **options), tokenizer)
    return "".join(chr(sample.tolist()[1] - 2) for sample in found.tokens.samples)


def test_the_files_of_a_data_set(hub: Path, byte_tokenizer_dir: Path) -> None:
    files = {
        f"{config}/{split}-0.jsonl": rows(f"{config[0]}{split[1]}abcdefgh")
        for config in ("main", "other")
        for split in ("train", "test")
    }
    snapshot = cached(hub, "owner/name", {"README.md": CARD, **files})

    def read(**options: Any) -> str:
        return text(byte_tokenizer_dir, "owner/name", **options)

    assert read(config="main", split="train") == "mrabcdefgh"
    assert read(config="other", split="test[:3]") == "oea"
    assert read(config="main", split="train[80%:]+test[-1:]") == "ghh"
    assert read(config="main", split="train[2:4]", revision=COMMIT) == "ab"
    assert read(config="main", split="train", num_samples=2) == "md"
    assert (
        text(byte_tokenizer_dir, "owner/name::config=main,split=test[:1]", str(snapshot / "main/test-0.jsonl"))
        == "mmeabcdefgh"
    )
    assert text(byte_tokenizer_dir, snapshot, config="other", split="train") == "orabcdefgh"
    found = prepare_data(
        DataOptions(sources=("owner/name",), config="main", split="test", pack=False), byte_tokenizer_dir
    )
    ((name, digest),) = found.tokens.origin.sources
    assert name == "owner/name main test"
    other = prepare_data(
        DataOptions(sources=("owner/name",), config="main", split="train", pack=False), byte_tokenizer_dir
    )
    assert digest != other.tokens.origin.sources[0][1]
    for wrong, message in (
        ({}, "Config name is missing.*main.*--config"),
        ({"config": "none"}, "with the config none cannot be read: BuilderConfig 'none' not found"),
        ({"config": "main"}, "owner/name has the splits train, test .*--split"),
        ({"config": "main", "split": "dev"}, r"has no split 'dev' \(it has train, test\)"),
        ({"config": "main", "split": "train[a]"}, r"--split is 'train\[a\]'"),
    ):
        with pytest.raises(UsageError, match=message):
            read(**wrong)
    with pytest.raises(DataError, match=r"owner/name main train has no column 'x' \(its columns are \['text', 'n'\]"):
        read(config="main", split="train", columns=("x",))


def test_tables_that_the_library_has_prepared(
    hub: Path, library: Any, tmp_path: Path, byte_tokenizer_dir: Path
) -> None:
    (tmp_path / "source.jsonl").write_text(rows("abcdef"))
    builder = library.load_dataset_builder(
        "json", data_files={"train": str(tmp_path / "source.jsonl")}, cache_dir=str(tmp_path / "work")
    )
    builder.download_and_prepare()
    place = tmp_path / "prepared" / "owner___name" / "default" / "0.0.0" / COMMIT
    shutil.copytree(builder.cache_dir, place)
    (place / "json-train.arrow").rename(place / "name-train.arrow")
    info = json.loads((place / "dataset_info.json").read_text())
    (place / "dataset_info.json").write_text(json.dumps(info | {"config_name": "default", "dataset_name": "name"}))
    assert text(byte_tokenizer_dir, "owner/name") == "abcdef"
    assert text(byte_tokenizer_dir, "owner/name", split="train[50%:]") == "def"
    cached(hub, "owner/name", {"README.md": "the card alone\n"})
    assert text(byte_tokenizer_dir, "owner/name", num_samples=2) == "ad"
    with pytest.raises(DataError, match="hf download --repo-type dataset owner/name --revision v1"):
        text(byte_tokenizer_dir, "owner/name", revision="v1")


def test_saved_data_sets(hub: Path, library: Any, tmp_path: Path, byte_tokenizer_dir: Path) -> None:
    table = library.Dataset.from_dict({"text": list("abc")})
    table.save_to_disk(str(tmp_path / "one"))
    library.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(str(tmp_path / "two"))
    assert text(byte_tokenizer_dir, tmp_path / "one") == "abc"
    assert text(byte_tokenizer_dir, tmp_path / "two", split="test+train[:1]") == "ba"
    with pytest.raises(UsageError, match="two has the splits train, test"):
        text(byte_tokenizer_dir, tmp_path / "two")


def test_what_is_not_cached(hub: Path, byte_tokenizer_dir: Path) -> None:
    command = r"hf download --repo-type dataset owner/none\)$"
    what = "no file or directory owner/none exists, and the data set owner/none is not in the local cache"
    with pytest.raises(DataError, match=f"{what} .*{command}"):
        text(byte_tokenizer_dir, "owner/none")
    with pytest.raises(DataError, match="no file or directory none exists, and the data set none is not in the local"):
        text(byte_tokenizer_dir, "none")
    cached(hub, "owner/part", {"README.md": CARD, "main/train-0.jsonl": rows("a")})
    with pytest.raises(DataError, match=r"may be incomplete .*hf download --repo-type dataset owner/part"):
        text(byte_tokenizer_dir, "owner/part", config="other", split="train")


@pytest.mark.parametrize("named", ["/etc/hostname", "https://example.org/x.jsonl", "../x.jsonl", "hf://datasets/a/b/*"])
def test_files_outside_of_a_data_set(tmp_path: Path, hub: Path, byte_tokenizer_dir: Path, named: str) -> None:
    card = f"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {named}\n---\n"
    snapshot = cached(hub, "owner/name", {"README.md": card, "x.jsonl": rows("a")})
    for source in ("owner/name", str(snapshot)):
        with pytest.raises(DataError, match=r"the card of .* names .*, which is outside of it"):
            text(byte_tokenizer_dir, source, split="train")


ALIASES = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{number}: &a{number} [{', '.join([f'*a{number - 1}'] * 10)}]\n" for number in range(1, 8)
)


@pytest.mark.parametrize("card", ["configs: &a\n- *a\n", f"{ALIASES}configs: *a7\n", f"{ALIASES}dataset_info: *a7\n"])
def test_a_card_whose_aliases_never_end(hub: Path, byte_tokenizer_dir: Path, card: str) -> None:
    cached(hub, "owner/name", {"README.md": f"---\n{card}---\n", "x.jsonl": rows("a")})
    with pytest.raises(DataError, match=r"the card of .* has more than 1,000,000 values \(shorten it\)"):
        text(byte_tokenizer_dir, "owner/name")


def test_links_out_of_a_data_set(tmp_path: Path, hub: Path, byte_tokenizer_dir: Path) -> None:
    (tmp_path / "secret.jsonl").write_text(rows("s"))
    snapshot = cached(hub, "owner/name", {"README.md": "text\n"})
    (snapshot / "x.jsonl").symlink_to(tmp_path / "secret.jsonl")
    with pytest.raises(DataError, match=r"x\.jsonl is a link to a file outside of the data set"):
        text(byte_tokenizer_dir, "owner/name")
    blob = snapshot.parent.parent / "blobs" / "0"
    blob.parent.mkdir()
    blob.write_text(rows("b"))
    (snapshot / "x.jsonl").unlink()
    (snapshot / "x.jsonl").symlink_to(blob)
    assert text(byte_tokenizer_dir, "owner/name") == "b"


@pytest.mark.parametrize("kind", ["image", "audio", "video", "pdf"])
def test_media_of_a_row_are_not_opened(hub: Path, byte_tokenizer_dir: Path, kind: str) -> None:
    """The library would open files, and addresses on a network, whose names are in the rows."""
    chat = {"messages": [{"role": "user", "content": "http://127.0.0.1:9/a"}], "text": "http://127.0.0.1:9/a"}
    features = f"""---
dataset_info:
  features:
  - name: text
    dtype: {kind}
  - name: messages
    list:
    - name: role
      dtype: string
    - name: content
      dtype: {kind}
---
"""
    cached(hub, "owner/name", {"README.md": features, "x.jsonl": json.dumps(chat)})
    with pytest.raises(DataError, match="messages of row 1 of owner/name train must be a list of objects"):
        text(byte_tokenizer_dir, "owner/name", columns=("text",))
    with pytest.raises(DataError, match="the content of a message of row 1 of owner/name train is dict"):
        text(byte_tokenizer_dir, "owner/name", columns=("messages",))


@pytest.mark.parametrize("entry", ["_data_files", "_indices_files"])
def test_files_outside_of_a_saved_data_set(library: Any, tmp_path: Path, byte_tokenizer_dir: Path, entry: str) -> None:
    for name in ("one", "other"):
        library.Dataset.from_dict({"text": [name[0]]}).save_to_disk(str(tmp_path / name))
    path = tmp_path / "one" / "state.json"
    state = json.loads(path.read_text())
    for outside in ("../other/data-00000-of-00001.arrow", str(tmp_path / "other" / "data-00000-of-00001.arrow")):
        path.write_text(json.dumps(state | {entry: [{"filename": outside}]}))
        with pytest.raises(DataError, match=r"state\.json names .*, which is outside of its directory"):
            text(byte_tokenizer_dir, tmp_path / "one")
    os.mkfifo(tmp_path / "one" / "pipe")
    path.write_text(json.dumps(state | {entry: [{"filename": "pipe"}]}))
    with pytest.raises(DataError, match="it is a pipe"):
        text(byte_tokenizer_dir, tmp_path / "one")


def test_scripts_are_never_executed(tmp_path: Path, hub: Path, byte_tokenizer_dir: Path) -> None:
    trap = f"open({str(tmp_path / 'executed')!r}, 'w')\n"
    snapshot = cached(hub, "owner/name", {"name.py": trap, f"{COMMIT}.py": trap, "x.jsonl": rows("a")})
    with pytest.raises(DataError, match="Dataset scripts are no longer supported"):
        text(byte_tokenizer_dir, "owner/name")
    (snapshot / f"{COMMIT}.py").unlink()
    assert text(byte_tokenizer_dir, "owner/name") == "a"
    assert not (tmp_path / "executed").exists()


def test_without_the_library(tmp_path: Path, byte_tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(DataError, match=r"the data set owner/name requires the package datasets \(pip install"):
        text(byte_tokenizer_dir, "owner/name")


def test_ids() -> None:
    assert all(map(is_id, ("squad", "owner/name", "o-1/n.a_b")))
    assert not any(map(is_id, ("a/b/c", "./a", "../a", "/a", "a/", "a b", "-a", "")))
