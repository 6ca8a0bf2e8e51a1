"""A host without a required package gets one line that names it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runtime.artifacts import write

ROOT = Path(__file__).parents[2]
WITHOUT = """
import importlib.abc, runpy, sys
missing, sys.argv = sys.argv[1], ["runtime", *sys.argv[2:]]

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
runpy.run_module("runtime", run_name="__main__")
"""


@pytest.mark.parametrize("name", ["typer", "msgspec", "regex"])
def test_the_package_is_named(tmp_path: Path, name: str) -> None:
    command = [sys.executable, "-c", WITHOUT, name, "check", str(write(tmp_path / "artifact"))]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 2, run.stderr
    (line,) = run.stderr.splitlines()
    assert line.startswith(f"runtime: error: the module {name} cannot be imported")
