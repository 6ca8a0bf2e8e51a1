"""Run a command line: return its exit code, print an error as one line, and the traceback only with `--debug`."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from runtime import __version__
from runtime.console import NOTHING_LEFT, complain, left_behind, tell_when_stopped
from runtime.errors import SeqbuildError
from runtime.standard_output import GONE, unfailing
from runtime.status import done, status_line
from runtime.workers.start import is_broken, is_first, tell_torchrun

EPILOG = "At any position, --version prints the versions, and --debug shows the traceback of an error."
USER_ERROR, INTERRUPTED, TERMINATED = 2, 130, 143
_LONGEST_MESSAGE = 4000  # names from untrusted files can have megabytes
_needs_output = [False]


def require_output() -> None:
    """Make the running command fail if its output cannot be written: the output is its only result."""
    _needs_output[0] = True


def run_app(app: Callable[..., Any], program: str, argv: list[str] | None = None) -> int:
    """Run a typer application and return the process's exit code.

    At any position, `--debug` shows the traceback of an error, and `--version` prints the versions instead of running a
    command. Without arguments the help is printed.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    is_debug = "--debug" in arguments
    if os.environ.get("WORLD_SIZE", "1") != "1":  # torch prints a stack of frames for each connection that ends
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    arguments = [argument for argument in arguments if argument != "--debug"]
    tell_when_stopped(NOTHING_LEFT)
    _needs_output[0] = False
    with unfailing() as (output, _):
        with status_line("loading libraries") if is_first() else contextlib.nullcontext():
            code = _run(app, program, arguments, is_debug)
        output.flush()
        if output.failure and output.failure != GONE:
            is_error = _needs_output[0] and code == 0
            kind = "error" if is_error else "warning"
            complain(f"{program}: {kind}: standard output cannot be written: {output.failure}")
            code = USER_ERROR if is_error else code
    if is_broken():
        os._exit(code)  # a thread that waits for another worker would keep the process
    return code


def _run(app: Callable[..., Any], program: str, arguments: list[str], is_debug: bool) -> int:
    from typer import Abort

    if "--version" in arguments:
        require_output()
        print(_versions(program))
        return 0
    try:
        with _unwound_by_sigterm(), _output_of_first_worker():
            result = app(args=arguments or ["--help"], prog_name=program, standalone_mode=False)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except (KeyboardInterrupt, Abort):
        code = INTERRUPTED
    except BaseException as error:
        # A panic of the tokenizers library, which is written in Rust, is not an Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        done()
        message = _user_error(error) or _internal_error(error)
        if is_debug:
            import traceback

            traceback.print_exc()
        shortened = message if len(message) <= _LONGEST_MESSAGE else f"{message[:_LONGEST_MESSAGE]}..."
        line = f"{program}: error: {' '.join(shortened.split())}"
        complain(line)
        tell_torchrun(line)
        return USER_ERROR
    else:
        code = int(result or 0) if arguments else USER_ERROR
    if code in (INTERRUPTED, TERMINATED):
        word = "interrupted" if code == INTERRUPTED else "terminated"
        complain(f"{program}: {word}; {left_behind[0]}" if is_first() else f"{program}: {word}")
    return code


def _versions(program: str) -> str:
    """State the version of this program, and of the libraries that its results depend on, without importing them."""
    import importlib.metadata

    found = [f"Python {'.'.join(map(str, sys.version_info[:3]))}"]
    for name in ("torch", "transformers", "compressed-tensors"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} is not installed")
    return f"{program} {__version__} ({', '.join(found)})"


def _internal_error(error: BaseException) -> str:
    """Describe a bug and the line that raised it."""
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    text = " ".join(str(error).split())[:500]
    return (
        f"internal error: {type(error).__name__}{where}: {text} (this is a bug in seqbuild; --debug shows the "
        "traceback: please report it with an issue in the project's repository)"
    )


def _user_error(error: BaseException) -> str | None:
    """Describe an error in the user's input or of the machine; None for a bug."""
    if isinstance(error, SeqbuildError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith(("runtime", "seqbuild")):
        return (
            f"the module {error.name} cannot be imported: a required package is missing or incomplete (install it, "
            "pip install seqbuild-llm installs all of them)"
        )
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
    if hasattr(error, "format_message"):  # typer's own, for a command line that does not parse
        command = getattr(getattr(error, "ctx", None), "command_path", "")
        hint = f" (see {command} --help)" if command else ""
        return str(error.format_message()).rstrip(".") + hint
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return "cannot start more threads (raise ulimit -u or the container's pids limit, or lower OMP_NUM_THREADS)"
    is_full = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if is_full or "can't allocate memory" in str(error):
        what = str(error).partition(". ")[0] or "an allocation failed"
        return f"out of memory: {what} (lower --batch-size or --seq-len)"
    return None


@contextlib.contextmanager
def _unwound_by_sigterm() -> Iterator[None]:
    """Let SIGTERM unwind the stack as Ctrl-C does, so that incomplete files are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> NoReturn:
        raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is stop:  # a worker that has failed ignores it until the process ends
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _output_of_first_worker() -> Iterator[None]:
    """Drop what a worker prints while the block runs, unless it is the first one; its error is printed afterwards."""
    if is_first():
        yield
        return
    with (
        open(os.devnull, "w", encoding="utf-8") as null_device,
        contextlib.redirect_stdout(null_device),
        contextlib.redirect_stderr(null_device),
    ):
        yield
