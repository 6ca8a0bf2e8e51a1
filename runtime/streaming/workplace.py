"""The hidden directory beside the output in which a run works until its checkpoint is complete.

    .<output>.run.partial/
      checkpoint/     becomes the output, by one rename
      values/         values between subgraphs that exceed the memory budget, and those saved for a resume
      journal         the finished steps
      lock            held while a process works here

An interrupted run leaves it, so that another process can resume. It is deleted when the run is complete, and when the
run failed for a reason that would make a resumed run fail as well.
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
from runtime.host.publish import disk_errors, flush_one, flush_tree, put_in_place, require_free, require_writable
from runtime.streaming import journal
from runtime.streaming.journal import Journal


@dataclass(frozen=True, kw_only=True, slots=True)
class Workplace:
    """The directory of a run."""

    out: Path
    root: Path
    journal: Journal

    @property
    def checkpoint(self) -> Path:
        """The directory that becomes the output."""
        return self.root / "checkpoint"

    @property
    def values(self) -> Path:
        """The directory for values between subgraphs."""
        return self.root / "values"

    @property
    def written_bytes(self) -> int:
        """Size on disk of the checkpoint so far."""
        return sum(path.stat().st_blocks * 512 for path in self.checkpoint.iterdir())

    def begin(self, identity: Mapping[str, str]) -> None:
        """Record the identity of a new run, or check that of a resumed one.

        Raises:
            OutputError: naming the ingredients that differ.
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
            if path.suffix != ".safetensors":  # perhaps incomplete; these are written at the end
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in self.values.iterdir():
            if not path.name.startswith("boundary-"):  # values of an earlier process that exceeded its budget
                path.unlink()

    def publish(self) -> None:
        """Rename the checkpoint to its final name.

        Raises:
            OutputError: when the output directory was filled meanwhile.
        """
        flush_tree(self.checkpoint)
        self.out.parent.mkdir(parents=True, exist_ok=True)  # of new/../out, only the directory of the run exists
        put_in_place(self.checkpoint, self.out)


@contextlib.contextmanager
def open_workplace(out: Path, *, resume: bool, identity: Mapping[str, str]) -> Iterator[Workplace]:
    """Lock the directory of a run while the block runs.

    Args:
        out: the output directory.
        resume: continue an interrupted run, if there is one.
        identity: everything that decides the bytes of the result, by name.

    Raises:
        OutputError: when `out` is not free, another process works on it, or an interrupted run would be lost or has
            another identity.
    """
    require_free(out)
    root = _root_of(out)
    _require_plain(root)
    with disk_errors(out, lambda: _what_is_left(out)), _locked(root, out):
        if not _require_resumed(out, resume=resume):
            _clear(root)
        place = Workplace(out=out, root=root, journal=Journal(root / journal.NAME))
        try:
            place.begin(identity)
            yield place
        except BaseException as error:
            if _is_published(out):
                shutil.rmtree(root, ignore_errors=True)
                tell_when_stopped(f"output directory {out} is complete")
            elif not _is_worth_keeping(place.journal, error):
                shutil.rmtree(root, ignore_errors=True)
            elif not isinstance(error, SeqbuildError):
                tell_when_stopped(_what_is_left(out))
            elif error.is_resumable:
                error.hint = "; ".join(part for part in (error.hint, _what_is_left(out)) if part)
            raise
        finally:
            place.journal.close()
        shutil.rmtree(root, ignore_errors=True)


def require_startable(out: Path, *, resume: bool) -> None:
    """Reject an output that no run can begin or continue, before its inputs are prepared.

    Raises:
        OutputError: as `require_unfinished` and `open_workplace`.
    """
    if resume:
        require_unfinished(out)
    require_free(out)
    require_writable(out)
    root = _root_of(out)
    if root.is_dir():
        _require_plain(root)
        with disk_errors(out), _locked(root, out):
            _require_resumed(out, resume=resume)


def _require_resumed(out: Path, *, resume: bool) -> int:
    """Require `resume` for an output with finished subgraphs of an interrupted run, and return their number."""
    count = num_finished(out)
    if count and not resume:
        raise OutputError(
            f"an interrupted run has left {_subgraphs(count)} of {out}",
            hint=f"continue it with --resume, or remove {_root_of(out)} to start again",
        )
    return count


def _root_of(out: Path) -> Path:
    return out.parent.resolve() / f".{out.name}.run.partial"


def _is_published(out: Path) -> bool:
    """Whether the checkpoint was renamed to the output, so that nothing remains to be resumed."""
    return (out / "config.json").is_file() and not (_root_of(out) / "checkpoint").exists()


def _require_plain(root: Path) -> None:
    """Reject a directory that contains links or special files: a run would delete or overwrite files elsewhere.

    Raises:
        OutputError: naming the first one.
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
                f"{path} is a link or a special file, which no run creates",
                hint=f"check where it comes from, and remove {root} to start again",
            )
        if is_directory:
            pending.extend(path.iterdir())


def _what_is_left(out: Path) -> str:
    count = num_finished(out)
    if not count:
        return "nothing was left behind"
    return f"{_subgraphs(count)} {'is' if count == 1 else 'are'} kept, continue with --resume"


def _subgraphs(count: int) -> str:
    return f"{count} finished subgraph{'' if count == 1 else 's'}"


def require_unfinished(out: Path) -> None:
    """Reject an output that is complete.

    A run that was killed after it had published the output left its directory behind; that is removed.

    Raises:
        OutputError: naming it.
    """
    if (out / "config.json").is_file():
        root = _root_of(out)
        if root.is_dir() and _is_published(out):
            _require_plain(root)
            with _locked(root, out):
                shutil.rmtree(root, ignore_errors=True)
        raise OutputError(
            f"output directory {out} is already complete; nothing to resume",
            hint="seqbuild evaluate measures its perplexity",
        )


def num_finished(out: Path) -> int:
    """Number of subgraphs that an interrupted run of an output has finished; 0 without one."""
    root = _root_of(out)
    if not (root / "checkpoint").is_dir():
        return 0  # killed after it was published
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
            f"another run is writing {out}", hint="wait for it, or choose another output directory"
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
    """Whether a resumed run could finish more steps than this one."""
    if not found.of_kind(journal.STEP):
        return False
    if not isinstance(error, SeqbuildError):
        return True
    return error.is_resumable or isinstance(error, (OutputError, MemoryError, RuntimeError))
