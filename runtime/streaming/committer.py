"""Commit finished steps: flush them to disk and record them in the journal while the next step runs.

Each worker flushes what it has written. With several workers, a step is recorded when the next one is committed or
`wait` is called: only then do all know that it is on every disk.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol

from runtime.streaming import journal
from runtime.streaming.saved_values import CannotSaveError, has_boundary, remove_boundary, save_boundary
from runtime.workers.agreement import agreed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from runtime.checkpoint.writer import ShardWriter
    from runtime.streaming.activations import Activations
    from runtime.streaming.events import Watchers
    from runtime.streaming.saved_values import Place
    from runtime.streaming.schedule import Step
    from runtime.streaming.work import Work
    from runtime.streaming.workplace import Workplace


class Alongside(Protocol):
    """Work that is done beside a run."""

    def reach(self, index: int) -> None:
        """Take note that a step begins; raise the error of the work, if it failed."""

    def written(self, index: int) -> None:
        """Take note that all workers have written a step to its files; another thread than that of `reach` calls it."""


class Committer:
    """Commits one step after the other in a thread; an error is raised by the next call.

    All workers call the same methods in the same order.

    Args:
        writer: of the new checkpoint.
        workplace: has the journal, and the directory for saved values.
        every: number of subgraphs after which values are saved; 0 for never.
        watch: receives a warning if values cannot be saved.
        alongside: is told which steps are written.
    """

    def __init__(
        self, writer: ShardWriter, workplace: Workplace, every: int, watch: Watchers, alongside: Alongside
    ) -> None:
        self.writer = writer
        self.workers = workplace.workers
        self.journal = workplace.journal
        self.folder = workplace.saved
        self.leads = workplace.leads
        self.every = every
        self.watch = watch
        self.alongside = alongside
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self._pending: Future[None] | None = None
        self._unrecorded: dict[str, Any] = {}

    def __enter__(self) -> Committer:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True)

    def commit(
        self, step: Step, work: Work, activations: Activations, places: Sequence[Place], cost: Mapping[str, Any]
    ) -> None:
        """Start to commit a step whose tensors are written, and whose outputs are stored.

        Args:
            step: the step.
            work: its reports and warnings.
            activations: its outputs.
            places: of the batches, see `runtime.streaming.saved_values`.
            cost: its time, traffic and memory, for the report of a resumed run.
        """
        facts = {
            "index": step.index,
            "saved": self._save(step, activations, places),
            "modules": [asdict(report) for report in work.reports],
            "warnings": work.warnings,
            "cost": cost,
        }
        self.wait()
        if self.workers.size == 1:
            self._pending = self._thread.submit(self._flush_and_record, facts)
        else:
            self._pending = self._thread.submit(self.writer.sync)
            self._unrecorded = facts

    def record(self, kind: str, **facts: Any) -> None:
        """Append an entry to the journal, after all earlier steps."""
        self.wait()
        with agreed(self.workers):
            self.journal.append(kind, **facts)

    def wait(self) -> None:
        """Wait until everything is committed."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        with agreed(self.workers):
            pending.result()
        if self._unrecorded:
            facts, self._unrecorded = self._unrecorded, {}
            with agreed(self.workers):
                self.alongside.written(facts["index"])
                self._record_step(facts)

    def last_saved(self, index: int, places: Sequence[Place]) -> int | None:
        """The last step before `index` whose values are saved on all workers, for the present batches."""
        self.wait()
        found: list[int] = []
        for entry in self.journal.entries:
            if entry["kind"] == journal.MICRO_BATCH:
                found = []
            elif entry["kind"] == journal.STEP and entry["saved"] and entry["index"] < index:
                found += [entry["index"]] if has_boundary(self.folder, entry["index"], places) else []
        of_all = self.workers.exchange(found)
        return max((saved for saved in found if all(saved in other for other in of_all)), default=None)

    def _flush_and_record(self, facts: dict[str, Any]) -> None:
        self.writer.wait()
        self.alongside.written(facts["index"])  # it reads the files while they are flushed
        self.writer.sync()
        self._record_step(facts)

    def _record_step(self, facts: dict[str, Any]) -> None:
        self.journal.append(journal.STEP, **facts)
        if facts["saved"] and self.leads:
            for earlier in self.journal.of_kind(journal.STEP)[:-1]:
                remove_boundary(self.folder, earlier["index"])

    def _save(self, step: Step, activations: Activations, places: Sequence[Place]) -> bool:
        if not step.goes_on or not self.every or (step.index + 1) % self.every:
            return False
        reason = ""
        with agreed(self.workers):
            try:
                save_boundary(activations, self.folder, step.index, places)
            except CannotSaveError as error:
                reason = str(error)
        reason = next(filter(None, self.workers.exchange(reason)), "")
        if not reason:
            return True
        text = f"warning: activations are not saved, because there is {reason}; a resumed run computes them again"
        if text not in self.watch.warnings:
            self.watch.tell("warning", text=text)
        return False
