"""Read calibration and evaluation data: token ids, cut into samples.

**Data.** Text with a tokenizer (`runtime.data.sources` lists what is read), or a token file
(`runtime.data.token_file`: `.safetensors`), which needs no tokenizer and loads none, so that the calibration host can
do without the tokenizer and its libraries.

**From documents to samples.** Packed, the ids of all documents are joined in order and cut into windows of `seq_len`
that do not overlap; the rest at the end is dropped. Not packed, each document is one sample, cut at `seq_len`. If there
are more samples than `num_samples`, those with index `i * total // num_samples` are taken: the same ones every time,
spread over the whole text. With `shuffle`, documents are in a random order that the seed determines, and the first
samples are taken. Of sources with weights, each contributes its share of the samples.

**Pairs.** A record of source and target is one sample and its labels, for encoder-decoder models, each cut at
`seq_len`; pairs are never joined, even if packing is on. The target is tokenized as a target if the tokenizer
distinguishes them (another vocabulary, the code of another language).

**Special tokens.** A document gets those that its tokenizer adds by default, a conversation only those of its chat
template, a window none of its own. So a text in one `.txt` starts with one BOS, and its later windows start in the
middle of the text. Perplexity is measured like this since GPTQ (WikiText-2 joined to one string, tokenized once, cut
into windows), so figures can be compared. A model that needs a BOS in each sample (gemma) is better measured on
documents that are not packed.

**Which tokens count.** All do, unless there is a loss mask: that of a token file or, with `loss_mask`, the text of the
assistant in conversations (`runtime.data.chats`), whereas all of a plain text counts. A mask affects statistics, never
perplexity.

Shapes: B samples of a batch, S tokens of a sample, T tokens of the joined documents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.arguments import as_path, require_count, require_counts, shown
from runtime.data.decoder import LABELS
from runtime.data.documents import require_file
from runtime.data.named_samples import have_media
from runtime.data.named_tensors import NamedSamples, chosen, chosen_of_file
from runtime.data.options import DataOptions, data_sources
from runtime.data.origin import DataOrigin
from runtime.data.reading import parts_of
from runtime.data.sources import DataSource
from runtime.data.token_file import (
    LOSS_MASK,
    SUFFIX,
    TokenData,
    read_token_file,
    require_place,
    save_tokens,
)
from runtime.data.tokenization import DataSummary, prepare_data, read_groups
from runtime.data.tokenizer import NO_TOKENIZER
from runtime.errors import DataError, UsageError
from runtime.status import doing

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "DataOrigin",
    "TokenData",
    "batches",
    "load_data",
    "load_tokens",
    "require_place",
    "save_tokens",
]


def load_tokens(
    path: str | Path | DataSource,
    *,
    tokenizer_dir: Path | None = None,
    num_samples: int | None = None,
    seq_len: int | None = None,
    pack: bool = True,
    loss_mask: bool = False,
    vocab_size: int | None = None,
    columns: Sequence[str] = (),
    split: str | None = None,
    config: str | None = None,
    revision: str | None = None,
    shuffle: bool = False,
    seed: int = 0,
) -> TokenData:
    """Read samples from texts or a token file.

    Samples of a token file are cut already: `pack` is ignored, and `seq_len` can only shorten them, each at its end.

    Args:
        path: a token file, or a file, directory or data set, as `runtime.data.sources` describes.
        tokenizer_dir: a directory with the tokenizer's files; required for text, ignored for a token file.
        num_samples: the number of samples; None for all.
        seq_len: the number of tokens of a window, or the maximum of a sample; None to cut nothing.
        pack: join the documents and cut windows, instead of one sample for each document.
        loss_mask: in conversations, count only the text of the assistant; a token file must have a mask. By default,
            the mask of a token file is used if it has one.
        vocab_size: reject ids outside of a model's vocabulary of this size.
        columns: the fields of records to read: `NAME`, or `FIELD=NAME`.
        split: the split of data sets, such as `train[:512]`.
        config: the configuration of data sets.
        revision: the branch, tag or commit of data sets.
        shuffle: take documents in a random order.
        seed: of that order.

    Raises:
        DataError: the data cannot be read, are invalid, or have too few samples.
        UsageError: an option is invalid, or text is packed without `seq_len`.
    """
    source = path if isinstance(path, DataSource) or (isinstance(path, str) and path) else as_path("the data", path)
    options = DataOptions(
        sources=(source,),
        num_samples=num_samples,
        seq_len=seq_len,
        pack=pack,
        loss_mask=loss_mask,
        columns=tuple(columns),
        split=split,
        config=config,
        revision=revision,
        shuffle=shuffle,
        seed=seed if shuffle else None,
    )
    tokenizer_dir = None if tokenizer_dir is None else as_path("tokenizer_dir", tokenizer_dir)
    found, _ = load_data(options, tokenizer_dir, vocab_size=vocab_size)
    if isinstance(found, NamedSamples):
        raise DataError(f"{found.origin.sources[0][0]} has images, sounds or videos besides tokens", hint="use text")
    return found


def load_data(
    options: DataOptions, tokenizer_dir: Path | None, *, vocab_size: int | None = None
) -> tuple[TokenData | NamedSamples, DataSummary | None]:
    """Read samples, and summarize how they were made from text; the summary of a token file is None.

    Raises:
        DataError: as for `load_tokens`.
        UsageError: as for `load_tokens`.
    """
    require_counts(num_samples=options.num_samples, seq_len=options.seq_len)
    sources = data_sources(options)
    path = Path(sources[0].location)
    summary = None
    if is_token_file(sources):
        read = read_token_file(path)
        if isinstance(read, NamedSamples):
            some = chosen(read, options, str(path))
            _require_vocabulary(path, some.texts, vocab_size)
            return some, None
        data = _shortened(read, options)
        if options.loss_mask and data.masks is None:
            raise DataError(f"{path} has no loss mask", hint="make it again with `seqbuild data --loss-mask`")
    elif tokenizer_dir is None:
        if path.suffix and len(sources) == 1:
            require_file(path)
        raise DataError(f"{path} is text, which requires a tokenizer", hint=NO_TOKENIZER)
    else:
        doing("tokenizing")
        found = prepare_data(options, tokenizer_dir)
        summary, tokens = found.summary, found.tokens
        if isinstance(tokens, NamedSamples):
            _require_vocabulary(path, tokens.texts, vocab_size)
            return replace(tokens, path=path), summary
        digests = [digest for _, digest in tokens.origin.sources]
        joined = hashlib.sha256("\n".join(digests).encode()).hexdigest()
        data = TokenData(
            samples=tokens.samples,
            path=path,
            digest=digests[0] if len(digests) == 1 else joined,
            seq_len=found.seq_len,
            origin=tokens.origin,
            masks=tokens.masks,
            targets=tokens.targets,
        )
    _require_vocabulary(data.path, (*data.samples, *(data.targets or ())), vocab_size)
    return data, summary


def holds_media(options: DataOptions) -> bool:
    """Whether the samples of the data have tensors besides tokens. Nothing is tokenized.

    Raises:
        DataError: the data cannot be read, or are invalid.
        UsageError: an option is invalid.
    """
    sources = data_sources(options)
    if is_token_file(sources):
        return isinstance(read_token_file(Path(sources[0].location)), NamedSamples)
    return have_media(read_groups(sources, [parts_of(source) for source in sources], options))


def _require_vocabulary(path: Path, samples: Sequence[Tensor], vocab_size: int | None) -> None:
    if vocab_size is None:
        return
    largest = max((int(sample.max()) for sample in samples), default=-1)
    if largest >= vocab_size:
        raise DataError(
            f"{path} has the token id {largest}, but the model's vocabulary has {vocab_size} entries",
            hint="use the model's own tokenizer",
        )


def is_token_file(sources: Sequence[DataSource]) -> bool:
    """Whether the data is a token file.

    Raises:
        UsageError: it is one besides other data.
    """
    files = [source.location for source in sources if Path(source.location).suffix == SUFFIX]
    if files and len(sources) > 1:
        raise UsageError(f"the token file {files[0]} cannot be mixed with other data", hint="pass it alone")
    return bool(files)


def batches(
    samples: Sequence[Tensor],
    batch_size: int,
    masks: Sequence[Tensor] | None = None,
    targets: Sequence[Tensor] | None = None,
) -> list[dict[str, Tensor]]:
    """Stack samples of equal length, because padding would affect the statistics.

    The longest samples come first, so that a batch too large for the memory fails at once. Samples of equal length
    stay in order; the last batch of each length may be smaller.

    Args:
        samples: tensors [S] int64.
        batch_size: the maximum number of samples of a batch.
        masks: which tokens of each sample count in statistics, bool [S].
        targets: the text to generate for each sample, [T] int64; those of a batch have the same length too.

    Returns:
        `{"input_ids": [B, S], "attention_mask": [B, S]}` for each batch, int64, the mask all ones; with masks also
        `"loss_mask": [B, S]`, with targets `"labels": [B, T]`, both int64.

    Raises:
        UsageError: `batch_size` is not positive.
        DataError: a sample is not a tensor of tokens, or masks or targets do not fit the samples.
    """
    import torch

    require_count("batch_size", batch_size)
    _require_samples("sample", samples)
    if masks is not None:
        _require_samples("mask", masks)
        if [mask.shape for mask in masks] != [sample.shape for sample in samples]:
            raise DataError("masks do not have the shapes of the samples", hint="pass one mask for each sample")
    if targets is not None:
        _require_samples("target", targets)
        if len(targets) != len(samples):
            raise DataError(f"{len(targets)} targets for {len(samples)} samples", hint="pass one for each sample")
    by_length: dict[tuple[int, int], list[int]] = {}
    for index, sample in enumerate(samples):
        by_length.setdefault((len(sample), 0 if targets is None else len(targets[index])), []).append(index)
    result = []
    for length in sorted(by_length, reverse=True):
        equals = by_length[length]
        for start in range(0, len(equals), batch_size):
            some = equals[start : start + batch_size]
            ids_BS = torch.stack([samples[index] for index in some])
            batch = {"input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS)}
            if masks is not None:
                batch[LOSS_MASK] = torch.stack([masks[index] for index in some]).to(torch.int64)
            if targets is not None:
                batch[LABELS] = torch.stack([targets[index] for index in some])
            result.append(batch)
    return result


def _require_samples(name: str, samples: Any) -> None:
    """Require a sequence of tensors of tokens."""
    import torch

    if not isinstance(samples, (list, tuple)):
        raise DataError(f"{name}s is {shown(samples)}", hint=f"pass a list of tensors [sequence], one for each {name}")
    for index, sample in enumerate(samples):
        is_tensor = isinstance(sample, torch.Tensor)
        if not is_tensor or sample.dim() != 1 or sample.is_floating_point() or not len(sample):
            what = f"{sample.dtype} {list(sample.shape)}" if is_tensor else shown(sample)
            raise DataError(f"{name} {index} is {what}", hint="it must be a tensor [sequence] of integers")


def _shortened(data: TokenData, options: DataOptions) -> TokenData:
    indices, seq_len = chosen_of_file(len(data.samples), data.seq_len, options, str(data.path))

    def shorten(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(tensors[index][:seq_len] for index in indices)

    return replace(
        data,
        samples=shorten(data.samples),
        masks=None if data.masks is None else shorten(data.masks),
        targets=None if data.targets is None else shorten(data.targets),
        seq_len=seq_len,
    )
