"""Run a command line: return its exit code, print an error as one line, and the traceback only with `--debug`."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime import __version__
from runtime.cli.starting import WORDS
from runtime.cli.stopping import Stopping, stoppable
from runtime.console import NOTHING_LEFT, complain, left_behind, tell_when_stopped
from runtime.errors import SeqbuildError
from runtime.host.event_log import SIGNALS, end_logs, finish_logs, versions
from runtime.standard_output import GONE, unfailing
from runtime.status import done, status_line
from runtime.terminal import is_terminal, printable
from runtime.workers.start import is_broken, is_first, tell_torchrun

EPILOG = "At any position, --version prints the versions, and --debug shows the traceback of an error."
USER_ERROR = 2
_LONGEST_MESSAGE = 4000  # names from untrusted files can have megabytes
_SHOW_CURSOR = "\x1b[?25h"
_needs_output = [False]
_command: list[str] = []


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a command ended.

    Attributes:
        code: the exit code.
        line: what it prints last: its error, or that a signal stopped it; empty without one.
    """

    code: int
    line: str = ""


def require_output() -> None:
    """Make the running command fail if its output cannot be written: the output is its only result."""
    _needs_output[0] = True


def command_line() -> list[str]:
    """The program and the arguments of the running command."""
    return list(_command)


