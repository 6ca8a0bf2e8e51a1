"""The program `seqbuild-runtime`: the host's command line, with the package `runtime` that is next to this file.

It is not in that package, because the path may have a foreign `runtime` first.
"""

from __future__ import annotations

import importlib
import os
import sys
import typing  # noqa: F401  # before this file's directory comes first on the path


def main() -> int:
    """Run the host's command line, and return the exit code."""
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    importlib.import_module("runtime")
    del sys.path[0]
    from runtime.__main__ import main as run

    return run()
