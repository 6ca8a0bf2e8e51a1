"""Open the checkpoints of an evaluation, compare what the workers were given, and keep the results."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from runtime.checkpoint.dequantize import as_weights, open_checkpoint
from runtime.evaluation.logits import LogitsPass, Take
from runtime.evaluation.progress import SavedProgress
from runtime.host.memory import OWN_THREADS, require_threads
from runtime.host.publish import flush_one
from runtime.quantize.preparation import prepare
from runtime.status import doing
from runtime.streaming.events import Watchers
from runtime.streaming.identity import run_identity
from runtime.streaming.output_place import RESULTS_NAME
from runtime.streaming.workplace import open_workplace
from runtime.workers.agreement import agreed
from runtime.workers.comparison import FILE_TIMES, require_same

if TYPE_CHECKING:
    from runtime.chain import Artifact
    from runtime.evaluation.options import PassOptions
    from runtime.quantize.preparation import Prepared
    from runtime.streaming.workplace import Workplace

Run = Callable[[Take], list[Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """Takes the results of an evaluation.

    Attributes:
        num_bytes: the size of each checkpoint on disk.
        place: where the results are written; None if they are not kept.
    """

    num_bytes: Sequence[int]
    place: Workplace | None

    def write(self, facts: Mapping[str, Any], others: Mapping[str, str] | None = None) -> None:
        """Write results.json and other texts, and publish them as the output directory."""
        if self.place is None:
            return
        with agreed(self.place.workers):
            if self.place.leads:
                texts = {**(others or {}), RESULTS_NAME: json.dumps(facts, indent=2, ensure_ascii=False) + "\n"}
                for name, text in texts.items():
                    path = self.place.checkpoint / name
                    path.write_text(text, encoding="utf-8")
                    flush_one(path)
        self.place.publish()


@contextmanager
def opened(
    artifact: Artifact,
    weights: Sequence[Any],
    batches: Sequence[Mapping[str, torch.Tensor]],
    options: PassOptions,
    progress: Callable[[str], None],
    identity: Mapping[str, str] | None = None,
) -> Iterator[tuple[Run, Results]]:
    """Prepare an evaluation, and yield the function that runs it and what takes its results.

    Args:
        artifact: the compiled model.
        weights: the directory or the hub id of each checkpoint, or an open one.
        batches: the model's inputs.
        options: of the evaluation.
        progress: called with a line for each warning and each subgraph.
        identity: what decides the results besides artifact, weights, batches, dtype and device.

    Raises:
        WorkerError: when another worker has failed, or has other weights or data.
        WeightsError: when a checkpoint does not fit the artifact.
        OutputError: when the output cannot be written, or an interrupted run differs from this one.
    """
    given = [as_weights(one) for one in weights]
    require_threads(torch.get_num_threads() - 1 + OWN_THREADS)
    run_dtype, workers = artifact.run_dtype(options.dtype), options.workers
    doing("checking the weights")
    sides = [prepare(artifact, open_checkpoint(one), None, run_dtype, options.device) for one in given]
    for side in sides:
        side.weights.checks.require_outside()
    facts = {"dtype": run_dtype, "device": options.device.type, **(identity or {})}
    watch = Watchers([] if workers.rank else [_LabelLines(progress), *options.watchers], workers)
    for remark in dict.fromkeys(remark for side in sides for remark in side.weights.remarks):
        watch.tell("warning", text=remark)
    with ExitStack() as stack:
        place = None
        if workers.size > 1 or options.out is not None:
            workers.step = "the comparison of the workers"
            with agreed(workers):
                whole = _identity(sides, batches, facts)
            for warning in require_same(workers, whole, options.device):
                watch.tell("warning", text=warning)
            if options.out is not None:
                made = open_workplace(options.out, resume=options.resume, identity=whole, workers=workers)
                place = stack.enter_context(made)
        run = LogitsPass(
            sides=sides,
            batches=batches,
            device=options.device,
            workers=workers,
            watch=watch,
            budget=options.activation_memory,
            saved=None if place is None else SavedProgress(place, options.save_every_s, watch),
        )
        yield run.run, Results(num_bytes=[side.weights.checkpoint.total_bytes for side in sides], place=place)


def _identity(
    sides: Sequence[Prepared], batches: Sequence[Mapping[str, torch.Tensor]], facts: Mapping[str, Any]
) -> dict[str, str]:
    """Everything that decides the results, by name."""
    first, *others = (
        run_identity(
            artifact=side.artifact, checkpoint=side.weights.checkpoint, recipe=None, batches=batches, options=facts
        )
        for side in sides
    )
    for other in others:  # of another checkpoint; the first word of the times is the host
        first["compared weights"] = other["checkpoint"]
        first[FILE_TIMES] += " " + other[FILE_TIMES].partition(" ")[2]
    return first


class _LabelLines:
    """Prints warnings, and the label of each finished subgraph.

    Args:
        say: prints a line.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self._count = 0

    def tell(self, event: str, **facts: Any) -> None:
        """Receive an event."""
        if event == "begin":
            self._count = facts["subgraphs"]
        elif event == "warning":
            self.say(facts["text"])
        elif event == "subgraph" and not facts["rank"]:
            self.say(f"[{facts['index'] + 1}/{self._count}] {facts['label']}")
