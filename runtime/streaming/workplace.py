"""Where a run works until its checkpoint is whole: a hidden directory beside the output.

    .<output>.run.partial/
      checkpoint/     what becomes the output, by one rename
      values/         values between subgraphs that there is no memory for, and those that were saved for a resume
      journal         what is finished
      lock            held while a process works here

It stays when a run is interrupted, so that another process can go on; it goes when the run is done, and when the run
failed for a reason that going on would meet again.
"""

from __future__ import annotations

import contextlib
import shutil
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from runtime.console import tell_when_stopped
from runtime.errors import OutputError, SeqbuildError
from runtime.host.publish import disk_errors, flush_one, flush_tree, put_in_place, require_free
from runtime.streaming import journal
from runtime.streaming.journal import Journal


@dataclass(frozen=True, kw_only=True, slots=True)
class Workplace:
    """The parts of a run's directory."""

    out: Path
    root: Path
    journal: Journal

    @property
    def checkpoint(self) -> Path:
        """What becomes the output."""
        return self.root / "checkpoint"

    @property
    def values(self) -> Path:
        """For values between subgraphs."""
        return self.root / "values"

    @property
    def written_bytes(self) -> int:
        """What the checkpoint takes on disk already."""
        return sum(path.stat().st_blocks * 512 for path in self.checkpoint.iterdir())

    def begin(self, identity: Mapping[str, str]) -> None:
        """Write down which run this is, or refuse to go on with another one.

        Raises:
            OutputError: naming what differs.
        """
        import torch

        from runtime.host.half_precision import names_of_slow_halves

        if self.journal.entries:
            self.journal.require_same_run(identity)
        for folder in (self.checkpoint, self.values):
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
            if path.suffix != ".safetensors":  # half of a file, perhaps; they are all written in the end
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in self.values.iterdir():
            if not path.name.startswith("boundary-"):  # what had no place in the memory of a process that is gone
                path.unlink()

    def publish(self) -> None:
        """Let the checkpoint appear under its name.

        Raises:
            OutputError: when something has come to be there meanwhile.
        """
        flush_tree(self.checkpoint)
        put_in_place(self.checkpoint, self.out)


@contextlib.contextmanager
def open_workplace(out: Path, *, resume: bool, identity: Mapping[str, str]) -> Iterator[Workplace]:
    """Work on an output that nobody else works on.

    Args:
        out: where the checkpoint will be.
        resume: go on with what an interrupted run has left, if there is anything.
        identity: everything that decides the bytes of the result, by name.

    Raises:
        OutputError: when `out` is taken, another process works on it, an interrupted run would be lost, or is another
            one than this.
    """
    require_free(out)
    root = out.parent.resolve() / f".{out.name}.run.partial"
    _require_plain(root)
    with disk_errors(out, lambda: _what_is_left(out)), _locked(root, out):
        count = num_finished(out)
        if count and not resume:
            raise OutputError(
                f"an interrupted run has left {_subgraphs(count)} of {out}",
                hint=f"go on with --resume, or remove {root} to start anew",
            )
        if not count:
            _clear(root)
        place = Workplace(out=out, root=root, journal=Journal(root / journal.NAME))
        try:
            place.begin(identity)
            yield place
        except BaseException as error:
            if not _is_worth_keeping(place.journal, error):
                shutil.rmtree(root, ignore_errors=True)
            elif not isinstance(error, SeqbuildError):
                tell_when_stopped(_what_is_left(out))
            elif error.is_resumable:
                error.hint = "; ".join(part for part in (error.hint, _what_is_left(out)) if part)
            raise
        finally:
            place.journal.close()
        shutil.rmtree(root, ignore_errors=True)


def _require_plain(root: Path) -> None:
    """Refuse a directory that another hand has prepared: through a link in it, a run would empty or overwrite what lies
    elsewhere.

    Raises:
        OutputError: naming what is no plain file or directory.
    """
    pending = [root]
    while pending:
        path = pending.pop()
        try:
            status = path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        is_directory = stat.S_ISDIR(status.st_mode)
        if not is_directory and (not stat.S_ISREG(status.st_mode) or status.st_nlink > 1 or path == root):
            raise OutputError(
                f"{path} is not what a run leaves behind: it is a link or a special file",
                hint=f"see where it comes from, and remove {root} to start anew",
            )
        if is_directory:
            pending.extend(path.iterdir())


def _what_is_left(out: Path) -> str:
    count = num_finished(out)
    if not count:
        return "nothing was left behind"
    return f"{_subgraphs(count)} {'is' if count == 1 else 'are'} kept: go on with --resume"


def _subgraphs(count: int) -> str:
    return f"{count} finished subgraph{'' if count == 1 else 's'}"


def require_unfinished(out: Path) -> None:
    """Refuse to resume what has come to its end.

    Raises:
        OutputError: saying so.
    """
    if (out / "config.json").is_file():
        raise OutputError(f"{out} is there and whole", hint="there is nothing to resume")


def num_finished(out: Path) -> int:
    """How many subgraphs the interrupted run of an output has finished; 0 where there is none."""
    root = out.parent.resolve() / f".{out.name}.run.partial"
    if not (root / "checkpoint").is_dir():
        return 0  # published, but killed before it could clear up
    return sum(entry["kind"] == journal.STEP for entry in journal.read(root / journal.NAME))


@contextlib.contextmanager
def _locked(root: Path, out: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    root.mkdir(parents=True, exist_ok=True)
    lock = FileLock(root / "lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise OutputError(
            f"another run is working on {out}", hint="wait for it, or choose another output directory"
        ) from error
    try:
        yield
    finally:
        lock.release()
        with contextlib.suppress(OSError):
            (root / "lock").unlink(missing_ok=True)


def _clear(root: Path) -> None:
    for path in root.iterdir():
        if path.name == "lock":
            continue
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _is_worth_keeping(found: Journal, error: BaseException) -> bool:
    """Whether going on could come further than this run did."""
    if not found.of_kind(journal.STEP):
        return False
    if not isinstance(error, SeqbuildError):
        return True
    return error.is_resumable or isinstance(error, (OutputError, MemoryError, RuntimeError))
