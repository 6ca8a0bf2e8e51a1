"""Importing a model's own code from memory, and what is left of it afterwards: nothing."""

from __future__ import annotations

import copy
import gc
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.artifact.own_code import ModelCode
from runtime.artifact.own_code_import import LoadedCode
from runtime.errors import ModelError

MAIN = """\
from .part import Part, double
from .inner import deep
from .inner.deep import Deep
class Main(Part):
    "What it is."
    def later(self):
        from .lazy import VALUE
        return VALUE + deep.VALUE
"""
FILES = {
    "inner/deep.py": "from ..lazy import VALUE\nclass Deep: pass\n",
    "lazy.py": "VALUE = 21\n",
    "main.py": MAIN,
    "part.py": "class Part: pass\nclass Other: pass\ndef double(x): return 2 * x\nFACTORY = double\n",
}


def code(files: dict[str, str] = FILES) -> ModelCode:
    return ModelCode(files={path: files[path].encode() for path in sorted(files)})


def ours() -> list[str]:
    return [name for name in sys.modules if name.startswith("seqbuild_modeling_")]


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> Iterator[None]:
    """What other tests have left is not looked through again and again."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _nothing_is_left(_frozen: None) -> Iterator[None]:
    gc.collect()
    before = list(sys.meta_path), ours()
    assert before[1] == []
    yield
    gc.collect()
    assert (list(sys.meta_path), ours()) == before


def test_modules_are_imported_when_they_are_asked_for() -> None:
    with LoadedCode(code()) as loaded:
        assert ours() == []
        main = loaded.find(f"{loaded.package}.main", "Main", object)
        assert main.__module__ == f"{loaded.package}.main"
        assert "lazy" in {name.rpartition(".")[2] for name in ours()}
        assert main().later() == 42  # type: ignore[attr-defined]
        assert copy.deepcopy(loaded) is loaded
    assert ours() == []


def test_source_is_known_to_those_who_look() -> None:
    with LoadedCode(code()) as loaded:
        main = loaded.find(f"{loaded.package}.main", "Main", object)
        assert inspect.getsource(main).startswith("class Main(Part):")
        assert inspect.getsource(sys.modules[main.__module__]) == MAIN
        file = inspect.getsourcefile(main)
        assert file == f"/{loaded.package}/main.py"
        assert not Path(file).exists()


def test_two_users_share_modules_until_the_last_one_goes() -> None:
    first, second = LoadedCode(code()), LoadedCode(code())
    main = first.find(f"{first.package}.main", "Main", object)
    first.close()
    first.close()
    assert second.find(f"{first.package}.main", "Main", object) is main
    del second
    gc.collect()
    assert ours() == []
    with LoadedCode(code()) as again:
        assert again.find(f"{again.package}.main", "Main", object) is not main


def test_two_models_do_not_meet() -> None:
    with LoadedCode(code()) as one, LoadedCode(code(FILES | {"lazy.py": "VALUE = 1\n"})) as other:
        assert one.package != other.package
        values = [loaded.find(f"{loaded.package}.main", "Main", object)().later() for loaded in (one, other)]  # type: ignore[attr-defined]
        assert values == [42, 2]


def test_nothing_else_is_found() -> None:
    with LoadedCode(code()) as loaded:
        for name in ("os", "nothing", "inner.nothing", "main.part", "__init__"):
            with pytest.raises(ModelError, match="which is missing"):
                loaded.find(f"{loaded.package}.{name}", "X", object)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (
            "import no_such_package",
            "main.py, line 1, imports 'no_such_package', which is not installed (install the packages",
        ),
        ("from .part import gone", "main.py, line 1, fails: ImportError: cannot import name 'gone'"),
        ("\nraise ValueError('no luck\\nat all')", "main.py, line 2, fails: ValueError: no luck"),
        ("raise RuntimeError", "fails: RuntimeError: no reason given"),
        ("import sys\nsys.exit(0)", "fails: SystemExit: 0"),
        ("def f(): f()\nf()", "fails: RecursionError"),
        ("from .part import bad", "part.py, line 1, fails: ZeroDivisionError: division by zero"),
        ("Main = 3", "has no class Main derived from"),
        ("", "has no class Main derived from"),
        ("class Main: pass", "has no class Main derived from Exception"),
    ],
)
def test_code_that_fails_is_one_error(text: str, why: str) -> None:
    part = "bad = 1 / 0\n" if "bad" in text else FILES["part.py"]
    with LoadedCode(code({"main.py": text, "part.py": part})) as loaded:
        with pytest.raises(ModelError) as caught:
            loaded.find(f"{loaded.package}.main", "Main", Exception)
        assert why in str(caught.value)
        assert "\n" not in caught.value.message


def test_what_is_our_users_or_the_machines_passes() -> None:
    for kind in (KeyboardInterrupt, MemoryError):
        with LoadedCode(code({"main.py": f"raise {kind.__name__}"})) as loaded, pytest.raises(kind):
            loaded.find(f"{loaded.package}.main", "Main", object)
