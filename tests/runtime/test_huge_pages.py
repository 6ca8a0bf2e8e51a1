"""Huge pages for tensors: which processes ask for them, and that a user's own setting is kept."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.host import huge_pages
from runtime.host.huge_pages import VARIABLE, use_huge_pages
from tests.runtime.place import ROOT


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The kernel's setting; the variable is not set."""
    monkeypatch.setattr(huge_pages, "_SETTING", tmp_path / "enabled")
    monkeypatch.setenv(VARIABLE, "")  # so that it is restored
    monkeypatch.delenv(VARIABLE)
    return tmp_path / "enabled"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("always [madvise] never\n", "1"), ("[always] madvise never\n", "1"), ("always madvise [never]\n", None)],
)
def test_they_are_used_where_the_kernel_has_them(setting: Path, text: str, expected: str | None) -> None:
    setting.write_text(text)
    use_huge_pages()
    assert os.environ.get(VARIABLE) == expected


def test_a_kernel_without_them_is_not_asked(setting: Path) -> None:
    use_huge_pages()
    assert not setting.exists()
    assert VARIABLE not in os.environ


@pytest.mark.parametrize("value", ["0", "1"])
def test_the_setting_of_the_user_is_kept(setting: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    setting.write_text("[always] madvise never\n")
    monkeypatch.setenv(VARIABLE, value)
    use_huge_pages()
    assert os.environ[VARIABLE] == value


def after(program: str, **environment: str) -> str:
    """What a new process has in the variable after a program, with a kernel that has huge pages."""
    text = (
        "import os, sys, pathlib\n"
        "import runtime.host.huge_pages as pages\n"
        "pages._SETTING = pathlib.Path(sys.argv[1])\n"
        "sys.argv[1:] = ['--version']\n"
        f"{program}\n"
        f"assert 'torch' not in sys.modules, 'too late for torch'\n"
        f"print(os.environ.get({VARIABLE!r}))"
    )
    own = {name: value for name, value in os.environ.items() if name != VARIABLE} | environment
    enabled = ROOT / "tests" / "runtime" / "place.py"  # any file without "[never]"
    command = [sys.executable, "-c", text, str(enabled)]
    run = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()[-1]


HOST = "from runtime.__main__ import main; main()"
COMPILER = "from seqbuild.cli.app import main; main()"


@pytest.mark.parametrize("program", [HOST, COMPILER], ids=["host", "compiler"])
def test_both_command_lines_ask_before_torch_is_imported(program: str) -> None:
    assert after(program) == "1"
    assert after(program, **{VARIABLE: "0"}) == "0"


@pytest.mark.parametrize("program", ["import runtime", "import seqbuild, seqbuild.cli.app"], ids=["host", "compiler"])
def test_an_import_changes_no_environment(program: str) -> None:
    assert after(program) == "None"
