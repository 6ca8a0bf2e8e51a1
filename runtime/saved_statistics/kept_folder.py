"""The directory into which a run writes statistics: hidden beside its place until they are complete.

    .<name>.run.partial/
      statistics/     becomes the directory, by one rename
      lock            held while a run writes here

An interrupted run leaves it for `--resume`, under the same conditions as the run's own directory.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.checkpoint.writer import require_space
from runtime.errors import OutputError, SeqbuildError
from runtime.host.publish import (
    disk_errors,
    flush_one,
    flush_tree,
    put_in_place,
    require_free,
    require_writable,
    write_file,
)
from runtime.saved_statistics.records import (
    FORMAT,
    INDEX_NAME,
    VERSION,
    SavedIndex,
    SavedStep,
    encoded,
    read_record,
    step_name,
)
from runtime.saved_statistics.store import StatisticsStore
from runtime.streaming.output_place import locked, require_plain, require_visible, root_of
from runtime.workers.agreement import agreed

if TYPE_CHECKING:
    from runtime.workers.group import Workers


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptFolder:
    """The directory of statistics of a run.

    Attributes:
        path: where they appear.
        identity: what decides them, see `runtime.saved_statistics.store`.
        surroundings: what may change their last bits.
        data: facts of the calibration data, JSON.
        workers: of the run; worker 0 writes the lists.
    """

    path: Path
    identity: Mapping[str, str]
    surroundings: Mapping[str, str]
    data: str
    workers: Workers

    @property
    def root(self) -> Path:
        """The hidden directory."""
        return root_of(self.path)

    @property
    def folder(self) -> Path:
        """The directory with the files."""
        return self.root / "statistics"

    def begin(self, num_finished: int, num_bytes: int) -> None:
        """Prepare the directory for a run that has finished some steps, and check that its disk has space.

        Raises:
            OutputError: statistics of finished steps are missing, or there is no space.
        """
        with agreed(self.workers), self.errors():
            if not self.workers.rank and not self._is_published():
                self._prepare(num_finished, num_bytes)
        if self.workers.size == 1:
            return
        mark = self.root / f"mark-{secrets.token_hex(8)}"
        with agreed(self.workers), self.errors():
            if not self.workers.rank:
                mark.touch()
        name = self.workers.exchange(mark.name)[0]
        with agreed(self.workers):
            if self.workers.rank:
                require_visible(self.root, name)
        if not self.workers.rank:
            mark.unlink()

    def _prepare(self, num_finished: int, num_bytes: int) -> None:
        if not num_finished:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        missing = next((n for n in range(num_finished) if not (self.folder / step_name(n)).is_file()), None)
        if missing is not None:
            raise OutputError(
                f"the statistics of step {missing} are missing in {self.folder}, and the interrupted run has "
                "finished it",
                hint="resume it without --keep-statistics, or remove the output's hidden directory to start again",
            )
        written = sum(file.stat().st_size for file in self.folder.iterdir())
        require_space(self.path, num_bytes - written)

    def write_step(self, index: int, step: SavedStep) -> None:
        """Write the list of a step, whose files are complete."""
        if not self.workers.rank:
            flush_one(self.folder)
            write_file(self.folder / step_name(index), encoded(step))

    def publish(self, num_steps: int) -> None:
        """Write the list of all steps, and rename the directory to its final name.

        Raises:
            OutputError: it cannot be written.
        """
        with agreed(self.workers), self.errors():
            if self.workers.rank or self._is_published():
                return
            digests = [read_record(self.folder / step_name(index), SavedStep)[1] for index in range(num_steps)]
            index = SavedIndex(
                format=FORMAT,
                format_version=VERSION,
                identity=dict(self.identity),
                surroundings=dict(self.surroundings),
                data=self.data,
                steps=tuple(digests),
            )
            write_file(self.folder / INDEX_NAME, encoded(index.sealed()))
            flush_tree(self.folder)
            put_in_place(self.folder, self.path)

    def _is_published(self) -> bool:
        """Whether an earlier process has published them, and was killed before the checkpoint was complete."""
        if not (self.path / INDEX_NAME).is_file():
            return False
        found = StatisticsStore.open(self.path).identity
        names = [name for name, value in self.identity.items() if found.get(name) != value]
        if names:
            raise OutputError(f"{self.path} has statistics of another run", hint="choose another directory")
        return True

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Convert errors of the disk while the block runs; the run can be resumed after them."""
        try:
            with disk_errors(self.path, lambda: "free disk space or choose another directory"):
                yield
        except OutputError as error:
            error.is_resumable = True
            raise


@contextlib.contextmanager
def open_kept(kept: KeptFolder, out: Path, *, resume: bool) -> Iterator[KeptFolder]:
    """Lock the directory of statistics while the block runs; remove it afterwards unless the run can be resumed.

    Args:
        kept: the directory.
        out: the output of the run.
        resume: whether the run may continue an interrupted one.

    Raises:
        OutputError: when the place is not free, or another run writes there.
    """
    with contextlib.ExitStack() as stack:
        with agreed(kept.workers):
            if not kept.workers.rank:
                _require_place(kept, resume=resume)
                with disk_errors(kept.path):
                    kept.path.parent.mkdir(parents=True, exist_ok=True)
                    require_plain(kept.root)
                    stack.enter_context(locked(kept.root, kept.path))
        try:
            yield kept
        except BaseException as error:
            if not kept.workers.rank and not _is_kept(error, out):
                shutil.rmtree(kept.root, ignore_errors=True)
            raise
        if not kept.workers.rank:
            shutil.rmtree(kept.root, ignore_errors=True)


def _require_place(kept: KeptFolder, *, resume: bool) -> None:
    if resume and (kept.path / INDEX_NAME).is_file():
        return
    require_free(kept.path)
    require_writable(kept.path)


def _is_kept(error: BaseException, out: Path) -> bool:
    """Whether the run has left its own directory, so that it can be resumed."""
    is_lasting = isinstance(error, SeqbuildError) and not error.is_resumable and not isinstance(error, OutputError)
    return not is_lasting and root_of(out).is_dir()
