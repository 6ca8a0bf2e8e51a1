"""Check where the output of a run will appear, and what an interrupted run has left beside it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.checkpoint.writer import PART_NAME
from runtime.errors import OutputError
from runtime.host.publish import disk_errors, require_free, require_writable
from runtime.streaming import journal
from runtime.workers.agreement import agreed
from runtime.workers.group import Alone

if TYPE_CHECKING:
    from runtime.workers.group import Workers


_VISIBLE_S = 30.0  # after which a network file system shows what another host has created
RESULTS_NAME = "results.json"  # of an evaluation


def part_path(out: Path, workers: Workers) -> Path:
    """The directory of a worker's part of an output."""
    return out.parent / f"{out.name}.part-{workers.rank}-of-{workers.size}"


def require_startable(out: Path, *, resume: bool, workers: Workers | None = None, parts: bool = False) -> None:
    """Reject an output that no run can begin or continue, before its inputs are prepared.

    Raises:
        OutputError: as `require_unfinished` and `open_workplace`.
    """
    workers = workers or Alone()
    require_place(out, resume=resume, workers=workers, parts=parts)
    out = part_path(out, workers) if parts else out
    with agreed(workers):
        if parts or not workers.rank:
            require_writable(out)
            root = root_of(out)
            if root.is_dir():
                require_plain(root)
                with disk_errors(out), locked(root, out):
                    require_resumed(out, resume=resume)


def require_place(out: Path, *, resume: bool, workers: Workers, parts: bool) -> None:
    """Require an output that does not exist, or a part that must wait for those of other workers.

    Raises:
        OutputError: naming the directory that exists, or an interrupted run with another number of parts.
    """
    place = part_path(out, workers) if parts else out
    are_complete = workers.exchange(is_complete(place)) if parts else [True]
    with agreed(workers):
        if parts:
            _require_same_division(out, workers)
        if not parts and workers.rank:
            return
        if resume and not all(are_complete) and is_published(place) and (root_of(place) / journal.NAME).is_file():
            return
        if resume:
            require_unfinished(place)
        require_free(place)


def _require_same_division(out: Path, workers: Workers) -> None:
    """Reject an output with parts of an interrupted run that had another number of workers."""
    name = re.compile(rf"\.({re.escape(out.name)}\.part-[0-9]+-of-([0-9]+))\.run\.partial")
    parent = out.parent.resolve()
    for path in sorted(parent.iterdir()) if parent.is_dir() else ():
        found = name.fullmatch(path.name)
        if found and int(found[2]) != workers.size and num_finished(parent / found[1]):
            raise OutputError(
                f"an interrupted run of {found[2]} workers has left parts of {out}, and this run has {workers.size}",
                hint=f"continue it with --resume and {found[2]} workers, or remove {path} to start again",
            )


def require_resumed(out: Path, *, resume: bool) -> int:
    """Require `resume` for an output with finished subgraphs of an interrupted run, and return their number."""
    count = num_finished(out)
    if count and not resume:
        raise OutputError(
            f"an interrupted run has left {_finished(count, unit_of(out))} of {out}",
            hint=f"continue it with --resume, or remove {root_of(out)} to start again",
        )
    return count


def root_of(out: Path) -> Path:
    """The hidden directory of a run beside its output."""
    return out.parent.resolve() / f".{out.name}.run.partial"


def is_published(out: Path) -> bool:
    """Whether the checkpoint was renamed to the output, so that nothing remains to be resumed."""
    return is_complete(out) and not (root_of(out) / "checkpoint").exists()


def is_complete(out: Path) -> bool:
    """Whether a directory has the file that is written last: of a checkpoint, a part, or an evaluation."""
    return any((out / name).is_file() for name in ("config.json", PART_NAME, RESULTS_NAME))


def require_plain(root: Path) -> None:
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


def require_visible(root: Path, name: str) -> None:
    """Wait for a file of worker 0 to appear: network file systems cache that a name did not exist.

    Raises:
        OutputError: the directory is not shared.
    """
    end = time.monotonic() + _VISIBLE_S
    while not root.is_dir() or name not in os.listdir(root):
        if time.monotonic() > end:
            raise OutputError(
                f"{socket.gethostname()} does not see the directory {root} of worker 0",
                hint="choose an output directory that all hosts share, or pass --parts",
            )
        time.sleep(0.05)


def what_is_left(count: int, unit: str) -> str:
    """Say how many finished subgraphs, or other units, an interrupted run leaves."""
    if not count:
        return "nothing was left behind"
    return f"{_finished(count, unit)} {'is' if count == 1 else 'are'} kept, continue with --resume"


def _finished(count: int, unit: str) -> str:
    return f"{count} finished {unit}{'' if count == 1 else 's'}"


def unit_of(out: Path) -> str:
    """What an interrupted run of an output finishes one after the other."""
    return journal.unit_of(journal.read(root_of(out) / journal.NAME))


def require_unfinished(out: Path) -> None:
    """Reject an output that is complete.

    A run that was killed after it had published the output left its directory behind; that is removed.

    Raises:
        OutputError: naming it.
    """
    if is_complete(out):
        root = root_of(out)
        if root.is_dir() and is_published(out):
            require_plain(root)
            with locked(root, out):
                shutil.rmtree(root, ignore_errors=True)
        raise OutputError(
            f"output directory {out} is already complete; nothing to resume",
            hint="join makes the checkpoint of all parts; remove this one to write them again"
            if (out / PART_NAME).is_file()
            else f"the results are in {RESULTS_NAME}"
            if (out / RESULTS_NAME).is_file()
            else "seqbuild evaluate measures its perplexity",
        )


def num_finished(out: Path) -> int:
    """Number of subgraphs that an interrupted run of an output has finished; 0 without one."""
    root = root_of(out)
    if not (root / "checkpoint").is_dir():
        return 0  # killed after it was published
    return sum(entry["kind"] == journal.STEP for entry in journal.read(root / journal.NAME))


@contextlib.contextmanager
def locked(root: Path, out: Path) -> Iterator[None]:
    """Lock the directory of a run, which is created if missing.

    Raises:
        OutputError: when another process has locked it.
    """
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


def clear(root: Path) -> None:
    """Remove everything but the lock from the directory of a run."""
    for path in root.iterdir():
        if path.name != "lock":
            remove(path)


def remove(path: Path) -> None:
    """Remove a file or a directory."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()
