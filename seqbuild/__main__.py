"""The programs `seqbuild` and `python -m seqbuild`."""

from __future__ import annotations

import sys

from runtime.cli.starting import end_on_signals


def main() -> int:
    """Run the command line in a process of its own, and return the exit code."""
    end_on_signals("seqbuild")
    from seqbuild.cli.app import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
