"""The list of operators that artifacts are checked with when torch is not imported."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from runtime.errors import ArtifactError
from runtime.language import operators
from runtime.language.operators import check_operators, listed, require_operators
from tests.operator_list import RELEASE, accepted
from tests.runtime.place import ROOT, Place

# Overloads that do not exist, write into an argument, or have no tensors.
OTHERS = ("default", "out", "Tensor", "Scalar_out", "Tensor_values", "dimname", "nonsense", "int", "a", "list", "")


def verdict(check: object, operator: str) -> str:
    try:
        check({operator: "000.py"})  # type: ignore[operator]
    except ArtifactError as error:
        return str(error)
    return "accepted"


def test_torch_accepts_all_that_is_listed() -> None:
    (releases, overloads), file = listed(), operators.LISTED_PATH.name
    again = "run python tests/operator_list.py in environments of all supported releases of torch"
    assert RELEASE in releases, f"{file} does not name torch {RELEASE}: {again}"
    wrong = sorted(overloads - accepted())
    assert not wrong, f"{file} has operators that torch {RELEASE} does not accept: {wrong}; {again}"
    missing = sorted(accepted() - overloads)  # new ones, and those that other releases do not have
    assert len(missing) < 50, f"{file} is incomplete: {missing}; {again}"


def test_the_verdict_is_the_same_with_and_without_the_list() -> None:
    names = (
        "abs",
        "add_",
        "cat",
        "view",
        "__iand__",
        "empty",
        "from_file",
        "_assert_async",
        "resize_",
        "set_",
        "nothing",
    )
    overloads = {*OTHERS, *(operator.partition(".")[2] for operator in accepted())}
    for operator in sorted({f"{name}.{overload}" for name in names for overload in overloads} | accepted()):
        assert verdict(check_operators, operator) == verdict(require_operators, operator), operator


@pytest.mark.parametrize("release", ["2.9", "3.0", ""])
def test_another_release_is_checked_with_torch(release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, str] = {}
    monkeypatch.setattr(operators, "_installed_release", lambda: release)
    monkeypatch.setattr(operators, "require_operators", asked.update)
    check_operators({"abs.default": "000.py"})
    assert asked == {"abs.default": "000.py"}


def test_an_artifact_that_is_loaded_is_checked_with_torch(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    from runtime import chain

    asked: dict[str, str] = {}
    monkeypatch.setattr(chain, "require_operators", asked.update)
    chain.load(place.artifact)
    assert "add.Tensor" in asked


@pytest.mark.parametrize("module", ["runtime", "seqbuild"])
def test_check_needs_no_torch(module: str, place: Place) -> None:
    program = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['numpy'] = None\n"
        f"from {module}.cli.app import main\n"
        "sys.exit(main(['check', sys.argv[1]]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(place.artifact)], cwd=ROOT, env=os.environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "valid" in done.stdout
