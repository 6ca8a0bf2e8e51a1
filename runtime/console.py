"""How both command lines speak: one line for an error, exit code 2; a traceback only when asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from runtime.errors import SeqbuildError

USER_ERROR, INTERRUPTED = 2, 130


def run_app(app: Callable[..., Any], program: str, argv: list[str] | None = None) -> int:
    """Run a typer application and return the process's exit code.

    `--debug`, anywhere on the command line, shows the traceback of an error.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    is_debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        result = app(args=arguments, prog_name=program, standalone_mode=True)
    except SeqbuildError as error:
        return _report(program, str(error), is_debug)
    except KeyboardInterrupt:
        print(f"{program}: interrupted; nothing half-written was left behind", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except BrokenPipeError:
        return 1
    return int(result or 0)


def _report(program: str, message: str, is_debug: bool) -> int:
    if is_debug:
        import traceback

        traceback.print_exc()
    print(f"{program}: error: {' '.join(message.split())}", file=sys.stderr)
    return USER_ERROR


def say(line: str = "") -> None:
    """Print a line at once, also into a pipe."""
    print(line, flush=True)


def human_bytes(count: float) -> str:
    """A size in the unit that keeps it short: 1.5 MB is 1 500 000 bytes."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
