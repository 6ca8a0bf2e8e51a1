"""The steps of `oneshot`.

check       arguments, recipe, data set, tokenizer and output, before anything runs
model       the config of a model in memory, or the directory of another one
data        read rows in memory, because the inputs of a model depend on them
compile     the model, or find the existing artifact
calibrate   after the data that a path or an id names was read
load        the quantized model, if wanted
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.cli.batches import DescribedBatches
from runtime.cli.reproduction import settings_of
from runtime.console import quiet, silent
from runtime.data.checked_batches import as_batches
from runtime.data.decoder import LABELS
from runtime.data.inputs import IDS
from runtime.data.named_batches import named_batches
from runtime.data.named_tensors import NamedSamples, save_named
from runtime.data.options import DataOptions
from runtime.data.processor import load_processor
from runtime.data.token_file import LOSS_MASK
from runtime.errors import DataError, ModelError, UsageError
from runtime.host.publish import disk_errors, require_outside
from runtime.provenance.origin import DataDescription, RunOrigin
from runtime.provenance.serving import auto_class
from seqbuild.onecall.arguments import OneshotOptions
from seqbuild.onecall.loaded_model import loaded_model, require_model
from seqbuild.onecall.options import BUILTIN, QuantizeOptions, user_artifacts
from seqbuild.onecall.preparers import given_preparers, tokenizer_of
from seqbuild.onecall.python_recipe import python_recipe
from seqbuild.onecall.recipes import choose_recipe
from seqbuild.onecall.row_tensors import TEXT_INPUTS, Batch, RowReader, as_named
from seqbuild.onecall.rows import chosen_rows, is_loader, require_dataset

if TYPE_CHECKING:
    from runtime.chain import Artifact
    from runtime.checkpoint.reader import Checkpoint
    from runtime.recipe.recipe import Recipe
    from runtime.streaming.report import Calibration
    from seqbuild.model.source import Source


_USUAL_REVISION = "main"
_MEDIA_TOKEN = re.compile(r"(image|audio|video)_(token_id|token_index|pad_token_id)")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Opened:
    """A model of a call.

    Attributes:
        source: its description on disk.
        weights: its directory, or its tensors in memory.
        kind: its class; None if it is not known before it is compiled.
        attention: the attention implementation to compile with; None for the default.
        preparers: the tokenizer and the processor that the caller gave.
        preparers_directory: has their files; None if the caller gave none.
        origin: the directory that a model in memory was loaded from, if it is known.
    """

    source: Source
    weights: Path | Checkpoint
    kind: type | None
    attention: str | None
    preparers: Sequence[Any]
    preparers_directory: Path | None
    origin: Path | None = None


def run_oneshot(options: OneshotOptions) -> Any:
    """Quantize a model; return the result of the calibration, or the quantized model.

    Raises:
        SeqbuildError: one of its classes, for anything the user can fix.
    """
    from runtime.host.devices import resolve_device
    from runtime.streaming.output_place import require_startable

    resolve_device(str(options.device))
    recipe = python_recipe(options.recipe, options.ignore)
    in_memory = options.dataset is not None and not options.is_named
    dataset = require_dataset(options) if in_memory else None
    with contextlib.ExitStack() as stack:
        out = options.output_dir or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="seqbuild-"))) / "model"
        require_startable(out, resume=bool(options.run.get("resume", False)))
        opened = stack.enter_context(_opened(options))
        if isinstance(opened.weights, Path):
            require_outside(out, opened.weights)
        if options.log_dir is not None:
            with disk_errors(options.log_dir):
                options.log_dir.mkdir(parents=True, exist_ok=True)
        rows = _batches_in_memory(dataset, options, opened) if in_memory else _samples_with_media(options, opened)
        artifact = _compiled(options, opened, recipe, rows)
        if isinstance(recipe, str):
            stated = QuantizeOptions(model=opened.source.name, out=out, scheme=recipe, ignore=options.ignore)
            recipe = choose_recipe(stated, artifact.manifest)
        if isinstance(rows, NamedSamples):
            rows = named_batches(artifact.manifest, rows, options.batch_size)
        in_rows = DescribedBatches(batches=list(rows or ()), description=_description(options))
        data = _stated_batches(options, opened, artifact, recipe) if rows is None else in_rows
        result = _calibrated(options, opened, artifact, recipe, data, out)
        if isinstance(opened.weights, Path):
            for preparer in opened.preparers:
                preparer.save_pretrained(out)
        return _loaded(out, artifact, options) if options.load else result


def _description(options: OneshotOptions) -> DataDescription:
    """Describe a data set in memory, whose name is not known."""
    is_shuffled = options.shuffle_calibration_samples
    settings = {"batch_size": options.batch_size, "max_seq_length": options.max_seq_length, "shuffle": is_shuffled}
    return DataDescription(settings=settings_of(settings | {"seed": options.seed if is_shuffled else None}))


@contextlib.contextmanager
def _opened(options: OneshotOptions) -> Iterator[_Opened]:
    """Find the model, or describe that in memory in a temporary directory."""
    from seqbuild.onecall.steps import find_model

    preparers = given_preparers(options)
    if not isinstance(options.model, (str, os.PathLike)):
        with loaded_model(require_model(options.model), preparers) as loaded:
            yield _Opened(
                source=loaded.source,
                weights=loaded.checkpoint,
                kind=type(options.model),
                attention=loaded.attention,
                preparers=preparers,
                preparers_directory=loaded.source.directory,
                origin=loaded.origin,
            )
        return
    revision = None if options.model_revision == _USUAL_REVISION else options.model_revision
    source, weights = find_model(os.fspath(options.model), revision)
    with tempfile.TemporaryDirectory(prefix="seqbuild-") as directory:
        for preparer in preparers:
            preparer.save_pretrained(directory)
        if preparers:
            shutil.copyfile(source.config_file, Path(directory) / "config.json")  # a processor is loaded with it
        yield _Opened(
            source=source,
            weights=weights,
            kind=_class_of(source),
            attention=None,
            preparers=preparers,
            preparers_directory=Path(directory) if preparers else None,
        )


def _class_of(source: Source) -> type | None:
    import transformers

    names = source.config.get("architectures") or ()
    return getattr(transformers, str(names[0]), None) if names and "auto_map" not in source.config else None


def _batches_in_memory(dataset: Any, options: OneshotOptions, opened: _Opened) -> list[Batch] | NamedSamples:
    """Read a data set in memory; columns that are no inputs of the model are left out."""
    inputs = tuple(inspect.signature(opened.kind.forward).parameters) if opened.kind is not None else None  # type: ignore[attr-defined]
    if is_loader(dataset):
        batches = as_batches([_without_others(batch, inputs) for batch in dataset])
        if not batches:
            raise DataError("the DataLoader has no batches", hint="pass a data set with rows")
        return batches
    directory = opened.source.directory
    reader = RowReader(
        options=options,
        load_processor=lambda: load_processor(opened.preparers_directory or directory),
        load_tokenizer=functools.cache(lambda: tokenizer_of(opened.preparers, directory)),
        length=_text_length(options, opened.source),
        inputs=inputs,
    )
    return reader.batches(chosen_rows(dataset, options))


def _samples_with_media(options: OneshotOptions, opened: _Opened) -> NamedSamples | None:
    """Read the data that a path or an id names; None if it is text only."""
    from seqbuild.onecall.steps import samples_with_media

    directory = opened.preparers_directory or opened.source.directory
    return samples_with_media(directory, _data_options(options), options.progress) if options.is_named else None


def _without_others(batch: Any, inputs: Sequence[str] | None) -> Any:
    if not isinstance(batch, Mapping) or inputs is None:
        return batch
    return {name: value for name, value in batch.items() if name in inputs or name in TEXT_INPUTS} or batch


def _text_length(options: OneshotOptions, source: Source) -> int:
    """Return the maximum number of tokens of a text: that of the caller or the default, within the model's limit."""
    from runtime.data.options import DEFAULT_SEQ_LEN
    from runtime.model.config import parse_config

    try:
        longest = getattr(parse_config(source.directory).get_text_config(), "max_position_embeddings", None)
    except Exception:  # a config of the model's own class
        longest = source.config.get("max_position_embeddings")
    length = options.max_seq_length or DEFAULT_SEQ_LEN
    return min(length, longest) if isinstance(longest, int) and longest > 0 else length


