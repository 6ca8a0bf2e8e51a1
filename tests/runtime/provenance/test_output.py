"""The three files of an output: true digests, the same bytes for the same run, and a check that finds damage."""

from __future__ import annotations

import hashlib
import io
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import runtime
import runtime.cli.app
from runtime.errors import WeightsError
from runtime.host.regular_files import file_digest
from runtime.provenance import hashing
from runtime.provenance.digests import RunDigests
from runtime.provenance.hashing import Hasher
from runtime.provenance.output_files import check_output
from runtime.provenance.record import ProvenanceRecord, read_record
from runtime.streaming.display import Display
from tests.runtime.place import Run, assert_refused
from tests.runtime.small import NARROW_W4, Small, Stop, calibrate, directory_bytes, recipe, stop_at, write_token_file
from tests.runtime.workshop import files_of, unfinished

HEADER = "---\nlicense: mit\nlanguage: [en]\n---\n# The original\n"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
GPTQ = f"GPTQModifier: {{{NARROW_W4}}}\n"


class Outputs:
    """A model in the hub's cache, and runs of it by the command line."""

    def __init__(self, folder: Path, model: Small) -> None:
        self.folder, self.model = folder, model
        self.weights = folder / "models--owner--name" / "snapshots" / COMMIT
        shutil.copytree(model.weights, self.weights)
        (self.weights / "README.md").write_text(HEADER)
        (self.weights / "seqbuild.json").write_text("{}")  # of an earlier quantization
        self.data = write_token_file(folder / "tokens.safetensors")
        self.recipe = folder / "my recipe.yaml"
        self.recipe.write_text(GPTQ)

    def run(self, name: str, *more: str | Path, recipe: Path | None = None) -> Path:
        command = ["calibrate", self.model.artifact, "--weights", self.weights, "--data", self.data]
        command += ["--recipe", recipe or self.recipe, "-o", self.folder / name, "--max-shard-size", "60KB", *more]
        assert runtime.cli.app.main([str(part) for part in command]) == 0
        return self.folder / name


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory, narrow_llama: Small) -> Outputs:
    return Outputs(tmp_path_factory.mktemp("outputs"), narrow_llama)


@pytest.fixture(scope="module")
def out(outputs: Outputs) -> Path:
    return outputs.run("out")


@pytest.fixture(scope="module")
def found(out: Path) -> ProvenanceRecord:
    return read_record(out)


def test_digests_are_those_of_sha256sum(outputs: Outputs, out: Path, found: ProvenanceRecord) -> None:
    expected = files_of(out)
    assert {file.name: file.sha256 for file in found.output.files} == {
        name: digest for name, digest in expected.items() if name not in ("README.md", "seqbuild.json")
    }
    assert len([name for name in expected if name.endswith(".safetensors")]) > 1
    assert all(file.bytes == (out / file.name).stat().st_size for file in found.output.files)
    source = {name: digest for name, digest in files_of(outputs.weights).items() if name.endswith(".safetensors")}
    assert {file.name: file.sha256 for file in found.weights.files} == source
    lines = "".join(f"{digest}  {name}\n" for name, digest in source.items())  # sha256sum *.safetensors | sha256sum
    assert found.weights.sha256 == hashlib.sha256(lines.encode()).hexdigest()
    assert found.recipe.sha256 == expected["recipe.yaml"]
    assert found.artifact.sha256 == file_digest(outputs.model.artifact / "manifest.msgpack")


def test_the_record_describes_the_run(out: Path, found: ProvenanceRecord) -> None:
    assert (found.model.hub_id, found.model.revision, found.model.name) == ("owner/name", COMMIT, "name")
    assert (found.model.card.license, found.model.card.language) == ("mit", ("en",))
    assert found.data is not None and (found.data.num_samples, found.data.num_tokens) == (6, 240)
    assert len(found.modules) == 21 and all(module.error and module.num_tokens == 240 for module in found.modules)
    assert found.unquantized == ("lm_head",)
    assert found.recipe.groups[0].num_modules == 21
    words = found.command.split()
    assert words[:2] == ["seqbuild", "calibrate"] and words[-2:] == ["-o", "OUT"]
    for part in (f"--revision {COMMIT}", "--weights owner/name", "--data tokens.safetensors", "--recipe recipe.yaml"):
        assert part in found.command


def test_nothing_depends_on_the_place(outputs: Outputs, out: Path) -> None:
    card = (out / "README.md").read_text()
    assert "# The original" not in card and "base_model: owner/name\n" in card
    for name in ("README.md", "seqbuild.json", "recipe.yaml"):
        text = (out / name).read_text()
        assert str(outputs.folder) not in text and "/tmp" not in text and "my recipe" not in text


def test_the_recipe_of_the_output_repeats_the_run(outputs: Outputs, out: Path) -> None:
    again = outputs.run("again", "--resume", recipe=out / "recipe.yaml")
    assert directory_bytes(again) == directory_bytes(out)


def test_joined_parts_are_the_same(outputs: Outputs, out: Path) -> None:
    outputs.run("parted", "--parts")
    part, joined = outputs.folder / "parted.part-0-of-1", outputs.folder / "joined"
    with pytest.raises(WeightsError, match=r"lists no files \(join the parts"):
        check_output(part)
    assert runtime.cli.app.main(["join", str(part), "-o", str(joined)]) == 0
    assert directory_bytes(joined) == directory_bytes(out)


def test_hashing_of_the_weights_can_be_off(outputs: Outputs, out: Path, found: ProvenanceRecord) -> None:
    quick = outputs.run("quick", "--no-hash-weights")
    weights = read_record(quick).weights
    assert weights.sha256 == "" and not any(file.sha256 for file in weights.files)
    assert [file.bytes for file in weights.files] == [file.bytes for file in found.weights.files]
    assert read_record(quick).output == found.output
    assert (quick / "README.md").read_bytes() == (out / "README.md").read_bytes()


