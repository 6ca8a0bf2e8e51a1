"""Directories that another hand has prepared: where a run works, a bundle's weights, what is copied into the result."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

import runtime
from runtime.artifact.bundle import BUNDLE_NAME, find_job
from runtime.errors import ArtifactError, OutputError
from seqbuild.ship.pack import pack
from tests.runtime.conftest import narrow_llama, small
from tests.runtime.small import NARROW_W4, Small, Stop, calibrate, recipe, stop_at, token_batches, write_token_file

__all__ = ["narrow_llama", "small"]

GPTQ = recipe(NARROW_W4, modifier="GPTQModifier")
SHARDS = {"max_shard_bytes": 30_000}


@pytest.fixture
def interrupted(narrow_llama: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a run has left that was stopped after two of three layers."""
    with monkeypatch.context() as patch:
        stop_at(patch, 15)
        with pytest.raises(Stop):
            calibrate(narrow_llama, GPTQ, tmp_path / "out", **SHARDS)
    return tmp_path / ".out.run.partial"


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """Somebody's files."""
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    (folder / "notes.safetensors").write_text("more of it")
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def link_root(partial: Path, victim: Path) -> None:
    partial.symlink_to(victim)


def link_folder(name: str) -> Callable[[Path, Path], None]:
    def prepare(partial: Path, victim: Path) -> None:
        partial.mkdir()
        (partial / name).symlink_to(victim)

    return prepare


def link_file(name: str) -> Callable[[Path, Path], None]:
    def prepare(partial: Path, victim: Path) -> None:
        (partial / name).parent.mkdir(parents=True)
        (partial / name).symlink_to(victim / "thesis.txt")

    return prepare


def hard_link(partial: Path, victim: Path) -> None:
    (partial / "checkpoint").mkdir(parents=True)
    os.link(victim / "thesis.txt", partial / "checkpoint" / "model.safetensors")


def pipe(partial: Path, victim: Path) -> None:
    partial.mkdir()
    os.mkfifo(partial / "journal")


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    "prepare",
    [
        link_root,
        *(link_folder(name) for name in ("checkpoint", "values", "anything")),
        *(link_file(name) for name in ("checkpoint/model.safetensors", "journal", "lock", "values/boundary-0")),
        hard_link,
        pipe,
    ],
)
def test_links_where_a_run_would_work_are_refused(
    narrow_llama: Small, tmp_path: Path, victim: Path, prepare: Callable[[Path, Path], None], resume: bool
) -> None:
    before = contents(victim)
    prepare(tmp_path / ".out.run.partial", victim)
    with pytest.raises(OutputError, match="is a link or a special file, which no run creates"):
        calibrate(narrow_llama, GPTQ, tmp_path / "out", resume=resume)
    assert contents(victim) == before
    assert not (tmp_path / "out").exists()


def a_shard(partial: Path) -> Path:
    return sorted((partial / "checkpoint").glob("*.safetensors"))[0]


def cut(partial: Path) -> None:
    os.truncate(a_shard(partial), a_shard(partial).stat().st_size // 2)


def overwrite(partial: Path) -> None:
    with a_shard(partial).open("r+b") as file:
        file.write(b"\0" * 16)


def lines(partial: Path) -> list[bytes]:
    return (partial / "journal").read_bytes().splitlines(keepends=True)


def line_twice(partial: Path) -> None:
    (partial / "journal").write_bytes(b"".join([*lines(partial), lines(partial)[-1]]))


def begun_twice(partial: Path) -> None:
    (partial / "journal").write_bytes(b"".join([lines(partial)[0], *lines(partial)]))


def never_begun(partial: Path) -> None:
    (partial / "journal").write_bytes(b"".join(lines(partial)[1:]))


def no_identity(partial: Path) -> None:
    text = json.dumps({"kind": "run", "identity": []}).encode()
    (partial / "journal").write_bytes(b"".join([b"%08x %s\n" % (zlib.crc32(text), text), *lines(partial)[1:]]))


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda partial: a_shard(partial).unlink(), "is missing, truncated or overwritten"),
        (cut, "is missing, truncated or overwritten"),
        (overwrite, "is missing, truncated or overwritten"),
        (line_twice, "is not the journal of one run"),
        (begun_twice, "is not the journal of one run"),
        (never_begun, "is not the journal of one run"),
        (no_identity, "is not the journal of one run"),
    ],
)
def test_a_damaged_run_is_not_gone_on_with(
    interrupted: Path, narrow_llama: Small, damage: Callable[[Path], None], why: str
) -> None:
    damage(interrupted)
    before = sorted(path.name for path in interrupted.rglob("*") if path.name != "lock")
    with pytest.raises(OutputError, match=why):
        calibrate(narrow_llama, GPTQ, interrupted.parent / "out", resume=True, **SHARDS)
    assert sorted(path.name for path in interrupted.rglob("*") if path.name != "lock") == before
    assert not (interrupted.parent / "out").exists()


