"""The built wheel, installed into a new environment: its programs, its data, and foreign modules named `runtime`."""

from __future__ import annotations

import email.message
import email.parser
import importlib.metadata
import os
import re
import rlcompleter
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import runtime
import seqbuild
from tests.minimums import declared

ROOT = Path(__file__).parents[1]
REPOSITORY = declared()["project"]["urls"]["Repository"]
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
FOREIGN = "raise SystemExit('the foreign module ran')\n"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy, so that nothing is left in the checkout."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    shutil.copy(ROOT / "seqbuild_runtime.py", copy)
    for name in ("runtime", "seqbuild"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-c", BUILD, str(out)], cwd=copy, capture_output=True, check=True)
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.parser.Parser().parsestr(archive.read(name).decode("utf-8"))


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a new environment that has the wheel; other libraries are those of this environment."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    found = dict.fromkeys(sysconfig.get_paths()[kind] for kind in ("purelib", "platlib"))
    (packages / "libraries.pth").write_text("".join(f"{path}\n" for path in found))
    install = ["-m", "pip", "--disable-pip-version-check", "install", "--no-deps", "--no-index", "--ignore-installed"]
    subprocess.run([folder / "bin" / "python", *install, wheel], capture_output=True, check=True)
    return folder / "bin"


@pytest.fixture(params=["empty", "runtime.py", "packages", "working directory on the path"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A user's directory, in which modules named like ours must not run."""
    folder = tmp_path / "place"
    folder.mkdir()
    (folder / "data").mkdir()
    if request.param == "runtime.py":
        for name in ("runtime", "seqbuild", "typing", "json"):
            (folder / f"{name}.py").write_text(FOREIGN)
        (folder / "runtime").mkdir()
    elif request.param == "packages":
        for name in ("runtime", "seqbuild"):
            (folder / name).mkdir()
            (folder / name / "__init__.py").write_text(FOREIGN)
    elif request.param == "working directory on the path":
        (folder / "runtime.py").write_text(FOREIGN)
        (folder / "seqbuild").mkdir()
    return folder


def call(command: list[str | Path], place: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    variables |= {"OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([*map(str, command)], cwd=place, env=variables, capture_output=True, text=True)


def test_both_programs_run_in_any_directory(programs: Path, place: Path) -> None:
    is_on_path = (place / "runtime.py").exists() and (place / "seqbuild").exists()
    path = {"PYTHONPATH": ":/no/such/folder"} if is_on_path else {}  # an empty entry is the working directory
    version = runtime.__version__
    for name in ("seqbuild", "seqbuild-runtime"):
        done = call([programs / name, "--version"], place, **path)
        assert (done.returncode, done.stderr) == (0, ""), done
        assert re.match(rf"{name} {re.escape(version)} \(Python \S+, torch \d", done.stdout)
    done = call([programs / "python", "-m", "seqbuild", "cache", "--version"], place, **path)
    if not (place / "seqbuild.py").exists() and not (place / "seqbuild" / "__init__.py").exists():
        assert done.stdout.startswith(f"seqbuild {version} ")


def test_a_model_is_quantized_in_any_directory(programs: Path, tmp_path: Path) -> None:
    """In an empty directory with the built-in text, then among foreign modules with the artifact of the first call."""
    artifacts, empty = tmp_path / "artifacts", tmp_path / "empty"
    empty.mkdir()
    for name in ("runtime", "seqbuild"):
        (tmp_path / f"{name}.py").write_text(FOREIGN)
    (tmp_path / "runtime").mkdir()
    quantize = [programs / "seqbuild", "quantize", ROOT / "demo" / "model", "--artifacts", artifacts, "-o", "out"]
    gptq = ["--scheme", "W4A16", "--samples", "4", "--seq-len", "64", "--no-evaluate"]
    done = call([*quantize, *gptq], empty)
    assert done.returncode == 0, done.stderr
    assert "28 modules with gptq W4A16, in out" in done.stdout
    assert sorted(path.name for path in empty.iterdir()) == ["out", "out.report.html"]
    done = call([*quantize, "--scheme", "W8A16", "--no-evaluate"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "28 modules with rtn W8A16, in out" in done.stdout
    (artifact,) = (path for path in artifacts.iterdir() if path.is_dir())
    done = call([programs / "seqbuild-runtime", "check", artifact], tmp_path)
    assert done.returncode == 0, done.stderr
    assert ": valid; " in done.stdout
    program = "import sys, seqbuild_runtime; before = sys.path[:]; seqbuild_runtime.main(); "
    program += "print('seqbuild' in sys.modules, sys.path == before)"
    done = call([programs / "python", "-I", "-c", program, "recipes", "w4a16_gptq"], tmp_path)
    assert "GPTQModifier" in done.stdout
    assert done.stdout.splitlines()[-1] == "False True", done


def test_the_wheel_contains_what_the_programs_read(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for package in ("runtime", "seqbuild"):
        folder = ROOT / package
        inside = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        assert {path.relative_to(ROOT).as_posix() for path in inside} <= names
    kinds = {"runtime/py.typed", "seqbuild/py.typed", "runtime/recipe/files/w4a16_gptq.yaml"}
    kinds |= {f"runtime/report/templates/{name}" for name in ("run.html.j2", "style.css", "page.js", "chain.js")}
    assert kinds | {"runtime/language/operators.txt"} <= names
    assert {"seqbuild/text/calibration.jsonl", "seqbuild/text/evaluation.jsonl", "seqbuild/text/LICENSES.md"} <= names
    own = {"runtime", "seqbuild", "seqbuild_runtime.py"}
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == own


def test_the_metadata(metadata: email.message.Message) -> None:
    assert (metadata["Name"], metadata["Version"]) == ("seqbuild-llm", runtime.__version__)
    assert metadata.get_all("License-File") == ["LICENSE", "seqbuild/text/LICENSES.md"]
    urls = dict(line.split(", ") for line in metadata.get_all("Project-URL", ()))
    assert set(urls) == {"Repository", "Documentation", "Changelog", "Issues"}
    assert all(url.startswith(REPOSITORY) for url in urls.values())
    assert metadata["Description-Content-Type"] == "text/markdown"
    for line in metadata.get_all("Requires-Dist", ()):
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            assert requirement.specifier.contains(importlib.metadata.version(requirement.name), prereleases=True)


def test_every_link_of_the_readme_works_on_the_package_page() -> None:
    """Such a page has no files next to it, so links are absolute; those into the repository name an existing file."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    defined = dict(re.findall(r"^\[(\w+)\]: (\S+)$", text, re.MULTILINE))
    assert set(re.findall(r"\]\[(\w+)\]", text)) == set(defined)
    links = [*defined.values(), *re.findall(r"\]\(([^)\s]+)\)", text)]
    assert len(links) > 5
    for link in links:
        url, _, heading = link.partition("#")
        assert re.match(rf"{re.escape(REPOSITORY)}/(blob|tree)/main/", url), f"{link} is relative, or leads elsewhere"
        path = ROOT / url.split("/main/")[1]
        assert path.is_dir() if "/tree/" in url else path.is_file(), link
        if heading:
            titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, link


class TestForeignRuntime:
    """`import seqbuild` where `import runtime` finds another module."""

    def refused(self, programs: Path, place: Path, program: str = "import seqbuild", **environment: str) -> str:
        done = call([programs / "python", "-c", program], place, **environment)
        assert done.returncode == 1
        last = done.stderr.splitlines()[-1]
        assert last.startswith("ImportError: seqbuild needs its own package runtime ("), done.stderr
        return last

    def test_in_the_working_directory(self, programs: Path, tmp_path: Path) -> None:
        (tmp_path / "runtime.py").write_text(FOREIGN)
        said, file = self.refused(programs, tmp_path), tmp_path / "runtime.py"
        assert f"but {file} comes first on the path (rename {file}, or move it, or use the program `seqbuild`" in said

    def test_on_the_python_path(self, programs: Path, tmp_path: Path) -> None:
        (tmp_path / "lib" / "runtime").mkdir(parents=True)
        (tmp_path / "lib" / "runtime" / "__init__.py").write_text(FOREIGN)
        said = self.refused(programs, tmp_path, PYTHONPATH=str(tmp_path / "lib"))
        assert f"but {tmp_path / 'lib' / 'runtime'} comes" in said
        assert f"or remove {tmp_path / 'lib'} from PYTHONPATH" in said

    def test_imported_before(self, programs: Path, tmp_path: Path) -> None:
        (tmp_path / "runtime.py").write_text("")
        said = self.refused(programs, tmp_path, "import runtime, sys; del sys.path[0]; import seqbuild")
        assert f"{tmp_path / 'runtime.py'} was imported before" in said

    def test_of_another_seqbuild(self, programs: Path, tmp_path: Path) -> None:
        shutil.copytree(ROOT / "runtime", tmp_path / "runtime", ignore=shutil.ignore_patterns("__pycache__"))
        path = tmp_path / "runtime" / "__init__.py"
        path.write_text(path.read_text().replace(f'"{runtime.__version__}"', '"0.0.7"'))
        assert f"{tmp_path / 'runtime'} of another seqbuild (0.0.7) comes first" in self.refused(programs, tmp_path)

    def test_written_over_ours(self, programs: Path, wheel: Path, tmp_path: Path) -> None:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(tmp_path / "packages")
        victim = tmp_path / "packages" / "runtime" / "__init__.py"
        for text in ("", "__version__ = '0.0.7'\n", None):
            victim.write_text(text) if text is not None else victim.unlink()
            for command in (["-c", "import seqbuild"], ["-m", "seqbuild", "--version"]):
                done = call([programs / "python", *command], tmp_path, PYTHONPATH=str(tmp_path / "packages"))
                assert done.returncode == (1 if command[0] == "-c" else 2)
                said = done.stderr.splitlines()[-1]
                assert f"{victim} is missing, or belongs to another package or version than seqbuild" in said
                assert f"--force-reinstall --no-deps seqbuild-llm=={runtime.__version__}" in said
                assert (said.startswith("seqbuild: error: ") and done.stderr.count("\n") == 1) is (command[0] == "-m")

    def test_a_module_of_the_user_keeps_its_directory(self, programs: Path, tmp_path: Path) -> None:
        """`python -m` of another package must not lose the working directory."""
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "__init__.py").write_text("import seqbuild\n")
        (tmp_path / "mine" / "__main__.py").write_text("import neighbor\n")
        (tmp_path / "neighbor.py").write_text("print('found')\n")
        assert call([programs / "python", "-m", "mine"], tmp_path).stdout == "found\n"


@pytest.mark.parametrize("package", [runtime, seqbuild])
def test_completion_lists_the_public_names(package: object) -> None:
    names = [name for name in dir(package) if not name.startswith("_")]
    assert names == sorted(package.__all__)  # type: ignore[attr-defined]
    completer = rlcompleter.Completer({"it": package})
    assert any(match.startswith("it.plan") for match in completer.attr_matches("it.pl"))


@pytest.mark.parametrize("package", ["runtime", "seqbuild"])
def test_listing_names_imports_nothing(package: str) -> None:
    program = f"import sys, {package}; dir({package}); print('torch' in sys.modules, 'calibrate' in dir({package}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == "False"