def _compiled(
    options: OneshotOptions, opened: _Opened, recipe: Recipe | str, rows: Sequence[Batch] | NamedSamples | None
) -> Artifact:
    """Compile the model, or find the existing artifact, for the inputs that the batches have."""
    from runtime.chain import load
    from seqbuild.build import compile_with
    from seqbuild.onecall.steps import has_media, lines_about
    from seqbuild.options import CompileOptions

    with contextlib.ExitStack() as stack:
        sample = None
        if rows and (isinstance(rows, NamedSamples) or any(name not in TEXT_INPUTS for name in rows[0])):
            sample = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="seqbuild-"))) / "sample.safetensors"
            _save_sample(rows, sample, opened.source)
        own_targets = () if isinstance(recipe, str) else recipe.sequential_targets
        compiled = compile_with(
            CompileOptions(
                model=os.fspath(opened.source.directory),
                targets=tuple(options.sequential_targets or ()) or own_targets,
                targets_per_subgraph=options.sequential_targets_per_subgraph,
                sample=sample,
                text_only=sample is None and has_media(opened.source),
                attn_implementation=opened.attention,
                out=options.artifacts or user_artifacts(),
                trust_remote_code=options.trust_remote_code_model,
            ),
            opened.source,
        )
    if options.progress is not None:
        for line in lines_about(compiled):
            options.progress(line)
    return load(compiled.path, trust_remote_code=options.trust_remote_code_model)


