"""Commit finished steps: flush them to disk and record them in the journal while the next step runs."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from runtime.streaming import journal
from runtime.streaming.saved_values import CannotSaveError, has_boundary, remove_boundary, save_boundary

if TYPE_CHECKING:
    from runtime.checkpoint.writer import ShardWriter
    from runtime.streaming.activations import Activations
    from runtime.streaming.events import Watchers
    from runtime.streaming.schedule import Step
    from runtime.streaming.work import Work
    from runtime.streaming.workplace import Workplace


class Committer:
    """Commits one step after the other in a thread; an error is raised by the next call.

    Args:
        writer: of the new checkpoint.
        workplace: has the journal, and the directory for saved values.
        every: number of subgraphs after which values are saved; 0 for never.
        watch: receives a warning if values cannot be saved.
    """

    def __init__(self, writer: ShardWriter, workplace: Workplace, every: int, watch: Watchers) -> None:
        self.writer = writer
        self.journal = workplace.journal
        self.folder = workplace.values
        self.every = every
        self.watch = watch
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self._pending: Future[None] | None = None

    def __enter__(self) -> Committer:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True)

    def commit(self, step: Step, work: Work, activations: Activations) -> None:
        """Start to commit a step whose tensors are written, and whose outputs are stored."""
        facts = {
            "index": step.index,
            "saved": self._save(step, activations),
            "modules": [asdict(report) for report in work.reports],
            "warnings": work.warnings,
        }
        self.wait()
        self._pending = self._thread.submit(self._record_step, facts)

    def record(self, kind: str, **facts: Any) -> None:
        """Append an entry to the journal, after all earlier steps."""
        self.wait()
        self.journal.append(kind, **facts)

    def wait(self) -> None:
        """Wait until everything is committed."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def last_saved(self, index: int) -> int | None:
        """The last step before `index` whose values are saved, for the present batches."""
        found = None
        for entry in self.journal.entries:
            if entry["kind"] == journal.MICRO_BATCH:
                found = None
            elif entry["kind"] == journal.STEP and entry["saved"] and entry["index"] < index:
                found = entry["index"] if has_boundary(self.folder, entry["index"]) else found
        return found

    def _record_step(self, facts: dict[str, Any]) -> None:
        self.writer.sync()
        self.journal.append(journal.STEP, **facts)
        if facts["saved"]:
            for earlier in self.journal.of_kind(journal.STEP)[:-1]:
                remove_boundary(self.folder, earlier["index"])

    def _save(self, step: Step, activations: Activations) -> bool:
        if not step.goes_on or not self.every or (step.index + 1) % self.every:
            return False
        try:
            save_boundary(activations, self.folder, step.index)
        except CannotSaveError as error:
            text = f"warning: activations are not saved, because there is {error}; a resumed run computes them again"
            if text not in self.watch.warnings:
                self.watch.tell("warning", text=text)
            return False
        return True
