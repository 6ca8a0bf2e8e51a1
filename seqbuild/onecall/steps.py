"""The steps of one call. Each can be used alone; none prints."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.cli.batches import (
    DEFAULT_SAMPLES,
    BatchOptions,
    DescribedBatches,
    data_name,
    describe,
    described_batches,
    description_of,
)
from runtime.console import silent, warn
from runtime.data.named_tensors import NamedSamples, save_named
from runtime.data.options import DataOptions
from runtime.errors import ModelError, SeqbuildError, UsageError
from runtime.provenance.origin import RunOrigin
from runtime.status import doing
from seqbuild.build import compile_with
from seqbuild.model.source import Source, resolve_source
from seqbuild.onecall.options import BUILTIN, EVALUATED_SAMPLES, EVALUATED_TOKENS, QuantizeOptions, user_artifacts
from seqbuild.options import CompileOptions
from seqbuild.text import builtin_evaluation_text, builtin_text

if TYPE_CHECKING:
    import torch

    from runtime.chain import Artifact
    from runtime.evaluation import Evaluation
    from runtime.planning.request import Planned
    from runtime.quantize.readiness import Readiness
    from runtime.recipe.recipe import Recipe
    from runtime.streaming.report import Calibration
    from seqbuild.cache.recall import Compiled
    from seqbuild.onecall.show import Show

    Batches = Sequence[Mapping[str, torch.Tensor]]

_NO_DATA = (1, 16)  # sizes for the plan of a recipe that runs no batch
_MEDIA_CONFIGS = ("vision_config", "audio_config")


def require_place(options: QuantizeOptions) -> None:
    """Reject an output that exists, or that an interrupted run has begun, unless it is resumed, and a missing device.

    Raises:
        OutputError: naming the output and what to do.
        DeviceError, UsageError: for the names of device and dtype, and a cache that cannot be written.
    """
    from runtime.host.devices import resolve_device, resolve_dtype
    from runtime.streaming.output_place import require_startable

    require_startable(options.out, resume=options.resume)
    if options.artifacts is None:
        user_artifacts()
    resolve_device(options.device)
    resolve_dtype(options.dtype)


def require_data(options: QuantizeOptions) -> None:
    """Reject invalid data arguments, files that cannot be read, and evaluation on calibration data, before the model is
    compiled.

    Raises:
        DataError, UsageError: naming the argument.
    """
    from runtime.data.documents import require_file
    from runtime.data.options import data_sources
    from runtime.data.reading import parts_of
    from runtime.data.samples import is_token_file
    from runtime.data.sources import STANDARD_INPUT

    sources = data_sources(options.data)
    if options.evaluate:
        held_out = data_sources(_held_out_data(options))
        both = [source.location for source in held_out if source in sources and source.location != BUILTIN]
        if both:
            raise UsageError(f"{both[0]} is given for calibration and evaluation", hint="pass another --eval-data")
        sources += held_out
    for source in sources:
        if is_token_file([source]):
            require_file(Path(source.location))
        elif source.location not in (BUILTIN, STANDARD_INPUT):
            parts_of(source)


def _held_out_data(options: QuantizeOptions) -> DataOptions:
    return DataOptions(
        sources=options.eval_data,
        default_samples=EVALUATED_SAMPLES,
        seq_len=options.data.seq_len,
        pack=options.data.pack,
        columns=options.data.columns,
        format=options.data.format,
    )


def find_weights(options: QuantizeOptions) -> Path:
    """Return the model's directory, whose weights are complete.

    Raises:
        ModelError, WeightsError: there is no such model, or no weights.
        OutputError: the output is inside it.
    """
    from runtime.host.publish import require_outside

    _, directory = find_model(options.model, options.revision)
    require_outside(options.out, directory)
    return directory


def find_model(model: str, revision: str | None) -> tuple[Source, Path]:
    """Return the description of a model with complete weights, and the directory of these.

    Raises:
        ModelError, WeightsError: there is no such model, or no weights.
    """
    from runtime.checkpoint.dequantize import open_checkpoint
    from runtime.host.hub import resolve_directory

    source = resolve_source(model, revision=revision)
    if Path(model).is_file():
        raise ModelError(f"{model} is a config without weights", hint="pass the directory of the model")
    directory = resolve_directory(model, revision=revision, what="weights")
    open_checkpoint(directory, plain=True)
    return source, directory


def media_samples(weights: Path, options: QuantizeOptions, show: Show) -> NamedSamples | None:
    """Read calibration data with images, sounds or videos; None if it has none.

    Raises:
        DataError: it cannot be read, or does not fit the model's processor.
    """
    data = replace(options.data, default_samples=DEFAULT_SAMPLES)
    return samples_with_media(options.tokenizer or weights, data, show.line)


def samples_with_media(
    directory: Path, data: DataOptions, tell: Callable[[str], None] | None = None
) -> NamedSamples | None:
    """Read data as `media_samples` does, for the processor in a directory."""
    from runtime.data.options import DEFAULT_SEQ_LEN
    from runtime.data.processor_files import PROCESSOR_FILES
    from runtime.data.samples import holds_media, load_data

    if BUILTIN in data.sources or not any((directory / name).is_file() for name in PROCESSOR_FILES):
        return None
    limited = replace(data, default_length=DEFAULT_SEQ_LEN)
    if not holds_media(limited):
        return None
    found, summary = load_data(limited, directory)
    assert isinstance(found, NamedSamples)
    describe(data_name(found, summary), found, summary, data.show, directory, tell)
    return found


def media_batches(artifact: Artifact, media: NamedSamples, options: QuantizeOptions) -> DescribedBatches:
    """Make the model's inputs from data with images, sounds or videos.

    Raises:
        DataError: it does not fit the artifact.
    """
    from runtime.data.named_batches import named_batches

    batches = named_batches(artifact.manifest, media, options.batch_size)
    described = replace(options.data, default_samples=DEFAULT_SAMPLES)
    return DescribedBatches(batches=batches, description=description_of(media, None, described, options.batch_size))


def compile_model_for(options: QuantizeOptions, media: NamedSamples | None = None) -> Compiled:
    """Compile the model, or find the existing artifact. Without media in the data, a model of images or sounds and text
    is compiled for text.

    Raises:
        ModelError, TargetError, TraceError, OutputError: as `compile_with`.
    """
    source = resolve_source(options.model, revision=options.revision)
    compilation = CompileOptions(
        model=options.model,
        revision=options.revision,
        text_only=options.text_only or (media is None and has_media(source)),
        leaves=options.leaves,
        out=options.artifacts or user_artifacts(),
        trust_remote_code=options.trust_remote_code,
    )
    if media is None:
        return compile_with(compilation)
    with tempfile.TemporaryDirectory(prefix="seqbuild-") as folder:
        file = Path(folder) / "sample.safetensors"
        save_named(file, media)
        return compile_with(replace(compilation, sample=file))


def lines_about(compiled: Compiled) -> Iterator[str]:
    """Describe a compiled model: warnings, and where it is."""
    for remark in compiled.remarks:
        yield f"warning: {remark}"
    what = "found" if compiled.is_cached else "compiled"
    yield f"artifact: {compiled.path}, {what} in {compiled.seconds:.1f} s"


def has_media(source: Source) -> bool:
    """Whether a model has inputs for images or sounds."""
    return any(isinstance(source.config.get(name), Mapping) for name in _MEDIA_CONFIGS)


def require_run(artifact: Artifact, weights: Path, recipe: Recipe, options: QuantizeOptions) -> Readiness:
    """Check that the recipe fits the model, its weights and the disk.

    Raises:
        RecipeError, WeightsError, OutputError: if it does not.
    """
    from runtime.checkpoint.dequantize import open_checkpoint
    from runtime.checkpoint.writer import require_space
    from runtime.host.devices import resolve_dtype
    from runtime.quantize.readiness import require_fitting

    dtype = artifact.run_dtype(resolve_dtype(options.dtype))
    ready = require_fitting(artifact, open_checkpoint(weights, plain=True), recipe, dtype)
    require_space(options.out, ready.least_bytes)
    return ready


def calibration_batches(artifact: Artifact, weights: Path, options: QuantizeOptions, show: Show) -> DescribedBatches:
    """Read the calibration data.

    Raises:
        DataError: it cannot be read, or does not fit the model.
    """
    from runtime.data.options import data_sources
    from runtime.data.samples import is_token_file
    from runtime.data.tokenizer import has_tokenizer
    from runtime.host.hub import resolve_directory

    if options.tokenizer is None and not has_tokenizer(weights) and not is_token_file(data_sources(options.data)):
        # Of a hub id, an interrupted download may have left the weights alone.
        resolve_directory(options.model, revision=options.revision, what="tokenizer")
    data = BatchOptions(
        data=replace(options.data, default_samples=DEFAULT_SAMPLES),
        tokenizer=options.tokenizer,
        weights=weights,
        batch_size=options.batch_size,
        is_calibration=True,
    )
    return text_batches(artifact, data, builtin_text(), show.line)


def held_out_batches(artifact: Artifact, weights: Path, options: QuantizeOptions) -> DescribedBatches | str:
    """Read the text that the evaluation predicts, or return the reason why perplexity cannot be measured.

    Raises:
        DataError: the user's text cannot be read, or does not fit the model.
    """
    from runtime.evaluation import require_predicting
    from runtime.model.config import text_limits

    is_builtin = options.eval_data == (BUILTIN,)
    data = _held_out_data(options)
    if is_builtin:
        lengths = [options.data.seq_len, EVALUATED_TOKENS, text_limits(artifact)[1]]
        # Documents begin as the model expects them to, which decides the perplexity of some models (Gemma).
        data = DataOptions(
            sources=options.eval_data,
            default_samples=EVALUATED_SAMPLES,
            seq_len=min(length for length in lengths if length is not None),
            pack=False,
        )
    batches = BatchOptions(data=data, tokenizer=options.tokenizer, weights=weights, batch_size=options.batch_size)
    try:
        require_predicting(artifact.manifest)
    except ModelError as error:
        return str(error)
    try:
        found = text_batches(artifact, batches, builtin_evaluation_text())
        return replace(found, batches=_equally_long(found.batches)) if is_builtin else found
    except SeqbuildError as error:
        if not is_builtin:
            raise
        return str(error)


def text_batches(
    artifact: Artifact, options: BatchOptions, builtin: Path, tell: Callable[[str], None] | None = None
) -> DescribedBatches:
    """Make the model's inputs from data; `builtin` is the file of the source of that name.

    Raises:
        DataError: it cannot be read, or does not fit the model.
    """
    sources = tuple(builtin if source == BUILTIN else source for source in options.data.sources)
    # A user cannot change how conversations of the built-in text are adapted to the model's template.
    complain = silent if set(options.data.sources) == {BUILTIN} else warn
    return described_batches(artifact, replace(options, data=replace(options.data, sources=sources)), tell, complain)


def _equally_long(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the batches of the greatest length, which come first, if they have half of all tokens.

    On a CPU, the first batch of each length takes as long as many others: it measures which products are fast.
    """
    sizes = [batch["input_ids"].shape for batch in batches]
    longest = [size for size in sizes if size[1] == sizes[0][1]]
    num_tokens, num_longest = (sum(size.numel() for size in some) for some in (sizes, longest))
    return batches[: len(longest)] if 2 * num_longest >= num_tokens else batches


