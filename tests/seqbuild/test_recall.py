"""The cache: what is found, what is not, and what killed, damaged and crowded compilations leave."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import seqbuild.cli.app
from runtime.artifact.encoding import sha256
from runtime.artifact.manifest import MANIFEST_NAME
from runtime.chain import check, read_manifest
from runtime.errors import DataError, OutputError
from runtime.host.publish import DAMAGED, PARTIAL
from seqbuild.build import build, opened
from seqbuild.cache import key as cache
from seqbuild.cache import recall
from seqbuild.cache.store import entries, nearest, prune
from seqbuild.cli.explain import EXCLUDED, explain
from seqbuild.options import CompileOptions
from tests.runtime.place import Run
from tests.tiny_models import save_config

ROOT = Path(__file__).parents[2]
# Libraries are imported once; then each child is a process of its own, which traces or finds.
CROWD = """
import os, sys, seqbuild.build, seqbuild.passes
from seqbuild.trace.attempts import trace_first_working
import transformers.models.llama.modeling_llama
children = []
for index in range(4):
    mine, theirs = os.pipe()
    child = os.fork()
    if not child:
        traced = []
        seqbuild.passes.trace_first_working = lambda *a, **k: traced.append(1) or trace_first_working(*a, **k)
        path = seqbuild.build.build(sys.argv[1], out=sys.argv[2]).path
        os.write(theirs, f"{path.name} {len(traced)}".encode())
        os._exit(0)
    os.close(theirs)
    children.append((child, mine))
for child, mine in children:
    said = os.read(mine, 1000).decode()
    print(said, os.waitpid(child, 0)[1])
"""
KILLED = """
import os, signal, sys, time, seqbuild.build, seqbuild.passes
import transformers.models.llama.modeling_llama
def timed(out, wait):
    start = time.monotonic()
    child = os.fork()
    if not child:
        seqbuild.build.build(sys.argv[1], out=out)
        os._exit(0)
    if wait is not None:
        time.sleep(wait)
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return time.monotonic() - start
whole = timed(sys.argv[3], None)
for part in (0.5, 0.96):
    timed(sys.argv[2], whole * part)
    print(whole * part, *sorted(os.listdir(sys.argv[2])) if os.path.isdir(sys.argv[2]) else (), sep="|", flush=True)
"""


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process: exit code, what it printed, what it complained about."""

    def call(arguments: list[str], main: Callable[[list[str]], int]) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main(arguments)
        return code, *capfd.readouterr()

    return call


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_config("llama", tmp_path_factory.mktemp("somewhere") / "model")