def _save_sample(rows: Sequence[Batch] | NamedSamples, path: Path, source: Source) -> None:
    """Write a file that the model is compiled for: samples, from which the compiler makes a batch, or a whole batch."""
    from safetensors.torch import save_file

    if isinstance(rows, NamedSamples):
        save_named(path, rows)
    elif all(len(batch[IDS]) == 1 for batch in rows if IDS in batch):
        tokens = [value for name, value in source.config.items() if _MEDIA_TOKEN.fullmatch(name) and type(value) is int]
        save_named(path, as_named(rows, tuple(tokens)))
    else:
        beside = (LABELS, LOSS_MASK)
        save_file({name: value.contiguous() for name, value in rows[0].items() if name not in beside}, path)


def _stated_batches(options: OneshotOptions, opened: _Opened, artifact: Artifact, recipe: Recipe) -> DescribedBatches:
    """Read the data that a path or an id names; without one, the built-in text if the recipe needs data."""
    from runtime.checkpoint.dequantize import open_checkpoint
    from runtime.cli.batches import BatchOptions
    from runtime.host.devices import resolve_dtype
    from runtime.quantize.readiness import require_fitting
    from seqbuild.onecall.steps import text_batches
    from seqbuild.text import builtin_text

    if not options.is_named:
        dtype = artifact.run_dtype(resolve_dtype(options.precision))
        ready = require_fitting(artifact, open_checkpoint(opened.weights, plain=True), recipe, dtype)
        is_needed = ready.needs_data or options.run.get("keep_statistics") is not None
        if not is_needed or options.run.get("statistics") is not None:
            return DescribedBatches()
        if options.is_data_free:
            raise UsageError("pipeline is 'datafree', but the recipe needs data", hint="pass dataset=")
        warnings.warn("the recipe needs data, and no dataset was given: the built-in text is used", stacklevel=4)
    batches = BatchOptions(
        data=_data_options(options),
        tokenizer=opened.preparers_directory,
        weights=opened.source.directory,
        batch_size=options.batch_size,
        is_calibration=True,
    )
    return text_batches(artifact, batches, builtin_text(), options.progress)


def _data_options(options: OneshotOptions) -> DataOptions:
    is_builtin = options.dataset in (None, BUILTIN)
    is_shuffled = options.shuffle_calibration_samples and not is_builtin
    return DataOptions(
        sources=(os.fspath(options.dataset or BUILTIN),),
        default_samples=options.num_calibration_samples,
        seq_len=options.max_seq_length,
        pack=is_builtin or options.concatenate_data,
        loss_mask=options.use_loss_mask,
        shuffle=is_shuffled,
        seed=options.seed if is_shuffled else None,
        columns=() if options.text_column == "text" else (options.text_column,),
        split=options.splits,
        config=options.dataset_config_name,
    )


def _calibrated(
    options: OneshotOptions,
    opened: _Opened,
    artifact: Artifact,
    recipe: Recipe,
    data: DescribedBatches,
    out: Path,
) -> Calibration:
    from runtime.calibration import calibrate
    from runtime.host.devices import resolve_device, resolve_dtype
    from runtime.host.event_log import EventLog

    run = dict(options.run)
    with contextlib.ExitStack() as stack:
        watchers = list(run.pop("watchers", ()))
        if options.log_dir is not None:
            name = f"oneshot_{time.strftime('%Y-%m-%d_%H-%M-%S')}.jsonl"
            watchers.append(stack.enter_context(EventLog(options.log_dir / name)))
        return calibrate(
            artifact,
            weights=opened.weights,
            recipe=recipe,
            batches=data.batches,
            out=out,
            origin=RunOrigin(data=data.description, directory=opened.origin),
            device=resolve_device(str(options.device)),
            dtype=resolve_dtype(options.precision),
            progress=options.progress or silent,
            watchers=watchers,
            propagate_error=options.propagate_error,
            moe_calibrate_all_experts=options.moe_calibrate_all_experts,
            **run,
        )


def _loaded(path: Path, artifact: Artifact, options: OneshotOptions) -> Any:
    """Load the quantized model with transformers, by the class of the original one.

    Raises:
        ModelError: transformers cannot load it.
    """
    import transformers

    name = artifact.manifest.model.class_name
    kind = getattr(transformers, name, None)
    if artifact.manifest.model.code or kind is None:
        kind = getattr(transformers, auto_class(name))
    try:
        with quiet("transformers"):
            return kind.from_pretrained(
                path, dtype="auto", local_files_only=True, trust_remote_code=options.trust_remote_code_model
            )
    except Exception as error:  # transformers raises many kinds of exceptions
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        where = f"; the checkpoint in {path} is complete" if options.output_dir is not None else ""
        raise ModelError(f"transformers cannot load the quantized {name}: {why}{where}") from error