def run_calibration(
    artifact: Artifact, weights: Path, recipe: Recipe, data: DescribedBatches, options: QuantizeOptions, show: Show
) -> Calibration:
    """Quantize the model and write the checkpoint.

    Raises:
        SeqbuildError: as `runtime.calibration.calibrate`.
    """
    from runtime.calibration import calibrate
    from runtime.host.devices import resolve_device, resolve_dtype

    with ExitStack() as stack:
        return calibrate(
            artifact,
            weights=weights,
            recipe=recipe,
            batches=data.batches,
            out=options.out,
            device=resolve_device(options.device),
            dtype=resolve_dtype(options.dtype),
            origin=RunOrigin(data=data.description, command=options.command(weights)),
            hash_weights=options.hash_weights,
            keep_statistics=options.keep_statistics,
            statistics=options.statistics,
            **show.watching(stack),
            max_shard_bytes=options.max_shard_bytes,
            resume=options.resume,
            checkpoint_activations=options.checkpoint_activations,
            activation_memory=options.activation_memory,
            propagate_error=options.propagate_error,
            moe_calibrate_all_experts=options.moe_calibrate_all_experts,
            statistics_memory=options.statistics_memory,
            solve_products=options.solve_products,
            force=options.force,
        )


def measure(artifact: Artifact, weights: Path, batches: Batches, options: QuantizeOptions) -> Evaluation:
    """Measure the perplexity of a checkpoint.

    Raises:
        SeqbuildError: as `runtime.evaluation.evaluate`.
    """
    from runtime.evaluation import evaluate
    from runtime.host.devices import resolve_device, resolve_dtype

    return evaluate(
        artifact,
        weights=weights,
        batches=batches,
        device=resolve_device(options.device),
        dtype=resolve_dtype(options.dtype),
        progress=lambda line: doing(f"evaluating: {line}"),
    )


def planned_run(artifact: Artifact, recipe: Recipe, batches: Batches, options: QuantizeOptions) -> Planned:
    """Predict the memory and disk space of the calibration, on this host.

    Raises:
        SeqbuildError: as `runtime.planning.request.plan_artifact`.
    """
    from runtime.host.devices import resolve_device, resolve_dtype
    from runtime.planning.request import memory_here, num_rows, plan_artifact

    device = resolve_device(options.device)
    rows = [num_rows(batch) for batch in batches] or [_NO_DATA[0]]
    return plan_artifact(
        artifact,
        num_samples=sum(rows),
        seq_len=_NO_DATA[1],  # the sizes of the batches, if any, take precedence
        batch_size=max(rows),
        batches=batches,
        recipe=recipe,
        dtype=resolve_dtype(options.dtype),
        device_type=device.type,
        budget=options.activation_memory,
        statistics_bytes=options.statistics_memory,
        limits=memory_here(device),
        keep_statistics=options.keep_statistics is not None,
        statistics=options.statistics,
    )
