"""Quantize a model in one call.

check       the output, the names of scheme and algorithm, and the weights
compile     the model, or find the existing artifact
data        the calibration data, and text that the calibration does not read
calibrate   after the recipe, memory and disk were checked
evaluate    the model and the result

Everything that can be wrong is checked before anything that takes long.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.cli.batches import DescribedBatches
from runtime.console import human_bytes, tell_when_stopped, warn
from runtime.errors import SeqbuildError
from runtime.provenance.serving import serving_lines
from runtime.workers.start import require_one_process
from seqbuild.onecall.options import QuantizeOptions
from seqbuild.onecall.recipes import choose_recipe, require_recipe_name
from seqbuild.onecall.result import Quantized
from seqbuild.onecall.show import Show
from seqbuild.onecall.steps import (
    calibration_batches,
    compile_model_for,
    find_weights,
    held_out_batches,
    lines_about,
    measure,
    media_batches,
    media_samples,
    planned_run,
    require_data,
    require_place,
    require_run,
    run_calibration,
)

if TYPE_CHECKING:
    from runtime.chain import Artifact
    from runtime.data.named_tensors import NamedSamples
    from runtime.evaluation import Evaluation
    from runtime.planning.request import Planned
    from runtime.provenance.origin import DataDescription
    from runtime.quantize.readiness import Readiness
    from runtime.recipe.recipe import Recipe
    from seqbuild.onecall.steps import Batches


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedCall:
    """A call that is ready to run: everything that its calibration and evaluation read.

    Attributes:
        artifact: the compiled model.
        weights: the model's directory.
        recipe: what to quantize, and how.
        readiness: what the recipe does with this model.
        batches: model inputs for the calibration; empty for a recipe that needs no data.
        held_out: model inputs for the evaluation, or the reason why there is none.
    """

    artifact: Artifact
    weights: Path
    recipe: Recipe
    readiness: Readiness
    batches: DescribedBatches
    held_out: DescribedBatches | str


@dataclass(frozen=True, slots=True)
class _Clock:
    """Seconds by step."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def quantize_model(options: QuantizeOptions, show: Show = Show()) -> Quantized:  # noqa: B008
    """Quantize a model and write the checkpoint.

    Args:
        options: what to quantize, and how.
        show: where progress is shown.

    Raises:
        SeqbuildError: one of its classes, for anything the user can fix; nothing partial is left under the output's
            name.
    """
    clock = _Clock()
    call = _checked(options, show, clock)
    with clock.step("calibrate"):
        done = run_calibration(call.artifact, call.weights, call.recipe, call.batches, options, show)
    tell_when_stopped(f"output directory {options.out} is complete")
    with clock.step("evaluate"):
        before, after, why_not = _evaluated(call, options, show)
    from runtime.host.devices import resolve_device
    from runtime.host.limits import peak_host_bytes
    from runtime.host.memory import peak_device_bytes

    return Quantized(
        calibration=done,
        artifact=call.artifact.path,
        recipe=call.recipe.source,
        original_bytes=call.readiness.weights_bytes,
        before=before,
        after=after,
        not_measured=why_not,
        seconds=clock.seconds,
        peak_host_bytes=peak_host_bytes(),
        peak_device_bytes=peak_device_bytes(resolve_device(options.device)),
        serving=serving_lines(call.artifact.manifest, done.path, done.remarks),
    )


def plan_quantization(options: QuantizeOptions, show: Show = Show()) -> Planned:  # noqa: B008
    """Check a call and predict its memory and disk space. The model is compiled, and nothing else is written.

    Raises:
        SeqbuildError: as `quantize_model`.
    """
    call = _checked(options, show, _Clock())
    return planned_run(call.artifact, call.recipe, call.batches.batches, options)


def _checked(options: QuantizeOptions, show: Show, clock: _Clock) -> CheckedCall:
    with clock.step("compile"):
        require_one_process("seqbuild quantize")
        require_place(options)
        require_data(options)
        require_recipe_name(options)
        weights = find_weights(options)
        media = media_samples(weights, options, show) if options.statistics is None else None
        artifact = _artifact(options, show, media)
        recipe = choose_recipe(options, artifact.manifest)
        readiness = require_run(artifact, weights, recipe, options)
    show.line(f"recipe: {recipe.source}, {readiness.num_modules} modules, {human_bytes(readiness.weights_bytes)}")
    with clock.step("data"):
        batches = DescribedBatches()
        if options.statistics is not None:
            show.line(f"data: none, statistics of {options.statistics}")
        elif media is not None and (readiness.needs_data or options.keep_statistics):
            batches = media_batches(artifact, media, options)
        elif readiness.needs_data or options.keep_statistics:
            batches = calibration_batches(artifact, weights, options, show)
        else:
            show.line("data: the recipe needs none")
        is_wanted = options.evaluate
        held_out = held_out_batches(artifact, weights, options) if is_wanted else "evaluation is off"
    if isinstance(held_out, str):
        show.line(f"evaluation: none, {held_out}")
    else:
        show.line(f"evaluation: {_amount(held_out.batches)}")
    return CheckedCall(
        artifact=artifact, weights=weights, recipe=recipe, readiness=readiness, batches=batches, held_out=held_out
    )


def _artifact(options: QuantizeOptions, show: Show, media: NamedSamples | None) -> Artifact:
    from runtime.chain import load

    compiled = compile_model_for(options, media)
    for line in lines_about(compiled):
        show.line(line)
    skew, trust = options.allow_version_skew, options.trust_remote_code
    return load(compiled.path, allow_version_skew=skew, trust_remote_code=trust)


def _amount(batches: Batches) -> str:
    """Describe the number of samples and tokens."""
    read = [batch.get("input_ids", batch.get("decoder_input_ids")) for batch in batches]
    sizes = [ids.shape for ids in read if ids is not None]
    tokens = sum(size.numel() for size in sizes)
    return f"{sum(size[0] for size in sizes)} samples, {tokens:,} tokens"


def _evaluated(
    call: CheckedCall, options: QuantizeOptions, show: Show
) -> tuple[Evaluation | None, Evaluation | None, str]:
    """Measure the perplexity of the model and of the result, or return why it cannot be measured."""
    if isinstance(call.held_out, str):
        return None, None, call.held_out
    try:
        found = []
        for which, what, weights in (("before", "the model", call.weights), ("after", "the result", options.out)):
            show.line(f"evaluating {what}")
            result = measure(call.artifact, weights, call.held_out.batches, options)
            found.append(result)
            facts = {"perplexity": result.perplexity, "tokens": result.num_tokens, "bytes": result.num_bytes}
            show.tell("evaluation", which=which, **facts, seconds=result.seconds)
        _record(options.out, found[0], found[1], call.held_out.description)
    except SeqbuildError as error:  # the checkpoint is complete
        return None, None, str(error)
    return found[0], found[1], ""


def _record(out: Path, before: Evaluation, after: Evaluation, description: DataDescription) -> None:
    """Add the perplexities to the record and the card of the result; a failure is a warning."""
    from runtime.provenance.record import EvaluationFacts
    from runtime.provenance.write import add_evaluation

    facts = EvaluationFacts(
        before=before.perplexity, after=after.perplexity, num_tokens=after.num_tokens, sources=description.sources
    )
    try:
        add_evaluation(out, facts)
    except (SeqbuildError, OSError) as error:
        warn(f"the perplexity is not recorded in {out}: {error}")