def cut(directory: Path) -> None:
    path = next(directory.glob("model-00002-*"))
    path.write_bytes(path.read_bytes()[:-1])


def flipped(directory: Path) -> None:
    path = next(directory.glob("model-00002-*"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def removed(directory: Path) -> None:
    (directory / "config.json").unlink()
    (directory / "recipe.yaml").unlink()


def added(directory: Path) -> None:
    shutil.copyfile(next(directory.glob("model-00002-*")), directory / "more.safetensors")


def outside(directory: Path) -> None:
    path = directory / "seqbuild.json"
    path.write_text(
        path.read_text().replace('"config.json"', '"../config.json"').replace('"recipe.yaml"', '"a\\u0000"')
    )


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (cut, ".safetensors has "),
        (flipped, ".safetensors has other content"),
        (removed, "config.json is missing, recipe.yaml is missing"),
        (added, "more.safetensors is not listed in seqbuild.json"),
        (outside, "../config.json is not the name of a file in it"),
    ],
)
def test_check_finds_damage(out: Path, tmp_path: Path, run: Run, damage: Callable[[Path], None], part: str) -> None:
    copy = Path(shutil.copytree(out, tmp_path / "copy"))
    (copy / "README.md").write_text("people edit cards")
    code, printed, complaint = run(["check", str(copy)])
    assert (code, complaint) == (0, "") and "match seqbuild.json" in printed and "owner/name" in printed
    damage(copy)
    assert_refused(run(["check", str(copy)]), "is not the checkpoint that was written: ", part, "download it again")


def test_a_signature_key_does_not_apply_to_an_output(out: Path, run: Run) -> None:
    assert_refused(run(["check", str(out), "--public-key", "key.pem"]), "has no signature")


GATE = threading.Event()


class Slow(Hasher):
    """Waits for the gate before the first piece of each file, so that the run is over first."""

    def _digest(self, pieces: hashing.Pieces) -> str | None:
        GATE.wait(20)
        return super()._digest(pieces)


def test_a_run_waits_for_digests_and_says_so(
    narrow_llama: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phases: list[str] = []

    class Phases:
        def tell(self, event: str, **facts: Any) -> None:
            if event == "phase":
                phases.append(f"{facts['label']}: {facts['phase']}")
                if facts["phase"] == "hash files":
                    console.print(display._drawn())
                    assert not (tmp_path / "out").exists()
                    GATE.set()

    GATE.clear()
    monkeypatch.setattr("runtime.provenance.digests.Hasher", Slow)
    monkeypatch.setattr("runtime.provenance.digests._LOOK_S", 0.01)
    rtn = recipe(NARROW_W4)
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with Display(console) as display:
        calibrate(narrow_llama, rtn, tmp_path / "out", watchers=[display, Phases()])
    assert phases[-1].endswith("left: hash files")
    assert isinstance(console.file, io.StringIO) and " left: hash files" in console.file.getvalue()
    calibrate(narrow_llama, rtn, tmp_path / "usual")
    assert directory_bytes(tmp_path / "out") == directory_bytes(tmp_path / "usual")


@pytest.mark.parametrize("index", [0, 3])
def test_a_source_that_changes_ends_the_run(
    narrow_llama: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index: int
) -> None:
    """Also after the run itself has read all of it."""
    weights = Path(shutil.copytree(narrow_llama.weights, tmp_path / "weights"))
    real = RunDigests.reach

    def reach(self: RunDigests, step: int) -> None:
        if step == index + 1:  # the last step of this model is 3, and 4 is the end
            (weights / "model.safetensors").write_bytes((narrow_llama.weights / "model.safetensors").read_bytes())
            GATE.set()
        real(self, step)

    monkeypatch.setattr(RunDigests, "reach", reach)
    monkeypatch.setattr("runtime.provenance.digests.Hasher", Slow)
    GATE.clear()
    with pytest.raises(WeightsError, match=r"model\.safetensors was changed while it was read"):
        calibrate(narrow_llama, recipe(NARROW_W4), tmp_path / "out", weights=weights)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("spoil", ["", "{", '{"model.safetensors": [1, 2, "ab"]}'])
def test_a_resumed_run_takes_over_digests(
    narrow_llama: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: str
) -> None:
    real = RunDigests.written

    def written(self: RunDigests, index: int) -> None:
        self._hasher.wait(20)  # a small file may be hashed after the step
        real(self, index)

    monkeypatch.setattr(RunDigests, "written", written)
    gptq = recipe(NARROW_W4, modifier="GPTQModifier")
    added: list[str] = []
    with monkeypatch.context() as patch:
        stop_at(patch, 9)
        with pytest.raises(Stop):
            calibrate(narrow_llama, gptq, tmp_path / "out")
    (kept,) = unfinished(tmp_path / "out").glob("digests-*")
    if spoil:
        kept.write_text(spoil)
    with monkeypatch.context() as patch:
        add = Hasher.add

        def noted(self: Hasher, key: str, pieces: hashing.Pieces) -> None:
            added.append(key)
            add(self, key, pieces)

        patch.setattr(Hasher, "add", noted)
        assert calibrate(narrow_llama, gptq, tmp_path / "out", resume=True).resumed_at
    assert added == [*(["source:model.safetensors"] if spoil else []), "output:model.safetensors"]
    calibrate(narrow_llama, gptq, tmp_path / "whole")
    assert directory_bytes(tmp_path / "out") == directory_bytes(tmp_path / "whole")
