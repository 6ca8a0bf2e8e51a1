"""The command `report`, which both command lines have, and the page that a run writes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from runtime.console import say, warn
from runtime.errors import UsageError
from runtime.workers.start import is_first

if TYPE_CHECKING:
    from runtime.report.collect import Collector
    from runtime.streaming.report import Calibration

_SOURCE = "Checkpoint directory of a run, its event log, or its report page."
Source = Annotated[Path, typer.Argument(metavar="OUT|LOG", help=_SOURCE)]
Page = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="File to write; default: the source's name and .report.html, or .compare.html."),
]
Compare = Annotated[
    Path | None, typer.Option("--compare", metavar="OUT2|LOG2", help="Another run, to be shown beside the first one.")
]


def report(source: Source, out: Page = None, compare: Compare = None) -> None:
    """Write a page about a finished run: errors, experts, time and memory; or compare two runs."""
    from runtime.report.compare_page import write_comparison
    from runtime.report.html import require_replaceable
    from runtime.report.page import write_report
    from runtime.report.sources import beside, read_facts

    path = out or beside(source, ".report.html" if compare is None else ".compare.html")
    _require_outside("--out", path, *(place for place in (source, compare) if place is not None and place.is_dir()))
    require_replaceable(path)
    facts = read_facts(source)
    if compare is None:
        write_report(path, facts)
    else:
        write_comparison(path, facts, read_facts(compare), names=(source.name, compare.name))
    say(f"report: {path}")


class RunPage:
    """The report page of a run: a watcher that collects what happens, and writes the page when the run has ended.

    Nothing that goes wrong here ends the run.

    Args:
        path: of the page; None for no page.
        out: the output directory.
    """

    def __init__(self, path: Path | None, out: Path) -> None:
        self.path = path
        self._out = out
        self._problem: Exception | None = None
        self._collector: Collector | None = None
        if path is not None:
            from runtime.report.collect import Collector

            self._collector = Collector()

    def tell(self, event: str, **facts: Any) -> None:
        """Receive an event."""
        if self._collector is None:
            return
        try:
            self._collector.tell(event, **facts)
        except Exception as error:
            self._collector, self._problem = None, error

    def write(self, result: Calibration, **known: Any) -> Path | None:
        """Write the page, or warn that it cannot be written.

        Args:
            result: of the calibration.
            known: more fields of `RunFacts`.

        Returns:
            The page's path; None if none was written.
        """
        if self.path is None:
            return None
        try:
            if self._collector is None:
                raise self._problem or RuntimeError("no facts were collected")
            self._write(self._collector, result, known)
        except Exception as error:
            warn(f"cannot write the report page {self.path}: {' '.join(str(error).split())}")
            return None
        return self.path

    def _write(self, collector: Collector, result: Calibration, known: dict[str, Any]) -> None:
        from runtime.report.page import write_report
        from runtime.report.run_facts import facts_of_run

        assert self.path is not None
        write_report(self.path, facts_of_run(collector, result, self._out, known))


def _require_outside(option: str, path: Path, *directories: Path) -> None:
    """Require that a page is not written into the output that it is about, or into an input.

    Raises:
        UsageError: naming both.
    """
    for place in directories:
        if path.resolve().is_relative_to(place.resolve()):
            raise UsageError(f"{option} {path} is inside {place}", hint="choose a file outside of it")


def run_page(path: Path | None, no_report: bool, out: Path, *inputs: Path) -> RunPage:
    """Check where the page of a run goes, before the run.

    Args:
        path: the user's; None for the default, beside the output.
        no_report: whether no page is wanted.
        out: the output directory.
        inputs: directories that the run reads.

    Raises:
        UsageError, OutputError: if it cannot be written there.
    """
    if no_report and path is not None:
        raise UsageError("--report and --no-report cannot be combined", hint="pass one of them")
    if no_report or not is_first():
        return RunPage(None, out)
    from runtime.report.html import require_replaceable
    from runtime.report.sources import beside

    chosen = path or beside(out, ".report.html")
    if path is not None:
        _require_outside("--report", path, out, *inputs)
    if path is not None or os.path.lexists(chosen):  # the default place is as writable as that of the output
        require_replaceable(chosen)
    return RunPage(chosen, out)