def run_app(app: Callable[..., Any], program: str, argv: list[str] | None = None) -> int:
    """Run a typer application and return the process's exit code.

    At any position, `--debug` shows the traceback of an error, and `--version` prints the versions instead of running a
    command. Without arguments the help is printed.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    _command[:] = [program, *arguments]
    if os.environ.get("WORLD_SIZE", "1") != "1":  # torch prints a stack of frames for each connection that ends
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    tell_when_stopped(NOTHING_LEFT)
    _needs_output[0] = False
    with unfailing() as (output, _), stoppable(lambda code: _end_at_once(program, code)) as stopping:
        outcome = _run(app, program, arguments, stopping)
        output.flush()
        if output.failure and output.failure != GONE:
            is_error = _needs_output[0] and outcome.code == 0
            text = f"standard output cannot be written: {output.failure}"
            complain(f"{program}: {'error' if is_error else 'warning'}: {text}")
            outcome = Outcome(code=USER_ERROR, line=text) if is_error else outcome
        _write_final_event(outcome)
    if is_broken():
        os._exit(outcome.code)  # a thread that waits for another worker would keep the process
    return outcome.code


def _run(app: Callable[..., Any], program: str, arguments: list[str], stopping: Stopping) -> Outcome:
    """Run the command, and print its error, or which signal stopped it."""
    if "--version" in arguments:
        require_output()
        print(_versions(program))
        return Outcome(code=0)
    is_debug = "--debug" in arguments
    given = [argument for argument in arguments if argument != "--debug"]
    try:
        with status_line("loading libraries") if is_first() else _without_output():
            result = app(args=given or ["--help"], prog_name=program, standalone_mode=False)
        code = int(result or 0) if given else USER_ERROR
        stopping.end()
    except BaseException as raised:
        stopping.end()
        if not isinstance(raised, (Exception, KeyboardInterrupt, SystemExit)) and not _is_panic(raised):
            _write_final_event(Outcome(code=1, line=type(raised).__name__))
            raise
        code, error = _code_of(raised, stopping.code)
        if error is not None:
            return _failed(program, error, is_debug)
    done()
    if code not in SIGNALS:
        return Outcome(code=code)
    line = f"{WORDS[SIGNALS[code]]}; {left_behind[0]}" if is_first() else WORDS[SIGNALS[code]]
    complain(f"{program}: {line}")
    return Outcome(code=code, line=line)


def _is_panic(error: BaseException) -> bool:
    """Whether it is a panic of the tokenizers library, which is written in Rust; that is not an Exception."""
    return type(error).__name__ == "PanicException"


def _code_of(raised: BaseException, code_of_signal: int) -> tuple[int, BaseException | None]:
    """The exit code for what ended a command, and the error to print, if it is one.

    Typer turns some errors into its own exceptions. An interrupted import may end with any error, so one that follows a
    signal is not reported, except those of other workers, which explain the signal.
    """
    context = raised.__context__
    if code_of_signal and not isinstance(raised, SeqbuildError):
        return code_of_signal, None
    if isinstance(context, EOFError) and type(raised).__name__ == "Abort":
        return USER_ERROR, context
    if isinstance(raised, KeyboardInterrupt) or type(raised).__name__ == "Abort":
        return 128 + signal.SIGINT, None
    if isinstance(raised, SystemExit):
        if isinstance(context, BrokenPipeError):
            return USER_ERROR, context
        return raised.code if isinstance(raised.code, int) else int(bool(raised.code)), None
    return USER_ERROR, raised


def _failed(program: str, error: BaseException, is_debug: bool) -> Outcome:
    """Print the line of an error."""
    done()
    message = _user_error(error) or _internal_error(error)
    if is_debug:
        import traceback

        traceback.print_exception(error)
    shortened = message if len(message) <= _LONGEST_MESSAGE else f"{message[:_LONGEST_MESSAGE]}..."
    text = " ".join(shortened.split())
    complain(f"{program}: error: {text}")
    tell_torchrun(f"{program}: error: {text}")
    return Outcome(code=USER_ERROR, line=text)


def _write_final_event(outcome: Outcome) -> None:
    """Write to the event log how the command ended."""
    if outcome.code in SIGNALS:
        facts = {"signal": SIGNALS[outcome.code], "exit_code": outcome.code, "text": printable(outcome.line)}
        finish_logs("interrupted", **facts)
    elif outcome.code:
        error = printable(outcome.line) or "the command printed why"
        finish_logs("failed", error=error, exit_code=outcome.code)
    else:
        end_logs()


def _end_at_once(program: str, code: int) -> None:
    """Say that a second signal ended a command that was still cleaning up."""
    line = f"{WORDS[SIGNALS[code]]}, and ended while it cleaned up; partial files may be left behind"
    for stream in (sys.stdout, sys.stderr):
        if is_terminal(stream):
            stream.write(_SHOW_CURSOR)  # which a progress display hides
    complain(f"{program}: {line}")
    _write_final_event(Outcome(code=code, line=line))


def _versions(program: str) -> str:
    libraries = {name: version for name, version in versions().items() if name != "seqbuild"}
    texts = (f"{name} {'is not installed' if version is None else version}" for name, version in libraries.items())
    return f"{program} {__version__} ({', '.join(texts)})"


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
    if isinstance(error, ImportError) and "shared object" in str(error):  # no memory, or a mount without execution
        hint = "raise ulimit -v, and mount the file system of the packages without noexec"
        return f"a library cannot be loaded: {error} ({hint})"
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
    if hasattr(error, "format_message"):  # typer's own, for a command line that does not parse
        command = getattr(getattr(error, "ctx", None), "command_path", "")
        hint = f" (see {command} --help)" if command else ""
        return str(error.format_message()).rstrip(".") + hint
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop from"):  # pathlib's, before Python 3.13
        path = str(error).removeprefix("Symlink loop from ")
        return f"the path {path} is a symbolic link that leads back to itself (remove it, or pass another path)"
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return "cannot start more threads (raise ulimit -u or the container's pids limit, or lower OMP_NUM_THREADS)"
    is_full = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if is_full or "can't allocate memory" in str(error):
        what = str(error).partition(". ")[0] or "an allocation failed"
        return f"out of memory: {what} (lower --batch-size or --seq-len)"
    return None


@contextlib.contextmanager
def _without_output() -> Iterator[None]:
    """Drop what a worker that is not the first one prints while the block runs; its error is printed afterwards."""
    with (
        open(os.devnull, "w", encoding="utf-8") as null_device,
        contextlib.redirect_stdout(null_device),
        contextlib.redirect_stderr(null_device),
    ):
        yield
