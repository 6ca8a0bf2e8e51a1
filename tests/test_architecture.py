"""How the parts may depend on each other."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

import runtime.errors
import seqbuild

ROOT = Path(__file__).parents[1]
# Layers, bottom first; docs/architecture.md explains them. A module imports from its own folder and from lower layers:
# two folders of one layer do not import each other.
RUNTIME = (
    {"errors"},
    {"standard_output", "patterns", "arguments"},
    {"terminal"},
    {"status"},
    {"console"},
    {"algorithms"},
    {"host"},
    {"workers"},
    {"language"},
    {"artifact"},
    {"formats"},
    {"model"},
    {"checkpoint"},
    {"chain"},
    {"recipe", "data"},
    {"weights"},
    {"experts"},
    {"streaming"},
    {"quantize"},
    {"saved_statistics"},
    {"planning"},
    {"provenance"},
    {"calibration_request"},
    {"search"},
    {"evaluation", "calibration", "dequantization"},
    {"planned_recipes"},
    {"recipe_sweep"},
    {"report"},
    {"cli", "lm_eval"},
    {"", "__main__"},
)
SEQBUILD = (
    {"options", "blame", "shrink", "own_runtime", "text"},
    {"sample"},
    {"chain"},
    {"model"},
    {"ship", "cache", "trace.surroundings", "trace.python"},
    {"trace.real"},
    {"trace.decide", "trace.experts"},
    {"trace.search", "trace.sizes"},
    {"trace.recorder"},
    {"trace.loops"},
    {"trace.record"},
    {"trace.model"},
    {"trace.attempts"},
    {"manifest"},
    {"passes"},
    {"build"},
    {"modifiers"},
    {"verify"},
    {"onecall"},
    {"peer"},
    {"llmcompressor"},
    {"cli"},
    {"", "__main__", "trace"},
)
LAYERS = {"runtime": RUNTIME, "seqbuild": SEQBUILD}
# What the compiler may import of the runtime: what both sides must agree on, and nothing that runs a model.
SHARED = {"errors", "console", "patterns", "arguments", "host", "language", "artifact", "model", "chain"}
SHARED |= {"terminal", "status", "checkpoint", "data", "recipe"}
# By part of the compiler, what it may import besides: `verify` and `onecall` are hosts, and both command lines share
# commands, options, and how they end on signals.
BESIDES = {
    "verify": {"weights"},
    "onecall": {
        "calibration",
        "evaluation",
        "formats",
        "planning",
        "provenance",
        "quantize",
        "streaming",
        "workers",
        "cli",
    },
    "cli": {"cli", "planning", "report"},
    "": {"planning"},
    "__main__": {"cli"},
}


def imports(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, anywhere in it; from-imports with the name that is taken."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def sources(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert len(found) > 10
    return found


def test_the_host_never_imports_the_compiler() -> None:
    for path in sources("runtime"):
        odd = [name for name in imports(path) if name.split(".")[0] in ("seqbuild", "tests")]
        assert not odd, f"{path.name} imports {odd}"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str:
    """The folder or file of the first level that a module belongs to; inside `seqbuild.trace`, of the second."""
    _, *rest = module.split(".")
    return ".".join(rest[:2] if rest[:1] == ["trace"] else rest[:1])


@functools.cache
def edges() -> dict[str, set[str]]:
    """Which module imports which, both packages."""
    known = {module_name(path): path for package in LAYERS for path in sources(package)}
    found = {}
    for module, path in known.items():
        used = {name for name in imports(path) if not name.endswith(".__version__")}
        taken = {name if name in known else name.rpartition(".")[0] for name in used}
        found[module] = {name for name in taken if name in known and name != module}
    return found


@pytest.mark.parametrize("package", ["runtime", "seqbuild"])
def test_imports_go_down(package: str) -> None:
    height = {part: level for level, layer in enumerate(LAYERS[package]) for part in layer}
    assert sum(map(len, LAYERS[package])) == len(height), "a part stands in two layers"
    for module, taken in edges().items():
        if module.split(".")[0] != package:
            continue
        part = part_of(module)
        assert part in height, f"{module} stands in no layer"
        for other in sorted(name for name in taken if name.split(".")[0] == package):
            lower = part_of(other)
            assert lower == part or height[lower] < height[part], f"{module} imports {other}"
    parts = {part_of(module) for module in edges() if module.split(".")[0] == package}
    assert parts == set(height)


def test_no_modules_import_each_other() -> None:
    graph = {module: {name for name in taken if name != "runtime"} for module, taken in edges().items()}
    while graph:
        free = {module for module, taken in graph.items() if not taken & graph.keys()}
        assert free, f"these import each other: {sorted(graph)}"
        graph = {module: taken for module, taken in graph.items() if module not in free}


def test_the_compiler_imports_of_the_host_what_both_agree_on() -> None:
    for path in sources("seqbuild"):
        part = part_of(module_name(path))
        allowed = SHARED | BESIDES.get(part, set())
        for name in sorted(imports(path)):
            package, _, rest = name.partition(".")
            assert package != "tests", path
            if package == "runtime" and rest:
                assert rest.split(".")[0] in allowed, f"{path} imports {name}"


@pytest.mark.parametrize("package", ["runtime", "seqbuild"])
def test_each_package_says_in_one_sentence_what_it_contains(package: str) -> None:
    for path in sorted((ROOT / package).rglob("__init__.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        assert text.endswith(".") and "\n\n" not in text, path


TRACING = ("torch.fx", "torch.export", "torch.jit", "torch._dynamo", "torch._subclasses")


def test_the_host_never_traces() -> None:
    for path in sources("runtime"):
        odd = [name for name in imports(path) if name.startswith(TRACING)]
        assert not odd, f"{path.name} imports {odd}"


@pytest.mark.parametrize("package", ["runtime", "seqbuild"])
def test_importing_is_free(package: str) -> None:
    program = (
        "import sys, time\n"
        "start = time.process_time()\n"
        f"import {package}\n"
        "seconds = time.process_time() - start\n"
        "heavy = {'torch', 'transformers', 'numpy', 'safetensors'} & set(sys.modules)\n"
        "print(seconds, *sorted(heavy))\n"
    )
    seconds = []
    for _ in range(2):  # the faster of two: the machine may be busy
        run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
        first, *heavy = run.stdout.split()
        assert heavy == []
        seconds.append(float(first))
    assert min(seconds) < 0.1


def test_errors_are_free_to_import() -> None:
    program = "import sys, runtime.errors; print(*sorted(name for name in sys.modules if name.startswith('runtime')))"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["runtime", "runtime.errors"]
    assert imports(ROOT / "runtime" / "errors.py") == {"__future__.annotations"}


def test_the_error_tree_is_drawn_as_it_is() -> None:
    assert runtime.errors.__doc__ is not None
    drawn = re.findall(r"[├└]── (\w+)", runtime.errors.__doc__)
    base = runtime.errors.SeqbuildError
    defined = [
        value for value in vars(runtime.errors).values() if isinstance(value, type) and issubclass(value, Exception)
    ]
    assert [cls.__name__ for cls in defined] == ["SeqbuildError", *drawn]
    assert all(cls.__base__ is base for cls in defined[1:])
    assert len(drawn) >= 12


def test_errors_print_as_one_sentence_with_a_hint() -> None:
    error = runtime.errors.ModelError("no such model", hint="name another")
    assert str(error) == "no such model (name another)"
    assert str(runtime.errors.ModelError("no such model")) == "no such model"
    assert isinstance(error, runtime.errors.SeqbuildError)


def test_the_public_names_exist() -> None:
    assert seqbuild.__all__ == sorted(seqbuild.__all__)
    for name in seqbuild.__all__:
        assert getattr(seqbuild, name).__doc__, f"seqbuild.{name} has no docstring"
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        seqbuild.nothing  # noqa: B018


def test_versions_agree() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (version,) = re.findall(r'^version = "(.+)"$', project, re.MULTILINE)
    assert seqbuild.__version__ == runtime.__version__ == version


def test_no_file_is_named_after_nothing() -> None:
    names = {path.stem for package in ("runtime", "seqbuild", "tests") for path in (ROOT / package).rglob("*.py")}
    assert not names & {"helpers", "utils", "misc", "common"}


def test_a_class_name_means_one_thing() -> None:
    places: dict[str, list[str]] = {}
    for package in LAYERS:
        for path in sources(package):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef):
                    places.setdefault(node.name.lstrip("_"), []).append(f"{module_name(path)}.{node.name}")
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_functions_and_files_are_short() -> None:
    for package in LAYERS:
        for path in sources(package):
            text = path.read_text(encoding="utf-8")
            assert len(text.splitlines()) <= 400, path
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    assert (node.end_lineno or 0) - node.lineno < 60, f"{path}: {node.name}"