@pytest.fixture(scope="module")
def compiled(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a compilation's artifacts; tests copy it."""
    out = tmp_path_factory.mktemp("compiled")
    build(model, out=out)
    return out


@pytest.fixture
def out(compiled: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(compiled, tmp_path / "out"))


@pytest.fixture
def never_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seqbuild.passes.build_weightless", lambda *_, **__: pytest.fail("the model was built"))


def asked(model: Path, **options: Any) -> dict[str, str]:
    with opened(CompileOptions(model=str(model), **options)) as compilation:
        return cache.requested(compilation)


def recalled(model: Path, out: Path) -> recall.Compiled | None:
    with opened(CompileOptions(model=str(model), out=out)) as compilation:
        return recall.recall(compilation, cache.requested(compilation))


def artifact(out: Path) -> Path:
    (found,) = (path for path in out.iterdir() if path.is_dir() and not path.name.startswith("."))
    return found


def said_by(program: str, *arguments: Path) -> list[str]:
    """The lines that a program prints."""
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


class TestHits:
    def test_a_hit_builds_nothing(self, model: Path, out: Path, never_traced: None) -> None:
        found = build(model, out=out)
        assert found.is_cached
        assert found.path == artifact(out)
        assert found.remarks == ()

    def test_a_hit_on_the_command_line_imports_no_torch(self, model: Path, out: Path) -> None:
        program = (
            "import sys, seqbuild.cli.app\n"
            "code = seqbuild.cli.app.main(sys.argv[1:])\n"
            "sys.exit(code or len({'torch', 'transformers', 'numpy'} & set(sys.modules)))\n"
        )
        command = [sys.executable, "-c", program, "compile", str(model), "--out", str(out), "--json"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["cached"] is True

    @pytest.mark.parametrize("replace", [lambda record: None, os.mkfifo, lambda record: record.write_bytes(b"{}")])
    def test_without_a_record_it_is_compiled_again_and_what_is_the_same_stays(
        self, model: Path, out: Path, replace: Callable[[Path], object]
    ) -> None:
        (record,) = out.glob(f".*{recall.RECORD_SUFFIX}")
        before, inode = record.read_bytes(), artifact(out).stat().st_ino
        record.unlink()
        replace(record)
        made = build(model, out=out)
        assert not made.is_cached and made.remarks == ()
        assert artifact(out).stat().st_ino == inode
        assert record.read_bytes() == before

    def test_the_record_of_another_request_for_the_same_key_counts(self, model: Path, out: Path) -> None:
        made = build(model, out=out, targets=["LlamaDecoderLayer"])
        assert made.is_cached and made.path == artifact(out)
        assert len(list(out.glob(f".*{recall.RECORD_SUFFIX}"))) == 2

    @pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"request": 1}', b"\xff", b"[" * 100_000])
    def test_a_damaged_record_is_no_hit(self, data: bytes, model: Path, out: Path) -> None:
        (record,) = out.glob(f".*{recall.RECORD_SUFFIX}")
        record.write_bytes(data)
        assert recalled(model, out) is None

    def test_a_record_of_another_manifest_is_no_hit(self, model: Path, out: Path) -> None:
        """Whoever puts another artifact in its place must not have it found."""
        (record,) = out.glob(f".*{recall.RECORD_SUFFIX}")
        table = json.loads(record.read_bytes())
        record.write_text(json.dumps(table | {"manifest": "0" * 64}))
        assert recalled(model, out) is None

    def test_other_library_files_are_no_hit(self, model: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("runtime.language.library_sources.source_digest", lambda module: "other")
        assert recalled(model, out) is None

    def test_what_a_model_is_made_of_includes_what_its_code_imports(self, out: Path) -> None:
        (record,) = out.glob(f".*{recall.RECORD_SUFFIX}")
        sources = json.loads(record.read_bytes())["sources"]
        assert {"transformers.models.llama.modeling_llama", "transformers.masking_utils"} <= sources.keys()
        assert not any(name.startswith("torch") for name in sources)


class TestKey:
    """What must not count: one test for each of `explain.EXCLUDED`."""

    def test_path(self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        other = Path(shutil.copytree(model, tmp_path / "far" / "away"))
        monkeypatch.chdir(tmp_path)
        assert asked(model) == asked(other) == asked(Path("far/away"))
        assert "path" in EXCLUDED

    def test_time(self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        other = Path(shutil.copytree(model, tmp_path / "model"))
        for path in other.iterdir():
            os.utime(path, (1, 1))
        before = asked(model)
        monkeypatch.setattr(time, "time", lambda: 1.0)
        assert asked(other) == before
        assert "time" in EXCLUDED

    def test_user(self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        before = asked(model)
        for name in ("HOME", "USER", "LOGNAME", "HOSTNAME", "TMPDIR", "LANG", "TZ", "HF_HOME", "SEQBUILD_ANYTHING"):
            monkeypatch.setenv(name, str(tmp_path))
        assert asked(model) == before
        assert "user" in EXCLUDED

    def test_values(self) -> None:
        import torch

        one, other = torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.int64)
        assert cache._signature(one) == cache._signature(other) != cache._signature(one.float())
        assert set(EXCLUDED) == {"path", "time", "user", "values"}

    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("targets", {"targets": "LlamaDecoderLayer"}),
            ("ignore", {"ignore": "create_causal_mask"}),
            ("auto_ignore", {"auto_ignore": False}),
            ("sample", {"text_only": True}),
            ("targets_per_subgraph", {"targets_per_subgraph": 2}),
            ("attn_implementation", {"attn_implementation": "eager"}),
            ("leaves", {"leaves": "target"}),
        ],
    )
    def test_what_is_asked_for_counts(self, name: str, options: dict[str, Any], model: Path) -> None:
        plain, other = asked(model), asked(model, **options)
        assert [part for part in plain if plain[part] != other[part]] == [name]

    @pytest.mark.parametrize(
        ("name", "file"),
        [("config", "config.json"), ("companions", "tokenizer.json"), ("companions", "generation_config.json")],
    )
    def test_the_files_of_the_model_count(self, name: str, file: str, model: Path, tmp_path: Path) -> None:
        other = Path(shutil.copytree(model, tmp_path / "model"))
        (other / file).write_bytes(((other / file).read_bytes() if (other / file).is_file() else b"{}") + b"\n")
        plain, changed = asked(model), asked(other)
        assert [part for part in plain if plain[part] != changed[part]] == [name]

    @pytest.mark.parametrize("name", ["seqbuild", "torch", "transformers"])
    def test_versions_count(self, name: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        plain = asked(model)
        monkeypatch.setattr(
            cache, "versions", lambda: {"seqbuild": "0", "torch": "0", "transformers": "0"} | {name: "1"}
        )
        first = asked(model)
        monkeypatch.setattr(cache, "versions", lambda: {"seqbuild": "0", "torch": "0", "transformers": "0"})
        second = asked(model)
        assert [part for part in plain if first[part] != second[part]] == [f"version_{name}"]

    def test_a_sample_counts_by_its_content(self, model: Path, tmp_path: Path) -> None:
        (tmp_path / "a.safetensors").write_bytes(b"a")
        shutil.copy(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
        samples = [asked(model, sample=tmp_path / f"{name}.safetensors")["sample"] for name in "ab"]
        assert samples[0] == samples[1] != asked(model)["sample"]
        with pytest.raises(DataError, match="cannot be read"):
            asked(model, sample=tmp_path / "c.safetensors")


class TestExplain:
    def test_a_hit(self, model: Path, out: Path, never_traced: None) -> None:
        found = explain(CompileOptions(model=str(model), out=out))
        assert (found.is_hit, found.path, found.reason) == (True, artifact(out), "")
        assert {
            "config",
            "model_class",
            "model_source",
            "version_torch",
            "targets",
            "sample",
        } <= found.ingredients.keys()

    def test_a_miss_names_what_differs(self, model: Path, out: Path, run: Run) -> None:
        code, said, _ = run(
            ["cache", "explain", str(model), "--out", str(out), "--leaves", "target"], seqbuild.cli.app.main
        )
        assert code == 0
        assert f"nearest: {artifact(out)}, which differs in leaves\n  leaves: auto there, target here" in said
        assert [line.split()[0] for line in said.splitlines()][:2] == ["attn_implementation", "auto_ignore"]

    def test_a_damaged_artifact_is_named(self, model: Path, out: Path, run: Run) -> None:
        (artifact(out) / "config.json").write_bytes(b"")
        code, said, _ = run(["cache", "explain", str(model), "--out", str(out), "--json"], seqbuild.cli.app.main)
        found = json.loads(said)
        assert (code, found["hit"]) == (0, False)
        assert "the existing artifact is damaged" in found["reason"]

    def test_nothing_is_near_where_nothing_is(self, model: Path, tmp_path: Path) -> None:
        found = explain(CompileOptions(model=str(model), out=tmp_path / "none"))
        assert (found.is_hit, found.nearest, found.differing) == (False, None, {})
        assert not (tmp_path / "none").exists()

    def test_the_nearest_differs_least(self, out: Path) -> None:
        (entry,) = entries(out)
        assert entry.manifest is not None
        ours = dict(entry.manifest.ingredients)
        far = replace(
            entry, path=Path("far"), manifest=replace(entry.manifest, ingredients={**ours, "a": "1", "b": "2"})
        )
        assert nearest({**ours, "a": "1"}, [far, entry]) == (Path("far"), {"b": ("2", "missing")})
        assert nearest(ours, [far, entry]) == (entry.path, {})
        assert nearest(ours, []) is None


class TestDamage:
    def test_it_is_named_moved_aside_and_mended(self, model: Path, out: Path, run: Run) -> None:
        path = artifact(out)
        good = (path / "config.json").read_bytes()
        (path / "config.json").write_bytes(b"{}")
        code, said, complaint = run(["compile", str(model), "--out", str(out)], seqbuild.cli.app.main)
        assert code == 0
        (aside,) = out.glob(f".{path.name}.*{DAMAGED}")
        assert f"{path / 'config.json'} is damaged" in complaint
        assert f"moved to {aside}" in complaint
        assert (aside / "config.json").read_bytes() == b"{}"
        assert (path / "config.json").read_bytes() == good
        assert [gone.path for gone in prune(out)] == [aside]
        assert "nothing was traced" not in said

    @pytest.mark.parametrize("has_record", [True, False])
    def test_an_artifact_that_no_compilation_made_is_moved_aside(
        self, model: Path, out: Path, run: Run, has_record: bool
    ) -> None:
        """All of its digests fit, and so does its key: only what was recorded, or making it again, can tell."""
        path = artifact(out)
        good = directory_bytes(path)
        manifest = read_manifest(path)
        program = path / manifest.subgraphs[0].file
        poisoned = program.read_bytes() + b"# poison\n"
        program.write_bytes(poisoned)
        files = [
            replace(entry, bytes=len(poisoned), sha256=sha256(poisoned))
            if entry.path == manifest.subgraphs[0].file
            else entry
            for entry in manifest.files
        ]
        (path / MANIFEST_NAME).write_bytes(replace(manifest, files=tuple(files)).to_bytes())
        check(path)
        if not has_record:
            for record in out.glob(f".*{recall.RECORD_SUFFIX}"):
                record.unlink()
        code, said, complaint = run(["compile", str(model), "--out", str(out)], seqbuild.cli.app.main)
        (aside,) = out.glob(f".{path.name}.*{DAMAGED}")
        assert code == 0 and "nothing was traced" not in said
        assert complaint.count("\n") == 1 and complaint.startswith("warning: ") and str(aside) in complaint
        assert (aside / manifest.subgraphs[0].file).read_bytes() == poisoned
        assert directory_bytes(path) == good


def directory_bytes(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_processes_at_the_same_time_trace_once(model: Path, tmp_path: Path) -> None:
    said = [line.split() for line in said_by(CROWD, model, tmp_path / "out")]
    assert len(said) == 4
    assert len({name for name, _, _ in said}) == 1
    assert sorted(int(count) for _, count, _ in said) == [0] * 3 + [1]
    assert {code for _, _, code in said} == {"0"}


def test_a_killed_compilation_leaves_all_or_nothing(model: Path, tmp_path: Path) -> None:
    """Killed in the middle of a compilation, and while it writes."""
    out = tmp_path / "out"
    out.mkdir()
    for line in said_by(KILLED, model, out, tmp_path / "whole"):
        names = [name for name in line.split("|")[1:] if not name.startswith(".")]
        assert len(names) <= 1, line
    for path in out.iterdir():
        if path.is_dir() and not path.name.startswith("."):
            check(path)
    found = build(model, out=out)
    check(found.path)
    list(prune(out))
    assert not [path for path in out.iterdir() if path.name.endswith((PARTIAL, DAMAGED))]
    assert artifact(out) == found.path


class TestPrune:
    def test_leftovers_go_and_what_is_worked_at_stays(self, out: Path) -> None:
        from filelock import FileLock

        name = artifact(out).name
        left, used = out / f".{name}.abc{PARTIAL}", out / f".other-0123456789ab.abc{PARTIAL}"
        for path in (left, used):
            path.mkdir()
            (path / "file").write_bytes(b"12345")
        (out / "note.txt").write_text("not ours")
        (out / f".not-ours{PARTIAL}").mkdir()
        lock = FileLock(out / ".other-0123456789ab.lock")
        with lock:
            assert [(gone.path, gone.num_bytes) for gone in prune(out)] == [(left, 5)]
            assert used.is_dir()
        assert [gone.path for gone in prune(out)] == [used]
        assert not (out / ".other-0123456789ab.lock").exists()
        assert artifact(out).is_dir()
        assert (out / "note.txt").is_file()
        assert (out / f".not-ours{PARTIAL}").is_dir()

    def test_half_of_a_record_goes(self, out: Path) -> None:
        (record,) = out.glob(f".*{recall.RECORD_SUFFIX}")
        half = out / f".{record.name}.a1b2c3{PARTIAL}"
        half.write_bytes(b"{")
        (gone,) = prune(out)
        assert (gone.path, gone.why, gone.num_bytes) == (half, "its compilation was killed", 1)
        assert record.is_file()
        assert not half.exists()

    def test_by_age(self, out: Path) -> None:
        assert list(prune(out, older_than_s=3600)) == []
        for path in (artifact(out), *out.glob(f".*{recall.RECORD_SUFFIX}")):
            os.utime(path, (1, 1))
        (gone,) = prune(out, older_than_s=3600)
        assert gone.why.startswith("not used for")
        assert sorted(path.name for path in out.iterdir()) == []

    def test_a_hit_is_use(self, model: Path, out: Path) -> None:
        for path in (artifact(out), *out.glob(f".*{recall.RECORD_SUFFIX}")):
            os.utime(path, (1, 1))
        assert recalled(model, out) is not None
        assert list(prune(out, older_than_s=3600)) == []

    def test_by_size_the_last_used_stay(self, out: Path) -> None:
        old = Path(shutil.copytree(artifact(out), out / "old-0123456789ab"))
        os.utime(old, (1, 1))
        (entry, _) = sorted(entries(out), key=lambda entry: -entry.used)
        assert [gone.path for gone in prune(out, max_bytes=entry.num_bytes)] == [old]
        assert [gone.path for gone in prune(out, max_bytes=0)] == [entry.path]

    def test_all(self, out: Path, run: Run) -> None:
        code, said, _ = run(["cache", "prune", "--all", "--out", str(out)], seqbuild.cli.app.main)
        assert (code, "--all was given" in said) == (0, True)
        assert list(out.iterdir()) == []

    def test_numbers(self, out: Path, run: Run) -> None:
        for option, value in (("--older-than", "3 weeks"), ("--max-size", "ten"), ("--older-than", "d")):
            code, _, complaint = run(["cache", "prune", option, value, "--out", str(out)], seqbuild.cli.app.main)
            assert (code, option in complaint) == (2, True)
        code, said, _ = run(
            ["cache", "prune", "--older-than", "30d", "--max-size", "1GB", "-o", str(out)], seqbuild.cli.app.main
        )
        assert (code, said) == (0, "0 B freed\n")
        code, said, _ = run(["cache", "ls", "-o", str(out)], seqbuild.cli.app.main)
        assert (code, said.splitlines()[-1].split(",")[0]) == (0, "1 artifacts")

    def test_no_such_directory(self, tmp_path: Path) -> None:
        with pytest.raises(OutputError, match="there is no directory"):
            entries(tmp_path / "nothing")


class TestDisks:
    def test_a_place_without_permission_still_gives_hits(
        self, model: Path, out: Path, monkeypatch: pytest.MonkeyPatch, never_traced: None
    ) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(os, "utime", refuse)
        monkeypatch.setattr("seqbuild.cache.recall.write_file", refuse)
        assert build(model, out=out).is_cached

    @pytest.mark.parametrize(("number", "reason"), [(28, "the disk is full"), (30, "the file system is read-only")])
    def test_full_and_read_only_disks_are_one_clear_error(
        self, number: int, reason: str, model: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("runtime.host.publish.flush_tree", refuse)
        code, _, complaint = run(["compile", str(model), "--out", str(tmp_path / "out")], seqbuild.cli.app.main)
        assert (code, reason in complaint, complaint.count("\n")) == (2, True, 1)
        assert [path.name for path in (tmp_path / "out").iterdir() if not path.name.endswith(".lock")] == []
