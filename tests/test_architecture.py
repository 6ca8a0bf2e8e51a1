"""How the parts may depend on each other."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import runtime.errors
import seqbuild

ROOT = Path(__file__).parents[1]
# What the compiler may use of the host's part: what both have to agree on, and nothing that runs a model.
SHARED = {"errors", "manifest", "grammar", "artifact", "publish", "program", "data", "documents", "token_file", "chats"}
SHARED |= {"document_tokens", "tokenizer"}
SHARED |= {
    "library",
    "offline",
    "reach",
    "reviewed",
    "summaries",
    "console",
    "cli_options",
    "construct",
    "model_config",
    "operators",
    "opaque_paths",
    "model_code",
    "code_loader",
    "host_sources",
    "conditions",
    "leaf_tables",
    "chain",
    "tables",
    "scale_groups",
    "expert_flow",
    "experts",
    "dense_experts",
    "stacked",
    "leaves",
    "plan_cli",
    "checks",
    "contents",
    "constants",
    "expressions",
    "bundle",
    "signatures",
    "written",
    "config_rules",
    "literals",
    "guards",
    "packed",
    "source_checks",
    "decoder",
    "patterns",
    "regular_files",
    "output",
    "left_as_found",
    "mutable_state",
    "arguments",
    "cached_values",
}
# Verifying an artifact is being its host: only there the compiler may use what runs a model.
HOSTING = {"weights", "dequantize", "derived", "inputs", "skeleton"}
# What is packed for a host is read as the host will read it.
PACKED = {"companions", "recipe"}
# `seqbuild.plan` is the host's planner under the compiler's name, as `seqbuild plan` is.
NAMED = {"planning"}


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


def test_the_compiler_imports_little_of_the_host() -> None:
    used = set()
    for path in sources("seqbuild"):
        for name in imports(path):
            package, _, rest = name.partition(".")
            assert package != "tests", path
            if package == "runtime":
                part = rest.split(".")[0]
                allowed = SHARED | (HOSTING if path.parent.name == "verify" else set())
                allowed |= PACKED if path.name == "pack.py" else set()
                allowed |= NAMED if path == ROOT / "seqbuild" / "__init__.py" else set()
                assert part in allowed, f"{path.name} imports runtime.{part}"
                used.add(part)
    assert {"errors", "manifest", "grammar"} & used


def test_what_is_shared_does_not_need_the_rest_of_the_host() -> None:
    """Functions may import lazily; at import time a shared module takes shared ones only."""
    for part in sorted(SHARED):
        tree = ast.parse((ROOT / "runtime" / f"{part}.py").read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("runtime."):
                assert (node.module or "").split(".")[1] in SHARED, f"runtime.{part} imports {node.module}"


def test_the_host_never_traces() -> None:
    for path in sources("runtime"):
        odd = [name for name in imports(path) if name.startswith(("torch.fx", "torch._dynamo", "torch._subclasses"))]
        assert not odd, f"{path.name} imports {odd}"


@pytest.mark.parametrize("package", ["runtime", "seqbuild"])
def test_importing_is_free(package: str) -> None:
    program = (
        "import sys, time\n"
        "start = time.perf_counter()\n"
        f"import {package}\n"
        "seconds = time.perf_counter() - start\n"
        "heavy = {'torch', 'transformers', 'numpy', 'safetensors'} & set(sys.modules)\n"
        "print(seconds, *sorted(heavy))\n"
    )
    seconds = []
    for _ in range(3):  # the fastest of three: the machine may be busy
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
