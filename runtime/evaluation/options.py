"""The options that every evaluation has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.arguments import require_kind
from runtime.streaming.activations import Budget
from runtime.workers.group import Alone

if TYPE_CHECKING:
    import torch

    from runtime.streaming.events import Watcher
    from runtime.workers.group import Workers

DEFAULT_SAVE_EVERY_S = 300.0


@dataclass(frozen=True, kw_only=True, slots=True)
class PassOptions:
    """Options of an evaluation.

    Attributes:
        device: where subgraphs run.
        dtype: of weights and activations; None for the model's own.
        activation_memory: the memory that values between subgraphs may take; the rest goes to disk.
        out: directory for the results, and until it is complete for what a resumed run needs; None to keep nothing.
        resume: continue an interrupted run of the same `out`, artifact, weights, data and options; the result is the
            same. Begins a new run when there is none.
        save_every_s: save the values between subgraphs if that many seconds have passed since the last time.
        watchers: receive all events of the first worker, see `runtime.streaming.events`.
        workers: the processes that share the batches.
    """

    device: torch.device
    dtype: torch.dtype | None = None
    activation_memory: Budget | None = None
    out: Path | None = None
    resume: bool = False
    save_every_s: float = DEFAULT_SAVE_EVERY_S
    watchers: Sequence[Watcher] = ()
    workers: Workers = field(default_factory=Alone)

    def __post_init__(self) -> None:
        """Reject values of the wrong type.

        Raises:
            UsageError: naming the option.
        """
        require_kind("activation_memory", self.activation_memory, Budget, "it must be a runtime.Budget, in bytes")
