"""The event log: lines of JSON that say what a process does, that it is alive, and how it ended.

docs/operate.md specifies the events. The first one of a process is `run`, the last one `end`, `failed` or
`interrupted`; between them a thread writes `heartbeat`, also while the main thread solves, imports or traces. A process
that was killed writes no last event.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from runtime import __version__
from runtime.console import followers_of_warnings, warn
from runtime.errors import OutputError
from runtime.host.limits import available_bytes, resident_bytes, usable_processors
from runtime.host.publish import disk_errors
from runtime.host.regular_files import NotRegularError, open_to_append
from runtime.status import followers

FORMAT = 1
SIGNALS = {129: "SIGHUP", 130: "SIGINT", 143: "SIGTERM"}  # by the exit code of a process that one has stopped
STANDARD_OUTPUT = "-"
HEARTBEAT_S = 15.0
BEGINNING = b'{"event": "'  # of each line
GIVEN = ("command", "artifact", "weights", "recipe", "data", "out")  # null in a log that a program writes by itself
_BRIEF = ("phase", "load", "batch", "solved", "tuned")  # too many for a log; the heartbeat has the latest
_LOCK_S = 2.0  # a final event must not wait longer for a thread whose write hangs
_open: list[EventLog] = []


class EventLog:
    """Appends every event except those of `_BRIEF` to a file, with the time in seconds since 1970 and the run's id.

    The first event is `run`. As a context manager, the log writes the final event from the exception that ends the
    block. If the file cannot be written any more, the log ends with a warning, and the run continues.

    Args:
        path: of the file, which a resumed run continues; `-` for standard output: all other text that is printed
            there goes to standard error until the log is closed.
        given: what the process was told to do, see `GIVEN`.

    Raises:
        OutputError: when it cannot be opened.
    """

    def __init__(self, path: Path | str, **given: Any) -> None:
        self.run_id = secrets.token_hex(8)
        self._path = path
        self._lock = threading.RLock()
        self._start = time.monotonic()
        self._place: dict[str, Any] = {"index": None, "label": None, "phase": "loading libraries"}
        self._tokens = 0
        self._result: dict[str, Any] = {"path": None, "bytes": None}
        self._restore: Callable[[], None] = lambda: None
        self._file: BinaryIO | None
        if str(path) == STANDARD_OUTPUT:
            self._file, self._restore = _take_standard_output()
        else:
            self._file = _opened(Path(path))
        self._is_closing = threading.Event()
        _open.append(self)
        followers.append(self._follow)
        followers_of_warnings.append(self._warn)
        self.tell("run", format=FORMAT, **(dict.fromkeys(GIVEN) | given), **_facts_of_process())
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    @property
    def is_on_standard_output(self) -> bool:
        """Whether the log is on standard output, so that nothing else may be printed there."""
        return str(self._path) == STANDARD_OUTPUT

    def tell(self, event: str, **facts: Any) -> None:
        """Receive an event."""
        if event == "phase":
            self._place, self._tokens = {name: facts[name] for name in ("index", "label", "phase")}, 0
        elif event == "batch":
            self._tokens += facts["tokens"]
        elif event == "published":
            self._result = {name: facts[name] for name in ("path", "bytes")}
        if event not in _BRIEF:
            self._write(event, facts)

    def finish(self, event: str, **facts: Any) -> None:
        """Write the final event, if there is none yet, and close the log."""
        if self not in _open:
            return
        _open.remove(self)
        followers.remove(self._follow)
        followers_of_warnings.remove(self._warn)
        self._is_closing.set()
        self._write(event, facts | {"seconds": round(time.monotonic() - self._start, 3)})
        self._close()

    def end(self) -> None:
        """Write that the process has finished its work."""
        self.finish("end", exit_code=0, **self._result)

    def _follow(self, text: str) -> None:
        """Take over what the status line shows."""
        self._place, self._tokens = {"index": None, "label": None, "phase": text}, 0

    def _warn(self, text: str) -> None:
        self.tell("warning", text=text)

    def _beat(self) -> None:
        while not self._is_closing.wait(HEARTBEAT_S):
            facts = {**self._place, "tokens": self._tokens, "host_bytes": resident_bytes()}
            self._write("heartbeat", {"elapsed": round(time.monotonic() - self._start, 3), **facts})

    def _write(self, event: str, facts: dict[str, Any]) -> None:
        line = _json({"event": event, "time": round(time.time(), 3), "run_id": self.run_id, **facts}) + "\n"
        is_locked = self._lock.acquire(timeout=_LOCK_S)
        try:
            data = memoryview(line.encode("ascii"))
            while data and self._file is not None:
                data = data[self._file.write(data) :]
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            self._close()
            warn(f"cannot write the log {self._path} ({reason}); the run continues without it")
        finally:
            if is_locked:
                self._lock.release()

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()
        restore, self._restore = self._restore, lambda: None
        restore()

    def __enter__(self) -> EventLog:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        code = error.code if isinstance(error, SystemExit) else 130 if isinstance(error, KeyboardInterrupt) else None
        if error is None:
            self.end()
        elif code in SIGNALS:
            self.finish("interrupted", signal=SIGNALS[code], exit_code=code, text=f"{SIGNALS[code]} was received")
        else:
            self.finish("failed", error=" ".join(str(error).split()) or type(error).__name__, exit_code=None)


def versions() -> dict[str, str | None]:
    """The versions of this program and of the libraries that its results depend on, without importing them; None for
    one that is not installed.
    """
    import importlib.metadata

    found: dict[str, str | None] = {"seqbuild": __version__, "Python": ".".join(map(str, sys.version_info[:3]))}
    for name in ("torch", "transformers", "compressed-tensors"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def finish_logs(event: str, **facts: Any) -> None:
    """Write the final event to every log of this process that is open."""
    for log in list(_open):
        log.finish(event, **facts)


def end_logs() -> None:
    """Write to every log that is open that the process has finished its work."""
    for log in list(_open):
        log.end()


def _facts_of_process() -> dict[str, Any]:
    return {
        "versions": versions(),
        "directory": os.getcwd(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "processors": usable_processors(),
        "available_bytes": available_bytes(),
    }


def _opened(path: Path) -> BinaryIO:
    if not path.absolute().parent.exists():
        raise OutputError(f"cannot write the log {path}: its directory does not exist", hint="create it")
    try:
        with disk_errors(path, lambda: "choose another file for the log"):
            _require_log(path)
            return open_to_append(path)
    except NotRegularError as error:
        hint = "--log - writes to standard output" if "pipe" in str(error.strerror) else "choose another file"
        raise OutputError(f"cannot write the log {path}: {error.strerror}", hint=hint) from error


def _require_log(path: Path) -> None:
    """Require that an existing file is a log: a recipe or a config must not be appended to."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        head = file.read(len(BEGINNING))
    if not BEGINNING.startswith(head):  # a process that was killed may have written a part
        raise OutputError(
            f"{path} exists and is not an event log, so nothing is appended to it", hint="choose another file"
        )


def _take_standard_output() -> tuple[BinaryIO, Callable[[], None]]:
    """Return standard output, and redirect what is printed from here on to standard error, also by native code."""
    output = sys.stdout
    output.flush()
    sys.stdout = sys.stderr
    try:
        number, errors = output.fileno(), sys.stderr.fileno()
        file = os.fdopen(os.dup(number), "wb", buffering=0)
    except (AttributeError, OSError, ValueError):  # not a file: a stream of a notebook or a test
        return _Encoded(output), lambda: setattr(sys, "stdout", output)  # type: ignore[return-value]
    original = os.dup(number)
    os.dup2(errors, number)

    def restore() -> None:
        sys.stdout = output
        os.dup2(original, number)
        os.close(original)

    return file, restore


class _Encoded:
    """A text stream that takes bytes."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, data: memoryview) -> int:
        self._stream.write(str(data, "ascii"))
        self._stream.flush()
        return len(data)

    def close(self) -> None:
        """Leave the stream open: it belongs to the caller."""


def _json(facts: dict[str, Any]) -> str:
    """Return JSON; numbers that JSON does not have are null."""
    try:
        return json.dumps(facts, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(facts))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
