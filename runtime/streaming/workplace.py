"""The hidden directory beside the output in which a run works until its checkpoint is complete.

    .<output>.run.partial/
      checkpoint/     becomes the output, by one rename
      values/         values between subgraphs, saved for a resume
      values/rank-R/  those of worker R that exceed its memory budget
      journal         the finished steps
      digests-R       the finished digests of source files of worker R
      lock            held while a run works here

An interrupted run leaves it, so that another process can resume. It is deleted when the run is complete, and when the
run failed for a reason that would make a resumed run fail as well.

Worker 0 leads: it locks, cleans, journals and publishes, and the other workers only write tensors and values. Without a
shared directory every worker leads in a directory of its own, whose output is a part of the checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.checkpoint.writer import require_space
from runtime.console import tell_when_stopped
from runtime.errors import SeqbuildError
from runtime.host.publish import disk_errors, flush_one, flush_tree, put_in_place
from runtime.streaming import journal
from runtime.streaming.journal import Journal
from runtime.streaming.output_place import (
    clear,
    is_complete,
    is_published,
    locked,
    num_finished,
    part_path,
    remove,
    require_place,
    require_plain,
    require_resumed,
    require_visible,
    root_of,
    unit_of,
    what_is_left,
)
from runtime.workers.agreement import agreed, is_worth_resuming
from runtime.workers.group import Alone

if TYPE_CHECKING:
    from runtime.workers.group import Workers


@dataclass(frozen=True, kw_only=True, slots=True)
class Workplace:
    """The directory of a run.

    Attributes:
        out: the output, or this worker's part of it.
        root: the directory.
        journal: of all workers.
        workers: of the run.
        leads: whether this worker locks, cleans, journals and publishes here.
    """

    out: Path
    root: Path
    journal: Journal
    workers: Workers
    leads: bool

    @property
    def checkpoint(self) -> Path:
        """The directory that becomes the output."""
        return self.root / "checkpoint"

    @property
    def saved(self) -> Path:
        """The directory for values that are saved for a resume."""
        return self.root / "values"

    @property
    def values(self) -> Path:
        """The directory for values of this worker that exceed its memory budget."""
        return self.saved / f"rank-{self.workers.rank}"

    def require_space(self, num_bytes: int) -> None:
        """Check that the disk has space for a checkpoint of this size, of which a part may be written.

        Raises:
            OutputError: on every worker.
        """
        with agreed(self.workers):
            if self.leads:
                written = sum(path.stat().st_blocks * 512 for path in self.checkpoint.iterdir())
                require_space(self.out, num_bytes - written)

    def publish(self) -> None:
        """Rename the checkpoint to its final name.

        Raises:
            OutputError: when the output directory was filled meanwhile.
        """
        with agreed(self.workers):
            if self.leads:
                flush_tree(self.checkpoint)
                self.out.parent.mkdir(parents=True, exist_ok=True)  # of new/../out, only the run's directory exists
                put_in_place(self.checkpoint, self.out)

    def _begin(self, identity: Mapping[str, str], parts: bool) -> None:
        """Record the identity of a new run, or check that of a resumed one, on all workers.

        Raises:
            OutputError: naming the ingredients that differ.
        """
        with agreed(self.workers):
            if self.journal.entries:
                self.journal.require_same_run(identity)
        if parts:  # a step is finished when all workers have it
            self.journal.keep(min(self.workers.exchange(len(self.journal.entries))))
        with agreed(self.workers):
            if self.leads:
                self._prepare(identity)
        if not parts and self.workers.size > 1:
            self._attach()
        with agreed(self.workers):
            self.values.mkdir(exist_ok=True)

    def _prepare(self, identity: Mapping[str, str]) -> None:
        import torch

        from runtime.host.half_precision import names_of_slow_halves

        for folder in (self.checkpoint, self.saved):
            folder.mkdir(exist_ok=True)
        flush_one(self.root)
        flush_one(self.root.parent)
        if not self.journal.entries:
            self.journal.append(
                journal.RUN,
                identity=identity,
                threads=torch.get_num_threads(),
                slow_halves=names_of_slow_halves(),
            )
        for path in self.checkpoint.iterdir():
            if path.suffix != ".safetensors":  # perhaps incomplete; these are written at the end
                remove(path)
        for path in self.saved.iterdir():
            if not path.name.startswith("boundary-"):  # values of earlier workers that exceeded their budget
                remove(path)

    def _attach(self) -> None:
        """Give the journal of worker 0 to the others, which check that they see the same directory."""
        mark = self.root / f"mark-{secrets.token_hex(8)}"
        with agreed(self.workers):
            if self.leads:
                mark.touch()
        entries, name = self.workers.exchange((self.journal.entries, mark.name))[0]
        with agreed(self.workers):
            if not self.leads:
                self.journal.entries += entries
                require_visible(self.root, name)
        if self.leads:
            mark.unlink()

    def _leave(self, error: BaseException, parts: bool) -> None:
        """Remove the directory unless another process can resume the run, and tell what is left."""
        if not parts and is_published(self.out):
            self._clear()
            tell_when_stopped(f"output directory {self.out} is complete")
        elif not self.journal.of_kind(journal.STEP) or not is_worth_resuming(error):
            self._clear()
        elif not isinstance(error, SeqbuildError):
            tell_when_stopped(self._what_is_left)
        elif error.is_resumable:
            error.hint = "; ".join(part for part in (error.hint, self._what_is_left) if part)

    @property
    def _what_is_left(self) -> str:
        return what_is_left(len(self.journal.of_kind(journal.STEP)), journal.unit_of(self.journal.entries))

    def _clear(self) -> None:
        if self.leads:
            shutil.rmtree(self.root, ignore_errors=True)


@contextlib.contextmanager
def open_workplace(
    out: Path, *, resume: bool, identity: Mapping[str, str], workers: Workers | None = None, parts: bool = False
) -> Iterator[Workplace]:
    """Lock the directory of a run while the block runs.

    Args:
        out: the output directory.
        resume: continue an interrupted run, if there is one.
        identity: everything that decides the bytes of the result, by name.
        workers: of the run; all call this.
        parts: whether each worker writes a part of its own, because they share no directory.

    Raises:
        OutputError: when `out` is not free, another process works on it, or an interrupted run would be lost or has
            another identity.
    """
    workers = workers or Alone()
    require_place(out, resume=resume, workers=workers, parts=parts)
    out = part_path(out, workers) if parts else out
    root, leads = root_of(out), parts or not workers.rank
    with disk_errors(out, lambda: what_is_left(num_finished(out), unit_of(out))), contextlib.ExitStack() as stack:
        with agreed(workers):
            if leads:
                require_plain(root)
                stack.enter_context(locked(root, out))
                if is_complete(out):  # a part of a run that was interrupted before all parts were published
                    os.rename(out, root / "checkpoint")
                if not require_resumed(out, resume=resume):
                    clear(root)
        log = Journal(root / journal.NAME, is_mine=leads)
        stack.callback(log.close)
        place = Workplace(out=out, root=root, journal=log, workers=workers, leads=leads)
        try:
            place._begin(identity, parts)
            yield place
        except BaseException as error:
            place._leave(error, parts)
            raise
        place._clear()
