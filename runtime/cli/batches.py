"""Make the model's inputs from the data options of a command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from runtime.chain import Artifact

DEFAULT_SAMPLES, DEFAULT_SEQ_LEN = 128, 2048


@dataclass(frozen=True, kw_only=True, slots=True)
class DataOptions:
    """The options that control how model inputs are made from a data file.

    Attributes:
        tokenizer: the tokenizer's directory; None for the tokenizer of the weights, or of the artifact.
        weights: the model directory.
        samples: number of samples; None for all, but at most `default_samples`, taken at even distances.
        default_samples: the maximum if `samples` is None; None for no maximum.
        seq_len: tokens per sample; None for the default.
        batch_size: samples per batch.
        pack: join texts into full samples.
        loss_mask: measure only the assistant's messages.
        has_masks: pass the masks of the data on; a perplexity does not use them.
    """

    tokenizer: Path | None
    weights: Path
    samples: int | None
    seq_len: int | None
    batch_size: int
    pack: bool
    default_samples: int | None = None
    loss_mask: bool = False
    has_masks: bool = False


def make_batches(artifact: Artifact, data: Path, options: DataOptions) -> list[dict[str, torch.Tensor]]:
    """Read a data file and make the model's inputs from it.

    Raises:
        DataError: for data that cannot be read, or that the artifact does not support.
    """
    from runtime.data.inputs import model_inputs, require_decoder, require_in_range, require_length
    from runtime.data.named_batches import chosen, named_batches
    from runtime.data.named_tensors import NamedSamples
    from runtime.data.samples import batches, load_data
    from runtime.model.config import text_limits

    vocab_size, longest = text_limits(artifact)
    seq_len = options.seq_len
    if seq_len is None and data.suffix != ".safetensors":
        seq_len = min(DEFAULT_SEQ_LEN, longest or DEFAULT_SEQ_LEN)
    tokens = load_data(
        data,
        tokenizer_dir=options.tokenizer or _tokenizer_directory(options.weights, artifact),
        num_samples=options.samples,
        seq_len=seq_len,
        pack=options.pack,
        loss_mask=options.loss_mask,
        vocab_size=vocab_size,
    )
    limit = options.default_samples
    if isinstance(tokens, NamedSamples):
        if options.samples is None and limit is not None and len(tokens.samples) > limit:
            tokens = chosen(tokens, limit, None, str(data))
        return named_batches(artifact.manifest, tokens, options.batch_size)
    indices: Sequence[int] = range(len(tokens.samples))
    if options.samples is None and limit is not None and len(indices) > limit:
        indices = [index * len(indices) // limit for index in range(limit)]
    samples = [tokens.samples[index] for index in indices]
    known = tokens.masks if options.has_masks else None
    masks = None if known is None else [known[index] for index in indices]
    targets = None if tokens.targets is None else [tokens.targets[index] for index in indices]
    require_length((*samples, *(targets or ())), longest)
    require_decoder(artifact.manifest, targets)
    made = [model_inputs(artifact.manifest, batch) for batch in batches(samples, options.batch_size, masks, targets)]
    require_in_range(artifact.manifest, made)
    return made


def _tokenizer_directory(weights: Path, artifact: Artifact) -> Path:
    """Return the directory of the weights if it has a tokenizer, otherwise the artifact's."""
    names = ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
    return weights if any((weights / name).is_file() for name in names) else artifact.companions_path
