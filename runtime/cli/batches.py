"""Make the model's inputs from the data options of a command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from runtime.chain import Artifact

DEFAULT_SEQ_LEN = 2048


@dataclass(frozen=True, kw_only=True, slots=True)
class DataOptions:
    """How the model's inputs are made from a data file.

    Attributes:
        tokenizer: its directory; None for that of the weights, or of the artifact.
        weights: the model directory.
        samples: how many samples to use; None for all, or `default_samples` spread over them.
        default_samples: the most samples without a stated number; None for all.
        seq_len: tokens of a sample; None for the default.
        batch_size: samples of a batch.
        pack: whether texts are joined into full samples.
        loss_mask: whether only what the assistant says counts.
        has_masks: whether a mask makes a difference; for a perplexity it makes none.
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
    """The model's inputs for a data file, refused where the artifact does not hold for them.

    Raises:
        DataError: for data that cannot be read, or that the artifact does not hold for.
    """
    from runtime.data.inputs import model_inputs, require_decoder, require_in_range, require_length
    from runtime.data.samples import batches, load_tokens
    from runtime.model.config import text_limits

    vocab_size, longest = text_limits(artifact)
    seq_len = options.seq_len
    if seq_len is None and data.suffix != ".safetensors":
        seq_len = min(DEFAULT_SEQ_LEN, longest or DEFAULT_SEQ_LEN)
    tokens = load_tokens(
        data,
        tokenizer_dir=options.tokenizer or _tokenizer_directory(options.weights, artifact),
        num_samples=options.samples,
        seq_len=seq_len,
        pack=options.pack,
        loss_mask=options.loss_mask,
        vocab_size=vocab_size,
    )
    places: Sequence[int] = range(len(tokens.samples))
    most = options.default_samples
    if options.samples is None and most is not None and len(places) > most:
        places = [index * len(places) // most for index in range(most)]
    chosen = [tokens.samples[place] for place in places]
    known = tokens.masks if options.has_masks else None
    masks = None if known is None else [known[place] for place in places]
    targets = None if tokens.targets is None else [tokens.targets[place] for place in places]
    require_length((*chosen, *(targets or ())), longest)
    require_decoder(artifact.manifest, targets)
    made = [model_inputs(artifact.manifest, batch) for batch in batches(chosen, options.batch_size, masks, targets)]
    require_in_range(artifact.manifest, made)
    return made


def _tokenizer_directory(weights: Path, artifact: Artifact) -> Path:
    """The weights' own tokenizer, else the one that travels with the artifact."""
    return weights if (weights / "tokenizer_config.json").is_file() else artifact.companions_path
