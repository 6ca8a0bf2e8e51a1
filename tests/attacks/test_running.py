"""Attacks that no text shows: what a checked program cannot do while it runs, and bytes that change after the check."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import runtime
from runtime.errors import ArtifactError
from runtime.language.guards import ITERATIONS_LIMIT
from runtime.language.program import Run
from runtime.terminal import printable
from tests.attacks.attack import OWNED, program
from tests.runtime.artifacts import write

ROOT = Path(__file__).parents[2]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Identity()
        self.weight = nn.Parameter(torch.ones(2))


def run(root: Path, *lines: str, x: Any, **changes: Any) -> Any:
    program("a program", "", *lines, **changes).make(root)
    artifact = runtime.load(root, allow_version_skew=True)
    with torch.no_grad():
        return artifact.subgraphs[0].forward(Model(), x=x)["y"]


def test_numbers_stay_numbers(tmp_path: Path) -> None:
    assert run(tmp_path / "0", "y = x * 3 - 1", x=5) == 14
    assert run(tmp_path / "1", "y = x % 4 // 2", x=7) == 1
    assert run(tmp_path / "2", "y = x + 1", x=torch.ones(2)).tolist() == [2.0, 2.0]


@pytest.mark.parametrize("x", ["%99999999d", [0], (0,), b"a", {}, None, 1j])
@pytest.mark.parametrize("sign", ["%", "*", "+"])
def test_no_arithmetic_on_what_is_no_number(sign: str, x: Any, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="only with numbers and tensors"):
        run(tmp_path / "a", f"y = x {sign} 999999999999", x=x)


def test_text_that_came_back_from_a_module_is_not_formatted(tmp_path: Path) -> None:
    lines = ('a = self.get_submodule("same")("text")', "y = a % x")
    with pytest.raises(ArtifactError, match="only with numbers and tensors; got str"):
        run(tmp_path / "a", *lines, x=1, submodules=("same",))


def test_text_out_of_a_copy_is_not_formatted(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="only with numbers and tensors; got str"):
        run(tmp_path / "a", 'a = run.copied({"a": "%9999999999d"})["a"]', "y = a % x", x=1)


def test_no_number_grows_without_end(tmp_path: Path) -> None:
    names = ["x", *(f"a{index}" for index in range(60)), "y"]
    lines = [f"{new} = {old} * {old}" for old, new in itertools.pairwise(names)]
    with pytest.raises(ArtifactError, match="more than 64 bits"):
        run(tmp_path / "a", *lines, x=3)


def test_no_root_of_a_negative_number(tmp_path: Path) -> None:
    """What came of it would be complex, of which nothing is checked."""
    assert run(tmp_path / "a", "y = x ** 0.5", x=4) == 2.0
    with pytest.raises(ArtifactError, match="root of a negative number"):
        run(tmp_path / "b", "y = x ** 0.5", x=-4)


@pytest.mark.parametrize("x", [2**62, ITERATIONS_LIMIT + 1])
def test_no_loop_without_end(x: int, tmp_path: Path) -> None:
    lines = ("y = x + 0", "for i in range(x):", "    y = y + 0")
    with pytest.raises(ArtifactError, match="iterations exceeds the limit"):
        run(tmp_path / "a", *lines, x=x)


def test_no_loops_in_loops_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.language.guards.ITERATIONS_LIMIT", 20_000)
    lines = [
        "y = x + 0",
        *(f"{'    ' * depth}for i{depth} in range(x):" for depth in range(4)),
        "    " * 4 + "y = y + 0",
    ]
    with pytest.raises(ArtifactError, match="iterations exceeds the limit"):
        run(tmp_path / "a", *lines, x=5000)


def test_loops_may_take_their_turns_again_and_again(tmp_path: Path) -> None:
    lines = ("y = x + 0", "for i in range(x):", "    y = y + i")
    program("a program", "", *lines).make(tmp_path / "a")
    subgraph = runtime.load(tmp_path / "a", allow_version_skew=True).subgraphs[0]
    for _ in range(3):
        assert subgraph.forward(Model(), x=4)["y"] == 10


@pytest.mark.parametrize("name", ["numpy", "register_hook", "share_memory_", "untyped_storage", "to", "dim"])
def test_no_function_comes_out_of_a_result(name: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="may read only data"):
        run(tmp_path / "a", f"y = x.{name}", x=torch.ones(2))


@pytest.mark.parametrize("x", [nn.Linear(1, 1), os, nn.Linear, print, lambda: 1])
def test_nothing_comes_out_of_modules_classes_and_functions(x: Any, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"may read only data|cannot be executed"):
        run(tmp_path / "a", "y = x.name", x=x)


def test_fields_of_results_are_there(tmp_path: Path) -> None:
    from transformers.modeling_outputs import BaseModelOutput

    hidden = torch.ones(2)
    assert run(tmp_path / "a", "y = x.last_hidden_state", x=BaseModelOutput(last_hidden_state=hidden)) is hidden
    assert run(tmp_path / "b", "y = x.shape", x=hidden) == (2,)


def test_weights_stay_as_they_are(tmp_path: Path) -> None:
    """Also where the code hides from the check that it changes one: a module hands it back."""
    lines = (
        'w = self.get_parameter("weight")',
        'a = self.get_submodule("same")(w)',
        "y = torch.ops.aten.mul_.Tensor(a, x)",
    )
    changes = {"submodules": ("same",), "attributes": ("weight",)}
    assert run(tmp_path / "a", *lines, x=torch.ones(2), **changes).tolist() == [1.0, 1.0]  # it is not in `parameters`
    root = tmp_path / "b"
    program("a program", "", *lines, **changes, parameters=("weight",)).make(root)
    with pytest.raises(ArtifactError, match="needs 'weight'"):
        runtime.load(root, allow_version_skew=True)


def test_what_makes_no_sense_is_an_error_with_the_programs_name(tmp_path: Path) -> None:
    for line in (
        "y = x[9]",
        "y = x.nothing",
        "y = torch.ops.aten.add.Tensor(x)",
        'y = self.get_submodule("same").config',
    ):
        with pytest.raises(ArtifactError, match=r"subgraphs/000\.py"):
            run(
                tmp_path / str(abs(hash(line))),
                line,
                x=torch.ones(2),
                objects=("same.config",) if "config" in line else (),
            )


class Refusing(nn.Module):
    """A module of the library, which states by `assert` what it takes."""

    def __init__(self, error: type[Exception]) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: Any) -> Any:
        raise self.error("it takes three axes")


@pytest.mark.parametrize("error", [AssertionError, StopIteration, NotImplementedError])
def test_what_modules_refuse_is_an_error_with_the_programs_name(error: type[Exception], tmp_path: Path) -> None:
    program("a", "", 'y = self.get_submodule("same")(x)', submodules=("same",)).make(tmp_path / "a")
    model = Model()
    model.same = Refusing(error)
    with pytest.raises(ArtifactError, match=rf"subgraphs/000.py cannot be executed .*{error.__name__}: it takes three"):
        runtime.load(tmp_path / "a", allow_version_skew=True).subgraphs[0].forward(model, x=torch.ones(2))


def test_what_operators_do_not_offer_is_an_error_with_the_programs_name(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"subgraphs/000.py cannot be executed .*bitwise"):
        run(tmp_path / "a", "y = torch.ops.aten.bitwise_not.default(x)", x=torch.ones(2))


def test_the_bytes_that_were_checked_are_those_that_run(tmp_path: Path) -> None:
    """Whatever is done to the files after the check, no reader looks at them again."""
    root = write(tmp_path / "artifact")
    artifact = runtime.load(root, allow_version_skew=True)
    for path in sorted(root.rglob("*")):
        if path.is_file():
            path.write_bytes(b"evil")
    assert artifact.constants["constant_0"].tolist() == [1.0, 2.0]
    assert artifact.companions["config.json"].startswith(b'{"model_type"')
    assert (artifact.companions_path / "config.json").read_bytes() == artifact.companions["config.json"]
    assert artifact.companions_path.stat().st_mode & 0o077 == 0
    assert "run.constant" in artifact.subgraphs[0].source


@pytest.mark.parametrize("name", ["typing", "json", "typer", "torch", "msgpack", "runtime_x", "hashlib"])
def test_a_check_from_inside_of_an_artifact_runs_nothing_of_it(name: str, tmp_path: Path) -> None:
    """`python -m` looks for modules in the current directory first."""
    root = write(tmp_path / "artifact")
    (root / f"{name}.py").write_text(f"open({str(tmp_path / OWNED)!r}, 'w')\nraise SystemExit(0)\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "runtime", "check", "."], cwd=root, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert f"contains {name}.py, which its manifest does not list" in done.stderr
    assert not (tmp_path / OWNED).exists()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ü", "plain ü"),
        ("\x1b[2Jx", r"\x1b[2Jx"),
        ("a\u202eb", r"a\u202eb"),
        ("\udcff", r"\udcff"),
        ("a\nb\tc", "a\nb\tc"),
    ],
)
def test_what_terminals_obey_is_shown_instead(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize("together", [lambda value: (value,), lambda value: (value, value), lambda value: {"a": value}])
def test_containers_are_not_put_into_each_other_without_end(together: Callable[[Any], Any]) -> None:
    """Python hashes and compares them by recursion, without a bound of its own."""
    value: Any = (1.5, 2.5)
    with pytest.raises(ArtifactError, match="may nest containers"):
        for _ in range(1_000_000):
            value = Run.copied({"t": together(value)})["t"]
    assert Run.copied({"a": (1, [2, {"b": 3}])}) == {"a": (1, [2, {"b": 3}])}
