"""The programs `seqbuild-runtime` and `python -m runtime`."""

from __future__ import annotations

import sys

from runtime.cli.starting import end_on_signals


def main(program: str = "seqbuild-runtime") -> int:
    """Run the host's command line in a process of its own, and return the exit code."""
    end_on_signals(program)
    try:
        from runtime.cli import app
        from runtime.host import own_process
    except ModuleNotFoundError as error:  # typer is missing, so there is no command line that could say so
        print(f"{program}: error: the module {error.name} cannot be imported (install typer)", file=sys.stderr)
        return 2
    own_process.claim()
    return app.main(program=program)


if __name__ == "__main__":
    sys.exit(main("runtime"))
