"""Tune the rounding of a step's modules by gradients of its block's output, as AutoRound does.

remember   run the block with its original weights, and keep its outputs; find the modules that gradients reach
start      round each module to nearest, or quantize it by GPTQ, whichever gives the block the smaller error
descend    steps of gradient descent on some batches each
choose     the last state, the best one of the steps, or the start, by the error on all batches

The result is packed by `runtime.quantize.solves` as that of any algorithm. A module that gradients do not reach is
tuned alone, by the Gram matrix of its inputs: those of a step without a block (a head), of a block whose code cannot
pass gradients, and of experts that few tokens reach, whose gradients would say little about other tokens.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from runtime.errors import ArtifactError, RecipeError
from runtime.formats.rounded_inputs import input_quantization, set_input_parts
from runtime.host.memory import is_out_of_memory
from runtime.quantize.block_forward import TunedBlock, floating, multiplies_bfloat16, opened, squared_error
from runtime.quantize.proof import assigned
from runtime.quantize.rounding import GlobalScales
from runtime.quantize.tuned_module import TunedModule
from runtime.quantize.tuning_starts import Starts
from runtime.recipe.modifiers import AutoRoundOptions

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme
    from torch import nn

    from runtime.algorithms.auto_round import TunedWeight, TuningState
    from runtime.algorithms.result import QuantizedWeight
    from runtime.quantize.rounding import Rounding
    from runtime.quantize.smoothing import Rescaled
    from runtime.quantize.statistics import InputStatistics
    from runtime.recipe.recipe import Assignment, Recipe
    from runtime.streaming.work import Work

AUTO_ROUND = "auto_round"
InputParts = Callable[[str, "InputStatistics", torch.dtype], "dict[str, torch.Tensor]"]


@dataclass(kw_only=True)
class StepTuning:
    """The tuning of a step's modules.

    Attributes:
        work: the step.
        names: the modules.
        options: of the tuning.
        experts: the mixture and the number of each module of an expert.
        alone: the modules that gradients of the block do not tune, and why.
        places: the floating point outputs that depend on the weights.
        targets: these outputs of the original block, by batch.
        idle: the modules that no gradient has reached in any step.
        mixed: whether gradients are computed with products in bf16.
    """

    work: Work
    names: Sequence[str]
    options: AutoRoundOptions
    experts: Mapping[str, tuple[str, int]]
    alone: dict[str, str] = field(default_factory=dict)
    places: tuple[int, ...] = ()
    targets: list[list[torch.Tensor]] = field(default_factory=list)
    idle: dict[str, None] = field(default_factory=dict)
    mixed: bool = False

    @cached_property
    def own_experts(self) -> dict[tuple[str, int], None]:
        """The experts with modules that are tuned, by mixture and number."""
        return dict.fromkeys(self.experts[name] for name in self.names if name in self.experts)

    def holds(self, name: str) -> bool:
        """Whether a module's statistics stay in memory until the step is tuned: it is of an expert that is tuned."""
        return name in self.experts and self.experts[name] in self.own_experts

    def remember(self) -> None:
        """Keep the outputs of the block, before any of its weights is changed."""
        step = self.work.step
        if not self.names or not self.options.iters:
            self.alone = dict.fromkeys(self.names, "")
            return
        if step.subgraph.entry.targets:
            with opened(self.work, self.names, self.work.weight) as block:
                reason = self._probe(block)
                if reason:
                    self.work.warnings.append(f"warning: {step.label}: each module is tuned alone: {reason}")
                    self.alone, self.places = dict.fromkeys(self.names, reason), ()
                else:
                    self._keep_outputs(block)
        else:
            self.alone = dict.fromkeys(self.names, "its step has no block")
        if self.work.is_split and (self.places or step.carries):
            self.targets.clear()
            self.work.run_original(self._keep)

    def _probe(self, block: TunedBlock) -> str:
        """Find what gradients reach, and whether products in bf16 work; return why gradients cannot be used, or ""."""
        reason = self._unreached(block)
        if not reason and self.options.amp and multiplies_bfloat16(self.work.device):
            found = dict(self.alone), self.places
            self.mixed = True
            # The code of a module may combine dtypes that autocast leaves different.
            if self._unreached(block):
                self.mixed, (self.alone, self.places) = False, found
        return reason

    def _unreached(self, block: TunedBlock) -> str:
        """Run a batch with gradients, and find what they reach; return why they cannot be used, or ""."""
        self.alone.clear()
        for weight in block.weights.values():
            weight.grad = None
        try:
            with torch.enable_grad():
                outputs = block.outputs(0, mixed=self.mixed)
                self.places = tuple(place for place, output in enumerate(outputs) if output.requires_grad)
                if self.places:
                    torch.autograd.backward([outputs[place].square().sum() for place in self.places])
        except (ArtifactError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            return f"its code cannot pass gradients ({' '.join(str(error).split())[:200]})"
        if not self.places:
            return "its outputs do not depend on its weights by operators with gradients"
        for name, weight in block.weights.items():
            if weight.grad is None and name not in self.experts:
                self.alone[name] = "gradients of its block do not reach it"
            elif weight.grad is not None and not bool(torch.isfinite(weight.grad).all()):
                return "its gradients are not finite"
            weight.grad = None
        return ""

    def _keep_outputs(self, block: TunedBlock) -> None:
        experts = [name for name in self.names if name in self.experts]
        with _tokens_of(self.work, experts) as counts, torch.no_grad():
            for batch in range(block.num_batches if experts or not self.work.is_split else 0):
                self._keep(batch, {}, block.outputs(batch))
        for name in experts:
            if counts[name] < block.weights[name].shape[1]:
                self.alone[name] = f"{counts[name]} tokens are routed to it, fewer than it has input features"

    def _keep(self, batch: int, inputs: Mapping[str, Any], outputs: Any) -> None:
        """Keep the outputs of the next batch as its targets."""
        found = floating(outputs)
        self.targets.append([found[place].to("cpu", self.work.source.dtype) for place in self.places])

    def tune(self, names: Sequence[str], rounding: Rounding, rescaled: Rescaled, input_parts: InputParts) -> None:
        """Tune the modules that tokens have reached, and add the results to those of the rounding.

        Args:
            names: all modules that are rounded next; those that are not tuned have their rescaled weights meanwhile.
            rounding: the weights and statistics of these modules.
            rescaled: the changed parameters of the step.
            input_parts: returns the scales of a module's static inputs.
        """
        scales = GlobalScales(names, rounding)
        starts = Starts(rounding=rounding, scales=scales.of, options=self.options)
        reached = [name for name in self.names if name in rounding.statistics]
        for name in reached:
            parts = input_parts(name, rounding.statistics[name], self.work.scale_dtype(name))
            set_input_parts(self.work.model.get_submodule(name), parts)
            if name in self.alone:
                reason = f"tuned alone: {self.alone[name]}" if self.alone[name] else ""
                rounding.tuned[name] = TunedModule(result=starts.alone(name), reason=reason)
        together = [name for name in reached if name not in self.alone]
        waiting = [f"{name}.weight" for name in names if name not in together]
        with assigned(self.work, rescaled, [name for name in rescaled.changed() if name in waiting]):
            if together:
                begin = time.perf_counter()
                results = self._tuned_together(together, starts, names)
                seconds = (time.perf_counter() - begin) / len(results)
                for name, result in results.items():
                    reason = "kept as it started: no gradient reached it" if name in self.idle else ""
                    rounding.tuned[name] = TunedModule(result=result, reason=reason, seconds=seconds)
        self.targets.clear()

    def _schemes(self, together: Sequence[str], names: Sequence[str]) -> dict[str, QuantizationScheme]:
        """The schemes of the modules whose inputs are rounded: those that are tuned, or were quantized before."""
        called = self.work.step.called(self.work.jobs)
        return {name: job.scheme for name, job in called.items() if name in together or name not in names}

    def _tuned_together(
        self, names: Sequence[str], starts: Starts, rounded: Sequence[str]
    ) -> dict[str, QuantizedWeight]:
        """Tune modules by the error of the block; `rounded` are all modules that are rounded next."""
        weights = {name: starts.weight(name) for name in names}
        with (
            opened(self.work, names, lambda name: weights[name].quantized_OI) as block,
            input_quantization(self.work.model, self._schemes(names, rounded)),
        ):
            errors = self._best_start(block, weights, starts)
            best = self._descend(block, weights, errors)
            self._choose(block, weights, best, sum(errors))
        return {name: weights.pop(name).result() for name in names}

    def _best_start(self, block: TunedBlock, weights: Mapping[str, TunedWeight], starts: Starts) -> list[float]:
        """Begin with the solutions of which the block has the smallest error; return the errors of its batches."""
        errors, places = self._errors(block), {name: weight.state() for name, weight in weights.items()}
        for solutions in () if self.options.disable_opt_rtn else starts.solved(list(weights)):
            for name, solution in solutions.items():
                weights[name].start_(starts.rounding.weight_of(name), solution)
            found = self._errors(block)
            if sum(found) < sum(errors):
                errors, places = found, {name: weight.state() for name, weight in weights.items()}
        for name, weight in weights.items():
            weight.return_(places[name])
        return errors

    def _errors(self, block: TunedBlock, *, mixed: bool = False) -> list[float]:
        """The squared error of each batch."""
        with torch.no_grad():
            return [float(self._batch_error(block, batch, mixed=mixed)) for batch in range(block.num_batches)]

    def _batch_error(self, block: TunedBlock, batch: int, *, mixed: bool) -> torch.Tensor:
        outputs = block.outputs(batch, mixed=mixed)
        return squared_error([outputs[place] for place in self.places], self.targets[batch], self.work.masks[batch])

    def _descend(
        self, block: TunedBlock, weights: Mapping[str, TunedWeight], errors: Sequence[float]
    ) -> dict[str, TuningState]:
        """Take all steps; return the state with the smallest error, relative to the start on the same batches."""
        options, step = self.options, self.work.step
        errors = self._errors(block, mixed=True) if self.mixed else errors
        generator = torch.Generator().manual_seed((options.seed * 2**20 + step.index) % 2**63)
        count = min(-(-options.batch_size // max(self.targets[0][0].shape[0], 1)), block.num_batches)
        order: list[int] = []
        self.idle = dict.fromkeys(weights)
        least = 1.0
        best: dict[str, TuningState] = {}
        for turn in range(options.iters):
            rate = options.rate * (1 - turn / options.iters)
            while len(order) < count:
                order += torch.randperm(block.num_batches, generator=generator).tolist()
            chosen = [order.pop(0) for _ in range(count)]
            error = sum(self._add_gradients(block, batch) for batch in chosen)
            before = sum(errors[batch] for batch in chosen)
            if error < least * before:
                least, best = error / before, {name: weight.state() for name, weight in weights.items()}
            for name, weight in weights.items():
                gradient_OI, block.weights[name].grad = block.weights[name].grad, None
                if gradient_OI is not None:
                    self.idle.pop(name, None)
                    weight.step_(gradient_OI, rate, rate)
            self.work.watcher.tell("tuned", index=step.index, done=turn + 1, count=options.iters)
        return best

    def _add_gradients(self, block: TunedBlock, batch: int) -> float:
        with torch.enable_grad():
            error = self._batch_error(block, batch, mixed=self.mixed)
            if error.requires_grad:
                torch.autograd.backward(error)
        return float(error.detach())

    def _choose(
        self, block: TunedBlock, weights: Mapping[str, TunedWeight], best: Mapping[str, TuningState], least: float
    ) -> None:
        """Keep the last state, or the best one of the steps, or the start, whichever has the smallest error."""
        last = sum(self._errors(block))
        if best:
            places = {name: weight.state() for name, weight in weights.items()}
            for name, weight in weights.items():
                weight.return_(best[name])
            found = sum(self._errors(block))
            if last < found:
                for name, weight in weights.items():
                    weight.return_(places[name])
            last = min(last, found)
        if not last < least:
            for weight in weights.values():
                weight.restart_()


def require_tunable(
    recipe: Recipe, jobs: Mapping[str, Assignment], num_workers: int, *, is_measured_before: bool
) -> None:
    """Check before a run that its modules can be tuned.

    Raises:
        RecipeError: several workers share the run, modifiers have different options, or no batches run.
    """
    found = list(dict.fromkeys(job.tuning for job in jobs.values() if job.tuning is not None))
    if len(found) > 1:
        raise RecipeError(
            f"{recipe.source}: AutoRoundModifiers have different options, and a block is tuned as a whole",
            hint="give all the same iters, batch_size, lr, disable_opt_rtn and seed, or one modifier config_groups",
        )
    if found and is_measured_before:
        raise RecipeError(
            f"{recipe.source}: AutoRoundModifier runs batches through each block, and saved statistics have none",
            hint="calibrate with data instead",
        )
    if found and num_workers > 1:
        raise RecipeError(
            f"{recipe.source}: AutoRoundModifier runs on one worker; this run has {num_workers}",
            hint="start one process, without torchrun",
        )


def step_tuning(work: Work, jobs: Mapping[str, Assignment], experts: Mapping[str, tuple[str, int]]) -> StepTuning:
    """Return the tuning of the modules of a step that a recipe tunes."""
    names = [name for name in work.step.modules if jobs[name].algorithm == AUTO_ROUND]
    options = next((job.tuning for job in map(jobs.get, names) if job is not None and job.tuning is not None), None)
    return StepTuning(work=work, names=names, options=options or AutoRoundOptions(), experts=experts)


@contextlib.contextmanager
def _tokens_of(work: Work, names: Sequence[str]) -> Iterator[Counter[str]]:
    """Count the tokens that reach modules while the block runs."""
    counts: Counter[str] = Counter()

    def hook(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = args[0] if args else next(iter(kwargs.values()))
            counts[name] += inputs.numel() // inputs.shape[-1]

        return note

    handles = [work.model.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True) for name in names]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()
