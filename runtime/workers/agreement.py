"""Let all workers leave a section of work in the same way: with success, or with an error of one of them."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from runtime.errors import OutputError, SeqbuildError, WorkerError
from runtime.workers.group import Workers

if TYPE_CHECKING:
    import torch

_IS_SHARED = "is_shared_by_all_workers"  # an attribute of errors


@contextlib.contextmanager
def agreed(workers: Workers) -> Iterator[None]:
    """Run a block that exchanges nothing, then raise on every worker if it failed on any.

    The worker that failed raises its own error, and the others one that names the worker. If all that happened is that
    memory ran out on some workers, then `runtime.host.memory.is_out_of_memory` is true of the error of each.

    Raises:
        WorkerError: when another worker has failed.
        torch.OutOfMemoryError: when only the memory of another worker ran out.
    """
    if workers.size == 1:
        yield
        return
    try:
        yield
    except Exception as error:
        others: WorkerError | torch.OutOfMemoryError | None = None
        with contextlib.suppress(WorkerError):  # the own error is the better one to report
            others = _error_of_another(workers, workers.exchange(_facts(workers, error)))
            setattr(error, _IS_SHARED, True)
        if others is not None:
            raise others from error
        raise
    failed = _error_of_another(workers, workers.exchange(None))
    if failed is not None:
        raise failed


def is_shared(error: BaseException, workers: Workers) -> bool:
    """Whether all workers have left a block of `agreed` with this error or one like it, so that all can recover.

    After any other error, the other workers wait for messages that this one does not send.
    """
    return workers.size == 1 or getattr(error, _IS_SHARED, False)


def described(error: BaseException) -> str:
    """Describe an error of a worker to the others: the message of a user error, and the type of any other."""
    text = " ".join(str(error).split())
    return text if isinstance(error, SeqbuildError) else f"{type(error).__name__}: {text}"


def is_worth_resuming(error: BaseException) -> bool:
    """Whether a resumed run could get further than the one that this error ended."""
    if not isinstance(error, SeqbuildError):
        return True
    return error.is_resumable or isinstance(error, (OutputError, MemoryError, RuntimeError))


def _facts(workers: Workers, error: Exception) -> dict[str, Any]:
    from runtime.host.memory import is_out_of_memory

    return {
        "host": socket.gethostname(),
        "step": workers.step,
        "message": described(error),
        "is_memory": is_out_of_memory(error),
        "is_resumable": is_worth_resuming(error),
    }


def _error_of_another(
    workers: Workers, statuses: list[Mapping[str, Any] | None]
) -> WorkerError | torch.OutOfMemoryError | None:
    """Return the error that this worker raises because another one failed; None if it raises its own or no error."""
    failed = {rank: status for rank, status in enumerate(statuses) if status is not None}
    for rank, status in failed.items():
        if not (isinstance(status, Mapping) and "is_memory" in status):
            text = f"worker {rank} does something else than worker {workers.rank}"
            raise WorkerError(text, hint="all workers must make the same calls with the same arguments")
    # A lack of memory can be recovered from, so that all workers must take any other error more seriously.
    serious = {rank: status for rank, status in failed.items() if not status["is_memory"]} or failed
    if not serious or workers.rank in serious:
        return None
    rank, status = next(iter(serious.items()))
    text = stopped_text(rank, status["host"], status["step"], status["message"])
    if status["is_memory"]:
        import torch

        lack = torch.OutOfMemoryError(text)
        setattr(lack, _IS_SHARED, True)
        return lack
    return WorkerError(text, is_resumable=status["is_resumable"])


def stopped_text(rank: int, host: str, step: str, message: str) -> str:
    """Say that a worker stopped because of an error."""
    return f"worker {rank} on {host} stopped{f' in {step}' if step else ''}: {message}"
