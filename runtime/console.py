"""How both command lines speak: one line for an error, exit code 2; a traceback only when asked for."""

from __future__ import annotations

import contextlib
import logging
import reprlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TextIO

from runtime.errors import SeqbuildError
from runtime.output import GONE, Output, unfailing

USER_ERROR, INTERRUPTED, TERMINATED = 2, 130, 143


_NOTHING = "nothing half-written was left behind"
_left_behind = [_NOTHING]


def tell_when_stopped(text: str) -> None:
    """What to say of a command that was interrupted: typer keeps no exception that could carry it."""
    _left_behind[0] = text


_needs_output = [False]


def require_output() -> None:
    """Let the command that runs fail in the end if its output cannot be written: it has no other result."""
    _needs_output[0] = True


def run_app(app: Callable[..., Any], program: str, argv: list[str] | None = None) -> int:
    """Run a typer application and return the process's exit code.

    `--debug`, anywhere on the command line, shows the traceback of an error. Without arguments there is the help.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    is_debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    tell_when_stopped(_NOTHING)
    _needs_output[0] = False
    with unfailing() as (output, _):
        code = _run(app, program, arguments, is_debug)
        output.flush()
        if output.failure and output.failure != GONE:
            is_error = _needs_output[0] and code == 0
            kind = "error" if is_error else "warning"
            print(f"{program}: {kind}: standard output cannot be written: {output.failure}", file=sys.stderr)
            code = USER_ERROR if is_error else code
    return code


def _run(app: Callable[..., Any], program: str, arguments: list[str], is_debug: bool) -> int:
    from typer import Abort

    try:
        with _terminable():
            result = app(args=arguments or ["--help"], prog_name=program, standalone_mode=False)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except (KeyboardInterrupt, Abort):
        code = INTERRUPTED
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # Rust's: of a tokenizer
            raise
        message = _user_error(error) or _unforeseen(error)
        if is_debug:
            import traceback

            traceback.print_exc()
        print(f"{program}: error: {printable(' '.join(message.split()))}", file=sys.stderr)
        return USER_ERROR
    else:
        code = int(result or 0) if arguments else USER_ERROR
    if code in (INTERRUPTED, TERMINATED):
        word = "interrupted" if code == INTERRUPTED else "terminated"
        print(f"{program}: {word}; {_left_behind[0]}", file=sys.stderr)
    return code


def _unforeseen(error: BaseException) -> str:
    """What to say about an error that nobody has thought of: where it is from, for whoever reports it."""
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    text = " ".join(str(error).split())[:500]
    return f"{type(error).__name__}{where}: {text} (nobody has foreseen this: report it with what --debug shows)"


def _user_error(error: BaseException) -> str | None:
    """What to say about an error that is not ours: a mistake of the user's, or something the machine lacks."""
    if isinstance(error, SeqbuildError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
    if hasattr(error, "format_message"):  # typer's own, for a command line that does not parse
        command = getattr(getattr(error, "ctx", None), "command_path", "")
        hint = f" ({command} --help shows what it takes)" if command else ""
        return str(error.format_message()).rstrip(".") + hint
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return "no more threads can be started (raise ulimit -u, or pids of the container, or lower OMP_NUM_THREADS)"
    is_full = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if is_full or "can't allocate memory" in str(error):
        what = str(error).partition(". ")[0] or "the machine has no more"
        return f"out of memory: {what} (lower --batch-size or --seq-len)"
    return None


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM unwind the stack as Ctrl-C does, so that what is half-written is taken away."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> NoReturn:
        raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def say(line: str = "") -> None:
    """Print a line at once, also into a pipe; a stream that takes none ends no run."""
    _print(printable(line), sys.stdout)


def warn(line: str) -> None:
    """Print a line where it does not mix with results."""
    _print(f"warning: {printable(line)}", sys.stderr)


def _print(line: str, stream: TextIO | Output | None) -> None:
    if stream is not None:
        output = stream if isinstance(stream, Output) else Output(stream)
        output.write(f"{line}\n")
        output.flush()


def shown(value: object) -> str:
    """A value for a message: of one that is large, a beginning."""
    shortener = reprlib.Repr()
    shortener.maxlevel = 2
    return shortener.repr(value)


def printable(text: str) -> str:
    """A text without what terminals obey and people do not see: names come from files that others have written."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() or character in "\n\t" else ascii(character)[1:-1] for character in text
    )


def human_bytes(count: float) -> str:
    """A size in the unit that keeps it short: 1.5 MB is 1 500 000 bytes."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


@contextlib.contextmanager
def quiet(*loggers: str, level: int = logging.ERROR) -> Iterator[None]:
    """Let these loggers, by name, say nothing below `level` while the block runs."""
    found = [logging.getLogger(name) for name in loggers]
    before = [logger.level for logger in found]
    for logger in found:
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, usual in zip(found, before, strict=True):
            logger.setLevel(usual)
