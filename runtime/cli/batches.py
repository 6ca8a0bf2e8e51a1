"""Make the model's inputs from the data options of a command."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.cli.reproduction import settings_of
from runtime.console import warn
from runtime.data.options import DEFAULT_SEQ_LEN, DataOptions, names_of
from runtime.data.tokenizer import has_tokenizer
from runtime.provenance.origin import DataDescription
from runtime.provenance.record import NamedDigest

if TYPE_CHECKING:
    import torch

    from runtime.chain import Artifact
    from runtime.data.batches import Batches
    from runtime.data.named_tensors import NamedSamples
    from runtime.data.token_file import TokenData
    from runtime.data.tokenization import DataSummary

DEFAULT_SAMPLES, DEFAULT_BATCH_SIZE = 128, 8
_SHORT = 32  # tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchOptions:
    """The options that control how model inputs are made from data.

    Attributes:
        data: the sources, and how they become samples.
        tokenizer: the tokenizer's directory; None for the tokenizer of the weights, or of the artifact.
        weights: the model directory.
        batch_size: samples per batch.
        is_calibration: pass the masks of the data on, which a perplexity does not use, and warn of short samples.
    """

    data: DataOptions
    tokenizer: Path | None
    weights: Path
    batch_size: int = DEFAULT_BATCH_SIZE
    is_calibration: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class DescribedBatches:
    """The model's inputs, and where they come from."""

    batches: Batches = field(default_factory=list)
    description: DataDescription = field(default_factory=DataDescription)


def make_batches(
    artifact: Artifact,
    options: BatchOptions,
    tell: Callable[[str], None] | None = None,
    complain: Callable[[str], None] = warn,
) -> list[dict[str, torch.Tensor]]:
    """Read data and make the model's inputs from it, as `described_batches`."""
    return described_batches(artifact, options, tell, complain).batches


def described_batches(
    artifact: Artifact,
    options: BatchOptions,
    tell: Callable[[str], None] | None = None,
    complain: Callable[[str], None] = warn,
) -> DescribedBatches:
    """Read data and make the model's inputs from it.

    Args:
        artifact: the compiled model.
        options: what is read, and how.
        tell: takes lines that describe the samples.
        complain: takes warnings about the data.

    Raises:
        DataError: for data that cannot be read, or that the artifact does not support.
    """
    from runtime.data.inputs import model_inputs, require_decoder, require_in_range, require_length
    from runtime.data.named_batches import named_batches
    from runtime.data.named_tensors import NamedSamples
    from runtime.data.samples import batches, load_data
    from runtime.model.config import text_limits

    vocab_size, longest = text_limits(artifact)
    data = replace(options.data, default_length=min(DEFAULT_SEQ_LEN, longest or DEFAULT_SEQ_LEN))
    tokenizer = options.tokenizer or tokenizer_directory(options.weights, artifact)
    tokens, summary = load_data(data, tokenizer, vocab_size=vocab_size)
    describe(data_name(tokens, summary), tokens, summary, data.show, tokenizer, tell, complain)
    description = description_of(tokens, summary, options.data, options.batch_size)
    if isinstance(tokens, NamedSamples):
        require_length(tokens.texts, longest)
        named = named_batches(artifact.manifest, tokens, options.batch_size)
        return DescribedBatches(batches=named, description=description)
    require_length((*tokens.samples, *(tokens.targets or ())), longest)
    require_decoder(artifact.manifest, tokens.targets)
    if options.is_calibration:
        _complain_of_short(tokens, min(_SHORT, options.data.seq_len or _SHORT, longest or _SHORT), complain)
    masks = tokens.masks if options.is_calibration else None
    stacked = batches(tokens.samples, options.batch_size, masks, tokens.targets)
    made = [model_inputs(artifact.manifest, batch) for batch in stacked]
    require_in_range(artifact.manifest, made)
    return DescribedBatches(batches=made, description=description)


def description_of(
    tokens: TokenData | NamedSamples, summary: DataSummary | None, data: DataOptions, batch_size: int
) -> DataDescription:
    """Describe data; the `summary` of a token file, whose samples were made before, is None."""
    origin = tokens.origin
    settings: dict[str, Any] = {"seq_len": tokens.seq_len, "batch_size": batch_size}
    if summary is None:
        settings |= {"token file sha256": getattr(tokens, "digest", None)}
    else:
        settings |= {"pack": data.pack, "loss_mask": data.loss_mask, "shuffle": data.shuffle}
        settings |= {"seed": (data.seed or 0) if data.shuffle else None, "columns": data.columns, "format": data.format}
        settings |= {"split": data.split, "config": data.config, "revision": data.revision}
    settings |= {"tokenizer sha256": origin.tokenizer_digest or None}
    return DataDescription(
        sources=tuple(NamedDigest(name=name, sha256=digest) for name, digest in origin.sources),
        settings=settings_of(settings),
    )


def data_name(tokens: TokenData | NamedSamples, summary: DataSummary | None) -> str:
    """Name data in a message: its sources, or the token file."""
    return str(tokens.path) if summary is None else names_of([name for name, _ in summary.shares])


def describe(
    name: str,
    tokens: TokenData | NamedSamples,
    summary: DataSummary | None,
    show: int,
    tokenizer: Path,
    tell: Callable[[str], None] | None,
    complain: Callable[[str], None] = warn,
) -> None:
    """Print warnings, the previews that `--show` requires, and one line about all samples."""
    from runtime.data.named_tensors import NamedSamples, sizes_of
    from runtime.data.preview import preview_lines, summary_line
    from runtime.data.tokenizer import load_tokenizer

    for remark in () if summary is None else summary.remarks:
        complain(remark)
    if tell is None or (summary is None and not show):
        return
    texts = tokens.texts if isinstance(tokens, NamedSamples) else tokens.samples
    if show:
        loaded = None if summary is None else load_tokenizer(tokenizer)
        for line in preview_lines(texts, show, loaded):
            tell(line)
    tell(f"{name}: {summary_line(tokens, summary)}")
    for line in sizes_of(tokens.samples) if isinstance(tokens, NamedSamples) else ():
        tell(f"  {line}")


def _complain_of_short(tokens: TokenData, least: int, complain: Callable[[str], None]) -> None:
    mean = sum(map(len, tokens.samples)) / len(tokens.samples)
    if mean < least:
        complain(
            f"the samples have {mean:.0f} tokens on average, so the model sees hardly any context and the result may "
            "be poor; use longer texts, or join them with --pack"
        )


def tokenizer_directory(weights: Path, artifact: Artifact) -> Path:
    """Return the directory of the tokenizer: that of the weights, or the artifact's if only the artifact has one."""
    own = ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
    is_compiled = has_tokenizer(artifact.companions_path)
    return weights if any((weights / name).is_file() for name in own) or not is_compiled else artifact.companions_path