def test_what_a_link_leads_to_is_copied_from_the_hubs_cache_alone(narrow_llama: Small, tmp_path: Path) -> None:
    hub = tmp_path / "models--owner--name"
    blobs, snapshot = hub / "blobs", hub / "snapshots" / "0123"
    shutil.copytree(narrow_llama.weights, snapshot)
    blobs.mkdir()
    (blobs / "ab").write_text('{"bos_token_id": 7}')
    (tmp_path / "secret.txt").write_text("a password")
    (snapshot / "generation_config.json").unlink(missing_ok=True)
    (snapshot / "generation_config.json").symlink_to("../../blobs/ab")
    (snapshot / "notes.txt").symlink_to(tmp_path / "secret.txt")
    (snapshot / "quantize_config.json").write_text("{}")
    calibrate(narrow_llama, GPTQ, tmp_path / "out", weights=snapshot)
    assert (tmp_path / "out" / "generation_config.json").read_text() == '{"bos_token_id": 7}'
    assert not (tmp_path / "out" / "generation_config.json").is_symlink()
    assert not (tmp_path / "out" / "notes.txt").exists()
    assert not (tmp_path / "out" / "quantize_config.json").exists()


def test_an_artifact_plants_no_files_that_readers_follow(narrow_llama: Small, tmp_path: Path) -> None:
    artifact = narrow_llama.load()
    planted = {"model.safetensors.index.json": b"{}", "adapter_config.json": b"{}", ".hidden": b"", "words.txt": b"a"}
    artifact.companions = {**artifact.companions, **planted}
    out, weights = tmp_path / "out", narrow_llama.weights
    runtime.calibrate(artifact, weights=weights, recipe=GPTQ, batches=token_batches(), out=out)
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found & set(planted) == {"words.txt"}


@pytest.fixture
def bundle(narrow_llama: Small, tmp_path: Path) -> Path:
    (tmp_path / "r.yaml").write_text(f"GPTQModifier: {{{NARROW_W4}}}\n")
    data = write_token_file(tmp_path / "calib.safetensors", num_samples=2, length=24)
    weights = narrow_llama.weights
    return pack(narrow_llama.artifact, recipe=tmp_path / "r.yaml", data=data, weights=weights, out=tmp_path / "bundle")


def job(bundle: Path) -> object:
    return find_job(bundle, weights=None, recipe=None, data=(), out=None)


def test_a_bundle_vouches_for_all_that_it_brings(bundle: Path, victim: Path) -> None:
    assert job(bundle)
    (bundle / "weights" / "notes.txt").symlink_to(victim / "thesis.txt")
    with pytest.raises(ArtifactError, match=r"notes\.txt is not a file of the bundle"):
        job(bundle)
    (bundle / "weights" / "notes.txt").unlink()
    table = json.loads((bundle / BUNDLE_NAME).read_text())
    del table["files"]["recipe.yaml"]
    (bundle / BUNDLE_NAME).write_text(json.dumps(table))
    with pytest.raises(ArtifactError, match=r"bundle\.json lists no recipe\.yaml"):
        job(bundle)
    table["files"]["artifact/manifest.msgpack"][0] = float("inf")
    (bundle / BUNDLE_NAME).write_text(json.dumps(table))
    with pytest.raises(ArtifactError, match="is not the table of contents of a bundle"):
        job(bundle)
