"""How a calibration is shown: a display on a terminal, a line for each subgraph in files and pipes, an event log."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.console import say, silent
from runtime.errors import OutputError
from runtime.host.publish import require_writable
from runtime.status import doing
from runtime.terminal import is_terminal
from runtime.workers.start import is_first

if TYPE_CHECKING:
    from runtime.streaming.events import Watcher


def require_log(path: Path | None) -> None:
    """Require that the event log can be written, before the work that it describes; a new one is not created.

    Raises:
        OutputError: naming it.
    """
    from runtime.streaming.events import EventLog

    if path is None:
        return
    if not path.absolute().parent.is_dir():
        raise OutputError(f"cannot write the log {path}: its directory does not exist", hint="create it")
    if not path.exists():
        require_writable(path)
        return
    with EventLog(path):
        return


def watching(stack: ExitStack, log: Path | None, *, as_json: bool) -> dict[str, Any]:
    """Create what shows a calibration, as the arguments `progress` and `watchers` of `runtime.calibrate`.

    Args:
        stack: closes the display and the log.
        log: file of the event log, if any.
        as_json: whether the result is printed as JSON, alone.
    """
    if not is_first():
        return {"progress": silent, "watchers": []}
    watchers: list[Watcher] = []
    is_drawn = is_terminal(sys.stdout) and not as_json
    if is_drawn:
        from rich.console import Console

        from runtime.streaming.display import Display

        watchers.append(stack.enter_context(Display(Console(highlight=False))))
    if log is not None:
        from runtime.streaming.events import EventLog

        watchers.append(stack.enter_context(EventLog(log)))
    progress = silent if is_drawn else doing if as_json else say
    return {"progress": progress, "watchers": watchers}
