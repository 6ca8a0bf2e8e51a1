"""How a calibration is shown: a display on a terminal, a line for each subgraph in files and pipes, an event log."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.cli.run import command_line
from runtime.console import say, silent
from runtime.errors import OutputError
from runtime.host.event_log import EventLog
from runtime.host.regular_files import read_text
from runtime.status import doing
from runtime.terminal import is_terminal
from runtime.workers.start import is_first

if TYPE_CHECKING:
    from runtime.cli.report import RunPage
    from runtime.streaming.events import Watcher

_LONGEST_RECIPE_BYTES = 2**20


class GivenLog:
    """The option `--log` of a command, which opens its log before it does anything else.

    Args:
        path: of the log; None for none. Only the first worker writes it.
        artifact, weights, recipe, data, out: as they were given, None without.

    Attributes:
        events: the open log; None without a log.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        artifact: Path | None = None,
        weights: str | None = None,
        recipe: str | Path | None = None,
        data: Sequence[str] | None = None,
        out: Path | None = None,
    ) -> None:
        self.events: EventLog | None = None
        self._problem: OutputError | None = None
        if path is None or not is_first():
            return
        found = {"name": str(recipe), "text": _text_of(Path(recipe))} if recipe is not None else None
        try:
            self.events = EventLog(
                path,
                command=command_line(),
                artifact=_text(artifact),
                weights=weights,
                recipe=found,
                data=list(data or ()),
                out=_text(out),
            )
        except OutputError as error:
            self._problem = error

    def require(self) -> None:
        """Require that the log is open; separate, so that several workers can agree on it.

        Raises:
            OutputError: when it cannot be written.
        """
        if self._problem is not None:
            raise self._problem

    def tell(self, event: str, **facts: Any) -> None:
        """Write an event to the log, if there is one."""
        if self.events is not None:
            self.events.tell(event, **facts)

    def takes_summary(self, facts: dict[str, Any]) -> bool:
        """Write a summary in JSON to the log, if that is on standard output, where nothing else may be printed."""
        if self.events is None or not self.events.is_on_standard_output:
            return False
        self.events.tell("summary", **facts)
        return True


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _text_of(recipe: Path) -> str | None:
    """The text of a recipe; None if it is the name of a preset, or cannot be read, which is reported later."""
    with contextlib.suppress(OSError, ValueError):
        if recipe.stat().st_size <= _LONGEST_RECIPE_BYTES:
            return read_text(recipe)
    return None


def watching(stack: ExitStack, log: GivenLog, page: RunPage | None = None, *, as_json: bool) -> dict[str, Any]:
    """Create what shows a calibration, as the arguments `progress` and `watchers` of `runtime.calibrate`.

    Args:
        stack: closes the display.
        log: receives all events.
        page: receives them too, if one is written; an evaluation has none.
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
    watchers += [] if log.events is None else [log.events]
    watchers += [] if page is None or page.path is None else [page]
    progress = silent if is_drawn else doing if as_json else say
    return {"progress": progress, "watchers": watchers}
