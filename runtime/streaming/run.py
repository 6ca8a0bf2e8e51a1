"""Run all subgraphs of a calibration; recover from an interruption, and from a lack of memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from runtime.data.masks import token_mask
from runtime.errors import RecipeError
from runtime.host.half_precision import names_of_slow_halves
from runtime.host.limits import peak_host_bytes
from runtime.host.memory import (
    OutOfMemory,
    give_memory_back,
    is_out_of_memory,
    peak_device_bytes,
    trim_heap,
)
from runtime.streaming import journal
from runtime.streaming.activations import DEVICE, Activations
from runtime.streaming.committer import Committer
from runtime.streaming.events import QUANTIZE, READ, WRITE
from runtime.streaming.graph_replay import GraphReplay
from runtime.streaming.passes import Passes
from runtime.streaming.replay import Written, run_again
from runtime.streaming.report import ModuleReport
from runtime.streaming.saved_values import load_boundary
from runtime.streaming.work import Work
from runtime.weights.parameters import assign, unload
from runtime.weights.stream import WeightStream
from runtime.workers.agreement import agreed, is_shared

if TYPE_CHECKING:
    from runtime.chain import Artifact
    from runtime.checkpoint.writer import ShardWriter
    from runtime.data.lanes import Lanes
    from runtime.recipe.recipe import Assignment
    from runtime.streaming.committer import Alongside
    from runtime.streaming.events import Watchers
    from runtime.streaming.options import RunOptions
    from runtime.streaming.schedule import Schedule, Step
    from runtime.streaming.work import SavedStatistics, StepModifier
    from runtime.streaming.workplace import Workplace
    from runtime.weights.parameters import Weights
    from runtime.workers.group import Workers


@dataclass(kw_only=True)
class StreamingRun:
    """One run over all subgraphs.

    Attributes:
        lanes: the model's inputs; this worker runs those of its own lanes.
        alongside: work that is done beside the run.
        kept: changed parameters that later steps run with.
        is_behind: whether batches are still at the model's inputs, and must be brought to the next step.
        graphs: see `Passes`.
        plan: the facts of the event that follows `begin`.
        saved_of: returns the saved statistics of a step, from which it is solved without batches; None to measure.
    """

    artifact: Artifact
    model: nn.Module
    source: Weights
    jobs: dict[str, Assignment]
    modifiers: Sequence[StepModifier]
    schedule: Schedule
    lanes: Lanes
    writer: ShardWriter
    workplace: Workplace
    options: RunOptions
    watch: Watchers
    workers: Workers
    alongside: Alongside
    plan: Mapping[str, Any] = field(default_factory=dict)
    saved_of: Callable[[int], SavedStatistics] | None = None
    reports: list[ModuleReport] = field(default_factory=list)
    kept: dict[str, torch.Tensor] = field(default_factory=dict)
    is_behind: bool = True
    graphs: GraphReplay | None = None
    passes: Passes = field(init=False)
    stream: WeightStream = field(init=False)
    committer: Committer = field(init=False)
    written: Written = field(init=False)

    def execute(self) -> int:
        """Run all steps, then copy the checkpoint tensors that no subgraph uses.

        Returns:
            How many steps an earlier process had finished.
        """
        first = len(self.workplace.journal.of_kind(journal.STEP))
        remaining = self.schedule.steps[first:]
        loads = {step.index: step.loads for step in remaining}
        self.written = Written(
            schedule=self.schedule,
            source=self.source,
            writer=self.writer,
            jobs=self.jobs,
            device=self.options.device,
        )
        if self.options.cuda_graphs:
            self.graphs = GraphReplay(self.options.device, lambda text: self.watch.tell("warning", text=text))
        with ExitStack() as stack:
            stack.callback(self.writer.close)
            stack.callback(self._forget_activations)
            self.committer = stack.enter_context(
                Committer(self.writer, self.workplace, self.options.checkpoint_activations, self.watch, self.alongside)
            )
            self.stream = stack.enter_context(
                WeightStream(self.source, loads, self.options.device, self._write_unchanged)
            )
            self._resume(first)
            for step in remaining:
                self._run_step(step)
            if self.schedule.rest:
                facts = {"index": len(self.schedule.steps) - 1, "label": "tensors outside of all subgraphs"}
                self.watch.tell("phase", **facts, phase=WRITE)
            with agreed(self.workers):
                for stored in self.schedule.rest:
                    self._pass_through(stored.name)
            self.committer.wait()
            self.writer.finish()
        return first

    def _forget_activations(self) -> None:
        if hasattr(self, "passes"):  # missing if the run could not be resumed
            self.passes.activations.close()

    def _run_step(self, step: Step) -> None:
        """Run one step, with smaller batches for as long as it runs out of memory."""
        is_retry = False
        while True:
            try:
                if self.is_behind:
                    self._rebuild(step.index)
                    self.is_behind = False
                self._attempt(step, is_retry=is_retry)
                return
            except Exception as error:
                if not is_out_of_memory(error) or not is_shared(error, self.workers):
                    raise
                reason = str(error).partition("\n")[0]
            # Outside of the block, so that no traceback refers to the tensors of the attempt.
            unload(self.model, step.subgraph.entry.parameters)
            give_memory_back(self.options.device)
            self._use_less_memory(step, reason)
            is_retry = self.is_behind = True

    def _attempt(self, step: Step, *, is_retry: bool) -> None:
        begin = time.perf_counter()
        bytes_before, sent_before = self.source.checkpoint.bytes_read, self.workers.bytes_sent
        self.passes.begin()
        self._begin_phase(step, READ)
        with agreed(self.workers):
            self.alongside.reach(step.index)
            if is_retry:
                self.stream.reload(self.model, step.index)
            else:
                self.stream.load(self.model, step.index)
        self.watch.tell("load", index=step.index, label=step.label)
        changed = [name for name in step.subgraph.entry.parameters if step.is_run and name in self.kept]
        for name in changed:
            assign(self.model, name, self.kept[name])
        split = self.passes.is_split(step)
        self.passes.originals = {name: self.source.read(name, self.options.device) for name in changed if split}
        if self.passes.splits_after(step) and not step.compares:
            self.passes.carry(step)
        work = self._work(step)
        self._begin_phase(step, QUANTIZE)  # batches that are measured begin a phase of their own
        for modifier in self.modifiers:
            modifier.apply(work)
        if step.goes_on:
            self.passes.go_on(step)
        self._begin_phase(step, WRITE)
        with agreed(self.workers):
            for key in step.passes:
                self._pass_through(key)
        unload(self.model, step.subgraph.entry.parameters)
        trim_heap()
        self.kept = {name: tensor for name, tensor in (self.kept | work.kept).items() if name in step.keeps}
        self.reports += work.reports
        for report in work.reports:
            self.watch.tell("module", index=step.index, **asdict(report))
        for text in work.warnings:
            self.watch.tell("warning", text=text)

        def cost() -> dict[str, Any]:
            return {
                "num_modules": len(work.reports),
                "seconds": time.perf_counter() - begin,
                "tokens": self.passes.num_tokens,
                "bytes_read": self.source.checkpoint.bytes_read - bytes_before,
                "bytes_written": step.num_written_bytes,
                "bytes_sent": self.workers.bytes_sent - sent_before,
                "peak_host_bytes": peak_host_bytes(),
                "peak_device_bytes": peak_device_bytes(self.options.device),
            }

        self.committer.commit(step, work, self.passes.activations, self._places, cost())
        self.watch.tell("subgraph", index=step.index, label=step.label, **cost())
        self.watch.share()

    @property
    def _places(self) -> list[tuple[int, int]]:
        return self.lanes.places(self.workers.rank, self.workers.size)

    @property
    def _batches(self) -> list[dict[str, Any]]:
        return self.lanes.batches(self.workers.rank, self.workers.size)

    def _begin_phase(self, step: Step, phase: str) -> None:
        self.workers.step = f"{step.label} ({phase})"
        self.watch.tell("phase", index=step.index, label=step.label, phase=phase)

    def _work(self, step: Step) -> Work:
        saved = None
        with agreed(self.workers):
            saved = self.saved_of(step.index) if self.saved_of is not None else None
        return Work(
            step=step,
            schedule=self.schedule,
            model=self.model,
            source=self.source,
            writer=self.writer,
            jobs=self.jobs,
            device=self.options.device,
            run_batches=partial(self._measure, step),
            run_first=partial(self.passes.first, step),
            run_original=partial(self.passes.carry, step),
            is_split=self.passes.is_split(step),
            by_hand=partial(self.passes.by_hand, step),
            masks=[token_mask(batch) for batch in self._batches],
            all_tokens=self.options.moe_calibrate_all_experts,
            statistics_bytes=self.options.statistics_memory,
            forgets=self.passes.forgets(step),
            watcher=self.watch,
            workers=self.workers,
            saved=saved,
        )

    def _measure(
        self,
        step: Step,
        before: Callable[[int], None] = lambda batch: None,
        after: Callable[[], None] = lambda: None,
        original: Callable[[int], None] | None = None,
    ) -> None:
        """Run all batches, see `Passes.measure`; the step before is recorded as soon as it is on the disks of all."""
        if self.saved_of is not None:
            raise RecipeError(f"{step.label} cannot be run again without data", hint="pass --data, not --statistics")

        def end_round() -> None:
            after()
            if self.workers.size > 1:  # with one worker, the thread of the committer records it
                self.committer.wait()

        self.passes.measure(step, before, end_round, original)

    def _pass_through(self, key: str) -> None:
        """Copy a tensor of the checkpoint, unless it was written when it was read."""
        if not self.writer.is_written(key):
            self.writer.write_bytes(key, self.source.checks.pieces(key))

    def _write_unchanged(self, key: str, tensor: torch.Tensor) -> None:
        """Write a tensor that was just read, if no step changes it."""
        if key in self._unchanged and not self.writer.is_written(key):
            self.writer.write(key, tensor)

    def _resume(self, first: int) -> None:
        """Take over the finished steps of an earlier process, and announce the rest."""
        log = self.workplace.journal
        steps = self.schedule.steps
        rewritten = {self.source.plain_key(name) for name in self.schedule.rewritten}
        self._unchanged = {key for step in steps for key in step.passes if key not in rewritten}
        for entry in log.entries:
            self.reports += [ModuleReport(**fields) for fields in entry.get("modules", ())]
            self.watch.warnings += entry.get("warnings", ())
        begun = log.of_kind(journal.RUN)[0]
        if begun["threads"] != torch.get_num_threads():
            found = f"started with {begun['threads']} threads and resumed with {torch.get_num_threads()}"
            self.watch.tell("warning", text=f"warning: {found}: the last bits of sums may differ")
        if begun.get("slow_halves", names_of_slow_halves()) != names_of_slow_halves():
            text = "warning: started on another kind of processor: the last bits of sums may differ"
            self.watch.tell("warning", text=text)
        for step in steps[:first]:
            self.writer.take_as_written(stored.name for stored in step.writes)
        self.kept = {name: self.written.read(name) for name in (steps[first - 1].keeps if first else ())}
        for entry in log.of_kind(journal.MICRO_BATCH):
            parts = self.lanes.split(self.artifact.manifest, entry["size"])
            assert parts is not None, "an earlier process has split these batches"
            self.lanes = parts
        self._set_batches()
        self._announce(first)

    def _announce(self, first: int) -> None:
        """Tell watchers the size of the run, and what finished steps have cost."""
        steps, entries = self.schedule.steps, self.workplace.journal.of_kind(journal.STEP)
        everyone = self.lanes.batches()
        num_tokens = sum(map(_num_tokens, everyone))
        self.watch.tell(
            "begin",
            subgraphs=len(steps),
            modules=len(self.jobs),
            batches=len(everyone),
            tokens=num_tokens,
            total_tokens=num_tokens * sum(self.passes.expected(step) for step in steps[first:]),
            resumed_at=first,
            device=str(self.options.device),
            workers=self.workers.size,
        )
        self.watch.tell("plan", **self.plan)
        for step, entry in zip(steps[:first], entries, strict=True):
            if "cost" in entry:
                self.watch.tell("earlier", index=step.index, label=step.label, **entry["cost"])

    def _set_batches(self) -> None:
        taken = {entry.name for entry in self.artifact.manifest.inputs}
        batches = self._batches
        inputs = [{name: value for name, value in batch.items() if name in taken} for batch in batches]
        budget, lasting = self.options.activation_memory, self.schedule.lasting
        self.passes = Passes(
            model=self.model,
            activations=Activations(inputs, self.options.device, budget, self.workplace.values, lasting),
            jobs=self.jobs,
            propagate_error=self.options.propagate_error,
            watcher=self.watch,
            tokens=[_num_tokens(batch) for batch in batches],
            rounds=self.lanes.rounds(self.workers.rank, self.workers.size),
            workers=self.workers,
            graphs=self.graphs,
        )

    def _rebuild(self, index: int) -> None:
        """Bring the batches to the step `index`, from the model's inputs or from the last saved values."""
        if index >= len(self.schedule.steps) or not self.schedule.steps[index].is_run:
            return
        begin = 0
        saved = self.committer.last_saved(index, self._places)
        if saved is not None:
            with agreed(self.workers):
                load_boundary(self.passes.activations, self.workplace.saved, saved, self._places)
            begin = saved + 1
        run_again(self.schedule.steps[begin:index], self.passes, self.written)

    def _use_less_memory(self, step: Step, reason: str) -> None:
        """Move values off the device, or else halve the largest batch; the batches start again at the model's inputs.

        Raises:
            OutOfMemory: when the largest batch has one sample, or memory ran out while no batch was running.
        """
        manifest = self.artifact.manifest
        activations = self.passes.activations
        own = {"is_on_device": bool(activations.used_bytes[DEVICE]), "is_running": self.passes.is_running}
        known = self.workers.exchange(own)
        if any(facts["is_on_device"] for facts in known):
            self.watch.tell("warning", text=f"warning: out of memory in {step.label}: activations leave the device")
            self.options = replace(self.options, activation_memory=replace(activations.budget, device_bytes=0))
            activations.close()
            self._set_batches()
            return
        size = self.lanes.largest(manifest)
        half = -(-size // 2)
        is_batch = any(facts["is_running"] for facts in known)
        parts = self.lanes.split(manifest, half) if is_batch and size > 1 else None
        if parts is None:
            what = "one sample at a time" if is_batch else "its weights and statistics"
            raise OutOfMemory(
                f"out of memory in {step.label} with {what}: {reason}",
                hint="lower --batch-size or --seq-len, or use a device with more memory",
            )
        samples = f"{half} sample{'' if half == 1 else 's'}"
        text = f"warning: out of memory in {step.label}: from here on {samples} at a time"
        self.watch.tell("warning", text=text)
        self.committer.record(journal.MICRO_BATCH, size=half, at=step.index, warnings=[text])
        self.lanes = parts
        activations.close()
        self._set_batches()


def _num_tokens(batch: Mapping[str, Any]) -> int:
    """The size of a batch's first input: its number of tokens, in a model of text."""
    first = next((value for value in batch.values() if isinstance(value, torch.Tensor)), None)
    return first.numel() if first is not None else 0
