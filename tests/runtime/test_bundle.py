"""The bundle: packed the same everywhere, and enough for a host that has nothing but the libraries."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import tarfile
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import runtime.cli.app
import seqbuild.cli.app
from runtime.artifact.bundle import damaged, read_bundle
from runtime.cli.doctor import Examination, examine
from runtime.errors import ArtifactError, OutputError, RecipeError, UsageError, WeightsError
from runtime.planning.fit import Limits
from seqbuild.ship.pack import REQUIRED, pack
from tests.runtime.place import Run
from tests.runtime.small import Small, directory_bytes, nameless_bytes, write_token_file

ROOT = Path(__file__).parents[2]
RECIPE = "GPTQModifier: {targets: Linear, scheme: W4A16, ignore: [lm_head]}\n"
FORBID = """
import runpy, socket, sys
def refuse(*_, **__):
    raise SystemExit("a socket was opened")
socket.socket.connect = socket.socket.connect_ex = socket.socket.bind = socket.getaddrinfo = refuse
sys.argv = ["runtime", *sys.argv[1:]]
sys.path.insert(0, "")
runpy.run_module("runtime", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def parts(llama: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a recipe and a token file."""
    folder = tmp_path_factory.mktemp("parts")
    (folder / "r.yaml").write_text(RECIPE)
    write_token_file(folder / "calib.safetensors", num_samples=4, length=40)
    return folder


@pytest.fixture(scope="module")
def bundle(llama: Small, parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole one; tests copy it before they change it."""
    out = tmp_path_factory.mktemp("bundles") / "bundle"
    return pack(
        llama.artifact, recipe=parts / "r.yaml", data=parts / "calib.safetensors", weights=llama.weights, out=out
    )


def findings(path: Path, **said: object) -> dict[str, list[str]]:
    examination = Examination(path=path, device="cpu", **said)  # type: ignore[arg-type]
    found: dict[str, list[str]] = {"ok": [], "note": [], "problem": []}
    for finding in examine(examination):
        found[finding.kind].append(finding.text)
    assert examination.is_ready is not bool(found["problem"])
    return found


class TestPacking:
    def test_the_same_bytes_again(self, bundle: Path, llama: Small, parts: Path, tmp_path: Path) -> None:
        again = pack(
            shutil.copytree(llama.artifact, tmp_path / "elsewhere"),
            recipe=parts / "r.yaml",
            data=parts / "calib.safetensors",
            weights=llama.weights,
            out=tmp_path / "again",
        )
        names = sorted(path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file())
        assert names == sorted(path.relative_to(again).as_posix() for path in again.rglob("*") if path.is_file())
        for name in names:
            assert (bundle / name).read_bytes() == (again / name).read_bytes(), name

    def test_a_tar_is_deterministic_and_holds_the_same(
        self, bundle: Path, llama: Small, parts: Path, tmp_path: Path
    ) -> None:
        options = {"recipe": parts / "r.yaml", "data": parts / "calib.safetensors", "weights": llama.weights}
        first = pack(llama.artifact, out=tmp_path / "a" / "bundle.tar", **options)
        second = pack(llama.artifact, out=tmp_path / "b" / "bundle.tar", **options)
        assert first.read_bytes() == second.read_bytes()
        with tarfile.open(first) as tar:
            assert {(entry.mtime, entry.uid, entry.gid, entry.uname) for entry in tar} == {(0, 0, 0, "")}
            tar.extractall(tmp_path / "x", filter="data")
        for path in sorted((tmp_path / "x" / "bundle").rglob("*")):
            if path.is_file():
                assert path.read_bytes() == (bundle / path.relative_to(tmp_path / "x" / "bundle")).read_bytes()
        assert sorted(path.name for path in first.parent.iterdir()) == ["bundle.tar"]
        with pytest.raises(OutputError, match="exists"):
            pack(llama.artifact, out=first, **options)

    def test_what_is_in_it(self, bundle: Path) -> None:
        found = read_bundle(bundle)
        assert found.data and found.weights
        assert damaged(found, with_weights=True) == []
        assert tuple(found.requirements) == tuple(sorted(REQUIRED))
        pinned = dict(line.split("==") for line in (bundle / "requirements.txt").read_text().splitlines())
        assert pinned == dict(found.requirements)
        assert not any("+" in version for version in pinned.values())
        assert "    python -m runtime calibrate .\n" in (bundle / "README.md").read_text()
        subprocess.run(["sha256sum", "--check", "--quiet", "--strict", "SHA256SUMS"], cwd=bundle, check=True)
        assert not list(bundle.rglob("__pycache__"))
        everything = b"".join(path.read_bytes() for path in bundle.glob("*.*") if path.suffix != ".safetensors")
        assert str(bundle.parent).encode() not in everything

    def test_what_is_not_right_is_not_packed(self, llama: Small, parts: Path, tmp_path: Path) -> None:
        (tmp_path / "odd.yaml").write_text("Nothing: {}")
        (tmp_path / "text.txt").write_text("text")
        artifact, recipe, out = llama.artifact, parts / "r.yaml", tmp_path / "out"
        with pytest.raises(RecipeError, match="'Nothing' is not supported"):
            pack(artifact, recipe=tmp_path / "odd.yaml", out=out)
        with pytest.raises(UsageError, match="is not a token file"):
            pack(artifact, recipe=recipe, data=tmp_path / "text.txt", out=out)
        with pytest.raises(WeightsError, match="contains no safetensors"):
            pack(artifact, recipe=recipe, weights=tmp_path, out=out)
        with pytest.raises(ArtifactError, match="is not an artifact"):
            pack(llama.weights, recipe=recipe, out=out)
        assert not out.exists()

    def test_on_the_command_line(self, llama: Small, parts: Path, tmp_path: Path, run: Run) -> None:
        arguments = ["pack", str(llama.artifact), "--recipe", str(parts / "r.yaml"), "-o", str(tmp_path / "out")]
        code, said, _ = run(arguments, seqbuild.cli.app.main)
        assert (code, said.startswith(f"{tmp_path / 'out'}: ")) == (0, True)
        assert "python -m runtime calibrate . --weights MODEL_DIR" in (tmp_path / "out" / "README.md").read_text()
        code, _, complaint = run(["calibrate", str(tmp_path / "out"), "--device", "cpu"])
        assert (code, "Missing option '--weights'" in complaint) == (2, True)
        code, _, complaint = run(["calibrate", str(llama.artifact), "--device", "cpu"])
        assert (code, "Missing option" in complaint) == (2, True)
        code, said, _ = run(["check", str(tmp_path / "out")])
        assert (code, "files and" in said) == (0, True)


class TestDoctor:
    def test_all_is_ready(self, bundle: Path) -> None:
        found = findings(bundle)
        assert found["problem"] == []
        said = "\n".join(found["ok"])
        for part in (
            "torch 2",
            "files match their digests",
            "artifact: valid, model",
            "artifact: portable",
            "data: 4 samples",
        ):
            assert part in said
        assert re.search(r"memory: 4 samples of \d+ tokens need .* of host memory", said)
        assert re.search(r"disk: the result needs at least .*, .* are free", said)
        assert found["note"] == ["artifact: not signed"]

    @pytest.mark.parametrize(
        "name", ["artifact/config.json", "runtime/language/grammar.py", "data.safetensors", "recipe.yaml"]
    )
    def test_damage(self, name: str, bundle: Path, tmp_path: Path, run: Run) -> None:
        copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
        (copy / name).write_bytes((copy / name).read_bytes()[:-1])
        found = findings(copy)
        assert any(name in text for text in found["problem"])
        code, _, complaint = run(["calibrate", str(copy), "--device", "cpu"])
        assert (code, f"{name} of the bundle" in complaint) == (2, True)
        assert not (copy / "quantized").exists()

    def test_damaged_weights(self, bundle: Path, tmp_path: Path) -> None:
        copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
        path = copy / "weights" / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(bytes(data))
        assert any("weights/model.safetensors" in text for text in findings(copy)["problem"])

    def test_a_library_that_is_missing_or_another(self, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real = importlib.metadata.version

        def version(name: str) -> str:
            if name == "accelerate":
                raise importlib.metadata.PackageNotFoundError(name)
            return "0.0.1" if name == "msgspec" else real(name)

        monkeypatch.setattr(importlib.metadata, "version", version)
        found = findings(bundle)
        assert found["problem"] == [f"accelerate is not installed (pip install accelerate=={real('accelerate')})"]
        assert f"msgspec 0.0.1; the bundle was packed with {real('msgspec')}" in found["note"]

    def test_memory_and_disk_that_do_not_suffice(self, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("runtime.planning.request.memory_here", lambda device: Limits(host=1000))
        assert any("which does not fit" in text for text in findings(bundle)["problem"])
        usage = shutil.disk_usage("/")
        monkeypatch.setattr(shutil, "disk_usage", lambda _: type(usage)(10, 10, 0))
        assert any("its disk has 0 B left" in text for text in findings(bundle)["problem"])

    def test_a_device_that_is_not_there(self, bundle: Path) -> None:
        import torch

        if not torch.cuda.is_available():
            examination = Examination(path=bundle, device="cuda")
            assert [finding.kind for finding in examine(examination)][-1] == "problem"

    def test_a_checkpoint_that_does_not_fit(self, bundle: Path, tmp_path: Path) -> None:
        (tmp_path / "model.safetensors").write_bytes(b"")
        found = findings(bundle, weights=tmp_path)
        assert any(str(tmp_path) in text for text in found["problem"])

    def test_a_bare_artifact(self, llama: Small, parts: Path, tmp_path: Path, run: Run) -> None:
        said = {"weights": llama.weights, "recipe": parts / "r.yaml", "out": tmp_path / "out"}
        assert any("needs calibration data" in text for text in findings(llama.artifact, **said)["problem"])
        assert findings(llama.artifact, **said, data=(str(parts / "calib.safetensors"),))["problem"] == []
        (tmp_path / "empty").mkdir()
        for missing, why in ((tmp_path / "none", "cannot be read"), (tmp_path / "empty", "has no data files")):
            assert any(why in text for text in findings(llama.artifact, **said, data=(str(missing),))["problem"])
        code, told, _ = run(["doctor", str(llama.artifact), "--device", "cpu"])
        assert code == 1
        assert told.splitlines()[-1] == "not ready: fix the problems above"
        assert "problem  Missing option '--weights'" in told
        code, _, complaint = run(["doctor", str(llama.artifact), "--dtype", "float64"])
        assert (code, "--dtype" in complaint, "'float64'" in complaint) == (2, True, True)

    def test_own_code(self, bundle: Path, tmp_path: Path) -> None:
        """A bundle whose table of contents is none is a problem, and not a traceback."""
        copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
        for text in ("", "[]", "{}", json.dumps({"format": "x"}), '{"format": "seqbuild-bundle", "format_version": 9}'):
            (copy / "bundle.json").write_text(text)
            assert any("is not the table of contents of a bundle" in problem for problem in findings(copy)["problem"])


def distributions(names: Iterator[str]) -> dict[str, importlib.metadata.Distribution]:
    """Those of these names and all that they require here, extras left away."""
    found: dict[str, importlib.metadata.Distribution] = {}
    pending = list(names)
    while pending:
        name = pending.pop()
        key = re.sub(r"[-_.]+", "-", name).lower()
        if key in found:
            continue
        try:
            found[key] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # nobody has installed it here either
        for line in found[key].requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                pending.append(requirement.name)
    return found


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The python of a new environment with the six libraries, what they require, and nothing else."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for distribution in distributions(iter(REQUIRED)).values():
        for top in dict.fromkeys(Path(file).parts[0] for file in distribution.files or ()):
            source = Path(str(distribution.locate_file(top)))
            if top not in ("..", "__pycache__") and source.exists() and not (packages / top).exists():
                (packages / top).symlink_to(source)
    return folder / "bin" / "python"


def isolated(python: Path) -> list[str]:
    """How to run python where no interface exists; without the means for that, where sockets are forbidden."""
    namespace = ["unshare", "--map-root-user", "--net"]
    if shutil.which("unshare") and subprocess.run([*namespace, "true"], capture_output=True).returncode == 0:
        return [*namespace, str(python), "-m", "runtime"]
    return [str(python), "-c", FORBID]


def test_a_host_without_seqbuild_network_and_home_does_the_whole_job(
    bare: Path, bundle: Path, llama: Small, parts: Path, tmp_path: Path
) -> None:
    there = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    # No file can be made in /proc, whoever asks.
    environment = {"PATH": os.environ["PATH"], "HOME": "/proc", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    unseen = ("seqbuild", "runtime", "pytest", "model_signing")
    program = f"import importlib.util as util; print([name for name in {unseen} if util.find_spec(name)])"
    found = subprocess.run([str(bare), "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert found.stdout == "[]\n"
    before = sorted(there.rglob("*"))
    for arguments, expected in ((["doctor", "."], "ready: this host can run"), (["calibrate", "."], "in quantized")):
        done = subprocess.run(
            [*isolated(bare), *arguments, *(["--device", "cpu"])],
            cwd=there,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert expected in done.stdout
        assert done.stderr == ""
    page = there / "quantized.report.html"
    assert page.is_file()
    assert [path for path in sorted(there.rglob("*")) if "quantized" not in path.parts and path != page] == before
    usual = ["calibrate", llama.artifact, "--weights", llama.weights, "--device", "cpu", "-o", tmp_path / "usual"]
    usual += ["--recipe", parts / "r.yaml", "--data", parts / "calib.safetensors"]
    assert runtime.cli.app.main([str(part) for part in usual]) == 0
    assert nameless_bytes(there / "quantized") == nameless_bytes(tmp_path / "usual")
    assert "model.safetensors" in directory_bytes(there / "quantized")
