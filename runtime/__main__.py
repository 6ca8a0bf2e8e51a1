"""`python -m runtime`."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    try:
        from runtime.cli import imports
        from runtime.cli.app import main
    except ModuleNotFoundError as error:  # typer is missing, so there is no command line that could say so
        print(f"runtime: error: the module {error.name} cannot be imported (install typer)", file=sys.stderr)
        sys.exit(2)
    imports.allow()
    sys.exit(main())
